"""One line on standard error that says how far a long job is."""

from __future__ import annotations

import sys
import time
from typing import TextIO

SECONDS_BETWEEN_LINES = 20.0  # where there is no terminal whose line can be overwritten


class StatusLine:
    """Name, bar, count, a note and the time left. first: how much was done before it started."""

    def __init__(self, name: str, stream: TextIO = sys.stderr, first: int = 0) -> None:
        self.name, self.stream, self.first, self.started = name, stream, first, time.monotonic()
        self.overwrites, self.written = stream.isatty(), self.started

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done; without a terminal at most one line in SECONDS_BETWEEN_LINES."""
        now = time.monotonic()
        if not self.overwrites and done != total and now - self.written < SECONDS_BETWEEN_LINES:
            return
        self.written = now
        left = (now - self.started) / max(1, done - self.first) * (total - done)
        line = f"{self.name} [{'#' * (24 * done // total):<24}] {done}/{total} {note} {left / 60:.1f} min left"
        self.stream.write(line + ("\r" if self.overwrites and done < total else "\n"))
        self.stream.flush()
