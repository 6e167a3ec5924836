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
HOW = "indomain"  # PNG text field that says how a strip was drawn
LARGEST_TILE = 256  # px; larger images are reduced
ROW_NAME = re.compile(r"step-(\d+)\.png")


class BeforeAfter:
    """Draws the grid of a run: a column per seed, the source on top, below it stages of the run up to now.

    Seeds are config.seed, config.seed + 1, ..., and mean what they mean in Generator Sample and `indomain sample`; a
    conditional generator shows its classes in turn, or the one that is trained on. Each stage is kept as a strip of
    images in `folder`/rows, with how it was drawn, so that a run that goes on shows its past.
    anew: whether the run begins, and stages that an earlier try left in the folder are none of its own.
    """

    def __init__(self, config: AdaptConfig, source: StyleGAN2, folder: Path, *, anew: bool = False) -> None:
        self.config, self.folder = config, folder / ROWS
        if anew:
            for path in self._strips():
                path.unlink(missing_ok=True)
        self.before = self._strip(source)

    def draw(self, generator: StyleGAN2, step: int) -> Image:
        """The grid after `step`, whose stage is kept."""
        config = self.config
        if step > 0:
            self._keep(self._strip(generator), self._path(step))
        stages = evenly([at for at in self._kept() if at <= step], ROWS_SHOWN)
        rows = [self.before, *(self._read(at) for at in stages)]
        labels = ["before", *(f"step {at}" for at in stages)]
        title = f"{config.name}: {config.prompt}" if config.prompt else config.name
        pictures = [_tiles(row, config.sample_count) for row in rows]
        return grid(pictures, labels, [f"seed {one}" for one in self.seeds], title)

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.sample_count)

    @torch.no_grad()
    def _strip(self, generator: StyleGAN2) -> np.ndarray:
        """The images of all seeds side by side, [h, w, 3] in 8 bits."""
        from PIL import Image

        config, about = self.config, generator.config
        device = next(generator.parameters()).device
        images = []
        for number, seed in enumerate(self.seeds):  # one at a time, to save memory
            z = latents_of_seeds([seed], about.z_dim).to(device)
            c = None
            if about.c_dim:
                c = torch.eye(about.c_dim)[[number % about.c_dim if config.label < 0 else config.label]].to(device)
            pixels = generator(z, c, config.sample_truncation, self._noise)[0].expand(3, -1, -1)
            values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            image = Image.fromarray(np.ascontiguousarray(values))
            if image.width > LARGEST_TILE:
                image = image.resize((LARGEST_TILE, LARGEST_TILE), Image.Resampling.LANCZOS)
            images.append(np.asarray(image))
        return np.concatenate(images, axis=1)

    @property
    def _noise(self) -> str:
        return "none" if self.config.noise == "none" else "const"

    @property
    def _how(self) -> str:
        """How strips are drawn: those of other latents or settings do not belong under one heading."""
        return f"latents of seeds, truncation {self.config.sample_truncation!r}, noise {self._noise}"

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.png"

    def _strips(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*.png") if ROW_NAME.fullmatch(path.name)]

    def _kept(self) -> list[int]:
        """The steps whose stages can be shown: drawn as the source's row is, and as wide."""
        steps = (int(ROW_NAME.fullmatch(path.name)[1]) for path in self._strips())
        return sorted(step for step in steps if self._read(step) is not None)

    def _keep(self, strip: np.ndarray, path: Path) -> None:
        from PIL import Image, PngImagePlugin

        text = PngImagePlugin.PngInfo()
        text.add_text(HOW, self._how)
        with replacing(path) as file:
            Image.fromarray(strip).save(file, format="PNG", pnginfo=text)

    def _read(self, step: int) -> np.ndarray | None:
        from PIL import Image

        try:
            with Image.open(self._path(step), formats=("PNG",)) as image:
                values, how = np.asarray(image.convert("RGB")), image.info.get(HOW)
        except OSError:  # no picture, or one that was cut off
            return None
        return values if values.shape == self.before.shape and how == self._how else None


def evenly(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, the last among them, spread over the whole."""
    if len(steps) <= count:
        return list(steps)
    return [steps[-1 - round(index * len(steps) / count)] for index in reversed(range(count))]


def _tiles(strip: np.ndarray, count: int) -> Tensor:
    """A strip as images [B, 3, h, w] in -1..1."""
    pixels = torch.from_numpy(np.array(strip)).float() / 127.5 - 1
    return torch.stack(pixels.permute(2, 0, 1).chunk(count, dim=2))
