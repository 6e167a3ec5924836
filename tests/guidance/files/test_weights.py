"""Checks of weights: finite numbers, and numbers that the format of a file holds."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, check_finite
from indomain_guidance.guidance.files.weights import file_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_finiteness(dtype, bad):
    tensors = {"fine": torch.ones(5).to(dtype), "count": torch.tensor([3]), "broken": torch.ones(2, 3)}
    tensors["broken"][1, 1] = bad
    tensors["broken"] = tensors["broken"].to(dtype)
    if dtype == torch.float8_e4m3fn and not bool(tensors["broken"].float().isnan().any()):
        pytest.skip("this type has no infinity")
    with pytest.raises(
        FileProblem, match="model.safetensors: expected finite weights.* in 1 of the 6 numbers of broken"
    ):
        check_finite(tensors, "model.safetensors")
    tensors["broken"] = torch.ones(2, 3).to(dtype)
    check_finite(tensors, "model.safetensors")


def test_fp16_ends_at_65504():
    weights = {"a": torch.tensor([1.0, -7e4]), "count": torch.tensor([3])}
    with pytest.raises(FileProblem, match="model: .* up to 65504, .* found 70000 in a; write bf16 or fp32"):
        file_tensors(weights, "fp16", "model")
    found = file_tensors(weights, "bf16", "model")
    assert found["a"].dtype == torch.bfloat16 and found["count"].dtype == torch.int64
    with pytest.raises(ValueError, match="one of fp32, fp16, bf16, found 'fp8'"):
        file_tensors(weights, "fp8", "model")
