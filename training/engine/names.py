"""Which names a run, and so its finished file, may have: those that every file system takes."""

from __future__ import annotations

from typing import Any

from .settings import ConfigProblem, is_unicode

# Characters that some file system refuses, control characters, and those that make a text read backwards.
FORBIDDEN = (
    set('<>:"/\\|?*')
    | {chr(code) for code in (*range(32), *range(127, 160))}
    | set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
)
# Devices on Windows, whatever the file's ending.
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789\u00b9\u00b2\u00b3"
}
# What Python, and ComfyUI in a node's text field, make of JSON's true, false, null and empty brackets.
WORDS_OF_JSON = {"True", "False", "None", "{}", "[]"}
LONGEST = 200  # bytes; file systems take 255, and the file's ending and temporary names of it need some


def check_name(name: Any) -> None:
    """Raise ConfigProblem for anything that is no file name (without ending) on every system."""
    is_text = isinstance(name, str) and is_unicode(name)
    is_plain = is_text and name.strip() and not set(name) & FORBIDDEN and name.strip(". ") == name
    if not is_plain or len(name.encode()) > LONGEST:
        fault = ""
    elif name in WORDS_OF_JSON:
        fault = ", a value of another kind"
    elif name.partition(".")[0].strip().lower() in DEVICES:
        fault = ", which is a device on Windows"
    else:
        return
    raise ConfigProblem(
        f"name: expected a plain file name of at most {LONGEST} bytes, without folders or ending, found "
        f"{name!r:.80}{fault}; use letters, digits, - and _."
    )
