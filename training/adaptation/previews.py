"""Before/after grids of an adaptation: the source's images above the same latents at stages of the run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...guidance.files.atomic import replacing
from ...guidance.networks.seeds import latents_of_seeds
from ...guidance.networks.stylegan2 import StyleGAN2
from ..engine.grids import grid
from .config import AdaptConfig

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS = "rows"
ROWS_SHOWN = 4  # stages of the run in a grid, beside the source
TRUNCATION = 0.7  # of the latents
LARGEST_TILE = 256  # px; larger images are reduced
ROW_NAME = re.compile(r"step-(\d+)\.png")


class BeforeAfter:
    """Draws the grid of a run: a column per seed, the source on top, below it stages of the run up to now.

    Seeds are config.seed, config.seed + 1, ..., and mean what they mean in Generator Sample and `indomain sample`; a
    conditional generator shows its classes in turn, or the one that is trained on. Each stage is kept as a strip of
    images in `folder`/rows, so that a run that goes on shows its past. anew: the run begins, and what an earlier
    try left there goes.
    """

    def __init__(self, config: AdaptConfig, source: StyleGAN2, folder: Path, *, anew: bool = False) -> None:
        self.config, self.folder = config, folder / ROWS
        if anew:
            for path in self._strips().values():
                path.unlink(missing_ok=True)
        self.before = self._strip(source)

    def draw(self, generator: StyleGAN2, step: int) -> Image:
        """The grid after `step`, whose stage is kept."""
        config = self.config
        if step > 0:
            self._keep(self._strip(generator), step)
        kept = {at: self._read(path) for at, path in sorted(self._strips().items()) if at <= step}
        strips = {at: strip for at, strip in kept.items() if strip is not None}
        stages = evenly(list(strips), ROWS_SHOWN)
        pictures = [_tiles(strip, config.sample_count) for strip in (self.before, *(strips[at] for at in stages))]
        labels = ["before", *(f"step {at}" for at in stages)]
        title = f"{config.name}: {config.prompt}" if config.prompt else config.name
        return grid(pictures, labels, [f"seed {seed}" for seed in self.seeds], title)

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.sample_count)

    @torch.no_grad()
    def _strip(self, generator: StyleGAN2) -> np.ndarray:
        """The images of all seeds side by side, [h, w, 3] in 8 bits."""
        from PIL import Image

        config, about = self.config, generator.config
        device = next(generator.parameters()).device
        noise, images = "none" if config.noise == "none" else "const", []
        for number, seed in enumerate(self.seeds):  # one at a time, to save memory
            z = latents_of_seeds([seed], about.z_dim).to(device)
            c = None
            if about.c_dim:
                c = torch.eye(about.c_dim)[[number % about.c_dim if config.label < 0 else config.label]].to(device)
            pixels = generator(z, c, TRUNCATION, noise)[0].expand(3, -1, -1)
            values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            image = Image.fromarray(np.ascontiguousarray(values))
            if image.width > LARGEST_TILE:
                image = image.resize((LARGEST_TILE, LARGEST_TILE), Image.Resampling.LANCZOS)
            images.append(np.asarray(image))
        return np.concatenate(images, axis=1)

    def _strips(self) -> dict[int, Path]:
        """The kept stages' files, by step."""
        found = ((ROW_NAME.fullmatch(path.name), path) for path in self.folder.glob("step-*.png"))
        return {int(name[1]): path for name, path in found if name}

    def _keep(self, strip: np.ndarray, step: int) -> None:
        from PIL import Image

        with replacing(self.folder / f"step-{step:06d}.png") as file:
            Image.fromarray(strip).save(file, format="PNG")

    def _read(self, path: Path) -> np.ndarray | None:
        """A kept strip; None for one of other sizes, or no picture at all."""
        from PIL import Image

        try:
            with Image.open(path, formats=("PNG",)) as image:
                values = np.asarray(image.convert("RGB"))
        except OSError:  # no picture, or one that was cut off
            return None
        return values if values.shape == self.before.shape else None


def evenly(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, the last among them, spread over the whole."""
    if len(steps) <= count:
        return list(steps)
    return [steps[-1 - round(index * len(steps) / count)] for index in reversed(range(count))]


def _tiles(strip: np.ndarray, count: int) -> Tensor:
    """A strip as images [B, 3, h, w] in -1..1."""
    pixels = torch.from_numpy(np.array(strip)).float() / 127.5 - 1
    return torch.stack(pixels.permute(2, 0, 1).chunk(count, dim=2))
