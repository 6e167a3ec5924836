"""What a terminal shows of a run: messages and a progress line on standard error, results on standard output."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from ...guidance.errors import printable
from ..engine.events import Event, Preparing, Started, Step, Stopped, Warned, describe
from .kinds import KINDS

if TYPE_CHECKING:
    from ..engine.run import Result

# A log file gets a line this often instead of a moving bar.
QUIET_SECONDS = 15.0
MOST_AT_ONCE = 20_000  # characters, such as all settings with many folders of images


class Console:
    """Shows a run in a terminal: called with each event, and `result` at the end.

    as_json: events and the result as JSON lines on standard output, else the finished file's path alone. quiet: only
    warnings on standard error. dry_run: all settings and the estimate are the result. Of several processes only the
    first speaks. A terminal or a reader that has gone away ends no run.
    """

    def __init__(
        self, as_json: bool = False, quiet: bool = False, dry_run: bool = False, errors: TextIO | None = None
    ) -> None:
        self._errors = sys.stderr if errors is None else errors
        self._speaks = int(os.environ.get("RANK", "0")) == 0
        self._as_json, self._quiet, self._dry_run = as_json, quiet, dry_run
        self._moving = not quiet and self._errors.isatty()
        self._width = 0
        self._told = time.monotonic()

    def __call__(self, event: Event) -> None:
        if not self._speaks:
            return
        if self._as_json:
            self._event(json.dumps(event.to_dict()))
        if isinstance(event, (Preparing, Step)):
            done, total = (event.step, event.steps) if isinstance(event, Step) else (event.done, event.total)
            self._progress(describe(event), done >= total)
        elif isinstance(event, Started):
            self._started(event)
        else:
            self._say(describe(event), always=isinstance(event, (Warned, Stopped)))

    def _started(self, event: Started) -> None:
        if self._dry_run and not self._as_json:
            _out(f"{_settings(event.config)}\n\n{describe(event)}")
        else:
            defaults = {field.name: _plain(field.default) for field in dataclasses.fields(KINDS[event.kind])}
            chosen = {name: value for name, value in event.config.items() if value != defaults.get(name)}
            self._say(f"{_settings(chosen)}\n(the other settings are the defaults)\n{describe(event)}")

    def warn(self, text: str) -> None:
        """Something the user should know."""
        self._say(describe(Warned(text)), always=True)

    def count(self, what: str, done: int, total: int) -> None:
        """Progress of something else than training steps, `done` of `total`."""
        bar = "#" * (24 * done // max(1, total))
        self._progress(f"{what} [{bar:<24}] {done}/{total}", done >= total)

    def stop_requested(self, number: int) -> None:
        """To be called by a signal handler, which may have interrupted a write: so it uses no buffered stream."""
        if self._speaks:
            text = "stopping as soon as all is saved ..." + (" (Ctrl+C again: do not wait)" if number == 2 else "")
            with suppress(OSError, ValueError):
                os.write(self._errors.fileno(), f"\n{text}\n".encode())

    def result(self, result: Result) -> None:
        """The run's last word on standard output: a JSON object, or the path of what it made."""
        if not self._speaks:
            return
        if self._as_json:
            _out(json.dumps({"event": "result", **vars(result)}, default=str))
        elif result.path is not None:
            _out(str(result.path))
        if result.status == "stopped":
            # Several processes go on as several.
            alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
            how = f": {own_command('resume', result.run)}" if alone else " the same command"
            self._say(f"go on with{how}", always=True)

    def _event(self, line: str) -> None:
        try:
            _out(line)
        except (OSError, ValueError):
            # The reader has gone. What is left in the buffer, and all that follows, goes nowhere.
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, sys.stdout.fileno())
                os.close(nowhere)

    def _say(self, text: str, always: bool = False) -> None:
        if not self._quiet or always:
            self._write(self._cleared() + printable(text, MOST_AT_ONCE) + "\n")

    def _progress(self, text: str, last: bool) -> None:
        """The one line that moves; where nothing can move, a line now and then."""
        if self._quiet:
            return
        text = printable(text)
        if self._moving:
            with suppress(OSError, ValueError):
                text = text[: os.get_terminal_size(self._errors.fileno()).columns - 1]
            self._write(self._cleared() + text + ("\n" if last else ""))
            self._width = 0 if last else len(text)
        elif last or time.monotonic() - self._told > QUIET_SECONDS:
            self._told = time.monotonic()
            self._write(text + "\n")

    def _cleared(self) -> str:
        cleared, self._width = ("\r" + " " * self._width + "\r" if self._width else ""), 0
        return cleared

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._errors.write(text)
            self._errors.flush()


def _out(line: str) -> None:
    print(line, flush=True)


def own_command(*words: object) -> str:
    """A command of this program as the user would type it; INDOMAIN_COMMAND says how the program was started."""
    return f"{os.environ.get('INDOMAIN_COMMAND', 'indomain')} {pasted([str(word) for word in words])}"


def pasted(words: Sequence[str], windows: bool = os.name == "nt") -> str:
    """A command as one pastes it into a terminal of this system."""
    return subprocess.list2cmdline(words) if windows else shlex.join(words)


def _settings(config: Mapping[str, Any]) -> str:
    """Settings, a line a field."""
    width = max(map(len, config), default=0)
    return "\n".join(f"{name:<{width}}  {_shown(value)}" for name, value in config.items())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
