"""A critic whose true scores are known, and an encoder, for distillation tests."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.diffusion import NoiseSchedule


class Gaussian:
    """The exact denoiser of clean latents ~ N(mu, spread^2): D = (spread^2 x + sigma^2 mu) / (spread^2 + sigma^2)."""

    def __init__(self, spread: float = 0.5) -> None:
        self.spread = spread
        self.calls: list[int] = []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        variance = sigma.reshape(-1, 1, 1, 1) ** 2
        return (self.spread**2 * x + variance * mu) / (self.spread**2 + variance)

    def factor(self, sigma: torch.Tensor) -> torch.Tensor:
        """sigma / (spread^2 + sigma^2): its noise prediction is this times (x - mu)."""
        return sigma / (self.spread**2 + sigma**2)


@pytest.fixture
def gaussian():
    return Gaussian()


@pytest.fixture
def make_gaussian():
    return Gaussian


@pytest.fixture(scope="session")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear()


@pytest.fixture(scope="session")
def mean():
    """A conditioning of the Gaussian critic: a mean per channel."""

    def make(*values: float) -> dict[str, torch.Tensor]:
        return {"mu": torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)}

    return make


@pytest.fixture(scope="session")
def encode():
    """[B, 3, H, W] -> [B, 4, H / 4, W / 4], differentiable and not linear."""
    weight = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 0.15

    def run(images: torch.Tensor) -> torch.Tensor:
        return 4 * torch.tanh(torch.nn.functional.conv2d(images, weight.to(images.dtype), stride=4))

    return run
