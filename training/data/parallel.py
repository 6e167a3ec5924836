"""Work in threads, results in order. Threads, because inside ComfyUI no class of this package can be pickled."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from .problems import Cancelled

Item = TypeVar("Item")
Result = TypeVar("Result")
ASK_EVERY_S = 0.2  # should_stop, while a result is waited for


def default_workers() -> int:
    """Threads that decode images: one per processor, at most 8 (Pillow and hashing release the interpreter's lock)."""
    return max(1, min(8, os.cpu_count() or 1))


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    ahead: int | None = None,
) -> Generator[Result, None, None]:
    """`map` in threads, with at most `ahead` results waiting (None: two per thread), so that memory stays bounded.

    An exception of `function` is raised where its result would have come. When the caller stops early, work that has
    not begun is dropped. should_stop is asked before every result and while it is waited for; when it says so,
    Cancelled is raised at once, and the threads end by themselves after the item they work on.
    """
    workers = workers or default_workers()
    ahead = 2 * workers if ahead is None else max(1, min(ahead, 2 * workers))
    workers = min(workers, ahead)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    cancelled = False

    def first() -> Result:
        future = waiting.popleft()
        while not should_stop():
            if wait([future], ASK_EVERY_S).done:
                return future.result()
        raise Cancelled

    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield first()
        while waiting:
            yield first()
    except Cancelled:
        cancelled = True
        raise
    finally:
        pool.shutdown(wait=not cancelled, cancel_futures=True)
