"""A prior of nothing, a domain model of it, and short bakings on drawn pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from indomain_guidance.guidance.files import DomainMetadata
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.null_text import build_cached
from indomain_guidance.training.baking.config import BakeConfig
from indomain_guidance.training.prior.encoded_prompts import EncodedPrompts
from indomain_guidance.training.prior.prior import Prior

from ..tiny_run import UNET, draw_images, tiny_base

PROMPTS = ("a circle", "two circles", "a blue ground")


def base_of(prediction_type: str = "epsilon") -> Prior:
    """The prior with three encoded prompts."""
    prior = tiny_base(prediction_type)
    generator = torch.Generator().manual_seed(9)
    texts = {prompt: (torch.randn(1, 7, UNET.context_dim or 0, generator=generator), None) for prompt in PROMPTS}
    prior.text_encoder = EncodedPrompts({"": (prior.null_context.tensor, None), **texts}, "tiny")
    return prior


def domain_of(prior: Prior, prediction_type: str | None = None, seed: int = 3) -> tuple[dict, DomainMetadata]:
    """Weights and metadata of a text-free UNet that is another than the prior's."""
    generator = torch.Generator().manual_seed(seed)
    moved = {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in prior.unet.items()}
    weights, config = build_cached(moved, prior.config, prior.null_context)
    facts: dict[str, Any] = {"latent_format": prior.latent_format, "prior_hash": prior.prior_hash}
    return weights, DomainMetadata(config, prediction_type=prediction_type, **facts)


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

    def make(folder: str | Path = "run", **changes: Any) -> BakeConfig:
        return BakeConfig(
            **{
                "base": "tiny",
                "domain": "connected: tiny",
                "data": (str(tmp_path / "images"),),
                "output": str(tmp_path / folder),
                "cache": str(tmp_path / "cache"),
                "name": "baked",
                "resolution": 64,
                "bucket_step": 8,
                "steps": 6,
                "batch_size": 4,
                "own_count": 6,
                "own_steps": 3,
                "prompt_list": PROMPTS[:2],
                "random_prompts": 0,
                "rank": 2,
                "layers": "all",
                "learning_rate": 1e-2,
                "warmup": 0,
                "ema": 0.5,
                "checkpoint_every": 2,
                "sample_every": 0,
                "validate_every": 0,
                "file_dtype": "fp32",
                "device": "cpu",
                "precision": "fp32",
                **changes,
            }
        )

    return make
