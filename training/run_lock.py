"""One run at a time in a folder: a lock that the system lets go of however the process ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..guidance.files import FileProblem

NAME = ".lock"
# What an operating system answers when another process holds the lock.
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


class Busy(FileProblem):
    """Another process holds the lock; trying again later may succeed."""


@contextmanager
def locked(folder: Path, name: str = NAME) -> Iterator[None]:
    """Hold a lock of the folder within the block; the folder is made. name: of the lock's file, one for each lock.

    Raises Busy when another process holds it, and FileProblem when the folder cannot be made. File systems without
    locks (some network shares) are used without one.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise FileProblem(
            f"{folder}: cannot be used as a run's folder ({error.strerror or error}); choose another with output."
        ) from error
    try:
        try:
            _lock(handle)
        except OSError as error:
            if error.errno in HELD:
                raise Busy(
                    f"{folder}: another process is training in this folder; wait for it, or choose another name or "
                    "output."
                ) from error
        yield
    finally:
        with suppress(OSError):
            os.close(handle)  # lets go of the lock


def _lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
