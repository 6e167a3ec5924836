"""A graph's MODELs, CONDITIONINGs and VAE as the critic of a distillation (arXiv 2212.04473).

The predictions are made where core would run a sampler: inside one run of a guider, so that models are loaded together
and LoRAs, hooks, areas and everything else on the MODELs and CONDITIONINGs act as they do in sampling. Gradients are
wanted of the VAE's encoder only, which therefore gets a copy of its own: weights made in ComfyUI's inference mode can
take no part in autograd.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor, nn

from ....guidance.combination import Guidance
from ....guidance.diffusion import NoiseSchedule
from ....guidance.distillation.critic import Critic
from ....guidance.distillation.image_encoder import ImageEncoder
from ....guidance.errors import Problem
from ....guidance.schedules import Constant
from ....guidance.terms import Source, Term
from ..guiding.compatibility import display_name, noise_family
from ..guiding.gaps import without_gaps
from ..guiding.guider import MultiGuidanceGuider, TermInput
from ..models.domain_info import domain_info
from ..models.loading import LATENT_FORMATS

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

NODE = "Adapt Generator"
PROMPT, SOURCE, UNWANTED = "prompt", "source", "unwanted"
# Without the text's vector, core would fail in the middle of the first prediction.
_WANT_POOLED = (comfy.model_base.SDXL, comfy.model_base.SDXLRefiner)
Outcome = TypeVar("Outcome")


# ---- checks -----------------------------------------------------------------------------------------------------


def noise_schedule(model: ModelPatcher, node: str = NODE) -> NoiseSchedule:
    """The noise levels of a MODEL, patches such as Model Sampling Discrete included.

    Raises ValueError for models without discrete noise levels of the variance-preserving kind (flow, EDM).
    """
    sampling = model.get_model_object("model_sampling")
    sigmas = getattr(sampling, "sigmas", None)
    discrete = isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) and isinstance(sigmas, Tensor)
    if not discrete or noise_family(sampling) != "diffusion":
        raise Problem(
            f"{node}: expected an eps- or v-prediction model with discrete noise levels (Stable Diffusion 1.x, 2.x, "
            f"SDXL), found a {display_name(model)} of the {noise_family(sampling)} kind; use another model."
        )
    return NoiseSchedule(1.0 / (1.0 + sigmas.detach().cpu().double() ** 2))


def check_conditioning(model: ModelPatcher, conditioning: list, what: str, node: str = NODE) -> None:
    """Refuse a CONDITIONING that is empty or made by another family's CLIP. Raises ValueError naming both widths."""
    if not conditioning:
        raise Problem(f"{node}: expected {what} to hold a conditioning, found none; connect a CLIP Text Encode.")
    info = domain_info(model)
    if info is not None and info.form != "full":
        return
    width = model.model.model_config.unet_config.get("context_dim")
    for tensor, options in conditioning:
        if isinstance(width, int) and isinstance(tensor, Tensor) and tensor.shape[-1] != width:
            raise Problem(
                f"{node}: expected a {what} conditioning of width {width}, as the {display_name(model)} reads, found "
                f"width {tensor.shape[-1]}; encode the text with the CLIP that belongs to the model."
            )
        if isinstance(model.model, _WANT_POOLED) and options.get("pooled_output") is None:
            raise Problem(
                f"{node}: expected a {what} conditioning with a pooled vector, as the {display_name(model)} reads, "
                "found none; encode the text with the CLIP that belongs to the model."
            )


def check_vae(model: ModelPatcher, vae: Any, node: str = NODE) -> None:
    """Refuse a VAE whose latents the MODEL cannot read. Raises ValueError naming both."""
    latent_format = model.get_model_object("latent_format")
    stage = getattr(vae, "first_stage_model", None)
    channels, dimensions = getattr(vae, "latent_channels", 0), getattr(vae, "latent_dim", 2)
    if stage is None or channels != latent_format.latent_channels or dimensions != latent_format.latent_dimensions:
        found = "no VAE" if stage is None else f"{type(stage).__name__} with {channels} latent channels"
        raise Problem(
            f"{node}: expected the VAE of the {display_name(model)} with {latent_format.latent_channels} latent "
            f"channels ({type(latent_format).__name__}), found {found}; connect the VAE that belongs to the model."
        )


