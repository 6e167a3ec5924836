"""Traces count what a forward pass keeps, and leave nothing behind."""

from __future__ import annotations

import gc

import pytest
import torch
from indomain_guidance.training.engine.tracing import size_text, trace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2))


@pytest.mark.parametrize("block_types", [(), (nn.Linear,)])
def test_counts_what_is_kept_and_leaves_nothing_in_memory(block_types):
    """A server estimates before every run."""

    def alive() -> int:
        gc.collect()
        return sum(type(value) is FakeTensor for value in gc.get_objects())

    before = alive()
    found = trace(network, lambda module: module(torch.empty(3, 4)), block_types)
    assert found.kept == (3 * 4 + 3 * 8) * 4 and found.largest == 3 * 8 * 4
    assert found.parameters == found.trainable == 4 * 8 + 8 + 8 * 2 + 2
    assert alive() == before


def test_finds_the_block_that_keeps_the_most():
    found = trace(network, lambda module: module(torch.empty(3, 4)), (nn.Linear,))
    assert found.block_bytes == 3 * 4 * 4  # the first's input; the second's is kept by the sigmoid before it


@pytest.mark.parametrize(
    "count, text", [(12, "12 B"), (2048, "2 KiB"), (1.5 * 2**20, "1.5 MiB"), (2**41, "2048.0 GiB")]
)
def test_sizes_in_words(count, text):
    assert size_text(count) == text
