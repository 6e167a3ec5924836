"""What a training run will need before it starts: memory by tracing a forward pass at the real size, and disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...guidance.files import DTYPES
from ...guidance.networks.unet import UNet
from ...guidance.networks.unet_layers import ResBlock, TransformerBlock
from ..data.settings import DataSettings
from ..engine.processes import pick_precision
from ..engine.tracing import CUDA_CONTEXT, Trace, bytes_of, free_bytes, memory_text, size_text, trace
from ..prior.prior import Prior
from .config import TrainConfig
from .previews import preview_dtype
from .trainee import choose_trainable


@dataclass(frozen=True)
class Estimate:
    """Bytes on the training device and on the disk.

    parts: what stays, by what it is for: the prior and its autoencoder, which wait in the CPU's memory (0 elsewhere),
    weights of the UNet in fp32, gradients, optimizer and average of what trains, and the activations that a forward
    pass of one process' batch keeps for the backward pass, casts of the weights included. peak: the most at once;
    preview: the most while a grid is drawn. available: of the device, None where unknown.
    """

    parameters: int
    trainable: int
    parts: dict[str, int]
    peak: int
    preview: int
    available: int | None
    disk: dict[str, int]
    device: str
    advice: str

    def to_text(self) -> str:
        """A few lines to print before the first step."""
        share = 100 * self.trainable / self.parameters
        parts = {**self.parts, "all while drawing samples": self.preview}
        lines = [
            f"trains {self.trainable / 1e6:.2f} M of {self.parameters / 1e6:.2f} M parameters ({share:.1f} %)",
            memory_text(self.device, max(self.peak, self.preview), parts, self.available),
            "disk: " + ", ".join(f"{size_text(size)} {what}" for what, size in self.disk.items()),
        ]
        return "\n".join([*lines, self.advice] if self.advice else lines)


def estimate(
    prior: Prior, config: TrainConfig, dataset_size: int = 0, *, device: torch.device | str = "cpu", processes: int = 1
) -> Estimate:
    """What a run of `config` on `prior` needs on `device`; nothing is loaded there.

    dataset_size: images, for the latents on disk. processes: among which a batch is split.
    """
    device = torch.device(device)
    dtype = DTYPES[config.precision if config.precision in DTYPES else pick_precision("auto", device)]
    batch = max(1, config.batch_size // processes)
    side, tokens = config.resolution // prior.factor, prior.null_context.tensor.shape[1]
    unet_config = prior.config
    if config.form != "full":
        unet_config = replace(prior.config, null_text=config.form, null_tokens=tokens)

    def prepared() -> UNet:
        unet = UNet(unet_config)
        choose_trainable(unet.train(), config.train, config.additions)
        return unet

    traced, kept = trace_step(prepared, batch, side, tokens, dtype, config.gradient_checkpointing)
    total, trainable = traced.parameters, traced.trainable

    gradients = 4 * trainable
    stays = {
        "the prior": bytes_of([*prior.unet.values(), *prior.autoencoder.parameters()]) if device.type == "cpu" else 0,
        "weights": 4 * total,
        "optimizer": (2 if config.optimizer == "adamw8bit" else 8) * trainable,
        "average": 4 * trainable if config.ema else 0,
    }
    fixed = sum(stays.values()) + (CUDA_CONTEXT if device.type == "cuda" else 0)
    peak = fixed + step_peak(traced, kept, gradients, device, gradients if config.accumulation > 1 else 0)
    preview = 0
    if config.sample_every:
        drawn = sum(tensor.numel() for tensor in prior.unet.values()) * preview_dtype(device).itemsize
        preview = fixed + drawn + int(3 * min(config.sample_count, batch) * traced.largest / batch)

    available = free_bytes(device)
    is_lora = config.form == "full" and config.train == "low_rank"  # its file is the additions alone
    return Estimate(
        parameters=total,
        trainable=trainable,
        parts={**stays, "gradients": gradients, "activations": kept},
        peak=peak,
        preview=preview,
        available=available,
        disk={
            "per checkpoint": 4 * trainable + stays["average"] + stays["optimizer"],
            "for the finished file": (trainable if is_lora else total) * DTYPES[config.file_dtype].itemsize,
            "of cached latents": cached_bytes(prior, config, dataset_size),
        },
        device=str(device),
        advice=_advice(max(peak, preview), fixed + gradients, available, config),
    )


def trace_step(
    make: Callable[[], UNet], batch: int, side: int, tokens: int, dtype: torch.dtype, checkpointing: bool
) -> tuple[Trace, int]:
    """(`trace_unet` without gradient checkpointing, bytes that a step's forward pass keeps, with it where asked)."""
    traced = trace_unet(make, batch, side, tokens, dtype, checkpointing=False)
    if not checkpointing:
        return traced, traced.kept
    # Only the blocks' inputs stay; during the backward pass one block's activations exist again.
    return traced, trace_unet(make, batch, side, tokens, dtype, checkpointing=True).kept + traced.block_bytes


def step_peak(traced: Trace, kept: int, gradients: int, device: torch.device, accumulated: int = 0) -> int:
    """The most bytes of a step beside what always stays; accumulated: gradients there are when a pass begins."""
    # Gradients grow while activations are freed, so the most is at the start of the backward pass, at its end (all
    # gradients and the first block's activations), or in the optimizer. They stay between passes that accumulate.
    start = kept + 2 * traced.largest + accumulated
    end = gradients + traced.block_bytes + 2 * traced.largest
    temporaries = gradients if device.type != "cpu" else 0
    return max(start, end, gradients + temporaries)


def cached_bytes(prior: Prior, config: DataSettings, images: int) -> int:
    """What the latents of so many images take on the disk, mean and standard deviation."""
    encodings = images * max(1, config.random_crops) * (2 if config.flip else 1)
    return encodings * 2 * 4 * prior.latent_channels * (config.resolution // prior.factor) ** 2


def trace_unet(
    make: Callable[[], UNet], batch: int, side: int, tokens: int, dtype: torch.dtype, checkpointing: bool
) -> Trace:
    """A forward pass of the UNet that `make` gives, on latents [batch, C, side, side] and a text of `tokens`."""

    def run(unet: nn.Module) -> None:
        assert isinstance(unet, UNet)
        unet.gradient_checkpointing, config = checkpointing, unet.config
        cond: dict[str, Tensor] = {}
        if config.null_text == "none" and config.context_dim is not None:
            cond["context"] = torch.empty(batch, tokens, config.context_dim)
        if config.adm_in_channels is not None:
            cond["y"] = torch.empty(batch, config.adm_in_channels)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            unet(torch.empty(batch, config.in_channels, side, side), torch.zeros(batch, dtype=torch.long), **cond)

    return trace(make, run, () if checkpointing else (ResBlock, TransformerBlock))


def _advice(needed: int, fixed: int, available: int | None, config: TrainConfig) -> str:
    """What to change when it will not fit, "" when it will or when nobody knows; fixed: needed whatever the batch."""
    if available is None or needed <= available:
        return ""
    ways, why = [], ""
    if fixed > available:
        why = f", and {size_text(fixed)} of it are needed whatever the batch"
        if config.train != "low_rank":
            ways.append("train self_attention or low_rank" if config.train == "all" else "train low_rank")
        if config.optimizer != "adamw8bit":
            ways.append("optimizer adamw8bit")
        if config.ema:
            ways.append("ema 0")
    else:
        if not config.gradient_checkpointing:
            ways.append("gradient_checkpointing")
        if config.batch_size > 1:
            ways.append(f"batch_size 1 with accumulation {config.batch_size * config.accumulation}")
        if config.train == "all":
            ways.append("train self_attention or low_rank")
        if config.resolution > 256:
            ways.append("a lower resolution")
    more = f"This is more than the {size_text(available)} available{why}"
    return f"{more}: try {', '.join(ways or ['another device'])}."
