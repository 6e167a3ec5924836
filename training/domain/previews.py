"""Sample grids of a model in training: fixed seeds, multi-guidance against the prior (arXiv 2312.08195), labelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    from .picture_settings import PictureSettings

METHOD = "dpmpp_2m"  # as the paper samples


class Preview:
    """Draws the grid of a run: a row per prompt, a column per seed, always from the same noise.

    Rows follow `config.sample_prompts`: multi-guidance of prior, domain model and prompt with the configured weights.
    Without prompts there are two rows, the domain model alone, and the domain model against the prior. A model that
    takes text (form full) is sampled with its own classifier-free guidance instead, since that is how it is used.
    Seeds are config.seed, config.seed + 1, ... batch: how many are drawn at once, None for the configuration's.

    The prior is built for a drawing and let go again, so that training keeps the memory. Raises ValueError for prompts
    that the prior cannot encode, when it is made and not in the middle of a run.
    """

    def __init__(
        self, prior: Prior, config: TrainConfig, device: torch.device | str = "cpu", batch: int | None = None
    ) -> None:
        self.prior, self.config = prior, config
        self.batch = config.batch_size if batch is None else batch
        self.device = torch.device(device)
        self.texts = [(prompt or "empty prompt", prior.encode_text([prompt])) for prompt in config.sample_prompts]
        self.dtype = preview_dtype(self.device)

    @torch.no_grad()
    def draw(
        self,
        unet: nn.Module,
        text: Text | None = None,
        *,
        title: str = "",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Image | None:
        """The grid of `unet` as a picture. text: what a model of form full was trained on, None for a text-free one.

        The UNet is used where and as it is. None where should_stop(), asked before every row, broke the drawing off.
        """
        rows = [(label, MultiGuidance(guidance)) for label, guidance in self._rows(unet, text)]
        return draw_rows(rows, self.prior, self.config, self.device, self.batch, title, should_stop)

    def _rows(self, unet: nn.Module, text: Text | None) -> list[tuple[str, Guidance]]:
        """(what stands beside a row, the guidance it is sampled with)."""
        prior, domain, control = self.prior, self.config.domain_weight, self.config.control_weight
        size = ImageSize((self.config.resolution, self.config.resolution))
        null = prior.conditioning([size], prior.null_text, self.device)
        conds = [(prompt, prior.conditioning([size], encoded, self.device)) for prompt, encoded in self.texts]
        trained = Denoiser(Autocast(unet, self.dtype), prior.schedule, prior.prediction_type)
        if text is not None:
            own = prior.conditioning([size], text, self.device)
            rows = [(f"{prompt} (guidance {control:g})", cfg(trained, null, cond, control)) for prompt, cond in conds]
            return rows or [("the model alone", cfg(trained, null, own, 1.0))]
        before = Denoiser(self._prior(), prior.schedule, prior.prediction_type)
        told = f"(domain {domain:g}, control {control:g})"
        rows = [(f"{prompt} {told}", in_domain(before, trained, null, cond, domain, control)) for prompt, cond in conds]
        return rows or [
            ("domain model alone", domain_guidance(before, trained, null, scale=1.0)),
            (f"domain {domain:g} against the prior", domain_guidance(before, trained, null, scale=domain)),
        ]

    def _prior(self) -> nn.Module:
        return self.prior.load_unet(self.dtype).to(self.device)


@torch.no_grad()
def draw_rows(
    rows: Sequence[tuple[str, MultiGuidance]],
    prior: Prior,
    config: PictureSettings,
    device: torch.device,
    batch: int,
    title: str,
    should_stop: Callable[[], bool],
) -> Image | None:
    """A grid of rows, each what stands beside it and a guidance to sample with, and a column per seed.

    batch: how many are drawn at once. None where should_stop(), asked before every row, broke the drawing off.
    """
    side, seeds = config.resolution, range(config.seed, config.seed + config.sample_count)
    noise, sigmas = prior.noise(seeds, side, side), sigmas_uniform(prior.schedule, config.sample_steps).float()
    drawn: list[Tensor] = []
    for _, guidance in rows:
        if should_stop():
            return None
        parts = [part.to(device) for part in noise.split(batch)]
        drawn.append(torch.cat([sample(guidance, part, sigmas, METHOD).float() for part in parts]))
    with prior.autoencoder_on(device):
        pictures = [prior.decode(latents).cpu() for latents in drawn]
    return grid(pictures, [label for label, _ in rows], [f"seed {seed}" for seed in seeds], title)


class Autocast(nn.Module):
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