# ---- images to latents, with gradients --------------------------------------------------------------------------


def gradient_encoder(
    vae: Any,
    model: ModelPatcher,
    device: torch.device,
    side_px: int,
    cancelled: Callable[[BaseException], None] | None = None,
) -> ImageEncoder:
    """Images [B, 3 or 1, H, W], judged at `side_px` -> the MODEL's latents [B, C, h, w], float32, differentiable.

    The latent is the mean of the VAE's posterior, from a private copy of its encoder half: core's own `vae.encode`
    writes into another tensor, crops, and has a tiled fallback, and gradients get lost in all three. Half precision
    becomes float32, which small gradients (and SDXL's encoder) need; bf16 stays. Call it outside inference mode.
    cancelled: told of a cancel, which then does not interrupt it (`to_the_end`).
    """
    stage = vae.first_stage_model
    encoder = copy.copy(stage)
    encoder._modules = {name: part for name, part in stage._modules.items() if "decoder" not in name}
    encoder = _ordinary(copy.deepcopy(encoder))
    dtype = torch.bfloat16 if vae.vae_dtype == torch.bfloat16 else torch.float32
    encoder = encoder.to(device=device, dtype=dtype).eval().requires_grad_(False)
    process_in = model.model.process_latent_in

    def encode(images: Tensor) -> Tensor:
        images = images.to(device).float()
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        pixels = vae.process_input(images * 0.5 + 0.5)
        return process_in(encoder.encode(pixels.to(dtype)).float())

    return ImageEncoder(encode if cancelled is None else to_the_end(encode, cancelled), side_px)


def _ordinary(module: nn.Module) -> nn.Module:
    """The module with every tensor that was made in inference mode replaced by an ordinary one."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                part._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()
    return module


def native_side(model: ModelPatcher) -> int:
    """The side in pixels of the images a MODEL was made for."""
    from ....training.prior.families import native_resolution

    kind = type(model.get_model_object("latent_format"))
    latent_format = next((name for name, known in LATENT_FORMATS.items() if known is kind), "")
    is_v = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION)
    return native_resolution(latent_format, model.model.model_config.unet_config.get("context_dim"), is_v) or 512


def latent_shape(vae: Any, model: ModelPatcher, side_px: int, batch: int) -> tuple[int, int, int, int]:
    """[B, C, h, w] of square images. Raises ValueError for a side that the VAE's factor does not divide."""
    factor = vae.downscale_ratio if isinstance(vae.downscale_ratio, int) else 8
    if side_px % factor:
        raise Problem(
            f"{NODE}: expected a resolution that is a multiple of {factor} px, as the VAE needs, found {side_px} px; "
            "set another resolution in the options."
        )
    return batch, model.get_model_object("latent_format").latent_channels, side_px // factor, side_px // factor


def to_the_end(call: Callable[..., Outcome], cancelled: Callable[[BaseException], None]) -> Callable[..., Outcome]:
    """`call`, begun again where a cancel interrupts it, which `cancelled` is told.

    Core's layers raise a cancel in the middle of a pass; a step that is finished can be saved and gone on from.
    """

    def begun_again(*args: Any, **kwargs: Any) -> Outcome:
        while True:
            try:
                return call(*args, **kwargs)
            except comfy.model_management.InterruptProcessingException as interrupted:
                cancelled(interrupted)

    return begun_again


# ---- predictions ------------------------------------------------------------------------------------------------


class _InTheSamplersPlace(comfy.samplers.Sampler):
    """What a guider runs instead of a sampling algorithm: `body(model_options)`, with everything loaded and ready."""

    def __init__(self, body: Callable[[dict[str, Any]], Outcome]) -> None:
        self.body = body
        self.outcome: Any = None

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        self.outcome = self.body(extra_args["model_options"])
        return torch.zeros_like(noise)


