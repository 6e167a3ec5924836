"""The budget of memory: never exceeded, never held on to, refused at once by who asks for more than there is."""

from __future__ import annotations

import random
import threading
import time

import pytest
from indomain_guidance.training.data.memory import MemoryBudget


def test_all_threads_together_hold_no_more_than_there_is():
    budget, most, lock = MemoryBudget(100), [0], threading.Lock()

    def work(seed: int) -> None:
        sizes = random.Random(seed)
        for _ in range(50):
            with budget.hold(sizes.choice((1, 30, 60, 100))):
                with lock:
                    most[0] = max(most[0], budget.held)
                time.sleep(0)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert 60 <= most[0] <= 100 and budget.held == 0
    with pytest.raises(MemoryError, match="101 bytes of 100"), budget.hold(101):
        pass
    with pytest.raises(KeyError), budget.hold(100):
        raise KeyError
    assert budget.held == 0
