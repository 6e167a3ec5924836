"""Single predictions of a guidance, outside sampling: what a distillation asks a model for (arXiv 2212.04473).

They are made where core would run a sampler: inside one run of a guider, so that models are loaded together and LoRAs,
hooks, areas and everything else on the MODELs and CONDITIONINGs act as they do in sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ....guidance.combination import Guidance
from ....guidance.diffusion import NoiseSchedule
from ....guidance.distillation.critic import Critic
from ....guidance.schedules import Constant
from ....guidance.terms import Source, Term
from .gaps import with_references, without_gaps
from .guider import TermGuider

PROMPT, SOURCE, UNWANTED = "prompt", "source", "unwanted"
Outcome = TypeVar("Outcome")
Cancelled = Callable[[BaseException], None]  # told of a cancel, which then does not interrupt a step


def to_the_end(call: Callable[..., Outcome], cancelled: Cancelled) -> Callable[..., Outcome]:
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


class PredictionGuider(TermGuider):
    """A guidance that is asked for single predictions instead of sampling: the terms, and the prompt as the last one.

    others: conditionings of the prior that a distillation method asks for besides, by name. Refuses what `TermGuider`
    refuses.
    """

    def __init__(
        self,
        prior: ModelPatcher,
        positive: list,
        negative: list,
        scale: float,
        terms: Sequence[Term] = (),
        others: Mapping[str, list] | None = None,
    ) -> None:
        asked = [Term(f"{name} conditioning", None, cond, 0.0) for name, cond in (others or {}).items()]
        prompt = Term(PROMPT, None, positive, scale)
        super().__init__(prior, negative, [*asked, *terms, prompt], always=[term.name for term in asked])
        self.others = {name: term.source for name, term in zip(others or (), self.guidance.terms)}

    def predict_many(
        self, sources: Sequence[Source], x: Tensor, sigma: Tensor, model_options: dict[str, Any]
    ) -> dict[Source, Tensor]:
        """Denoised predictions [B, C, h, w] of `sources` for x at sigma [B]; a reference's where one covers nothing."""
        gaps = self.gaps(sources, x, sigma)
        return without_gaps(self.predict_sources(with_references(sources, gaps), x, sigma, model_options), gaps)

    def run(self, shape: Sequence[int], sigmas: Sequence[float], body: Callable[[Predictions], Outcome]) -> Outcome:
        """What `body(predictions)` returns, run while the models are loaded for latents of `shape` [B, C, h, w].

        sigmas: noise levels, falling, that will be asked for; a model that does not cover them is refused. The body
        runs outside inference mode, whatever the caller's.
        """

        def with_models(model_options: dict[str, Any]) -> Outcome:
            with torch.inference_mode(False), torch.enable_grad():
                return body(Predictions(self, model_options))

        sampler = _InTheSamplersPlace(with_models)
        # Core loads and patches weights in inference mode, as everywhere; they may not be changed outside it.
        with torch.inference_mode():
            empty = torch.zeros(tuple(shape))
            self.sample(empty, empty, sampler, torch.tensor([*sigmas, 0.0]), disable_pbar=True, seed=0)
        return sampler.outcome


class Predictions:
    """The models of a running `PredictionGuider` as one model of the library's: all a step needs in one call.

    A conditioning for it is {"source": i}, the i-th source of the guidance. Core puts what fits into memory in one
    batch, and whatever is on the MODELs and CONDITIONINGs acts. Has gradients only where autograd records. `cancelled`:
    called with a cancel, which then does not interrupt a prediction (`to_the_end`).
    """

    def __init__(self, guider: PredictionGuider, model_options: dict[str, Any]) -> None:
        self.guider, self.model_options = guider, model_options
        self.sources = guider.guidance.sources
        self.device: torch.device = guider.model_patcher.load_device
        self.cancelled: Cancelled | None = None
        self._one_level_at_a_time = _depends_on_level(
            [*guider.conds.values(), *guider.conditionings.of_others.values()]
        )

    @property
    def unet(self) -> nn.Module:
        """The prior's UNet, for the second critic of variational score distillation."""
        return self.guider.model_patcher.model.diffusion_model

    def critic(self, schedule: NoiseSchedule) -> Critic:
        """The graph's guidance as a `Critic`; its last term is the prompt.

        The conditionings named "source" (what the generator makes now) and "unwanted" are the critic's, where given.
        """
        guidance, others = self.guider.guidance, self.guider.others
        asked = set(others.values())
        # One dict for each source, since the library compares conditionings by identity.
        own = {source: Source(self, {"source": index}) for index, source in enumerate(self.sources)}
        terms = [
            Term(term.name, self, own[term.source].cond, term.weight, term.reference)
            for term in guidance.terms
            if term.source not in asked or not is_zero(term.weight)
        ]
        source = None
        if SOURCE in others:
            source = Guidance(own[guidance.base], [Term(PROMPT, self, own[others[SOURCE]].cond, terms[-1].weight)])
        return Critic(
            Guidance(own[guidance.base], terms),
            schedule,
            unwanted=own[others[UNWANTED]] if UNWANTED in others else None,
            source=source,
            percent_to_sigma=self.guider.percent_to_sigma,
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
        return [prediction.clone() for prediction in made]

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
        made: dict[int, Tensor] = {}
        for x, sigma, indices in batches:
            predictions = self._predict([self.sources[index] for index in indices], x, sigma)
            for index in indices:
                numbers = by_source[index]
                parts = predictions[self.sources[index]].split([len(jobs[number][0]) for number in numbers])
                made |= {number: part.to(jobs[number][0].device) for number, part in zip(numbers, parts)}
        return [made[number] for number in range(len(jobs))]

    def _predict(self, sources: Sequence[Source], x: Tensor, sigma: Tensor) -> dict[Source, Tensor]:
        if not self._one_level_at_a_time or len(sigma) == 1:
            return self.guider.predict_many(sources, x, sigma, self.model_options)
        rows = [
            self.guider.predict_many(sources, image, level, self.model_options)
            for image, level in zip(x.split(1), sigma.split(1))
        ]
        return {source: torch.cat([row[source] for row in rows]) for source in sources}


def is_zero(weight: Any) -> bool:
    """Whether a weight is 0 at every noise level."""
    return weight == Constant(0.0)


def _depends_on_level(conditionings: Sequence[list[dict[str, Any]]]) -> bool:
    """Whether core would look at the noise level of a batch's first image to decide what acts on all of it."""
    keys = ("timestep_start", "timestep_end", "start_percent", "end_percent", "hooks", "control")
    return any(entry.get(key) is not None for entries in conditionings for entry in entries for key in keys)
