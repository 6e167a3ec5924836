"""What a training run reports, and who listens: the log, TensorBoard and the loss curve (a terminal: console.py).

Every event is a frozen dataclass of plain values; `to_dict` makes a JSON line of it and `event_from_dict` the event
again, so that a run in another process reports the same things.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ...guidance.errors import Problem
from ...guidance.files import FileProblem
from ...guidance.files.atomic import replacing
from ...guidance.plain_json import parse_json
from .lettering import default_font
from .small_files import open_regular, read_lines


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""

    def to_dict(self) -> dict[str, Any]:
        """`{"event": name, field: value, ...}` of JSON values; NaN and infinity, which JSON lacks, are None."""
        return {"event": type(self).__name__.lower(), **_finite(dataclasses.asdict(self))}


@dataclass(frozen=True)
class Started(Event):
    """The run begins: its folder, the resolved configuration, the step it continues from (0: anew), the estimate.

    An adaptation has no images; what trains is told with its estimate.
    """

    run: str
    config: Mapping[str, Any]
    step: int
    steps: int
    images: int
    estimate: str = ""


@dataclass(frozen=True)
class Caching(Event):
    """Images encoded (or found in the cache) so far."""

    done: int
    total: int


@dataclass(frozen=True)
class Measuring(Caching):
    """Passes of the prior for the form `constant` done so far."""


@dataclass(frozen=True)
class Step(Event):
    """An optimizer step is finished.

    loss: of its global batch; rate: learning rate; gradient_norm: before clipping, None where fp16 overflowed and the
    step was skipped; eta_s: seconds left, None at first.
    """

    step: int
    steps: int
    loss: float
    rate: float
    gradient_norm: float | None
    seconds_per_step: float
    eta_s: float | None = None


@dataclass(frozen=True)
class Distilled(Step):
    """An optimizer step of an adaptation: what else there is to tell of it.

    parts: by name, the mean timestep (`t`), the loss of every term (`sds`, `directional`, ...), the norm of its
    gradient on the latents (`norm sds`), the share of it that a clamp changed (`clamped sds`, `clamped image`), and 1
    for every layer that selection chose (`trained b8.conv0`).
    """

    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Validated(Event):
    """Loss on the held-out images: the mean over noise levels, and per timestep (its number as text)."""

    step: int
    loss: float
    per_level: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampled(Event):
    """A grid of samples was written."""

    step: int
    path: str


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint was written."""

    step: int
    path: str


@dataclass(frozen=True)
class Warned(Event):
    """Something the user should know that does not stop the run."""

    text: str


@dataclass(frozen=True)
class Stopped(Event):
    """The run was asked to stop: the step was finished and saved in `path` (empty: nothing was trained yet)."""

    step: int
    path: str


@dataclass(frozen=True)
class Finished(Event):
    """The run is complete: `path` is the domain model or the adapted generator."""

    step: int
    path: str


@dataclass(frozen=True)
class Failed(Event):
    """The run ended by an error after this step. In the log only: who called the run gets the error itself."""

    step: int
    text: str


EVENTS: dict[str, type[Event]] = {
    kind.__name__.lower(): kind
    for kind in (
        Started,
        Caching,
        Measuring,
        Step,
        Distilled,
        Validated,
        Sampled,
        Saved,
        Warned,
        Stopped,
        Finished,
        Failed,
    )
}
Listener = Callable[[Event], None]


def event_from_dict(values: Mapping[str, Any]) -> Event:
    """The event `to_dict` made. Raises Problem for anything else; unknown fields of a known event are ignored."""
    name = values.get("event") if isinstance(values, Mapping) else None
    kind = EVENTS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise Problem(f"Expected an event out of {', '.join(EVENTS)}, found {values!r:.80}.")
    known = {one.name: one.type for one in dataclasses.fields(kind)}
    values = {name: value for name, value in values.items() if name in known}
    if issubclass(kind, (Step, Validated)):  # a loss that JSON cannot hold
        values["loss"] = _number(values.get("loss"))
    for name in {Validated: ("per_level",), Distilled: ("parts",)}.get(kind, ()):
        numbers = values.get(name) or {}
        if isinstance(numbers, Mapping):
            values[name] = {one: _number(value) for one, value in numbers.items()}
    if not all(_fits(value, known[name]) for name, value in values.items()):
        raise Problem(f"Expected an event {name!r:.20} as this trainer writes it, found {values!r:.80}.")
    try:
        return kind(**values)
    except TypeError as error:
        raise Problem(f"Expected a complete {kind.__name__.lower()} event, found {values!r:.80}.") from error


