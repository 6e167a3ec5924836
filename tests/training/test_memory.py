"""Memory that ran out, in the words of several allocators, and what is said of it."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.training.adapt_config import AdaptConfig
from indomain_guidance.training.config import TrainConfig
from indomain_guidance.training.memory import memory_problem


@pytest.mark.parametrize("error, expected", [
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
    (MemoryError(), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
])  # fmt: skip
def test_running_out_of_memory_is_recognised(error, expected):
    training = TrainConfig(base="m", data=("d",), batch_size=2, resolution=64)
    adapting = AdaptConfig(generator="g", base="m", batch_size=3, resolution=256)
    for config, sizes in ((training, "batch size 2 at 64 px"), (adapting, "batch size 3 at 256 px")):
        told = memory_problem(error, config)
        assert (told is not None and sizes in told) == expected
