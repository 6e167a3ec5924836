"""JSON from untrusted files: its size, nesting, values and numbers are bounded before it is parsed.

Python's own parser turns 100,000 brackets into a RecursionError, a number of 310 digits into an OverflowError where it
is used, and three bytes of an empty list into eighty bytes of memory.
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

__all__ = ["MOST_BYTES", "check_nesting", "decode", "parse_json"]

MOST_BYTES = 2**20  # of a file of settings, or of one field of metadata
MOST_VALUES = 1_000_000  # values and lists in one text; a list takes up to 80 bytes of memory
MOST_NESTED = 64  # lists and objects in one another
MOST_DIGITS = 100  # of a number; the longest that this project writes has 24
_OPENS = {"[": 1, "{": 1, "]": -1, "}": -1}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what PowerShell's `>` writes


def parse_json(text: str | bytes, most: int = MOST_BYTES) -> Any:
    """The value of a JSON text of at most `most` bytes or characters.

    Raises Problem, with a short reason, for text that is no JSON or in no Unicode encoding, a name that stands twice,
    NaN, infinity, a number that a float does not hold or of more than MOST_DIGITS digits, more than MOST_NESTED levels
    or MOST_VALUES values.
    """
    if len(text) > most:
        raise Problem(f"more than {most} bytes, which nothing of this kind needs")
    text = decode(text) if isinstance(text, bytes) else text
    openings = text.count("[") + text.count("{")
    if openings > MOST_NESTED or openings + text.count(",") > MOST_VALUES:
        check_nesting(_outside_texts(text))
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
    """Raise Problem where a text, without what stands in quotes, has too many brackets or commas."""
    if text.count("[") + text.count("{") + text.count(",") > MOST_VALUES:
        raise Problem(f"more than {MOST_VALUES} values, which nothing of this kind needs")
    brackets = re.sub(r"[^][{}]+", "", text)
    if max(accumulate(map(_OPENS.__getitem__, brackets)), default=0) > MOST_NESTED:
        raise Problem(f"more than {MOST_NESTED} lists or objects in one another")


def _outside_texts(text: str) -> str:
    """A JSON text without what stands between quotes."""
    text = text.replace("\\\\", "").replace('\\"', "")  # a run of backslashes from its beginning, so pairs first
    if text.count('"') > 4 * MOST_VALUES:
        raise Problem(f"more than {MOST_VALUES} values, which nothing of this kind needs")
    return "".join(text.split('"')[::2])


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
