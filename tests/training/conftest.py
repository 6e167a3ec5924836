"""Small real parts to train with: a UNet of a few thousand weights and latents in memory."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.training.data.latent_dataset import Sample
from indomain_guidance.training.domain.config import TrainConfig
from torch import Generator, Tensor


class MemoryLatents:
    """Latents [C, h, w] in memory as the learner sees a dataset; `flip` mirrors each with probability one half."""

    def __init__(self, latents: list[Tensor], flip: bool = False) -> None:
        self.latents, self.flip = latents, flip
        self.groups: dict[tuple[int, int], list[int]] = {}
        for index, latent in enumerate(latents):
            self.groups.setdefault(tuple(latent.shape[-2:]), []).append(index)
        digest = hashlib.sha256()
        for latent in latents:
            digest.update(latent.numpy().tobytes())
        self.content_hash = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, index: int, generator: Generator) -> Sample:
        mirrored = self.flip and bool(torch.rand((), generator=generator) < 0.5)
        latent = self.latents[index]
        size = (latent.shape[1] * 8, latent.shape[2] * 8)
        return Sample(latent.flip(-1) if mirrored else latent, (size[0] + index, size[1]), size, (0, 0))

    def name_of(self, index: int) -> str:
        return f"image-{index}.png"


@pytest.fixture
def latents() -> MemoryLatents:
    """24 squares and 7 wide latents of two textures."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 8, 8)] * 24 + [(4, 4, 16)] * 7
    return MemoryLatents([torch.randn(shape, generator=generator).cumsum(-1) / 3 for shape in shapes], flip=True)


@pytest.fixture
def tiny_unet() -> Callable[..., UNet]:
    """A text-free UNet of 32 channels with two blocks of attention; the same weights for the same seed."""

    def make(seed: int = 0, **changes: object) -> UNet:
        config = UNetConfig(
            **{
                "model_channels": 32,
                "channel_mult": (1, 2),
                "num_res_blocks": (1, 1),
                "transformer_depth": (0, 1),
                "transformer_depth_middle": 0,
                "transformer_depth_output": (1, 0, 0, 0),
                "num_heads": 2,
                "context_dim": 16,
                "null_text": "constant",
                **changes,
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet = UNet(config)
            for one in unet.parameters():  # zero-initialised layers would hide what comes before them
                torch.nn.init.normal_(one, std=0.08) if one.ndim > 1 else None
        return unet

    return make


@pytest.fixture
def configure() -> Callable[..., TrainConfig]:
    """A short fp32 run on the CPU; fields can be replaced."""

    def make(**changes: object) -> TrainConfig:
        return TrainConfig(
            **{
                "base": "mini_world",
                "device": "cpu",
                "precision": "fp32",
                "resolution": 64,
                "steps": 12,
                "batch_size": 4,
                "learning_rate": 2e-3,
                "warmup": 3,
                "ema": 0.9,
                **changes,
            }
        )

    return make


@pytest.fixture(scope="session")
def tiny_run():
    """The module tiny_run.py beside this file: whole runs on a prior of nothing."""
    return beside("tiny_run")


@pytest.fixture(scope="session")
def tiny_adaptation():
    """The module tiny_adaptation.py beside this file: adaptations of a generator of nothing."""
    return beside("tiny_adaptation")


def beside(name: str):
    """A module of this folder, which is no package."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"indomain_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def two_processes() -> list[str]:
    """The beginning of a command line that runs a script in two processes on the CPU; behind it come its arguments."""
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("needs the package accelerate")
    # With --cpu it would start one process whatever the number; the run's own device says cpu.
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    shared = "--main_process_port 0 --num_cpu_threads_per_process 1"
    return [sys.executable, "-m", "accelerate.commands.launch", *options.split(), *shared.split()]
