"""The log of a run: events as JSON lines, written and read."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from ...guidance.files import FileProblem
from ...guidance.plain_json import parse_json
from .events import Event, Failed, Finished, Preparing, Saved, Step, Stopped, event_from_dict
from .small_files import open_regular, read_lines


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
        if isinstance(event, Preparing) and event.done < event.total:
            return
        if isinstance(event, Step):
            self._losses.append(event.loss)
            self._parts.append(event.parts)
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
            names = dict.fromkeys(name for parts in self._parts for name in parts)
            parts = {name: _mean([parts[name] for parts in self._parts if name in parts]) for name in names}
            self._write(dataclasses.replace(self._last, loss=_mean(self._losses), parts=parts))
            self._losses.clear()
            self._parts.clear()
            self._last = None

    def _write(self, event: Event) -> None:
        # ASCII: a file's name in Python may hold what UTF-8 cannot.
        line = json.dumps({**event.to_dict(), "time": round(time.time(), 3)}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()


def _ends_torn(path: Path) -> bool:
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return size > 0 and file.read(1) != b"\n"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
