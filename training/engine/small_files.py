"""Small files of settings, logs and indices, read within bounds.

Whatever lies in their place, such as a pipe, a huge file or one of a million brackets, is refused in one sentence.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...guidance.errors import Problem
from ...guidance.files import FileProblem
from ...guidance.plain_json import MOST_BYTES, check_nesting, decode, parse_json

MOST_TOML = 2**18  # bytes; Python's reader takes some hundred times the memory of a file of short lines
MOST_DOTS = 16  # in one TOML name, whose cost grows with their square; settings have none
MOST_WORD = 300  # characters of a TOML name or number outside quotes
_QUOTED = re.compile(
    r'"""(?:\\.|[^\\])*?"""' r"|'''.*?'''" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'" r"|#[^\n]*", re.DOTALL
)
_BETWEEN = re.compile(r"[][{},=\n]")
_BACKSLASHES = {
    ".toml": "in double quotes \\ begins a special character: write paths of Windows in single quotes, or with /",
    ".json": "\\ begins a special character: write paths of Windows with \\\\ or /",
}


class NotAFile(Problem, OSError):
    """A pipe, socket or device in the place of a file, which might never end or never begin."""


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A file opened to read. Raises OSError, of pipes, sockets and devices NotAFile."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise NotAFile("it is a pipe, socket or device")
    return file


def read_small(path: str | os.PathLike, what: str, most: int = MOST_BYTES) -> bytes:
    """The content of a file of at most `most` bytes; `what` it should be. Raises FileProblem."""
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        problem = f"{path}: cannot be read as {what} ({reason}); check name, folder and permissions."
        raise FileProblem(problem) from error
    if len(data) > most:
        raise FileProblem(f"{path}: expected {what} of at most {most} bytes, found more; name another file.")
    return data


def read_lines(path: str | os.PathLike, most: int = MOST_BYTES) -> Iterator[bytes]:
    """The lines of a file, one at a time; those of more than `most` bytes are left out. Raises OSError."""
    with open_regular(path) as file:
        whole = True
        while line := file.readline(most):
            ends = line.endswith(b"\n")
            if whole and (ends or len(line) < most):
                yield line
            whole = ends


def read_values(path: str | os.PathLike) -> dict[str, Any]:
    """The values in a .toml or .json file, unchecked.

    Raises FileProblem for a missing or malformed file, and for TOML on Python 3.10 without the package tomli.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in _BACKSLASHES:
        raise FileProblem(f"{path}: expected a configuration in .toml or .json, found another ending.")
    data = read_small(path, "a configuration", MOST_TOML if ending == ".toml" else MOST_BYTES)
    try:
        values = parse_json(data) if ending == ".json" else _parse_toml(data, path)
    except FileProblem:
        raise
    except (ValueError, RecursionError) as error:
        hint = f"; {_BACKSLASHES[ending]}" if b"\\" in data else ""
        raise FileProblem(f"{path}: expected {ending[1:].upper()}, found a mistake: {error}{hint}.") from error
    if not isinstance(values, dict):
        raise FileProblem(f"{path}: expected fields with values, found {type(values).__name__}.")
    return values


def _parse_toml(data: bytes, path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise FileProblem(
                f"{path}: Python 3.10 reads TOML only with the package tomli; install it, use Python 3.11, or write "
                "the configuration as .json."
            ) from error
    text = decode(data)
    bare = _QUOTED.sub('""', text)
    check_nesting(bare)
    for word in _BETWEEN.split(bare):
        if word.count(".") > MOST_DOTS or len(word.strip()) > MOST_WORD:
            raise Problem(f"a name or number of more than {MOST_DOTS} parts or {MOST_WORD} characters")
    return tomllib.loads(text)
