"""The base of every error that a user can act on, and how its message is made safe to show.

Messages quote prompts, file names and tensor names that come from strangers. A log, a terminal or a browser must be
able to show any of them: half of a surrogate pair, which JSON and file names may hold, ends ComfyUI's prompt worker
where it is written raw, and escape sequences move a terminal's cursor.
"""

from __future__ import annotations

__all__ = ["MOST_CHARACTERS", "Problem", "printable"]

MOST_CHARACTERS = 500
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
