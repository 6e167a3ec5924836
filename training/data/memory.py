"""How much memory pictures may take while they are read, over all threads together."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LARGE = 32 * 2**20  # bytes from which on it is worth while to ask for freed memory


@functools.lru_cache(maxsize=1)
def _give_back() -> Callable[[int], object]:
    """What returns freed memory to the system: Linux' C library keeps up to 64 MiB of it for every thread."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # other systems do it by themselves
        return lambda rest: None


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
        give_back = _give_back()
        with self._changed:
            self._changed.wait_for(lambda: self.held + size <= self.total)
            self.held += size
        try:
            yield
        finally:
            if size >= LARGE:
                give_back(0)
            with self._changed:
                self.held -= size
                self._changed.notify_all()