def _fits(value: Any, wanted: str) -> bool:
    """Whether a field may hold a value, by what its dataclass says."""
    if wanted.startswith("Mapping"):
        return type(value) is dict and ("Any" in wanted or all(_fits(one, "float") for one in value.values()))
    if wanted == "str":
        return type(value) is str
    if value is None:
        return "None" in wanted
    # What no picture or sum can hold is no number of a run.
    return type(value) in ((int,) if wanted == "int" else (int, float)) and not abs(value) >= 2**63


def read_log(path: str | os.PathLike) -> list[Event]:
    """The events of a log.jsonl, oldest first; lines torn by a kill are left out. Empty where there is no file.

    Raises FileProblem for one that cannot be read.
    """
    events = []
    try:
        for line in read_lines(path):
            with suppress(ValueError):
                events.append(event_from_dict(parse_json(line)))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise FileProblem(
            f"{path}: cannot be read as a run's log ({error.strerror or error}); move it away to go on."
        ) from error
    return events


class LogFile:
    """Listener that appends events to a JSON-lines file, with the time.

    Steps are averaged: one line every `every` steps carries their mean loss, and one before a checkpoint or the end
    that of the steps since. A torn last line stays a line of its own.
    """

    def __init__(self, path: str | os.PathLike, every: int = 10) -> None:
        self.path, self.every = Path(path), every
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and _ends_torn(self.path)
        self._file: TextIO = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if torn:
            self._file.write("\n")
        self._losses: list[float] = []
        self._parts: list[Mapping[str, float]] = []
        self._last: Step | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Caching) and event.done < event.total:
            return
        if isinstance(event, Step):
            self._losses.append(event.loss)
            self._parts += [event.parts] if isinstance(event, Distilled) else []
            self._last = event
            if event.step % self.every == 0 or event.step == event.steps:
                self._write_steps()
            return
        if isinstance(event, (Saved, Stopped, Finished, Failed)):  # after a kill the run goes on from here
            self._write_steps()
        self._write(event)

    def close(self) -> None:
        try:
            self._write_steps()
        finally:
            self._file.close()

    def _write_steps(self) -> None:
        if self._last is not None:
            means: dict[str, Any] = {"loss": _mean(self._losses)}
            if self._parts:
                names = dict.fromkeys(name for parts in self._parts for name in parts)
                means["parts"] = {
                    name: _mean([parts[name] for parts in self._parts if name in parts]) for name in names
                }
            self._write(dataclasses.replace(self._last, **means))
            self._losses.clear()
            self._parts.clear()
            self._last = None

    def _write(self, event: Event) -> None:
        # ASCII: a file's name in Python may hold what UTF-8 cannot.
        line = json.dumps({**event.to_dict(), "time": round(time.time(), 3)}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()


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
            for name, value in getattr(event, "parts", {}).items():
                self._writer.add_scalar(f"distillation/{name.replace(' ', '_')}", value, event.step)
        elif isinstance(event, Validated):
            self._writer.add_scalar("held_out/loss", event.loss, event.step)
            for level, loss in event.per_level.items():
                self._writer.add_scalar(f"held_out/t{level}", loss, event.step)
        elif isinstance(event, Sampled):
            import numpy
            from PIL import Image

            with Image.open(event.path, formats=("PNG",)) as image:
                self._writer.add_image("samples", numpy.asarray(image.convert("RGB")), event.step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def describe(event: Event) -> str:
    """An event in one line (a start in several) for people."""
    if isinstance(event, Started):
        where = f"continues {event.run} at step {event.step}" if event.step else f"starts in {event.run}"
        head = f"training {where}: {event.images} images, {event.steps} steps"
        if "generator" in event.config:
            head = f"adaptation {where}: {event.steps} steps"
        return f"{head}\n{event.estimate}".rstrip()
    if isinstance(event, Measuring):
        return f"measuring the prior {_bar(event.done, event.total)} {event.done}/{event.total}"
    if isinstance(event, Caching):
        return f"latents {_bar(event.done, event.total)} {event.done}/{event.total}"
    if isinstance(event, Step):
        left = "" if event.eta_s is None else f", {duration(event.eta_s)} left"
        return (
            f"step {_bar(event.step, event.steps)} {event.step}/{event.steps}  loss {event.loss:.4f}  "
            f"{event.seconds_per_step:.3g} s/step{left}"
        )
    if isinstance(event, Validated):
        return f"held-out loss at step {event.step}: {event.loss:.4f}"
    if isinstance(event, Sampled):
        return f"samples at step {event.step}: {event.path}"
    if isinstance(event, Saved):
        return f"checkpoint at step {event.step}: {event.path}"
    if isinstance(event, Warned):
        return f"warning: {event.text}"
    if isinstance(event, Stopped):
        if not event.path:
            return "stopped before the first step; nothing was trained"
        return f"stopped after step {event.step}, saved in {event.path}; the same command with resume continues there"
    if isinstance(event, Finished):
        return f"finished after step {event.step}: {event.path}"
    if isinstance(event, Failed):
        return f"failed after step {event.step}: {event.text}"
    return str(event)


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 7 min, 3 h 05 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ends_torn(path: Path) -> bool:
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return size > 0 and file.read(1) != b"\n"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def _bar(done: int, total: int, width: int = 24) -> str:
    return f"[{'#' * (width * done // max(1, total)):<{width}}]"


class LossCurve:
    """Listener that keeps the losses and draws loss.png (with Pillow): the mean loss, and held-out losses as dots.

    `history`: events of an earlier part of the run; those after step `start` are dropped, because a run that was killed
    repeats them.
    """

    def __init__(self, path: str | os.PathLike, history: Iterable[Event] = (), start: int = 0, every: int = 10) -> None:
        self.path, self.every = Path(path), every
        self.train: dict[int, float] = {}
        self.held_out: dict[int, float] = {}
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
            self.held_out[event.step] = event.loss

    def draw(self) -> None:
        """Write the picture, complete or not at all; nothing while there is nothing to draw. Raises FileProblem."""
        if self.train or self.held_out:
            with replacing(self.path) as file:
                draw_losses(thinned(self.train), self.held_out).save(file, format="PNG")


def thinned(values: Mapping[int, float], most: int = 2000) -> dict[int, float]:
    """At most about `most` values by step: means of neighbours under the step of the last."""
    steps = sorted(values)
    size = -(-len(steps) // most)
    parts = [steps[at : at + size] for at in range(0, len(steps), size or 1)]
    return {part[-1]: sum(values[step] for step in part) / len(part) for part in parts}


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Running mean over `share` of the values on both sides (of few values over more), fewer at the ends."""
    reach = max(int(len(values) * share), min(10, len(values) // 8))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    result = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        result.append((sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
    return result


def draw_losses(train: Mapping[int, float], held_out: Mapping[int, float], width: int = 960, height: int = 480) -> Any:
    """The loss curve as a Pillow image: single steps grey, their running mean blue, held-out losses orange."""
    from PIL import Image, ImageDraw

    steps = sorted(train)
    mean = smoothed([train[step] for step in steps])
    # The range follows the means: single steps scatter widely and would flatten the curve.
    shown = sorted(mean + list(held_out.values()))
    spread = sorted(train.values())
    low = min(shown[0], spread[len(spread) // 20] if spread else shown[0])
    high = max(shown[-1], spread[len(spread) * 19 // 20] if spread else shown[-1])
    ticks = _ticks(low, high if high > low else low + max(abs(low) * 0.1, 1e-6))
    low, high = min(ticks[0], low), max(ticks[-1], high)
    first, last = min([*steps, *held_out]), max([*steps, *held_out])

    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), default_font(13)
    left, top, right, bottom = 70, 40, width - 24, height - 44

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + (right - left) * (step - first) / max(1, last - first)
        return x, min(max(bottom - (bottom - top) * (loss - low) / (high - low), top), bottom)

    for tick in ticks:
        y = place(first, tick)[1]
        draw.line([(left, y), (right, y)], fill=(225, 225, 225))
        draw.text((left - 8, y), f"{tick:g}", fill=(90, 90, 90), font=font, anchor="rm")
    for tick in _ticks(first, max(last, first + 1)):
        if first <= tick <= last and tick == int(tick):
            x = place(tick, low)[0]
            draw.line([(x, bottom), (x, bottom + 5)], fill=(90, 90, 90))
            draw.text((x, bottom + 8), f"{int(tick)}", fill=(90, 90, 90), font=font, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=(90, 90, 90))
    if len(steps) > 1:
        draw.line([place(step, train[step]) for step in steps], fill=(205, 213, 225), width=1)
        draw.line([place(step, loss) for step, loss in zip(steps, mean)], fill=(31, 95, 191), width=2)
    for step, loss in held_out.items():
        x, y = place(step, loss)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=(224, 124, 24))
    label = f"loss at step {last}: {mean[-1]:.4f}" if mean else f"loss at step {last}"
    if held_out:
        label += f"     held out: {held_out[max(held_out)]:.4f} (dots)"
    draw.text((left, 14), label, fill=(40, 40, 40), font=font)
    return image


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that cover low..high."""
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (size * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]
