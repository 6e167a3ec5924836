"""Work in threads: results in order, no more of them than asked for, and a stop that waits for nobody."""

from __future__ import annotations

import threading
import time

import pytest
from indomain_guidance.training.data.parallel import in_order
from indomain_guidance.training.data.problems import Cancelled


def test_results_come_in_order_and_errors_in_their_place():
    def work(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        if number == 30:
            raise KeyError(number)
        return number * number

    results = in_order(work, range(50), workers=4)
    assert [next(results) for _ in range(30)] == [number * number for number in range(30)]
    with pytest.raises(KeyError):
        next(results)


@pytest.mark.parametrize("ahead, most", [(None, 9), (1, 2), (3, 4), (100, 9)])
def test_no_more_results_wait_than_asked_for(ahead, most):
    made: list[int] = []
    results = in_order(lambda number: made.append(number), range(100), workers=4, ahead=ahead)
    next(results)
    time.sleep(0.05)
    assert len(made) == most
    results.close()
    assert len(made) == most


def test_a_stop_does_not_wait_for_what_is_at_work():
    release, begun, asked = threading.Event(), [], []

    def work(number: int) -> None:
        begun.append(number)
        release.wait(30)

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) > 1

    try:
        with pytest.raises(Cancelled):
            list(in_order(work, range(100), workers=2, should_stop=should_stop))
        assert not release.is_set() and len(asked) == 2 and sorted(begun) == [0, 1]
    finally:
        release.set()


def test_an_error_of_time_is_an_error_and_not_a_reason_to_wait_on():
    def work(number: int) -> None:
        raise TimeoutError("the drive does not answer")

    with pytest.raises(TimeoutError, match="the drive"):
        list(in_order(work, range(3), should_stop=lambda: False))
