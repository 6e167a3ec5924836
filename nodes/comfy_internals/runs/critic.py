"""A graph's MODELs, CONDITIONINGs and VAE as the critic of a distillation (arXiv 2212.04473), checked first."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import comfy.model_base
import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ....guidance.diffusion import NoiseSchedule
from ....guidance.distillation.critic import Critic
from ....guidance.distillation.image_encoder import ImageEncoder
from ....guidance.errors import Problem
from ....guidance.terms import Term
from ..guiding.compatibility import display_name, noise_family
from ..guiding.predictions import SOURCE, UNWANTED, Cancelled, PredictionGuider, Predictions, to_the_end
from ..models.loading import LATENT_FORMATS
from ..models.text_free import is_text_free

NODE = "Adapt Generator"
# Without the text's vector, core would fail in the middle of the first prediction.
_WANT_POOLED = (comfy.model_base.SDXL, comfy.model_base.SDXLRefiner)
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, eq=False)
class CriticInputs:
    """The inputs of a graph that make up the critic; scale: the weight of the prompt.

    source: the conditioning of what the generator makes now. unwanted: that of what images should not be. Both only for
    methods that ask for them.
    """

    model: ModelPatcher
    vae: Any
    positive: list
    negative: list
    scale: float
    terms: tuple[Term, ...] = ()
    source: list | None = None
    unwanted: list | None = None

    def check(self) -> NoiseSchedule:
        """The model's noise levels. Raises Problem for parts that do not belong together."""
        schedule = noise_schedule(self.model)
        check_vae(self.model, self.vae)
        for what in ("positive", "negative", "source", "unwanted"):
            if getattr(self, what) is not None:
                check_conditioning(self.model, getattr(self, what), what)
        for term in self.terms:
            if term.shaping is not None:  # distillation takes a prediction apart by its terms, as they are
                raise Problem(
                    f"The judge's term {term.name!r}: expected a term as Guidance Term makes it, found one changed by "
                    "Shape Guidance Term; connect the terms from before that node."
                )
            if term.cond is not None:
                model = self.model if term.model is None else term.model
                check_conditioning(model, term.cond, f"term {term.name!r}")
        return schedule

    def run(
        self,
        side_px: int,
        batch: int,
        timesteps: tuple[int, int],
        body: Callable[[Critic, ImageEncoder], Outcome],
        *,
        learns: bool = False,
        cancelled: Cancelled | None = None,
    ) -> Outcome:
        """Run `body(critic, encode)` with everything loaded; refuses first what cannot work.

        side_px: of the images as they are encoded; batch: latents in one prediction; timesteps: the least and the
        largest that will be asked for; learns: whether a second critic is trained in the model; cancelled: told of a
        cancel, which then interrupts neither critic nor encode.
        """
        schedule = self.check()
        others = {SOURCE: self.source, UNWANTED: self.unwanted}
        others = {name: conditioning for name, conditioning in others.items() if conditioning is not None}
        guider = PredictionGuider(self.model, self.positive, self.negative, self.scale, self.terms, others)
        low, high = timesteps
        levels = sorted({round(low + (high - low) * part / 8) for part in range(9)}, reverse=True)

        def with_models(predictions: Predictions) -> Outcome:
            with ordinary_weights(predictions.unet) if learns else contextlib.nullcontext():
                encode = gradient_encoder(self.vae, self.model, predictions.device, side_px, cancelled)
                predictions.cancelled = cancelled
                return body(predictions.critic(schedule), encode)

        shape = latent_shape(self.vae, self.model, side_px, batch)
        return guider.run(shape, [float(schedule.sigma(float(level))) for level in levels], with_models)


def noise_schedule(model: ModelPatcher) -> NoiseSchedule:
    """The noise levels of a MODEL, patches included. Raises Problem where they are not discrete (flow, EDM)."""
    sampling = model.get_model_object("model_sampling")
    sigmas = getattr(sampling, "sigmas", None)
    discrete = isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete)
    if not discrete or not isinstance(sigmas, Tensor) or noise_family(sampling) != "diffusion":
        raise Problem(
            f"{NODE}: expected an eps- or v-prediction model with discrete noise levels (Stable Diffusion 1.x, 2.x, "
            f"SDXL), found a {display_name(model)} of the {noise_family(sampling)} kind; use another model."
        )
    return NoiseSchedule(1.0 / (1.0 + sigmas.detach().cpu().double() ** 2))


