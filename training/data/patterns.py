"""The paths that a pattern of braces and wildcards stands for, bounded in number and spelled as on the disk."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from glob import has_magic
from pathlib import Path

from ..engine.paths import composed, found_as
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
    watch, path, found = watch or Watch(), pattern, 0
    with suppress(ValueError):  # a user whose name is no text that systems know
        path = os.path.expanduser(pattern)
    if os.path.exists(path):
        yield Path(path)
        return
    for name in _without_braces(path):
        watch.look()
        if os.path.lexists(name):
            matches = [Path(name)]
        else:
            matches = _matches(name, watch) if has_magic(name) else [as_on_disk(name, watch)]
        if not matches:
            raise DataProblem(
                f"{name}: expected images or shards, found nothing that fits the pattern; check the path."
            )
        yield from matches
        found += len(matches)
        if found > MOST_NAMES:
            raise _too_many(pattern, found)


def as_on_disk(path: str, watch: Watch) -> Path:
    """The path as this disk writes it (accents composed otherwise, slashes); itself where nothing like it is there."""
    for spelling in dict.fromkeys((path, path.replace("\\", "/"))):
        found = found_as(spelling)
        if found is not None and watch.allows(found):
            return Path(found)
    return Path(path)


def nearly(path: str, watch: Watch) -> str | None:
    """A file or folder whose path differs only in capital letters and in spaces and dots at the end of a name."""
    found = found_as(path, lambda name: composed(name).casefold().strip(" ").rstrip("."))
    return found if found is not None and watch.allows(found) else None


def _too_many(pattern: str, count: int) -> DataProblem:
    many = f"{count:,}" if count < 10**12 else "more than a trillion"
    return DataProblem(
        f"{pattern}: expected a pattern of at most {MOST_NAMES:,} names, found one of {many}; name the folder that "
        "they lie in."
    )


def _without_braces(pattern: str) -> Iterator[str]:
    choices, count = [], 1
    for index, part in enumerate(BRACES.split(pattern)):  # text, choice, text, choice, ..., text
        choices.append([part] if index % 2 == 0 else _choices(pattern, part))
        count *= len(choices[-1])
        if count > MOST_NAMES:
            raise _too_many(pattern, count)
    return map("".join, itertools.product(*choices))


def _choices(pattern: str, inside: str) -> list[str]:
    """What stands for one pair of braces."""
    numbers = RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last = numbers.groups()
    low, high = sorted((int(first), int(last)))
    if high - low >= MOST_NAMES:
        raise _too_many(pattern, high - low + 1)
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    names = [str(number).zfill(width) for number in range(low, high + 1)]
    return names if int(first) == low else names[::-1]


def _matches(pattern: str, watch: Watch) -> list[Path]:
    """The paths that fit a pattern's wildcards, level by level, each folder once."""
    anchor = Path(pattern).anchor
    level, parts = [anchor], Path(pattern).parts[1 if anchor else 0 :]
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        deeper: dict[str, str] = {}
        for folder in level:
            for path in _step_into(folder, part, last, watch):
                watch.look()
                # What lies elsewhere by a link or by ".." counts once per level, or "*/../*/.." would have no end.
                deeper.setdefault(path if last else os.path.realpath(path), path)
                if len(deeper) > MOST_NAMES:
                    raise _too_many(pattern, len(deeper))
        level = list(deeper.values())
    return [Path(name) for name in sorted(level)]


def _step_into(folder: str, part: str, last: bool, watch: Watch) -> Iterator[str]:
    """What fits one name of a pattern in a folder; all but the last name stand for folders."""
    if part == "**":
        yield folder
        for found in walk(Path(folder or "."), watch, lambda name: name.startswith(".")):
            for end in range(1, len(found.parts)):
                yield os.path.join(folder, *found.parts[:end])
            if last and found.kind == "file":
                yield os.path.join(folder, *found.parts)
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
