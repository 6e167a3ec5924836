"""Work in threads, results in order. Threads, because inside ComfyUI no class of this package can be pickled."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Threads that decode images: one per processor, at most 8 (Pillow and hashing release the interpreter's lock)."""
    return max(1, min(8, os.cpu_count() or 1))


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """`map` in threads, with at most two results per thread waiting, so that memory stays bounded.

    An exception of `function` comes out where its result would have. When the caller stops early, work that has not
    begun is dropped.
    """
    workers = workers or default_workers()
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
