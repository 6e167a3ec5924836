"""The errors that a user can act on, and how their messages are made safe to show.

Messages quote prompts, file names and tensor names from untrusted files. A log, a terminal and a browser must be able
to show them all: half of a surrogate pair, which JSON and file names may hold, ends ComfyUI's prompt worker when it is
printed, and escape sequences move a terminal's cursor.
"""

from __future__ import annotations

import logging

__all__ = ["MOST_CHARACTERS", "FileProblem", "Problem", "first_line", "logger", "printable"]

MOST_CHARACTERS = 500
MOST_IN_THE_LOG = 4000  # a line that reports on a run of many terms
_CUT = " [...] "


def printable(text: object, most: int = MOST_CHARACTERS) -> str:
    """`text` with everything but printable characters and line ends escaped, at most `most` characters long.

    A longer text loses its middle: the beginning says what is wrong, the end what to do.
    """
    text = str(text)
    if len(text) > most:  # before escaping, so that a text of megabytes costs no more than a short one
        text = text[:most] + text[-most:]
    escaped = "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)
    if len(escaped) <= most:
        return escaped
    start = (most - len(_CUT)) * 2 // 3
    return escaped[:start] + _CUT + escaped[len(escaped) - (most - len(_CUT) - start) :]


class Problem(ValueError):
    """Something that a user can act on: one sentence with what was expected, what was found, where, and what to do.

    All errors of this project derive from it. Its message is made printable and cut to `MOST_CHARACTERS` here.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class GuidanceError(Problem):
    """A guidance that cannot work: one sentence with what was expected and what was found."""


class FileProblem(Problem):
    """A file that cannot be used: one sentence with the file, what was expected, what was found, what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its full stop, or the error's type: why, inside another sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class _Printable(logging.Filter):
    """Makes a log record printable, with the values it quotes."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage(), MOST_IN_THE_LOG), ()
        return True


def logger(name: str) -> logging.Logger:
    """The logger of a module; its lines are as safe to show as the message of a `Problem`."""
    log = logging.getLogger(name)
    if not any(isinstance(known, _Printable) for known in log.filters):
        log.addFilter(_Printable())
    return log