class CriticGuider(MultiGuidanceGuider):
    """A guidance that is asked for single predictions instead of sampling: the terms, and the prompt as the last one.

    others: conditionings of the prior that a method asks for besides, by name. Refuses what `MultiGuidanceGuider`
    refuses.
    """

    def __init__(
        self,
        prior: ModelPatcher,
        positive: list,
        negative: list,
        scale: float,
        terms: Sequence[TermInput] = (),
        others: Mapping[str, list] | None = None,
    ) -> None:
        asked = [TermInput(f"{name} conditioning", 0.0, conditioning=cond) for name, cond in (others or {}).items()]
        prompt = TermInput(PROMPT, scale, conditioning=positive)
        self._asked_apart = len(asked)
        super().__init__(prior, negative, [*asked, *terms, prompt])
        self.others = {name: term.source for name, term in zip(others or (), self.guidance.terms)}

    def _sources_ever_needed(self) -> list[Source]:
        asked = [term.source for term in self.guidance.terms[: self._asked_apart]]
        return list(dict.fromkeys([*super()._sources_ever_needed(), *asked]))

    def predict_many(
        self, sources: Sequence[Source], x: Tensor, sigma: Tensor, model_options: dict[str, Any]
    ) -> dict[Source, Tensor]:
        """Denoised predictions [B, C, h, w] of `sources` for x at sigma [B]; a reference's where one covers nothing."""
        gaps = self._gaps(sources, x, sigma)
        needed = dict.fromkeys([*sources, *(reference for _, reference in gaps.values())])
        return without_gaps(self._predict(list(needed), x, sigma, model_options), gaps)

    def hold(self, shape: Sequence[int], sigmas: Sequence[float], body: Callable[[Predictions], Outcome]) -> Outcome:
        """Run `body(predictions)` while the models are loaded for latents of `shape` [B, C, h, w]; its outcome.

        sigmas: noise levels, falling, that will be asked for; a model that does not cover them is refused. The body
        runs outside inference mode, whatever the caller's.
        """

        def run(model_options: dict[str, Any]) -> Outcome:
            with torch.inference_mode(False), torch.enable_grad():
                return body(Predictions(self, model_options))

        sampler = _InTheSamplersPlace(run)
        # Core loads and patches weights in inference mode, as everywhere; they may not be changed outside it.
        with torch.inference_mode():
            empty = torch.zeros(tuple(shape))
            self.sample(empty, empty, sampler, torch.tensor([*sigmas, 0.0]), disable_pbar=True, seed=0)
        return sampler.outcome


