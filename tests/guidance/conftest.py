"""Oracles and random weights for the library's tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def randomise():
    """Fills a module with weights that keep activations near 1, so that no layer (zero at birth or not) hides."""

    def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.normal_(generator=generator)
                if parameter.ndim > 1:
                    parameter.mul_(parameter[0].numel() ** -0.5)
                else:
                    parameter.mul_(0.1).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        return module.eval()

    return fill


@pytest.fixture
def relative_error():
    """RMS(actual - expected) / RMS(expected)."""

    def measure(actual: torch.Tensor, expected: torch.Tensor) -> float:
        assert actual.shape == expected.shape
        assert bool(expected.isfinite().all()) and float(expected.square().mean()) > 1e-6
        return float((actual.double() - expected.double()).norm() / expected.double().norm())

    return measure
