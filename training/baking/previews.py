"""Sample grids of a baking: plain CFG of the baked model beside the guidance it takes in, on the same seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...guidance.diffusion import Denoiser
from ...guidance.multi_guidance import MultiGuidance
from ...guidance.presets import cfg
from ..domain.previews import Autocast, draw_rows
from ..prior.prior import ImageSize
from .config import BakeConfig
from .teacher import Teacher

if TYPE_CHECKING:
    from PIL.Image import Image


class BakePreview:
    """Draws the grid of a baking: for each sample prompt a row of plain CFG and one of guidance, a column per seed.

    Without prompts both rows are of the empty prompt. batch: how many pictures are drawn at once. Raises ValueError for
    prompts that the prior cannot encode, when it is made and not in the middle of a run.
    """

    def __init__(self, config: BakeConfig, teacher: Teacher, dtype: torch.dtype, batch: int) -> None:
        self.config, self.teacher, self.dtype, self.batch = config, teacher, dtype, batch
        self.prompts = config.sample_prompts or ("",)
        self.texts = [teacher.prior.encode_text([prompt]) for prompt in self.prompts]

    def draw(self, unet: nn.Module, title: str, should_stop: Callable[[], bool] = lambda: False) -> Image | None:
        """The grid of a UNet in evaluation mode; None when should_stop() asks to stop between rows."""
        teacher = self.teacher
        return draw_rows(self._rows(unet), teacher.prior, self.config, teacher.device, self.batch, title, should_stop)

    def _rows(self, unet: nn.Module) -> list[tuple[str, MultiGuidance]]:
        """(what stands beside a row, the guidance it is sampled with)."""
        teacher, scale = self.teacher, self.config.control_weight
        prior, size = teacher.prior, [ImageSize((self.config.resolution, self.config.resolution))]
        baked = Denoiser(Autocast(unet, self.dtype), prior.schedule, prior.prediction_type)
        empty = prior.conditioning(size, prior.null_text, teacher.device)
        rows = []
        for prompt, text in zip(self.prompts, self.texts):
            prompted = prior.conditioning(size, text, teacher.device) if prompt else empty
            # With the whole guided prediction baked in, the model alone is CFG 1.
            alone = 1.0 if self.config.target == "guided" or not prompt else scale
            plain = cfg(baked, empty, prompted, alone)
            guided = teacher.guidance(empty, prompted, size, scale if prompt else None)
            label = prompt or "no prompt"
            rows.append((f"{label} (baked, CFG {alone:g})", teacher.guided(plain)))
            rows.append((f"{label} (guidance)", teacher.guided(guided)))
        return rows
