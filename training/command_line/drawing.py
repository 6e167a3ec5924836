"""Pictures from a base and a domain model with multi-guidance (arXiv 2312.08195), without ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...guidance.combination import Guidance
from ...guidance.diffusion import Denoiser
from ...guidance.errors import Problem
from ...guidance.files import DomainMetadata
from ...guidance.multi_guidance import MultiGuidance
from ...guidance.null_text import load_unet
from ...guidance.sampling import SAMPLERS, sample, sigmas_karras, sigmas_sgm_uniform, sigmas_uniform
from ...guidance.schedules import Interval, WeightLike
from ...guidance.terms import Source, Term
from ..prior.prior import ImageSize, Prior
from ..prior.text_encoders import Text

SPACINGS = {"uniform": sigmas_uniform, "sgm_uniform": sigmas_sgm_uniform, "karras": sigmas_karras}
METHOD = "dpmpp_2m"


@dataclass(frozen=True)
class DrawingSettings:
    """How to sample. Weights as in `presets.in_domain`: 0 leaves a part out and saves its predictions.

    domain_start, domain_end: share of sampling (0 start, 1 end) in which the domain model takes part. method: one of
    `guidance.sampling.SAMPLERS`; spacing of the noise levels: "uniform" in timesteps, "sgm_uniform" (that of the
    paper's code) or "karras". size (height, width) in pixels. batch: pictures of one prompt that are sampled at once.
    """

    domain_weight: float = 2.5
    control_weight: float = 2.5
    domain_start: float = 0.0
    domain_end: float = 1.0
    steps: int = 25
    method: str = METHOD
    spacing: str = "uniform"
    size: tuple[int, int] = (512, 512)
    batch: int = 4

    def __post_init__(self) -> None:
        if self.method not in SAMPLERS or self.spacing not in SPACINGS:
            raise Problem(
                f"Expected a method of {', '.join(SAMPLERS)} and a spacing of {', '.join(SPACINGS)}, got "
                f"{self.method!r} and {self.spacing!r}."
            )
        if not 0.0 <= self.domain_start <= self.domain_end <= 1.0:
            raise Problem(
                f"Expected the domain's part of sampling between 0 and 1, got {self.domain_start} to {self.domain_end}."
            )
        if self.steps < 1 or self.batch < 1:
            raise Problem(f"Expected at least 1 step and 1 picture at once, got {self.steps} and {self.batch}.")

    def domain_term(self) -> WeightLike:
        """The domain model's weight over sampling."""
        if (self.domain_start, self.domain_end) == (0.0, 1.0):
            return self.domain_weight
        return Interval(self.domain_weight, self.domain_start, self.domain_end)


@dataclass(frozen=True)
class Drawn:
    """One picture: what was asked for, the pixels [3, H, W] in -1..1, and predictions evaluated per step."""

    prompt: str
    seed: int
    pixels: Tensor
    samples_per_step: float


class Artist:
    """A base and a domain model, loaded once, that draw pictures.

    weights, metadata: of a domain file (`guidance.files.read_domain_file`). A domain model of form full is conditioned
    on the caption it was trained with. Both run in `dtype` on `device`. Raises ValueError where sizes do not fit.
    """

    def __init__(
        self,
        base: Prior,
        weights: Mapping[str, Tensor],
        metadata: DomainMetadata,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.base, self.device, self.metadata = base, torch.device(device), metadata
        prior = base.load_unet(dtype).to(self.device)
        domain = load_unet(weights, metadata.config, dtype).to(self.device)
        self.prior = Denoiser(prior, base.schedule, base.prediction_type)
        self.domain = Denoiser(domain, base.schedule, metadata.prediction_type or base.prediction_type)
        self.caption = metadata.caption

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: DrawingSettings,
        negative: str = "",
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[Drawn]:
        """A picture of every prompt from every seed, in this order.

        Noise is drawn on the CPU from the seed alone, so that a picture is the same whatever is drawn beside it (up to
        rounding). negative: the prompt of the base prediction, "" as in the paper. on_step(done, total) counts model
        steps over all pictures.
        """
        height, width = settings.size
        factor = self.base.factor
        if height % factor or width % factor or min(height, width) < factor:
            raise Problem(f"Expected a width and height that are multiples of {factor} px, got {width}x{height}.")
        size = ImageSize((height, width))
        base_cond = self._cond(size, self.base.encode_text([negative]))
        own = base_cond if self.caption is None else self._cond(size, self.base.encode_text([self.caption]))
        texts = [self.base.encode_text([prompt]) for prompt in prompts]
        sigmas = SPACINGS[settings.spacing](self.base.schedule, settings.steps).float()
        parts = [list(seeds[at : at + settings.batch]) for at in range(0, len(seeds), settings.batch)]
        total, done = len(prompts) * len(parts) * settings.steps, 0

        def count(_: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            on_step(done, total)

        for prompt, text in zip(prompts, texts):
            # A prompt equal to the base's says nothing: its term is 0 and needs no prediction.
            control = settings.control_weight if prompt != negative else 0.0
            guidance = Guidance(
                Source(self.prior, base_cond),
                [
                    Term("domain", self.domain, own, settings.domain_term()),
                    Term("control", self.prior, self._cond(size, text), control),
                ],
            )
            for part in parts:
                noise = torch.cat([self._noise(seed, height // factor, width // factor) for seed in part])
                guided = MultiGuidance(guidance, self.base.schedule.percent_to_sigma)
                latents = sample(guided, noise.to(self.device), sigmas, settings.method, count)
                with self.base.autoencoder_on(self.device):
                    pictures = self.base.decode(latents).cpu()
                cost = sum(guided.samples_per_step) / len(guided.samples_per_step)
                for seed, pixels in zip(part, pictures):
                    yield Drawn(prompt, seed, pixels, cost)

    def _noise(self, seed: int, height: int, width: int) -> Tensor:
        return torch.randn((1, self.base.latent_channels, height, width), generator=torch.Generator().manual_seed(seed))

    def _cond(self, size: ImageSize, text: Text) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self.base.conditioning([size], text).items()}
