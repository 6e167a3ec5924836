"""Configurations, weights and inputs that the tests of StyleGAN2 and goldens/make_stylegan2.py share."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import torch
from indomain_guidance.guidance.networks.stylegan2 import StyleGAN2
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig
from torch.utils._python_dispatch import TorchDispatchMode

WIDTHS = {32: (24, 20, 16, 12), 64: (24, 24, 20, 16, 12), 256: (24, 24, 20, 20, 16, 12, 8)}
# What goldens/make_stylegan2.py ran in the original code, and how: case -> (configuration, noise, truncation, cutoff).
CASES = {
    f"nvidia {architecture} {size}": (
        GeneratorConfig(
            size,
            WIDTHS[size],
            z_dim=16,
            w_dim=24,
            mapping_layers=4,
            architecture=architecture,
            conv_clamp=None if size == 64 else 256,
        ),
        "const",
        1.0,
        None,
    )
    for size in WIDTHS
    for architecture in ("skip", "resnet", "orig")
}
CASES |= {
    f"nvidia {architecture} 32 labels": (
        replace(CASES[f"nvidia {architecture} 32"][0], c_dim=5, img_channels=4, mapping_layers=2, conv_clamp=0.5),
        "none",
        0.6,
        3,
    )
    for architecture in ("skip", "resnet", "orig")
}
CASES |= {
    f"rosinality {size}": (
        GeneratorConfig(size, WIDTHS[size], z_dim=24, w_dim=24, mapping_layers=4),
        "const",
        0.7,
        None,
    )
    for size in WIDTHS
}
TINY = GeneratorConfig(16, (6, 5, 4), z_dim=5, w_dim=7, mapping_layers=2)


def weights(config: GeneratorConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by name, from numpy's frozen generator: every tensor counts, activations stay near 1."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in StyleGAN2(config).state_dict().items()}
    filled = {}
    for key, shape in shapes.items():
        random = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
        values = random.standard_normal(tuple(shape))
        if key.startswith("mapping.fc"):
            values = values * (100.0 if key.endswith("weight") else 20.0)
        elif key.endswith("affine.bias"):
            values = 1 + 0.2 * values
        elif key.endswith((".bias", "noise_strength", "w_avg")):
            values = 0.3 * values
        filled[key] = torch.tensor(np.asarray(values, dtype=np.float32))
    return filled


def inputs(config: GeneratorConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    batch = 1 if config.resolution > 64 else 2
    random = np.random.RandomState(7)
    z = torch.tensor(random.standard_normal((batch, config.z_dim)).astype(np.float32))
    c = torch.tensor(random.standard_normal((batch, config.c_dim)).astype(np.float32)) if config.c_dim else None
    return z, c


def digest(images: torch.Tensor) -> dict[str, np.ndarray]:
    """A grid of pixels and the means of rows and columns: small, and no pixel escapes it."""
    images = images.detach().double()
    at = torch.linspace(0, images.shape[-1] - 1, 9).round().long()
    parts = {"grid": images[:, :, at][:, :, :, at], "rows": images.mean(dim=3), "columns": images.mean(dim=(1, 2))}
    return {name: value.float().numpy() for name, value in parts.items()}


def probe(shape: torch.Size) -> torch.Tensor:
    """What images are multiplied by to get one number whose gradients are compared."""
    return torch.tensor(np.random.RandomState(3).standard_normal(tuple(shape)).astype(np.float32))


def loaded(config: GeneratorConfig, seed: int = 0) -> StyleGAN2:
    generator = StyleGAN2(config)
    generator.load_state_dict(weights(config, seed))
    return generator.eval()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS(actual - expected) / RMS(expected)."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


class Largest(TorchDispatchMode):
    """Notes the most numbers that any operation within gives."""

    most = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        if isinstance(made, torch.Tensor):
            self.most = max(self.most, made.numel())
        return made
