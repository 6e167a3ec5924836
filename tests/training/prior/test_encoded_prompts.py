"""Prompts that were encoded beforehand are looked up."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.training.prior.encoded_prompts import EncodedPrompts
from indomain_guidance.training.prior.opening import open_mini_world


@pytest.fixture(scope="module")
def mini():
    return open_mini_world()


def test_prompts_are_those_that_were_encoded(mini):
    known = ["", "a red seven", "a blue three on a white background"]
    encoded = EncodedPrompts({prompt: (mini.encode_text([prompt]).context, None) for prompt in known}, "the mini world")
    prompts = ["a blue three on a white background", "", "a red seven"]
    assert torch.equal(encoded(prompts).context, mini.encode_text(prompts).context)
    assert encoded(prompts).pooled is None
    with pytest.raises(ValueError, match="the mini world: .*'a dog'.*sample_prompts"):
        encoded(["a dog"])


def test_prompts_of_several_lengths_fit_in_one_batch():
    short, long = torch.randn(1, 77, 128), torch.randn(1, 154, 128)
    pooled = torch.randn(2, 1, 16)
    text = EncodedPrompts({"short": (short, pooled[0]), "long": (long, pooled[1])})(["short", "long"])
    assert torch.equal(text.context, torch.cat([short.repeat(1, 2, 1), long]))
    assert torch.equal(text.pooled, pooled[:, 0])