class Predictions:
    """The models of a running `CriticGuider` as one model of the library's: everything a step needs in one call.

    A conditioning for it is {"source": i}, the i-th source of the guidance. Core puts what fits into memory in one
    batch, and whatever is on the MODELs and CONDITIONINGs acts. Has gradients only where autograd records. `cancelled`:
    who is told of a cancel instead of being interrupted by it (`to_the_end`).
    """

    def __init__(self, guider: CriticGuider, model_options: dict[str, Any]) -> None:
        self.guider, self.model_options = guider, model_options
        self.sources = guider.guidance.sources
        self.device: torch.device = guider.model_patcher.load_device
        self.cancelled: Callable[[BaseException], None] | None = None
        self._one_level_at_a_time = _depends_on_level([*guider.conds.values(), *guider._branch_conds.values()])

    @property
    def unet(self) -> nn.Module:
        """The prior's UNet, for the second critic of variational score distillation."""
        return self.guider.model_patcher.model.diffusion_model

    def source(self, one: Source) -> Source:
        """One of the graph's sources as the library's."""
        return Source(self, self._conditionings[one])

    @functools.cached_property
    def _conditionings(self) -> dict[Source, dict[str, int]]:
        return {source: {"source": index} for index, source in enumerate(self.sources)}

    def critic(self, schedule: NoiseSchedule) -> Critic:
        """The graph's guidance as a `Critic`; its last term is the prompt.

        The conditionings named "source" (what the generator makes now) and "unwanted" are the critic's, where given.
        """
        guidance, others = self.guider.guidance, self.guider.others
        asked = set(others.values())
        base = self.source(guidance.base)
        terms = [
            Term(term.name, self, self._conditionings[term.source], term.weight, term.reference)
            for term in guidance.terms
            if term.source not in asked or not is_zero(term.weight)
        ]
        prompt = terms[-1]
        source = None
        if SOURCE in others:
            source = Guidance(base, [Term(PROMPT, self, self._conditionings[others[SOURCE]], prompt.weight)])
        unwanted = self.source(others[UNWANTED]) if UNWANTED in others else None
        return Critic(
            Guidance(base, terms),
            schedule,
            unwanted=unwanted,
            source=source,
            percent_to_sigma=self.guider._percent_to_sigma,
        )

    def __call__(self, x: Tensor, sigma: Tensor, source: int) -> Tensor:
        """x [B, C, h, w] = x0 + sigma * noise, sigma [B] -> x0 [B, C, h, w]."""
        return self.denoise_many([(x, sigma, {"source": source})])[0]

    def denoise_many(self, jobs: Sequence[tuple[Tensor, Tensor, Mapping[str, int]]]) -> list[Tensor]:
        """x0 of each (x [B, C, h, w], sigma [B], {"source": i}), on the device of its x, in float32."""
        denoise = self._denoise if self.cancelled is None else to_the_end(self._denoise, self.cancelled)
        if torch.is_grad_enabled():
            return denoise(jobs)
        # Weights from ComfyUI's loaders are made for inference mode. Clones made outside it can be used with gradients.
        with torch.inference_mode():
            made = denoise(jobs)
        return [one.clone() for one in made]

    def _denoise(self, jobs: Sequence[tuple[Tensor, Tensor, Mapping[str, int]]]) -> list[Tensor]:
        """All latents of a source become one batch, and sources with equal batches one call."""
        by_source: dict[int, list[int]] = {}
        for number, (_, _, arguments) in enumerate(jobs):
            by_source.setdefault(arguments["source"], []).append(number)
        batches: list[tuple[Tensor, Tensor, list[int]]] = []
        for index, numbers in by_source.items():
            x = torch.cat([jobs[number][0] for number in numbers]).to(self.device, torch.float32)
            sigma = torch.cat([jobs[number][1] for number in numbers]).to(self.device, torch.float32)
            for other, levels, indices in batches:
                if other.shape == x.shape and torch.equal(other, x) and torch.equal(levels, sigma):
                    indices.append(index)
                    break
            else:
                batches.append((x, sigma, [index]))
        made: list[Tensor | None] = [None] * len(jobs)
        for x, sigma, indices in batches:
            predictions = self._predict([self.sources[index] for index in indices], x, sigma)
            for index in indices:
                numbers = by_source[index]
                parts = predictions[self.sources[index]].split([len(jobs[number][0]) for number in numbers])
                for number, part in zip(numbers, parts):
                    made[number] = part.to(jobs[number][0].device)
        return made

    def _predict(self, sources: Sequence[Source], x: Tensor, sigma: Tensor) -> dict[Source, Tensor]:
        if not self._one_level_at_a_time or len(sigma) == 1:
            return self.guider.predict_many(sources, x, sigma, self.model_options)
        rows = [
            self.guider.predict_many(sources, one, level, self.model_options)
            for one, level in zip(x.split(1), sigma.split(1))
        ]
        return {source: torch.cat([row[source] for row in rows]) for source in sources}


def is_zero(weight: Any) -> bool:
    """Whether a weight is 0 at every noise level."""
    return weight == Constant(0.0)


def _depends_on_level(conditionings: Sequence[list[dict[str, Any]]]) -> bool:
    """Whether core would look at the noise level of a batch's first image to decide what acts on all of it."""
    keys = ("timestep_start", "timestep_end", "start_percent", "end_percent", "hooks", "control")
    return any(entry.get(key) is not None for entries in conditionings for entry in entries for key in keys)


