"""Before/after grids of an adaptation: the source's images above the same latents of the generator as it is now."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...guidance.networks.stylegan2 import StyleGAN2, class_labels, latents_of_seeds
from ..engine.grids import grid
from .config import AdaptConfig

if TYPE_CHECKING:
    from PIL.Image import Image

TRUNCATION = 0.7  # of the latents
LARGEST_TILE = 256  # px; larger images are reduced


class BeforeAfter:
    """Draws the grid of a run: a column per seed, the source on top.

    Seeds are config.seed, config.seed + 1, ..., and mean what they mean in Generator Sample and `indomain sample`; a
    conditional generator shows its classes in turn, or the one that is trained on.
    """

    def __init__(self, config: AdaptConfig, source: StyleGAN2) -> None:
        self.config, self.seeds = config, range(config.seed, config.seed + config.sample_count)
        self.before = self._images(source)

    def draw(self, generator: StyleGAN2, step: int) -> Image:
        """The grid after `step`."""
        config, rows = self.config, {"before": self.before}
        if step > 0:
            rows[f"step {step}"] = self._images(generator)
        title = f"{config.name}: {config.prompt}" if config.prompt else config.name
        return grid(list(rows.values()), list(rows), [f"seed {seed}" for seed in self.seeds], title)

    @torch.no_grad()
    def _images(self, generator: StyleGAN2) -> Tensor:
        """The images of all seeds, [B, 3, h, w] in -1..1 on the CPU, drawn one at a time to save memory."""
        config, about, images = self.config, generator.config, []
        device = next(generator.parameters()).device
        noise = "none" if config.noise == "none" else "const"
        for number, seed in enumerate(self.seeds):
            c = None
            if about.c_dim:
                label = number % about.c_dim if config.label < 0 else config.label
                c = class_labels([label], about.c_dim).to(device)
            image = generator(latents_of_seeds([seed], about.z_dim).to(device), c, TRUNCATION, noise).float().cpu()
            if image.shape[-1] > LARGEST_TILE:
                image = interpolate(image, (LARGEST_TILE, LARGEST_TILE), mode="bicubic", antialias=True)
            images.append(image.expand(-1, 3, -1, -1))
        return torch.cat(images)
