"""Folders from top to bottom, for finding images and for noticing that they changed.

Every walk ends: links are followed once, the system's own folders (``/proc``) are left out, and so is what leaves the
folders that a caller confines it to. It asks `should_stop` often enough to stop within a blink.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .problems import Cancelled, DataProblem

OF_A_RUN = {"config.json", "log.jsonl"}  # both lie in the folder of every run
OF_THE_SYSTEM = ("/proc", "/sys", "/dev")  # they hold no images, and some lead back to everything
MOST_LOOKED = 5_000_000  # files and folders that one search looks at
LOOKS = 64  # of them between two looks at should_stop
LOST_LINK = "is a link to nothing; connect the drive or fetch the file that it stands for"

RUN, OUTSIDE, SYSTEM, SPECIAL = (
    "folders of runs",
    "links that leave the allowed folders",
    "folders of the system",
    "pipes and devices",
)


@dataclass
class Watch:
    """Bounds of a long search: `should_stop` ends it, and it goes no further than it may.

    within: folders outside of which nothing is opened, whatever links and patterns say; None: no bounds. most: files
    and folders that it looks at before it gives up.
    """

    should_stop: Callable[[], bool] | None = None
    within: Sequence[str | os.PathLike] | None = None
    looked: int = 0
    asked: int = 0
    most: int = MOST_LOOKED

    def __post_init__(self) -> None:
        self._bounds = [_real(folder) for folder in self.within or ()]

    def look(self) -> None:
        """Count a file or folder. Raises Cancelled when somebody asked to stop, DataProblem when there are too many."""
        self.ask()
        self.looked += 1
        if self.looked > self.most:
            raise DataProblem(
                f"Expected at most {self.most:,} files and folders to look at, found more; name folders closer to the "
                "images."
            )

    def ask(self) -> None:
        """Ask should_stop, at every LOOKS-th call. Raises Cancelled."""
        if self.asked % LOOKS == 0 and self.should_stop is not None and self.should_stop():
            raise Cancelled
        self.asked += 1

    def allows(self, path: str | os.PathLike) -> bool:
        """Whether a file or folder lies inside the bounds, links resolved."""
        if self.within is None:
            return True
        real = _real(path)
        return any(real == folder or real.startswith(os.path.join(folder, "")) for folder in self._bounds)


@dataclass(frozen=True)
class WalkEntry:
    """A file that a walk finds, or something that it cannot or may not go into.

    parts: its name below the root. note: of a "file" nothing, of a "fault" what is wrong with it, of something "left
    out" as what it counts (RUN, OUTSIDE, SYSTEM, SPECIAL).
    """

    kind: Literal["file", "fault", "left out"]
    parts: tuple[str, ...]
    path: Path
    note: str = ""


def walk(root: Path, watch: Watch, unwanted: Callable[[str], bool] = lambda name: False) -> Iterator[WalkEntry]:
    """All files below a folder, folder by folder in the order of their names; links are followed, once.

    unwanted: names of files and folders to pass over without mention. A folder below the root that is a training run's
    is left out. Raises what `Watch.look` does.
    """
    waiting, visited = [(Path(root), ())], {_real(root)}
    while waiting:
        folder, parts = waiting.pop()
        if _of_the_system(_real(folder)):
            yield WalkEntry("left out", parts, folder, SYSTEM)
            continue
        entries = []
        try:
            with os.scandir(folder) as listing:
                for entry in listing:
                    watch.look()
                    entries.append(entry)
        except OSError as error:
            yield WalkEntry(
                "fault", parts, folder, f"cannot be read ({error.strerror or error}); check its permissions"
            )
            continue
        if parts and {entry.name for entry in entries} >= OF_A_RUN:
            yield WalkEntry("left out", parts, folder, RUN)
            continue
        deeper = []
        for entry in sorted(entries, key=lambda entry: entry.name):
            if unwanted(entry.name):
                continue
            found = _looked_at(entry, (*parts, entry.name), watch)
            if found is not None:
                yield found
                continue
            # Links, and Windows' junctions, which do not look like links, may lead back to a folder already visited.
            real = _real(entry.path)
            if real not in visited:
                visited.add(real)
                deeper.append((Path(entry.path), (*parts, entry.name)))
        waiting.extend(reversed(deeper))


def _looked_at(entry: os.DirEntry, parts: tuple[str, ...], watch: Watch) -> WalkEntry | None:
    """What an entry of a folder is; None for a folder to go into."""
    path = Path(entry.path)
    try:
        link = entry.is_symlink()
        if (link or entry.is_dir()) and not watch.allows(path):  # a folder that is no link may be Windows' junction
            return WalkEntry("left out", parts, path, OUTSIDE)
        if entry.is_dir():
            return None
        if entry.is_file():
            return WalkEntry("file", parts, path)
    except OSError as error:  # a link to itself, a drive that fails
        return WalkEntry("fault", parts, path, f"cannot be read ({error.strerror or error})")
    return WalkEntry("fault", parts, path, LOST_LINK) if link else WalkEntry("left out", parts, path, SPECIAL)


def _real(path: str | os.PathLike) -> str:
    """What a path stands for, links resolved; on Windows in one case."""
    return os.path.normcase(os.path.realpath(path))


def _of_the_system(real: str) -> bool:
    return os.name != "nt" and any(real == folder or real.startswith(folder + "/") for folder in OF_THE_SYSTEM)
