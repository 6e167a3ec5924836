"""What a baking will need before it starts: memory by tracing a forward pass at the real size, and disk."""

from __future__ import annotations

import torch

from ...guidance.files import DTYPES
from ...guidance.networks.unet import UNet
from ..domain.estimate import Estimate, cached_bytes, step_peak, trace_step
from ..domain.trainee import choose_trainable
from ..engine.processes import pick_precision
from ..engine.tracing import CUDA_CONTEXT, bytes_of, free_bytes, size_text
from ..prior.prior import Prior
from .config import BakeConfig
from .terms import BakedTerm


def estimate_baking(
    prior: Prior,
    config: BakeConfig,
    terms: list[BakedTerm],
    dataset_size: int = 0,
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> Estimate:
    """What a baking of `config` needs on `device`; nothing is loaded there. Arguments as of `domain.estimate`.

    Raises Problem for layers that take no addition.
    """
    device = torch.device(device)
    dtype = DTYPES[config.precision if config.precision in DTYPES else pick_precision("auto", device)]
    batch = max(1, config.batch_size // processes)
    side, tokens = config.resolution // prior.factor, prior.null_context.tensor.shape[1]

    def prepared() -> UNet:
        unet = UNet(prior.config)
        choose_trainable(unet.train(), config.train, config.additions)
        return unet

    traced, kept = trace_step(prepared, batch, side, tokens, dtype, config.gradient_checkpointing)
    models = [tensor for term in terms if term.model for tensor in term.model[0].values()]
    teacher = sum(tensor.numel() for tensor in models)
    if config.train == "all":  # the prior of the guidance is a network of its own
        teacher += traced.parameters
    gradients, cpu = 4 * traced.trainable, device.type == "cpu"
    stays = {
        "the models in their files": bytes_of([*prior.unet.values(), *prior.autoencoder.parameters(), *models])
        if cpu
        else 0,
        "weights": 4 * traced.parameters,
        "the guidance's models": teacher * dtype.itemsize,
        "optimizer": 2 * gradients,
        "average": gradients if config.ema else 0,
    }
    fixed = sum(stays.values()) + (0 if cpu else CUDA_CONTEXT)
    # The guidance predicts before the network that learns does: twice the batch at once, of which little is kept.
    peak = fixed + max(step_peak(traced, kept, gradients, device), 6 * traced.largest)
    available = free_bytes(device)
    saved = traced.parameters if config.train == "all" else traced.trainable
    return Estimate(
        parameters=traced.parameters,
        trainable=traced.trainable,
        parts={**stays, "gradients": gradients, "activations": kept},
        peak=peak,
        preview=0,
        available=available,
        disk={
            "per checkpoint": gradients + stays["average"] + stays["optimizer"],
            "for the finished file": saved * DTYPES[config.file_dtype].itemsize,
            "of cached latents": cached_bytes(prior, config, dataset_size),
        },
        device=str(device),
        advice=_advice(peak, available, config),
    )


def _advice(needed: int, available: int | None, config: BakeConfig) -> str:
    """What to change when it will not fit, "" when it will or when nobody knows."""
    if available is None or needed <= available:
        return ""
    ways = {
        "train low_rank": config.train == "all",
        "gradient_checkpointing": not config.gradient_checkpointing,
        f"batch_size {len(config.states)}": config.batch_size > len(config.states),
        "a lower resolution": config.resolution > 256,
    }
    fitting = ", ".join(way for way, helps in ways.items() if helps) or "another device"
    return f"This is more than the {size_text(available)} available: try {fitting}."
