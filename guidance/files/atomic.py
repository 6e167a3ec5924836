"""Atomic writing: a file is written under a temporary name in its folder, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import FileProblem

UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")


@contextmanager
def temporary_path(path: str | os.PathLike) -> Iterator[Path]:
    """The name of an empty file to write to; when the block ends without an error, it takes the place of `path`.

    Until then, and after any exception, the file at `path` stays as it was. Missing folders are made. Raises
    FileProblem for an OSError, such as a full disk or a folder that cannot be written; other exceptions pass through.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's default, which some writers (safetensors) would make private
        yield temporary
        _flush(temporary)
        if temporary.stat().st_mode != mode:
            with suppress(OSError):  # some network drives refuse; the file is better private than lost
                os.chmod(temporary, mode)
        os.replace(temporary, path)
        if os.name == "posix":
            with suppress(OSError):  # some network drives cannot; the file is in its place already
                _flush(path.parent)
    except OSError as error:
        raise FileProblem(
            f"{path}: could not be written ({error.strerror or error}); free some space or check the folder's "
            "permissions."
        ) from error
    finally:
        with suppress(OSError):  # gone after renaming, and never made where the path itself is impossible
            temporary.unlink()


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """`temporary_path`, opened to be written, read back and searched."""
    with temporary_path(path) as temporary, open(temporary, "w+b") as file:
        yield file


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace the file's content by `text` in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def clear_unfinished(folder: Path, name: str | None = None) -> None:
    """Delete what killed processes left half-written in a folder, or of one file there; only while nobody writes it."""
    for path in folder.glob(".*.tmp"):
        match = UNFINISHED.fullmatch(path.name)
        if match and name in (None, match[1]):
            with suppress(OSError):
                path.unlink()


def _flush(path: Path) -> None:
    # Windows flushes only handles that are open for writing; folders, which only posix flushes, cannot be opened so.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
