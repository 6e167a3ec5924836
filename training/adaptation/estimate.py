"""What an adaptation will need before it starts: memory, by tracing one step's passes on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...guidance.networks.autoencoder import Autoencoder
from ...guidance.networks.stylegan2 import StyleGAN2
from ..domain.estimate import CUDA_CONTEXT, _available, size_text
from .config import AdaptConfig

if TYPE_CHECKING:
    from ..prior.prior import Prior


@dataclass(frozen=True)
class AdaptEstimate:
    """Bytes on the device that a step needs at its highest, about.

    models: the critic's and the generator twice, as it is and as it learns; optimizer: gradients, Adam's state and the
    average; activations: what generator and VAE keep for the way back. available: of the device, None where unknown.
    """

    models: int
    optimizer: int
    activations: int
    available: int | None
    device: str

    @property
    def peak(self) -> int:
        return self.models + self.optimizer + self.activations

    def to_text(self) -> str:
        """A line to print before the first step, and advice where it will not fit."""
        text = (
            f"memory on {self.device}: about {size_text(self.peak)} at its highest (models {size_text(self.models)}, "
            f"gradients, optimizer and average {size_text(self.optimizer)}, activations {size_text(self.activations)})"
        )
        if self.available is None:
            return text
        text += f", {size_text(self.available)} available"
        if self.peak > self.available:
            text += (
                "\nThis is more than there is: try batch_size 1, gradient_checkpointing, a lower resolution, or (on a "
                "GPU) precision bf16."
            )
        return text


def estimate_adaptation(
    config: AdaptConfig,
    generator: StyleGAN2,
    trained: int,
    base: Prior,
    resolution: int,
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> AdaptEstimate:
    """What a run needs. trained: parameters that learn; resolution: side in pixels at which images are judged."""
    device = torch.device(device)
    batch = max(1, config.batch_size // processes)
    half = config.precision in ("fp16", "bf16")
    encodes_in = torch.bfloat16 if config.precision == "bf16" else torch.float32
    weights = sum(one.numel() for one in base.unet.values()) * (2 if half else 4)
    if device.type == "cpu" and not half:
        # Those already in fp32 are shared with the base.
        weights += sum(one.numel() * one.element_size() for one in base.unet.values() if one.dtype != torch.float32)
    weights += sum(one.numel() * one.element_size() for one in base.autoencoder.parameters())
    weights += 3 * 4 * sum(one.numel() for one in generator.parameters())  # the caller's own too
    extra = CUDA_CONTEXT if device.type == "cuda" else 0

    def generates() -> tuple[nn.Module, Tensor]:
        traced = StyleGAN2(generator.config)
        traced.gradient_checkpointing = config.gradient_checkpointing
        return traced, traced.synthesize(torch.empty(batch, traced.num_ws, generator.config.w_dim))

    def encodes() -> tuple[nn.Module, Tensor]:
        traced = Autoencoder(base.autoencoder.config).requires_grad_(False)
        images = torch.empty(batch, 3, resolution, resolution, requires_grad=True)
        with torch.autocast("cpu", encodes_in, enabled=encodes_in is not torch.float32):
            return traced, traced.encode(images)[0]

    kept = kept_bytes(generates) + kept_bytes(encodes)
    state = 4 * trained * (3 + bool(config.ema))
    return AdaptEstimate(weights + extra, state, kept, _available(device), str(device))


def kept_bytes(forward: Callable[[], tuple[nn.Module, Tensor]]) -> int:
    """What autograd keeps of a forward pass beside parameters; `forward` makes its module and runs it, without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, Tensor] = {}  # one tensor per storage; holding it keeps the identity unique

    def pack(tensor: Tensor) -> None:
        # Without a graph: a tensor that its own graph holds is never freed, and no backward pass comes.
        kept.setdefault(id(tensor.untyped_storage()), tensor.detach())

    with FakeTensorMode(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        module, _ = forward()
        own = {id(one.untyped_storage()) for one in (*module.parameters(), *module.buffers())}
        return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
