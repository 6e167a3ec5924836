"""Whole bakings on a prior of nothing and drawn images, in processes of their own.

python training/bootstrap.py tests/training/tiny_baking.py FOLDER '{"steps": 20}'
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from indomain_guidance.guidance.files import DomainMetadata
from indomain_guidance.guidance.null_text import build_cached
from indomain_guidance.training.baking.bake import bake
from indomain_guidance.training.baking.config import BakeConfig
from indomain_guidance.training.prior.encoded_prompts import EncodedPrompts
from indomain_guidance.training.prior.prior import Prior

PROMPTS = ("a circle", "two circles", "a blue ground")


def _tiny_run():
    path = Path(__file__).with_name("tiny_run.py")
    spec = importlib.util.spec_from_file_location("indomain_tiny_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_run = _tiny_run()


def base_of(prediction_type: str = "epsilon") -> Prior:
    """The prior with three encoded prompts, which its predictions depend on."""
    prior = tiny_run.tiny_base(prediction_type)
    generator = torch.Generator().manual_seed(9)
    for tensor in prior.unet.values():  # layers that begin at zero would leave the text out
        if tensor.ndim > 1 and not tensor.any():
            tensor.normal_(std=0.2, generator=generator)
    width = prior.config.context_dim or 0
    texts = {prompt: (torch.randn(1, 7, width, generator=generator), None) for prompt in PROMPTS}
    prior.text_encoder = EncodedPrompts({"": (prior.null_context.tensor, None), **texts}, "tiny")
    return prior


def domain_of(prior: Prior, prediction_type: str | None = None, seed: int = 3) -> tuple[dict, DomainMetadata]:
    """Weights and metadata of a text-free UNet that is another than the prior's."""
    generator = torch.Generator().manual_seed(seed)
    moved = {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in prior.unet.items()}
    weights, config = build_cached(moved, prior.config, prior.null_context)
    facts: dict[str, Any] = {"latent_format": prior.latent_format, "prior_hash": prior.prior_hash}
    return weights, DomainMetadata(config, prediction_type=prediction_type, **facts)


def baking(folder: Path, run: str | Path = "run", **changes: Any) -> BakeConfig:
    """A baking of six steps in FOLDER/RUN, on the images in FOLDER/images."""
    return BakeConfig(
        **{
            "base": "tiny",
            "domain": "connected: tiny",
            "data": (str(folder / "images"),),
            "output": str(folder / run),
            "cache": str(folder / "cache"),
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
            "log_every": 1,
            "file_dtype": "fp32",
            "device": "cpu",
            "precision": "fp32",
            **changes,
        }
    )


def main(folder: Path, changes: dict) -> int:
    """One baking; its events as JSON lines."""

    def tell(event) -> None:
        print(json.dumps(event.to_dict()), flush=True)

    prior = base_of()
    bake(baking(folder, **changes), base=prior, domain=domain_of(prior), listener=tell)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
