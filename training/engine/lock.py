"""One run at a time in a folder: a lock that the system lets go of however the process ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...guidance.files import FileProblem

NAME = ".lock"
TRIES = 20  # at a lock whose folder others take away; some network drive may never call two looks at a file one
# What an operating system answers when another process holds the lock.
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


class Busy(FileProblem):
    """Another process holds the lock; trying again later may succeed."""


@contextmanager
def locked(folder: Path, name: str = NAME) -> Iterator[None]:
    """Hold a lock of the folder within the block. name: of the lock's file, one for each lock.

    The folder is made, and goes again where it was made here and the block leaves nothing in it. Raises Busy when
    another process holds the lock, and FileProblem when the folder cannot be made. File systems without locks (some
    network shares) are used without one.
    """
    made: list[Path] = []
    tries = 0
    while True:
        made += [path for path in (folder, *folder.parents) if not path.exists()]
        handle = _open(folder, name)
        held = _try_lock(handle, folder)
        tries += 1
        if tries > TRIES or _is_at(handle, folder / name):
            break
        os.close(handle)  # whoever held it has just taken the folder away
    try:
        yield
    finally:
        mine = made if held else []
        if os.name == "posix":  # while it is locked: nobody else can have begun to use it
            _remove_if_alone(folder, name, mine)
        with suppress(OSError):
            os.close(handle)  # lets go of the lock
        if os.name != "posix":  # where a file that is open cannot be removed
            _remove_if_alone(folder, name, mine)


def _try_lock(handle: int, folder: Path) -> bool:
    """Whether the lock is held now; not on file systems without locks. Raises Busy, with the file closed."""
    try:
        _lock(handle)
    except OSError as error:
        if error.errno not in HELD:
            return False
        os.close(handle)
        raise Busy(
            f"{folder}: another process is training in this folder; wait for it, or choose another name or output."
        ) from error
    return True


def _open(folder: Path, name: str) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
        raise FileProblem(
            f"{folder}: cannot be used as a run's folder ({getattr(error, 'strerror', None) or error}); choose another "
            "with output."
        ) from error


def _is_at(handle: int, path: Path) -> bool:
    """Whether a lock's file still is what lies at its path; nothing else can be where open files cannot be removed."""
    if os.name != "posix":
        return True
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _remove_if_alone(folder: Path, name: str, made: list[Path]) -> None:
    """Delete a folder that was made for the lock, and those above it, as long as nothing else lies in them."""
    with suppress(OSError):
        if made and os.listdir(folder) == [name]:
            (folder / name).unlink()
            for path in made:  # the innermost first
                path.rmdir()


def _lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
