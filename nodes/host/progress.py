"""A progress bar on standard error: one line that is rewritten on a terminal, one line a finished task elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 28


class Bar:
    """Shows how far each named task is; `prefix` stands before every line."""

    def __init__(self, prefix: str = "", stream: TextIO | None = None):
        self.prefix = prefix
        self.stream = sys.stderr if stream is None else stream
        self._live = self.stream.isatty()
        self._task = ""
        self._done = self._total = 0
        self._since = 0.0

    def update(self, task: str, done: int, total: int) -> None:
        if task != self._task or done < self._done:
            self.close()
            self._task, self._since = task, time.monotonic()
        self._done, self._total = done, total
        if self._live:
            self.stream.write("\r" + self._line())
            self.stream.flush()

    def close(self) -> None:
        """End the current task's line."""
        if self._task:
            self.stream.write(("\r" if self._live else "") + self._line() + "\n")
            self.stream.flush()
        self._task, self._done, self._total = "", 0, 0

    def _line(self) -> str:
        share = min(1.0, self._done / self._total) if self._total else 0.0
        filled = int(share * _WIDTH)
        bar = "#" * filled + "-" * (_WIDTH - filled)
        seconds = time.monotonic() - self._since
        return f"{self.prefix}[{bar}] {self._done}/{self._total} {seconds:5.1f} s  {self._task}"
