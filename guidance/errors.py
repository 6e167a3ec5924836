"""The base of every error that a user can act on, and how its message is made safe to show.

Messages quote prompts, file names and tensor names that come from strangers. A log, a terminal or a browser must be
able to show any of them: half of a surrogate pair, which JSON and file names may hold, ends ComfyUI's prompt worker
where it is written raw, and escape sequences move a terminal's cursor.
"""

from __future__ import annotations

import logging

__all__ = ["MOST_CHARACTERS", "Problem", "logger", "printable"]

MOST_CHARACTERS = 500
MOST_IN_THE_LOG = 4000  # a line that reports on a run of many terms
_CUT = " [...] "


def printable(text: object, most: int = MOST_CHARACTERS) -> str:
    """`text` with everything but printable characters and line ends escaped, at most `most` characters long.

    What is too long loses its middle: the beginning says what is wrong, the end what to do. Safe text comes back as it
    is.
    """
    text = str(text)
    if len(text) > most:  # before escaping, so that a text of megabytes costs no more than a short one
        text = text[:most] + text[-most:]
    escaped = "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)
    if len(escaped) <= most:
        return escaped
    start = (most - len(_CUT)) * 2 // 3
    return escaped[:start] + _CUT + escaped[len(escaped) - (most - len(_CUT) - start) :]


class Problem(ValueError):
    """Something that a user can act on: one sentence with what was expected, what was found, where, and what to do.

    All errors of this project derive from it. The message is made printable and cut to `MOST_CHARACTERS` here, whoever
    raises it and whatever it quotes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class _Printable(logging.Filter):
    """Makes whole records printable, the values that they quote included."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage(), MOST_IN_THE_LOG), ()
        return True


def logger(name: str) -> logging.Logger:
    """The logger of a module, whose lines are as safe to show as a `Problem`'s message; once for each name."""
    log = logging.getLogger(name)
    if not any(isinstance(one, _Printable) for one in log.filters):
        log.addFilter(_Printable())
    return log
