"""How much memory pictures may take while they are read, over all threads together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """So many bytes for all threads of the process; who finds too few left waits until others have given theirs back.

    Nobody may ask for more while holding some, or two would wait for each other.
    """

    def __init__(self, total: int) -> None:
        self.total, self.held = total, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """`size` bytes, at most `total`, within the block. Raises MemoryError at once for more."""
        if size > self.total:
            raise MemoryError(f"{size:,} bytes of {self.total:,}")
        with self._changed:
            self._changed.wait_for(lambda: self.held + size <= self.total)
            self.held += size
        try:
            yield
        finally:
            with self._changed:
                self.held -= size
                self._changed.notify_all()
