"""How much memory pictures may take while they are read, over all threads together."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LARGE = 32 * 2**20  # bytes from which on freed memory is returned to the system


@functools.lru_cache(maxsize=1)
def _trim() -> Callable[[int], object]:
    """Returns freed memory to the system: Linux' C library keeps up to 64 MiB of it for every thread."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # other systems do it by themselves
        return lambda rest: None


class MemoryBudget:
    """A number of bytes for all threads of the process; a thread that finds too few left waits for the others.

    No thread may ask for more while it holds some, or two would wait for each other.
    """

    def __init__(self, total: int) -> None:
        self.total, self.held = total, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """`size` bytes, at most `total`, within the block. Raises MemoryError at once for more."""
        if size > self.total:
            raise MemoryError(f"{size:,} bytes of {self.total:,}")
        trim = _trim()
        with self._changed:
            self._changed.wait_for(lambda: self.held + size <= self.total)
            self.held += size
        try:
            yield
        finally:
            if size >= LARGE:
                trim(0)
            with self._changed:
                self.held -= size
                self._changed.notify_all()
