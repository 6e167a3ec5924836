"""Paths as people paste them: in quotes, as file:// URLs, with ~ or variables, as another system writes them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ...guidance.errors import Problem

QUOTES = ('""', "''", "\u201c\u201d", "\u2018\u2019")
EXTENDED = "\\\\?\\"  # what Windows puts before long paths
OF_WINDOWS = re.compile(r"/?([A-Za-z]):[\\/](.*)", re.DOTALL)


def meant_path(text: str) -> str:
    """The path that a text means here: as it stands where something lies there, else the first reading that leads on.

    Readings: without blanks and quotes around it, a file:// URL as its path, ~ and variables filled in; on POSIX "/"
    for "\\", and C:\\ as Linux on Windows sees it; names spelled with other codes for the same letters. Where none
    leads to anything the first of them comes back, for a folder to be made.
    """
    if not text or os.path.lexists(text):
        return text
    readings = list(dict.fromkeys(_readings(plain_path(text))))
    for reading in readings:
        if os.path.lexists(reading):
            return reading
    for reading in readings:
        spelled = None if reading.isascii() else found_as(reading)
        if spelled is not None:
            return spelled
    return readings[0]


def path_here(text: str) -> str:
    """`meant_path`. Raises Problem, a sentence to go on with, for a path of Windows that nothing lies at here."""
    meant = meant_path(text)
    if is_of_windows(text) and not os.path.lexists(meant):
        raise Problem(
            f"expected a path of this system, found one of Windows, {text!r:.80}; give the place where it lies here"
        )
    return meant


def is_of_windows(text: str) -> bool:
    """Whether a path begins with a drive or a server as on Windows, on a system that has neither."""
    plain = plain_path(text)
    return os.name == "posix" and (plain.startswith("\\\\") or OF_WINDOWS.fullmatch(plain) is not None)


def plain_path(text: str) -> str:
    """A text without what programs and people put around a path; all of it where nothing would be left.

    Nothing on the disk is looked at.
    """
    plain = text.strip()
    for left, right in QUOTES:
        if len(plain) > 2 and plain[0] == left and plain[-1] == right:
            plain = plain[1:-1].strip()
            break
    if plain[:7].lower() == "file://":
        with suppress(ValueError):  # a host that can be none
            parts = urlsplit(plain)
            host = "" if parts.netloc.lower() in ("", "localhost") else f"//{parts.netloc}"
            plain = host + url2pathname(parts.path)
    if os.name == "posix" and plain.startswith(EXTENDED):
        plain = plain[len(EXTENDED) :]
    return plain or text


def _readings(plain: str) -> Iterator[str]:
    filled = os.path.expandvars(os.path.expanduser(plain))
    if os.name != "posix":
        yield filled
        return
    drive = OF_WINDOWS.fullmatch(plain)
    if drive:
        yield plain
        yield f"/mnt/{drive[1].lower()}/" + drive[2].replace("\\", "/")
    elif "\\" in plain:
        forward = plain.replace("\\", "/")
        yield os.path.expandvars(os.path.expanduser(forward))
    yield filled


def composed(name: str) -> str:
    """A name with its accents composed as most systems write them."""
    return unicodedata.normalize("NFC", name)


def found_as(path: str, key: Callable[[str], str] = composed) -> str | None:
    """The first path that is there and whose names are equal to those of `path` by `key`; None without one."""
    where = Path(path).anchor
    for part in Path(path).parts[1 if where else 0 :]:
        there = os.path.join(where, part)
        if not os.path.lexists(there):
            try:
                twins = sorted(name for name in os.listdir(where or ".") if key(name) == key(part))
            except (OSError, ValueError):
                return None
            if not twins:
                return None
            there = os.path.join(where, twins[0])
        where = there
    return where
