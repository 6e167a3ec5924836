"""Content hash and size of image files that were read before, so that a run need not read all again.

As in git's index, an entry counts as long as path, length and both times of change stay the same. Any process may
append lines of JSON; lines that cannot be read are skipped, and without the file everything is read again.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...guidance.plain_json import parse_json
from ..engine.small_files import read_lines
from .sources import Entry

# A file changed this recently may change again without its time of change moving on.
SETTLED_NS = 3_000_000_000
LONGEST_LINE = 2**16  # bytes; a path has 4,096, each of which JSON may write as six
LARGEST = 2**63
INDEX = "content-index.jsonl"  # its name in the cache folder
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Known:
    """SHA-256 of an image file's content, and its picture's height and width in pixels after orientation."""

    content: str
    height: int
    width: int


class ContentIndex:
    """The index in one file. Any thread may look up while one other adds; adding and closing are for one thread."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._known: dict[str, tuple[tuple[int, ...], Known]] = {}  # bytes and times; replaced, never changed
        self._new: list[str] = []
        with suppress(OSError):
            for line in read_lines(self.path, LONGEST_LINE):
                with suppress(ValueError):
                    entry = _entry(parse_json(line))
                    if entry is not None:
                        self._known[entry[0]] = entry[1]

    def look_up(self, entry: Entry) -> Known | None:
        """What is known about the entry's present content; None when it is new or has changed."""
        stamp = entry.stamp()
        if stamp is None:
            return None
        state, known = self._known.get(stamp[0], ((), None))
        return known if state == stamp[1:] else None

    def add(self, stamp: tuple[str, int, int, int] | None, known: Known) -> None:
        """Remember what was read from a file. stamp: the entry's from before it was read."""
        if stamp is None or time.time_ns() - stamp[2] < SETTLED_NS:
            return
        where, *state = stamp
        self._known[where] = tuple(state), known
        self._new.append(_line(where, state, known))

    def close(self) -> None:
        """Append what is new. Failing is no harm."""
        lines, self._new = self._new, []
        with suppress(OSError):
            if lines:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # One write of a file opened for appending: lines of two processes do not mix on local disks.
                with open(self.path, "ab", buffering=0) as file:
                    file.write("".join(("\n", *lines)).encode("utf-8"))  # apart from a line torn before


def _entry(found: Any) -> tuple[str, tuple[tuple[int, ...], Known]] | None:
    """What a line says; None for one that `_line` did not write."""
    if not isinstance(found, list) or [type(value) for value in found] != [str, int, int, int, str, int, int]:
        return None
    where, size, changed, moved, content, height, width = found
    if not HASH.fullmatch(content) or min(height, width) < 1 or max(map(abs, (*found[1:4], height, width))) >= LARGEST:
        return None
    return where, ((size, changed, moved), Known(content, height, width))


def _line(where: str, state: Sequence[int], known: Known) -> str:
    return json.dumps([where, *state, known.content, known.height, known.width]) + "\n"
