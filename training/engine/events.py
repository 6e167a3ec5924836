"""What a run reports, as events.

An event is a frozen dataclass of plain values; `to_dict` makes a JSON line of it and `event_from_dict` the event again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...guidance.errors import Problem

LOSS = "loss"


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""

    def to_dict(self) -> dict[str, Any]:
        """`{"event": name, field: value, ...}` of JSON values; NaN and infinity, which JSON lacks, are None."""
        return {"event": type(self).__name__.lower(), **_finite(dataclasses.asdict(self))}


@dataclass(frozen=True)
class Started(Event):
    """The run begins: its kind, folder and resolved configuration, the step it continues from (0: anew), the estimate.

    images: how many it learns from; 0 for kinds of run without any.
    """

    kind: str
    run: str
    config: Mapping[str, Any]
    step: int
    steps: int
    images: int
    estimate: str = ""


@dataclass(frozen=True)
class Preparing(Event):
    """Work before the first step, such as "encoding images": how much is done, of how much."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Step(Event):
    """An optimizer step is finished.

    loss: of its global batch; rate: learning rate; gradient_norm: before clipping, None where fp16 overflowed and the
    step was skipped; eta_s: seconds left, None at first. parts: what else a kind of run tells of its steps, by name,
    such as the losses that make up the whole.
    """

    step: int
    steps: int
    loss: float
    rate: float
    gradient_norm: float | None
    seconds_per_step: float
    eta_s: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Validated(Event):
    """What the model is like on the held-out images: the mean over noise levels, and per timestep (a number as text).

    what: the number's name; other numbers than losses are drawn on a scale of their own.
    """

    step: int
    loss: float
    per_level: Mapping[str, float] = field(default_factory=dict)
    what: str = LOSS


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
    """The run is complete: `path` is its file."""

    step: int
    path: str


@dataclass(frozen=True)
class Failed(Event):
    """The run ended by an error after this step. In the log only: the caller of the run gets the error itself."""

    step: int
    text: str


EVENTS: dict[str, type[Event]] = {kind.__name__.lower(): kind for kind in Event.__subclasses__()}
Listener = Callable[[Event], None]


def event_from_dict(values: Mapping[str, Any]) -> Event:
    """The event `to_dict` made. Raises Problem for anything else; unknown fields of a known event are ignored."""
    name = values.get("event") if isinstance(values, Mapping) else None
    kind = EVENTS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise Problem(f"Expected an event out of {', '.join(EVENTS)}, found {values!r:.80}.")
    known = {own.name: str(own.type) for own in dataclasses.fields(kind)}
    values = {name: value for name, value in values.items() if name in known}
    for name, missing in (("loss", None), ("per_level", {}), ("parts", {})):
        if name in known:
            values[name] = _or_nan(values.get(name, missing))
    if not all(_fits(value, known[name]) for name, value in values.items()):
        raise Problem(f"Expected an event {name!r:.20} as this trainer writes it, found {values!r:.80}.")
    try:
        return kind(**values)
    except TypeError as error:
        raise Problem(f"Expected a complete {kind.__name__.lower()} event, found {values!r:.80}.") from error


def _fits(value: Any, wanted: str) -> bool:
    """Whether a field may hold a value, by what its dataclass says."""
    if wanted.startswith("Mapping"):
        return type(value) is dict and ("Any" in wanted or all(_fits(part, "float") for part in value.values()))
    if wanted == "str":
        return type(value) is str
    if value is None:
        return "None" in wanted
    # What no picture or sum can hold is no number of a run.
    return type(value) in ((int,) if wanted == "int" else (int, float)) and not abs(value) >= 2**63


def describe(event: Event) -> str:
    """An event in one line (a start in several) for people."""
    if isinstance(event, Started):
        where = f"continues {event.run} at step {event.step}" if event.step else f"starts in {event.run}"
        images = f"{event.images} images, " if event.images else ""
        return f"{event.kind} {where}: {images}{event.steps} steps\n{event.estimate}".rstrip()
    if isinstance(event, Preparing):
        return f"{event.what} {_bar(event.done, event.total)} {event.done}/{event.total}"
    if isinstance(event, Step):
        left = "" if event.eta_s is None else f", {duration(event.eta_s)} left"
        return (
            f"step {_bar(event.step, event.steps)} {event.step}/{event.steps}  loss {event.loss:.4f}  "
            f"{event.seconds_per_step:.3g} s/step{left}"
        )
    if isinstance(event, Validated):
        return f"held-out {event.what} at step {event.step}: {event.loss:.4f}"
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
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _or_nan(value: Any) -> Any:
    """Numbers out of JSON, where None stands for one that it cannot hold."""
    if isinstance(value, dict):
        return {name: _or_nan(part) for name, part in value.items()}
    return math.nan if value is None else value


def _bar(done: int, total: int, width: int = 24) -> str:
    return f"[{'#' * (width * done // max(1, total)):<{width}}]"
