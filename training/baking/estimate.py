"""What a baking will need before it starts: memory by tracing a forward pass at the real size, and disk."""

from __future__ import annotations

import torch

from ...guidance.files import DTYPES
from ...guidance.networks.unet import UNet
from ..domain.estimate import trace_unet
from ..domain.trainee import choose_trainable
from ..engine.processes import pick_precision
from ..engine.tracing import CUDA_CONTEXT, bytes_of, free_bytes, memory_text, size_text
from ..prior.prior import Prior
from .config import BakeConfig
from .terms import BakedTerm


def estimate_baking(
    prior: Prior, config: BakeConfig, terms: list[BakedTerm], device: torch.device, processes: int = 1
) -> tuple[str, int, int | None]:
    """(a few lines to print before the first step, bytes at the highest, bytes available or None)."""
    dtype = DTYPES[config.precision if config.precision in DTYPES else pick_precision("auto", device)]
    batch = max(1, config.batch_size // processes)
    side, tokens = config.resolution // prior.factor, prior.null_context.tensor.shape[1]

    def prepared() -> UNet:
        unet = UNet(prior.config)
        choose_trainable(unet.train(), config.train, config.additions)
        return unet

    traced = trace_unet(prepared, batch, side, tokens, dtype, checkpointing=False)
    kept = traced.kept
    if config.gradient_checkpointing:
        kept = trace_unet(prepared, batch, side, tokens, dtype, checkpointing=True).kept + traced.block_bytes
    trained = 4 * traced.trainable
    models = sum(tensor.numel() for term in terms if term.model for tensor in term.model[0].values()) * dtype.itemsize
    cpu = device.type == "cpu"
    parts = {
        "the prior": bytes_of([*prior.unet.values(), *prior.autoencoder.parameters()]) if cpu else 0,
        "weights": 4 * traced.parameters * (2 if config.train == "all" else 1),  # with all, the teacher has its own
        "the guidance's models": models,
        "optimizer": 2 * trained,
        "average": trained if config.ema else 0,
        "gradients": trained,
        "activations": kept,
    }
    # The teacher's forward pass of up to three predictions for each latent keeps next to nothing.
    peak = sum(parts.values()) + 6 * traced.largest + (0 if cpu else CUDA_CONTEXT)
    available = free_bytes(device)
    finished = (traced.parameters if config.train == "all" else traced.trainable) * DTYPES[config.file_dtype].itemsize
    share = 100 * traced.trainable / traced.parameters
    lines = [
        f"trains {traced.trainable / 1e6:.2f} M of {traced.parameters / 1e6:.2f} M parameters ({share:.1f} %)",
        memory_text(str(device), peak, parts, available),
        f"disk: {size_text(3 * trained + parts['average'])} per checkpoint, {size_text(finished)} for the file",
    ]
    return "\n".join(lines), peak, available
