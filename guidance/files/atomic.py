"""Files that are there completely or not at all: a temporary name in the same folder, flushed to the disk, renamed."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from . import FileProblem

UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write into (and read back, seek); when the block ends well it takes the place of `path`.

    Until then, and after any exception, whatever was at `path` stays as it was. Folders are made. Raises FileProblem
    when the disk is full or the folder cannot be written; other exceptions of the block pass through.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise FileProblem(
            f"{path}: could not be written ({error.strerror or error}); free some space or check the folder's "
            "permissions."
        ) from error
    finally:
        with suppress(OSError):  # gone after renaming
            temporary.unlink()


def clear_unfinished(*folders: Path) -> None:
    """Delete what killed processes left half-written in these folders; only where nobody else is writing."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            if UNFINISHED.fullmatch(path.name):
                with suppress(OSError):
                    path.unlink()


def clear_unfinished_file(path: Path) -> None:
    """Delete what killed processes left half-written of one file; only where nobody else is writing it."""
    for other in path.parent.glob(".*.tmp"):
        if UNFINISHED.fullmatch(other.name) and other.name[1:].rsplit(".", 2)[0] == path.name:
            with suppress(OSError):
                other.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace the file's content by `text` in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can (not Windows, nor some network drives)."""
    if os.name != "posix":
        return
    with suppress(OSError):  # the file is in its place already
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
