"""What an adaptation will need before it starts: memory, by tracing one step's passes on tensors without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...guidance.networks.autoencoder import Autoencoder
from ...guidance.networks.stylegan2 import StyleGAN2
from ..engine.tracing import CUDA_CONTEXT, bytes_of, free_bytes, memory_text, trace
from ..prior.prior import Prior
from .config import AdaptConfig


@dataclass(frozen=True)
class AdaptEstimate:
    """Bytes on the device that a step needs at its highest, about.

    parts: the critic's models and the generator twice, as it is and as it learns; gradients, Adam's state and average;
    the activations that generator and VAE keep for the way back. available: of the device, None where unknown.
    """

    parts: dict[str, int]
    available: int | None
    device: str

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def to_text(self) -> str:
        """A line to print before the first step, and advice where it will not fit."""
        text = memory_text(self.device, self.peak, self.parts, self.available)
        if self.available is not None and self.peak > self.available:
            text += (
                "\nThis is more than there is: try batch_size 1, gradient_checkpointing, a lower resolution, or (on a "
                "GPU) precision bf16."
            )
        return text


def estimate_adaptation(
    config: AdaptConfig,
    generator: StyleGAN2,
    trained: int,
    prior: Prior,
    resolution: int,
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> AdaptEstimate:
    """What a run needs. trained: parameters that learn; resolution: side in pixels at which images are judged."""
    device = torch.device(device)
    batch = max(1, config.batch_size // processes)
    half = config.precision in ("fp16", "bf16")
    weights = sum(tensor.numel() for tensor in prior.unet.values()) * (2 if half else 4)
    if device.type == "cpu" and not half:
        # Those already in fp32 are shared with the prior.
        weights += bytes_of(tensor for tensor in prior.unet.values() if tensor.dtype != torch.float32)
    weights += bytes_of(prior.autoencoder.parameters())
    weights += 3 * 4 * sum(parameter.numel() for parameter in generator.parameters())  # the caller's own too

    def generator_copy() -> StyleGAN2:
        copy = StyleGAN2(generator.config)
        copy.gradient_checkpointing = config.gradient_checkpointing
        return copy

    def generate(network: nn.Module) -> None:
        assert isinstance(network, StyleGAN2)
        network.synthesize(torch.empty(batch, network.num_ws, generator.config.w_dim))

    def encode(network: nn.Module) -> None:
        assert isinstance(network, Autoencoder)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            network.encode(torch.empty(batch, 3, resolution, resolution, requires_grad=True))

    activations = trace(generator_copy, generate).kept
    activations += trace(lambda: Autoencoder(prior.autoencoder.config).requires_grad_(False), encode).kept
    parts = {
        "models": weights + (CUDA_CONTEXT if device.type == "cuda" else 0),
        "gradients, optimizer and average": 4 * trained * (3 + bool(config.ema)),
        "activations": activations,
    }
    return AdaptEstimate(parts, free_bytes(device), str(device))