@contextlib.contextmanager
def ordinary_weights(module: nn.Module) -> Iterator[None]:
    """Inside the block, a module's weights can take part in autograd although they were made in inference mode.

    They are replaced by ordinary tensors in the same memory, and put back afterwards. Call it outside inference mode.
    """
    taken: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for part in module.modules():
            for holder in (part._parameters, part._buffers):
                for name, tensor in holder.items():
                    if tensor is not None and tensor.is_inference():
                        taken.append((holder, name, tensor))
                        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
                            tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
                        )
                        is_parameter = isinstance(tensor, nn.Parameter)
                        holder[name] = nn.Parameter(alias, requires_grad=False) if is_parameter else alias
        yield
    finally:
        for holder, name, tensor in taken:
            holder[name] = tensor


def ignored_hooks(model: ModelPatcher) -> list[str]:
    """Hooks of the sampling function on the MODEL, which have no meaning in a distillation."""
    names = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function")
    return [name for name in names if model.model_options.get(name)]


@dataclass(frozen=True, eq=False)
class CriticInputs:
    """What a graph says about the critic.

    source: the conditioning that describes what the generator makes now (DDS, SDS-Bridge). unwanted: that of what
    images should not be (NFSD). scale: the weight of the prompt; terms: those of Guidance Term nodes.
    """

    model: ModelPatcher
    vae: Any
    positive: list
    negative: list
    scale: float
    terms: tuple[TermInput, ...] = ()
    source: list | None = None
    unwanted: list | None = None

    def check(self) -> NoiseSchedule:
        """The model's noise levels. Raises ValueError for parts that do not belong together."""
        schedule = noise_schedule(self.model)
        check_vae(self.model, self.vae)
        for what in ("positive", "negative", "source", "unwanted"):
            conditioning = getattr(self, what)
            if conditioning is not None:
                check_conditioning(self.model, conditioning, what)
        for term in self.terms:
            if term.shaping is not None:  # distillation takes a prediction apart by its terms, as they are
                raise Problem(
                    f"The judge's term {term.name!r}: expected a term as Guidance Term makes it, found one changed by "
                    "Shape Guidance Term; connect the terms from before that node."
                )
            if term.conditioning is not None:
                model = self.model if term.model is None else term.model
                check_conditioning(model, term.conditioning, f"term {term.name!r}")
        return schedule

    def run(
        self,
        side_px: int,
        batch: int,
        timesteps: tuple[int, int],
        body: Callable[[Critic, ImageEncoder], Outcome],
        *,
        learns: bool = False,
        cancelled: Callable[[BaseException], None] | None = None,
    ) -> Outcome:
        """Run `body(critic, encode)` with everything loaded; refuses first what cannot work.

        side_px: of the images as they are encoded; batch: latents in one prediction; timesteps: the least and the
        largest that will be asked for; learns: whether a second critic is trained in the model (the method vsd);
        cancelled: told of a cancel, which then interrupts neither critic nor encode.
        """
        schedule = self.check()
        others = {SOURCE: self.source, UNWANTED: self.unwanted}
        guider = CriticGuider(
            self.model,
            self.positive,
            self.negative,
            self.scale,
            self.terms,
            {name: conditioning for name, conditioning in others.items() if conditioning is not None},
        )
        low, high = timesteps
        levels = sorted({round(low + (high - low) * part / 8) for part in range(9)}, reverse=True)

        def with_models(predictions: Predictions) -> Outcome:
            with ordinary_weights(predictions.unet) if learns else contextlib.nullcontext():
                encode = gradient_encoder(self.vae, self.model, predictions.device, side_px, cancelled)
                predictions.cancelled = cancelled
                return body(predictions.critic(schedule), encode)

        shape = latent_shape(self.vae, self.model, side_px, batch)
        return guider.hold(shape, [schedule.sigma(float(level)) for level in levels], with_models)
