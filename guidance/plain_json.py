"""JSON from untrusted files: its size, nesting and numbers are bounded before it is parsed.

Python's own parser turns 100,000 brackets into a RecursionError and a number of 310 digits into an OverflowError where
it is used.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from .errors import Problem

MOST_BYTES = 2**20  # of a file of settings, or of one field of metadata
MOST_NESTED = 64  # lists and objects in one another
MOST_DIGITS = 100  # of a number; the longest that this project writes has 24
_OPENS = {"[": 1, "{": 1, "]": -1, "}": -1}
_QUOTED = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what PowerShell's `>` writes


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text of at most MOST_BYTES bytes or characters.

    Raises Problem, with a short reason, for text that is no JSON or in no Unicode encoding, a name that stands twice,
    NaN, infinity, a number that a float does not hold or of more than MOST_DIGITS digits, and more than MOST_NESTED
    levels.
    """
    if len(text) > MOST_BYTES:
        raise Problem(f"more than {MOST_BYTES} bytes, which nothing of this kind needs")
    text = decode(text) if isinstance(text, bytes) else text
    if text.count("[") + text.count("{") > MOST_NESTED:
        check_nesting(_QUOTED.sub("", text))
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Problem(f"{error.msg} in line {error.lineno}, column {error.colno}") from None


def decode(data: bytes) -> str:
    """A text in UTF-8, or in UTF-16 with the mark that editors on Windows put first. Raises Problem."""
    encoding = "utf-16" if data.startswith(_UTF_16) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise Problem("it is no text in UTF-8; save it as UTF-8") from None


def check_nesting(text: str) -> None:
    """Raise Problem where a text, without what stands in quotes, has too many brackets in one another."""
    brackets = re.sub(r"[^][{}]+", "", text)
    if max(accumulate(map(_OPENS.__getitem__, brackets)), default=0) > MOST_NESTED:
        raise Problem(f"more than {MOST_NESTED} lists or objects in one another")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise Problem(f"the name {twice!r:.60} stands twice; keep one of them")
    return made


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise Problem(f"a number of {len(digits)} digits ({digits[:20]}...); write a smaller one")
    return int(digits)


def _fraction(digits: str) -> float:
    number = float(digits)
    if len(digits) > MOST_DIGITS or not math.isfinite(number):
        raise Problem(f"a number that no float holds ({digits[:20]}); write another")
    return number


def _constant(name: str) -> float:
    raise Problem(f"{name}, which is no number in JSON; write a finite one")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_whole, parse_float=_fraction, parse_constant=_constant
)
