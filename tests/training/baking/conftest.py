"""A prior of nothing, a domain model of it, and short bakings on drawn pictures."""

from __future__ import annotations

import pytest
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.training.prior.prior import Prior

from .. import tiny_baking
from ..tiny_baking import PROMPTS, base_of, domain_of
from ..tiny_run import draw_images

__all__ = ["PROMPTS", "base_of", "domain_of", "unet_of"]


@pytest.fixture
def base() -> Prior:
    return base_of()


@pytest.fixture
def domain(base):
    return domain_of(base)


def unet_of(prior: Prior) -> UNet:
    return prior.load_unet()


@pytest.fixture
def settings(tmp_path):
    """settings(**changes): a baking of six steps on drawn pictures in two shapes."""
    draw_images(tmp_path / "images")
    return lambda folder="run", **changes: tiny_baking.baking(tmp_path, folder, **changes)
