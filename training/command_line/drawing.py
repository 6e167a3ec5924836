"""Pictures from a base, with a domain model by multi-guidance (arXiv 2312.08195), without ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from ..engine.settings import ConfigProblem, Settings, group
from ..prior.prior import ImageSize, Prior

SPACINGS = {"uniform": sigmas_uniform, "sgm_uniform": sigmas_sgm_uniform, "karras": sigmas_karras}
drawing = group("drawing")


@dataclass(frozen=True, kw_only=True)
class DrawingSettings(Settings):
    """How to sample. Weights as in `presets.in_domain`: 0 leaves a part out and saves its predictions.

    Raises ConfigProblem for a value out of its range.
    """

    command: ClassVar[str] = "indomain sample"
    groups: ClassVar[tuple[str, ...]] = ("drawing",)

    domain_weight: float = drawing(2.5, "weight of the domain model, usually 0 to 5", min=-1000.0, max=1000.0)
    control_weight: float = drawing(2.5, "weight of the prompt, usually 0 to 8", min=-1000.0, max=1000.0)
    domain_start: float = drawing(0.0, "share of sampling at which the domain model begins", min=0.0, max=1.0)
    domain_end: float = drawing(1.0, "share of sampling at which it ends", min=0.0, max=1.0)
    strength: float = drawing(
        1.0, "of a LoRA: 0 draws as the base, 1 as it was trained, below 0 the other way", min=-100.0, max=100.0
    )
    steps: int = drawing(25, "model steps", min=1, max=1000)
    method: str = drawing("dpmpp_2m", "sampler", choices=SAMPLERS)
    spacing: str = drawing(
        "uniform",
        "of the noise levels, as ComfyUI has them: uniform (there called normal), sgm_uniform (the released code's of "
        "the paper), karras",
        choices=tuple(SPACINGS),
    )
    width: int = drawing(512, "in pixels, a multiple of 8", min=8, max=16384)
    height: int = drawing(512, "in pixels, a multiple of 8", min=8, max=16384)
    batch_size: int = drawing(4, "pictures of one prompt drawn at once", min=1, max=4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.domain_start > self.domain_end:
            raise ConfigProblem(
                f"domain_start: expected at most domain_end, {self.domain_end}, found {self.domain_start}."
            )

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

    weights, metadata: of a domain file (`guidance.files.read_domain_file`); None for the base alone. A domain model of
    form full is conditioned on the caption it was trained with. Both run in `dtype` on `device`. Raises ValueError
    where sizes do not fit.
    """

    def __init__(
        self,
        prior: Prior,
        weights: Mapping[str, Tensor] | None = None,
        metadata: DomainMetadata | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.prior, self.device, self.metadata = prior, torch.device(device), metadata
        self.base = Denoiser(prior.load_unet(dtype).to(self.device), prior.schedule, prior.prediction_type)
        self.domain = None
        if weights is not None and metadata is not None:
            domain = load_unet(weights, metadata.config, dtype).to(self.device)
            self.domain = Denoiser(domain, prior.schedule, metadata.prediction_type or prior.prediction_type)

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
        width, height = settings.width, settings.height
        factor = self.prior.factor
        if height % factor or width % factor or min(height, width) < factor:
            raise Problem(f"Expected a width and height that are multiples of {factor} px, got {width}x{height}.")
        size = ImageSize((height, width))
        base_cond, *conds = (
            self.prior.conditioning([size], self.prior.encode_text([prompt]), self.device)
            for prompt in (negative, *prompts)
        )
        domain_cond, caption = base_cond, self.metadata.caption if self.metadata else None
        if caption is not None:
            domain_cond = self.prior.conditioning([size], self.prior.encode_text([caption]), self.device)
        sigmas = SPACINGS[settings.spacing](self.prior.schedule, settings.steps).float()
        parts = [list(seeds[at : at + settings.batch_size]) for at in range(0, len(seeds), settings.batch_size)]
        total, done = len(prompts) * len(parts) * settings.steps, 0

        def count(_: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            on_step(done, total)

        for prompt, cond in zip(prompts, conds):
            # The term of a prompt equal to the base's is 0 and needs no prediction.
            control = settings.control_weight if prompt != negative else 0.0
            terms = [Term("control", self.base, cond, control)]
            if self.domain is not None:
                terms.insert(0, Term("domain", self.domain, domain_cond, settings.domain_term()))
            guidance = Guidance(Source(self.base, base_cond), terms)
            for part in parts:
                noise = self.prior.noise(part, height, width)
                guided = MultiGuidance(guidance, self.prior.schedule.percent_to_sigma)
                latents = sample(guided, noise.to(self.device), sigmas, settings.method, count)
                with self.prior.autoencoder_on(self.device):
                    pictures = self.prior.decode(latents).cpu()
                cost = sum(guided.samples_per_step) / len(guided.samples_per_step)
                for seed, pixels in zip(part, pictures):
                    yield Drawn(prompt, seed, pixels, cost)
