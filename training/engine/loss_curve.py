"""The loss curve of a run as a picture: loss.png."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ...guidance.files import FileProblem
from ...guidance.files.atomic import replacing
from .events import LOSS, Event, Finished, Saved, Step, Stopped, Validated

if TYPE_CHECKING:
    from PIL.Image import Image


WIDTH, HEIGHT = 960, 480  # px
MEANS = 100  # points of the blue line


class LossCurve:
    """Listener that keeps the losses and draws loss.png (with Pillow): the mean loss, and what was validated as dots.

    `history`: events of an earlier part of the run; those after step `start` are dropped, because a run that was killed
    repeats them.
    """

    def __init__(self, path: str | os.PathLike, history: Iterable[Event] = (), start: int = 0) -> None:
        self.path = Path(path)
        self.train: dict[int, float] = {}
        self.held_out: dict[int, float] = {}
        self.what = LOSS
        for event in history:
            if getattr(event, "step", 0) <= start:
                self._keep(event)

    def __call__(self, event: Event) -> None:
        self._keep(event)
        if isinstance(event, (Validated, Saved, Stopped, Finished)):
            # On Windows a viewer may hold the picture; the next event draws it again, a full disk is told by others.
            with suppress(FileProblem):
                self.draw()

    def _keep(self, event: Event) -> None:
        if isinstance(event, Step) and math.isfinite(event.loss):
            self.train[event.step] = event.loss
        elif isinstance(event, Validated) and math.isfinite(event.loss):
            self.held_out[event.step], self.what = event.loss, event.what

    def draw(self) -> None:
        """Write the picture, complete or not at all; nothing while there is nothing to draw. Raises FileProblem."""
        if self.train or self.held_out:
            with replacing(self.path) as file:
                draw_losses(thinned(self.train), self.held_out, self.what).save(file, format="PNG")


def thinned(values: Mapping[int, float], most: int = 2000) -> dict[int, float]:
    """At most about `most` values by step: means of neighbours under the step of the last."""
    steps = sorted(values)
    size = -(-len(steps) // most)
    parts = [steps[at : at + size] for at in range(0, len(steps), size or 1)]
    return {part[-1]: sum(values[step] for step in part) / len(part) for part in parts}


def draw_losses(train: Mapping[int, float], held_out: Mapping[int, float], what: str = LOSS) -> Image:
    """The loss curve as a Pillow image: single steps grey, means of neighbours blue, held-out numbers orange.

    what: those numbers' name; other numbers than losses have a scale of their own, at the right.
    """
    from PIL import Image, ImageDraw, ImageFont

    steps, means = sorted(train), thinned(train, MEANS)
    # The range follows the means: single steps scatter widely and would flatten the curve.
    spread, apart = sorted(train.values()), what != LOSS
    usual = [spread[len(spread) // 20], spread[len(spread) * 19 // 20]] if spread else []
    left_scale = _ticks_over([*means.values(), *usual, *(() if apart and usual else held_out.values())])
    right_scale = _ticks_over(held_out.values()) if apart and held_out else left_scale
    first, last = min([*steps, *held_out]), max([*steps, *held_out])

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    left, top, right, bottom = 70, 40, WIDTH - (70 if apart else 24), HEIGHT - 44

    def place(step: float, value: float, scale: list[float] = left_scale) -> tuple[float, float]:
        x = left + (right - left) * (step - first) / max(1, last - first)
        return x, min(max(bottom - (bottom - top) * (value - scale[0]) / (scale[-1] - scale[0]), top), bottom)

    for tick in left_scale:
        y = place(first, tick)[1]
        draw.line([(left, y), (right, y)], fill=(225, 225, 225))
        draw.text((left - 8, y), f"{tick:g}", fill=(90, 90, 90), font=font, anchor="rm")
    for tick in right_scale if apart else ():
        y = place(last, tick, right_scale)[1]
        draw.text((right + 8, y), f"{tick:g}", fill=(224, 124, 24), font=font, anchor="lm")
    for tick in _ticks(first, max(last, first + 1)):
        if first <= tick <= last and tick == int(tick):
            x = place(tick, left_scale[0])[0]
            draw.line([(x, bottom), (x, bottom + 5)], fill=(90, 90, 90))
            draw.text((x, bottom + 8), f"{int(tick)}", fill=(90, 90, 90), font=font, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=(90, 90, 90))
    if len(steps) > 1:
        draw.line([place(step, train[step]) for step in steps], fill=(205, 213, 225), width=1)
        draw.line([place(step, loss) for step, loss in means.items()], fill=(31, 95, 191), width=2)
    for step, value in held_out.items():
        x, y = place(step, value, right_scale)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=(224, 124, 24))
    label = f"loss at step {last}" + (f": {means[steps[-1]]:.4f}" if steps else "")
    if held_out:
        label += f"     held-out {what}: {held_out[max(held_out)]:.4f} (dots)"
    draw.text((left, 14), label, fill=(40, 40, 40), font=font)
    return image


def _ticks_over(values: Iterable[float]) -> list[float]:
    """Round numbers, the first and last of which hold all values between them."""
    low, high = min(values := list(values)), max(values)
    return _ticks(low, high if high > low else low + max(abs(low) * 0.1, 1e-6))


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that cover low..high."""
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (size * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]
