"""The paths that a pattern of braces and wildcards stands for: few enough, one after the other, and as on the disk."""

from __future__ import annotations

import itertools
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from glob import has_magic
from pathlib import Path

from .problems import DataProblem
from .walking import Watch, walk

MOST_NAMES = 100_000  # that one pattern may stand for
MOST_CHARACTERS = 2**16  # of a pattern
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def expanded(pattern: str, watch: Watch | None = None) -> Iterator[Path]:
    """The paths a pattern stands for; itself where a file or folder has that very name.

    Braces ``{0000..0003}`` and ``{train,more}``, the wildcards ``*``, ``?``, ``[...]`` and ``**`` (folders at any
    depth, links followed once) and ``~`` are expanded; wildcards pass over hidden names. A name that another system
    wrote in another way, with backslashes or its accents composed otherwise, is found under the way it is written on
    this disk. Raises DataProblem for an empty pattern, for one that nothing fits, for one of more than MOST_NAMES names
    (before any is looked at where braces alone say so), and what `Watch.look` does.
    """
    if not pattern:
        raise DataProblem("Expected a folder of images or a shard, found an empty path; . is the folder you are in.")
    if len(pattern) > MOST_CHARACTERS:
        raise DataProblem(f"Expected a path of at most {MOST_CHARACTERS:,} characters, found {len(pattern):,}.")
    watch, path = watch or Watch(), pattern
    with suppress(ValueError):  # a user whose name is no text that systems know
        path = os.path.expanduser(pattern)
    if os.path.exists(path):
        yield Path(path)
        return
    found = 0
    for one in _without_braces(path):
        watch.look()
        if os.path.exists(one) or not has_magic(one):
            matches = iter([Path(one) if os.path.lexists(one) else as_on_disk(one, watch)])
        else:
            matches = _matches(one, watch)
        fits = 0
        for fits, match in enumerate(matches, start=1):  # noqa: B007
            yield match
        if not fits:
            raise DataProblem(f"{one}: expected images or shards, found nothing that fits the pattern; check the path.")
        found += fits
        if found > MOST_NAMES:
            raise _too_many(pattern, found)


def as_on_disk(path: str, watch: Watch) -> Path:
    """The path as this disk writes it: accents composed otherwise, backslashes; itself where there is no such one."""
    for one in dict.fromkeys((path, path.replace("\\", "/"))):
        found = _written(one, lambda name: unicodedata.normalize("NFC", name), watch)
        if found is not None:
            return found
    return Path(path)


def nearly(path: str, watch: Watch) -> Path | None:
    """A file or folder whose path differs only in capital letters and in spaces and dots at the end of a name."""
    return _written(path, lambda name: unicodedata.normalize("NFC", name).casefold().strip(" ").rstrip("."), watch)


def _written(path: str, key: Callable[[str], str], watch: Watch) -> Path | None:
    """The first path that is there and allowed, and whose names are equal to those of `path` by `key`."""
    where = Path(path).anchor
    for part in Path(path).parts[1 if where else 0 :]:
        there = os.path.join(where, part)
        if not os.path.lexists(there):
            try:
                with os.scandir(where or ".") as listing:
                    twins = sorted(entry.name for entry in listing if key(entry.name) == key(part))
            except (OSError, ValueError):
                return None
            if not twins:
                return None
            there = os.path.join(where, twins[0])
        where = there
    return Path(where) if watch.allows(where) else None


def _too_many(pattern: str, count: int) -> DataProblem:
    return DataProblem(
        f"{pattern}: expected a pattern of at most {MOST_NAMES:,} names, found one of {_count(count)}; name the folder "
        "that they lie in."
    )


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**12 else "more than a trillion"


def _without_braces(pattern: str) -> Iterator[str]:
    parts = BRACES.split(pattern)  # text, choice, text, choice, ..., text
    choices = [[part] if index % 2 == 0 else _choices(part) for index, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MOST_NAMES:
        raise _too_many(pattern, math.prod(map(len, choices)))
    return map("".join, itertools.product(*choices))


class _Numbers:
    """The numbers of ``{first..last}`` as texts, made when asked for."""

    def __init__(self, first: str, last: str) -> None:
        step = 1 if int(last) >= int(first) else -1
        self._width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        self._numbers = range(int(first), int(last) + step, step)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return (str(number).zfill(self._width) for number in self._numbers)


def _choices(inside: str) -> list[str] | _Numbers:
    numbers = RANGE.fullmatch(inside)
    if numbers is not None:
        return _Numbers(*numbers.groups())
    return inside.split(",") if "," in inside else ["{" + inside + "}"]


def _matches(pattern: str, watch: Watch) -> Iterator[Path]:
    """The paths that fit a pattern's wildcards, level by level, each folder once."""
    path = Path(pattern)
    level = [path.anchor] if path.anchor else [""]
    parts = path.parts[1 if path.anchor else 0 :]
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        deeper: dict[str, str] = {}
        for folder in level:
            for one in _step_into(folder, part, last, watch):
                watch.look()
                # What lies elsewhere by a link or by ".." counts once per level, or "*/../*/.." would have no end.
                deeper.setdefault(one if last else os.path.realpath(one), one)
                if len(deeper) > MOST_NAMES:
                    raise _too_many(pattern, len(deeper))
        level = list(deeper.values())
    return map(Path, sorted(level))


def _step_into(folder: str, part: str, last: bool, watch: Watch) -> Iterator[str]:
    """What fits one name of a pattern in a folder; all but the last name stand for folders."""
    if part == "**":
        yield folder
        for step in walk(Path(folder or "."), watch, lambda name: name.startswith(".")):
            for end in range(1, len(step.parts)):
                yield os.path.join(folder, *step.parts[:end])
            if last and step.kind == "file":
                yield os.path.join(folder, *step.parts)
    elif not has_magic(part):
        there = os.path.join(folder, part)
        if os.path.lexists(there) if last else os.path.isdir(there):
            yield there
    elif watch.allows(folder or "."):
        with suppress(OSError), os.scandir(folder or ".") as listing:
            for entry in listing:
                watch.look()
                hidden = entry.name.startswith(".") and not part.startswith(".")
                if not hidden and fnmatch(entry.name, part) and (last or entry.is_dir()):
                    yield os.path.join(folder, entry.name)
