"""Ctrl+C and requests to end, as a question that a long run asks at each step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

# A closed terminal (HUP) and a closed console window or Ctrl+Break on Windows (BREAK) end a run as well.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")


class StopRequest:
    """Within its ``with`` block signals no longer end the process: ``request()`` becomes True instead.

    A second Ctrl+C raises KeyboardInterrupt, for someone who will not wait. `number` is the first signal's, None until
    then. on_request(number) is called with the first one, in the main thread between two bytecodes. Earlier handlers
    come back at the end of the block; a hang-up that was ignored (``nohup``) stays ignored.
    """

    def __init__(self, on_request: Callable[[int], None] = lambda number: None) -> None:
        self.number: int | None = None
        self._on_request = on_request
        self._earlier: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """What shells report for a process that the signal ended: 130 for Ctrl+C, 143 for SIGTERM."""
        return 0 if self.number is None else 128 + self.number

    def __enter__(self) -> StopRequest:
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue
            self._earlier[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            # None: a handler that was not installed by Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            self._on_request(number)
        elif number == signal.SIGINT and self.number == signal.SIGINT and not _has_launcher():
            raise KeyboardInterrupt


def _has_launcher() -> bool:
    """A launcher of several processes passes Ctrl+C on to processes that have had it from the terminal already."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
