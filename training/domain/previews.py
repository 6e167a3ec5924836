"""Sample grids of a model in training: fixed seeds, multi-guidance against the prior (arXiv 2312.08195), labelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...guidance.combination import Guidance
from ...guidance.diffusion import Denoiser
from ...guidance.multi_guidance import MultiGuidance
from ...guidance.presets import cfg, domain_guidance, in_domain
from ...guidance.sampling import sample, sigmas_uniform
from ..engine.grids import grid
from ..engine.processes import computes_in_bf16
from ..prior.prior import ImageSize, Prior
from ..prior.text_encoders import Text

if TYPE_CHECKING:
    from PIL.Image import Image

    from .config import TrainConfig

METHOD = "dpmpp_2m"  # as the paper samples


@dataclass(frozen=True)
class Row:
    """One row of a grid: what stands beside it, and the guidance it is sampled with."""

    label: str
    guidance: Guidance


class Preview:
    """Draws the grid of a run: a row per prompt, a column per seed, always from the same noise.

    Rows follow `config.sample_prompts`: multi-guidance of prior, domain model and prompt with the configured weights.
    Without prompts there are two rows, the domain model alone, and the domain model against the prior. A model that
    takes text (form full) is sampled with its own classifier-free guidance instead, since that is how it is used.
    Seeds are config.seed, config.seed + 1, ...; the noise is drawn on the CPU as ComfyUI draws it. batch: how many are
    drawn at once, None for the configuration's.

    The prior is built for a drawing and let go again, so that training keeps the memory. Raises ValueError for prompts
    that the prior cannot encode, when it is made and not in the middle of a run.
    """

    def __init__(
        self, prior: Prior, config: TrainConfig, device: torch.device | str = "cpu", batch: int | None = None
    ) -> None:
        self.prior = prior
        self.config = config
        self.batch = config.batch_size if batch is None else batch
        self.device = torch.device(device)
        self.prompts = tuple(config.sample_prompts)
        self.texts = [prior.encode_text([prompt]) for prompt in self.prompts]
        self.dtype = preview_dtype(self.device)

    @torch.no_grad()
    def draw(
        self,
        unet: nn.Module,
        text: Text | None = None,
        *,
        title: str = "",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Image:
        """The grid of `unet` as a picture. text: what a model of form full was trained on, None for a text-free one.

        The UNet is used where and as it is. should_stop() ends the drawing after a row; the rest stays grey.
        """
        config, prior = self.config, self.prior
        size = ImageSize((config.resolution, config.resolution))
        untrained = None if text is not None else self._prior()
        rows = self._rows(unet, untrained, size, text)
        side = config.resolution // prior.factor
        noise = torch.cat(
            [
                torch.randn((1, prior.latent_channels, side, side), generator=torch.Generator().manual_seed(seed))
                for seed in self.seeds
            ]
        )
        sigmas = sigmas_uniform(prior.schedule, config.sample_steps).float()
        drawn: list[Tensor] = []
        for row in rows:
            if should_stop():
                break
            denoiser = MultiGuidance(row.guidance)
            latents = [
                sample(denoiser, part.to(self.device), sigmas, METHOD).float() for part in noise.split(self.batch)
            ]
            drawn.append(torch.cat(latents))
        del untrained
        with prior.autoencoder_on(self.device):
            pictures = [prior.decode(latents).cpu() for latents in drawn]
        grey = torch.zeros(len(noise), 3, config.resolution, config.resolution)
        pictures += [grey] * (len(rows) - len(pictures))
        return grid(pictures, [row.label for row in rows], [f"seed {seed}" for seed in self.seeds], title)

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.sample_count)

    def _prior(self) -> nn.Module:
        return self.prior.load_unet(self.dtype).to(self.device)

    def _rows(self, unet: nn.Module, untrained: nn.Module | None, size: ImageSize, text: Text | None) -> list[Row]:
        prior, config = self.prior, self.config
        null = self._cond(size, prior.null_text)
        conds = [self._cond(size, one) for one in self.texts]
        trained = Denoiser(_Autocast(unet, self.dtype), prior.schedule, prior.prediction_type)
        if untrained is None:
            assert text is not None
            if not self.prompts:
                return [Row("the model alone", cfg(trained, null, self._cond(size, text), 1.0))]
            return [
                Row(
                    f"{prompt or 'empty prompt'} (guidance {config.control_weight:g})",
                    cfg(trained, null, cond, config.control_weight),
                )
                for prompt, cond in zip(self.prompts, conds)
            ]
        before = Denoiser(untrained, prior.schedule, prior.prediction_type)
        if not self.prompts:
            return [
                Row("domain model alone", domain_guidance(before, trained, null, scale=1.0)),
                Row(
                    f"domain {config.domain_weight:g} against the prior",
                    domain_guidance(before, trained, null, scale=config.domain_weight),
                ),
            ]
        return [
            Row(
                f"{prompt or 'empty prompt'} (domain {config.domain_weight:g}, control {config.control_weight:g})",
                in_domain(before, trained, null, cond, config.domain_weight, config.control_weight),
            )
            for prompt, cond in zip(self.prompts, conds)
        ]

    def _cond(self, size: ImageSize, text: Text) -> Mapping[str, Tensor]:
        return {name: value.to(self.device) for name, value in self.prior.conditioning([size], text).items()}


class _Autocast(nn.Module):
    """A UNet in training, run in the precision of previews; its own fp32 weights stay as they are."""

    def __init__(self, unet: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet, self.dtype = unet, dtype

    def forward(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return self.unet(x, timesteps, **cond).float()


def preview_dtype(device: torch.device) -> torch.dtype:
    """bf16 on GPUs that have it, fp16 on those that do not, else fp32."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if computes_in_bf16(device) else torch.float16