def check_conditioning(model: ModelPatcher, conditioning: list, what: str) -> None:
    """Refuse a CONDITIONING that is empty or made by another family's CLIP. Raises Problem naming both widths."""
    if not conditioning:
        raise Problem(f"{NODE}: expected {what} to hold a conditioning, found none; connect a CLIP Text Encode.")
    if is_text_free(model):
        return
    width = model.model.model_config.unet_config.get("context_dim")
    for tensor, options in conditioning:
        if isinstance(width, int) and isinstance(tensor, Tensor) and tensor.shape[-1] != width:
            raise Problem(
                f"{NODE}: expected a {what} conditioning of width {width}, as the {display_name(model)} reads, found "
                f"width {tensor.shape[-1]}; encode the text with the CLIP that belongs to the model."
            )
        if isinstance(model.model, _WANT_POOLED) and options.get("pooled_output") is None:
            raise Problem(
                f"{NODE}: expected a {what} conditioning with a pooled vector, as the {display_name(model)} reads, "
                "found none; encode the text with the CLIP that belongs to the model."
            )


def check_vae(model: ModelPatcher, vae: Any) -> None:
    """Refuse a VAE whose latents the MODEL cannot read. Raises Problem naming both."""
    latent_format = model.get_model_object("latent_format")
    stage = getattr(vae, "first_stage_model", None)
    channels, dimensions = getattr(vae, "latent_channels", 0), getattr(vae, "latent_dim", 2)
    if stage is None or channels != latent_format.latent_channels or dimensions != latent_format.latent_dimensions:
        found = "no VAE" if stage is None else f"{type(stage).__name__} with {channels} latent channels"
        raise Problem(
            f"{NODE}: expected the VAE of the {display_name(model)} with {latent_format.latent_channels} latent "
            f"channels ({type(latent_format).__name__}), found {found}; connect the VAE that belongs to the model."
        )


def native_side(model: ModelPatcher) -> int:
    """The side in pixels of the images a MODEL was made for."""
    from ....training.prior.families import native_resolution

    kind = type(model.get_model_object("latent_format"))
    latent_format = next((name for name, known in LATENT_FORMATS.items() if known is kind), "")
    is_v = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION)
    return native_resolution(latent_format, model.model.model_config.unet_config.get("context_dim"), is_v) or 512


def latent_shape(vae: Any, model: ModelPatcher, side_px: int, batch: int) -> tuple[int, int, int, int]:
    """[B, C, h, w] of square images. Raises Problem for a side that the VAE's factor does not divide."""
    factor = vae.downscale_ratio if isinstance(vae.downscale_ratio, int) else 8
    if side_px % factor:
        raise Problem(
            f"{NODE}: expected a resolution that is a multiple of {factor} px, as the VAE needs, found {side_px} px; "
            "set another resolution in the options."
        )
    return batch, model.get_model_object("latent_format").latent_channels, side_px // factor, side_px // factor


def gradient_encoder(
    vae: Any, model: ModelPatcher, device: torch.device, side_px: int, cancelled: Cancelled | None = None
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
    encoder = copy.deepcopy(encoder)
    for holder, name, tensor in _inference_tensors(encoder):
        holder[name] = _like(tensor, tensor.detach().clone())
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


@contextlib.contextmanager
def ordinary_weights(module: nn.Module) -> Iterator[None]:
    """Inside the block, a module's weights can take part in autograd although they were made in inference mode.

    They are replaced by ordinary tensors in the same memory, and put back afterwards. Call it outside inference mode.
    """
    taken = _inference_tensors(module)
    try:
        for holder, name, tensor in taken:
            alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
            holder[name] = _like(tensor, alias)
        yield
    finally:
        for holder, name, tensor in taken:
            holder[name] = tensor


def _inference_tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """(the dictionary that holds it, its name there, the tensor) of all that were made in inference mode."""
    holders = [holder for part in module.modules() for holder in (part._parameters, part._buffers)]
    return [
        (holder, name, tensor)
        for holder in holders
        for name, tensor in holder.items()
        if tensor is not None and tensor.is_inference()
    ]


def _like(original: Tensor, tensor: Tensor) -> Tensor:
    """A parameter where the original is one."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(original, nn.Parameter) else tensor
