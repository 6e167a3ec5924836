"""Paths as people paste them: in quotes, as file:// URLs, with ~ or variables, as another system writes them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit
from urllib.request import url2pathname

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
        spelled = _as_folders_spell(reading)
        if os.path.lexists(spelled):
            return spelled
    return readings[0]


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


def _as_folders_spell(path: str) -> str:
    """The path with each name spelled as its folder has it, where that differs in the codes of its letters alone."""
    if path.isascii():
        return path
    at, names = (os.sep, path.split(os.sep)[1:]) if os.path.isabs(path) else ("", path.split(os.sep))
    for name in names:
        there = os.path.join(at, name)
        if not name.isascii() and not os.path.lexists(there):
            wanted = unicodedata.normalize("NFC", name)
            try:
                found = [one for one in os.listdir(at or ".") if unicodedata.normalize("NFC", one) == wanted]
            except (OSError, ValueError):
                found = []
            there = os.path.join(at, found[0]) if found else there
        at = there
    return at
