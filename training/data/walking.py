"""Folders from top to bottom: one walk for whoever looks for images and for whoever asks whether they changed.

A walk ends, whatever it is sent into: links are followed once, the system's own folders (``/proc``) are left out, and
so is what leaves the folders that a caller confines it to. It asks `should_stop` often enough to stop within a blink.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .images import DataProblem

OF_A_RUN = {"config.json", "log.jsonl"}  # both lie in the folder of every run
OF_THE_SYSTEM = ("/proc", "/sys", "/dev")  # nothing in them is anybody's image, and some lead back to everything
MOST_LOOKED = 5_000_000  # files and folders that one search looks at
LOOKS = 64  # of them between two looks at should_stop
LOST_LINK = "is a link to nothing; connect the drive or fetch the file that it stands for"

RUN, OUTSIDE, SYSTEM, SPECIAL = (
    "folders of runs",
    "links that leave the allowed folders",
    "folders of the system",
    "pipes and devices",
)


class Cancelled(Exception):
    """Somebody asked to stop while images were looked for or read."""


@dataclass
class Watch:
    """What every long search is given: whom to ask whether to stop, and where it may go.

    within: folders outside of which nothing is opened, whatever links and patterns say; None: no bounds. most: files
    and folders that it looks at before it gives up.
    """

    should_stop: Callable[[], bool] | None = None
    within: Sequence[str | os.PathLike] | None = None
    looked: int = 0
    asked: int = 0
    most: int = MOST_LOOKED

    def __post_init__(self) -> None:
        if self.within is not None:
            self.within = tuple(_real(one) for one in self.within)

    def look(self) -> None:
        """Count a file or folder. Raises Cancelled when somebody asked to, DataProblem when there is no end of them."""
        self.ask()
        self.looked += 1
        if self.looked > self.most:
            raise DataProblem(
                f"Expected at most {self.most:,} files and folders to look at, found more; name folders closer to the "
                "images."
            )

    def ask(self) -> None:
        """Ask whether to stop, not each time. Raises Cancelled."""
        if self.asked % LOOKS == 0 and self.should_stop is not None and self.should_stop():
            raise Cancelled
        self.asked += 1

    def allows(self, path: str | os.PathLike) -> bool:
        """Whether a file or folder lies inside the bounds, links resolved."""
        if self.within is None:
            return True
        real = _real(path)
        return any(real == one or real.startswith(one.rstrip(os.sep) + os.sep) for one in self.within)


@dataclass(frozen=True)
class Step:
    """One thing that a walk comes upon.

    parts: its name below the root. note: of a "file" nothing, of a "fault" what is wrong with it, of something "left
    out" as what it counts (RUN, OUTSIDE, SYSTEM, SPECIAL).
    """

    kind: Literal["file", "fault", "left out"]
    parts: tuple[str, ...]
    path: Path
    note: str = ""


def walk(root: Path, watch: Watch, unwanted: Callable[[str], bool] = lambda name: False) -> Iterator[Step]:
    """All files below a folder, folder by folder in the order of their names; links are followed, once.

    unwanted: names of files and folders to pass over without a word. A folder below the root that is a training run's
    is left out. Raises what `Watch.look` does.
    """
    waiting, visited = [(Path(root), ())], {_real(root)}
    while waiting:
        folder, parts = waiting.pop()
        if _of_the_system(_real(folder)):
            yield Step("left out", parts, folder, SYSTEM)
            continue
        entries = []
        try:
            with os.scandir(folder) as listing:
                for entry in listing:
                    watch.look()
                    entries.append(entry)
        except OSError as error:
            yield Step("fault", parts, folder, f"cannot be read ({error.strerror or error}); check its permissions")
            continue
        if parts and {entry.name for entry in entries} >= OF_A_RUN:
            yield Step("left out", parts, folder, RUN)
            continue
        deeper = []
        for entry in sorted(entries, key=lambda entry: entry.name):
            if unwanted(entry.name):
                continue
            step = _step(entry, (*parts, entry.name), watch)
            if step is not None:
                yield step
                continue
            # Links, and Windows' junctions, which do not look like links, may lead back to where it has been.
            real = _real(entry.path)
            if real not in visited:
                visited.add(real)
                deeper.append((Path(entry.path), (*parts, entry.name)))
        waiting.extend(reversed(deeper))


def _step(entry: os.DirEntry, parts: tuple[str, ...], watch: Watch) -> Step | None:
    """What an entry of a folder is; None for a folder to go into."""
    path = Path(entry.path)
    try:
        link = entry.is_symlink()
        if (link or entry.is_dir()) and not watch.allows(path):  # a folder that is no link may be Windows' junction
            return Step("left out", parts, path, OUTSIDE)
        if entry.is_dir():
            return None
        if entry.is_file():
            return Step("file", parts, path)
    except OSError as error:  # a link to itself, a drive that fails
        return Step("fault", parts, path, f"cannot be read ({error.strerror or error})")
    return Step("fault", parts, path, LOST_LINK) if link else Step("left out", parts, path, SPECIAL)


def _real(path: str | os.PathLike) -> str:
    """What a path stands for, links resolved; on Windows in one case."""
    return os.path.normcase(os.path.realpath(path))


def _of_the_system(real: str) -> bool:
    return os.name != "nt" and any(real == one or real.startswith(one + "/") for one in OF_THE_SYSTEM)
