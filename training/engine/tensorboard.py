"""The optional listener for TensorBoard."""

from __future__ import annotations

import os

from ...guidance.errors import Problem
from .events import Event, Sampled, Step, Validated


class TensorBoard:
    """Listener that writes scalars and sample grids for TensorBoard (optional package tensorboard).

    start: the step that the run goes on from; what a killed run wrote of later ones is hidden. None: all stays.
    """

    def __init__(self, folder: str | os.PathLike, every: int = 10, start: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise Problem(
                "tensorboard: expected the package tensorboard, which is not installed; pip install tensorboard, or "
                "turn the option off (log.jsonl and loss.png are always written)."
            ) from error
        self.every = every
        self._writer = SummaryWriter(str(folder), purge_step=None if start is None else start + 1)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step) and (event.step % self.every == 0 or event.step == event.steps):
            for name in ("loss", "rate", "gradient_norm", "seconds_per_step"):
                if getattr(event, name) is not None:
                    self._writer.add_scalar(f"train/{name}", getattr(event, name), event.step)
            for name, value in event.parts.items():
                self._writer.add_scalar(f"parts/{name.replace(' ', '_')}", value, event.step)
        elif isinstance(event, Validated):
            self._writer.add_scalar(f"held_out/{event.what.replace(' ', '_')}", event.loss, event.step)
            for level, loss in event.per_level.items():
                self._writer.add_scalar(f"held_out/t{level}", loss, event.step)
        elif isinstance(event, Sampled):
            import numpy
            from PIL import Image

            with Image.open(event.path, formats=("PNG",)) as image:
                self._writer.add_image("samples", numpy.asarray(image.convert("RGB")), event.step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
