"""How much memory there is, errors that mean that it ran out, and what a user can do about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch

from .run_settings import RunSettings


def is_memory_problem(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; the CPU's and some devices' allocators say so in words only."""
    words = str(error).lower()
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(
        sign in words for sign in ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate")
    )


def memory_problem(error: BaseException, config: RunSettings) -> str | None:
    """What to tell the user when `error` says that memory ran out, else None."""
    return config.memory_advice if is_memory_problem(error) else None


def available_memory(system: Path = Path("/")) -> int | None:
    """Bytes of main memory that this process could still get, disk caches included; None where nobody says (not Linux).

    The least of what the system has and what the control groups leave of their limits, which containers and batch
    systems set and at which a process is killed. system: the root of the file system.
    """
    found = []
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = (system / "proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    for folder, limit, used, cache in _control_groups(system):
        with suppress(OSError, StopIteration, ValueError, IndexError):  # "max" is no number: no limit
            most = int((folder / limit).read_text(encoding="ascii"))
            stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            droppable = next(int(line.split()[1]) for line in stat if line.split()[:1] == [cache])
            found.append(max(0, most - int((folder / used).read_text(encoding="ascii")) + droppable))
    return min(found, default=None)


def _control_groups(system: Path) -> Iterator[tuple[Path, str, str, str]]:
    """(folder, its file of the limit, of what is used, and the name of caches in memory.stat) from the own group up."""
    try:
        lines = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            root = system / "sys/fs/cgroup"
            limit, used, cache = "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root = system / "sys/fs/cgroup/memory"
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # Inside a container the path may be the host's, and only its root is there.
        own = PurePosixPath(path.strip("/"))
        for group in (own, *own.parents):
            yield root / group, limit, used, cache
