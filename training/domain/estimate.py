"""What a training run will need before it starts: memory by tracing a forward pass at the real size, disk, time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...guidance.files import DTYPES
from ...guidance.networks.unet import UNet
from ...guidance.networks.unet_layers import ResBlock, TransformerBlock
from ..engine.processes import pick_precision
from ..engine.tracing import CUDA_CONTEXT, Blocks, Trace, bytes_of, free_bytes, size_text, timed, trace
from ..prior.prior import Prior
from .config import TrainConfig
from .previews import preview_dtype
from .trainee import choose_trainable

# Bytes an optimizer step moves for each trained number: AdamW reads 16 and writes 12, its temporaries and the average
# about as much again.
OPTIMIZER_TRAFFIC = 60
# Images in the timed batch: enough to fill a device, few enough that a batch too large to train is still timed.
TIMED_BATCH = 8
HOPELESS = 2.0  # times the memory there is; estimates are within a factor of 1.5


@dataclass(frozen=True)
class Estimate:
    """Bytes on the training device, bytes on the disk, seconds. Times are rough (often within a factor of 1.5).

    waiting: the prior and its autoencoder, which stay in the CPU's memory (0 elsewhere). weights: of the UNet in fp32;
    gradients, optimizer, average: of what trains; activations: what a forward pass of one process' batch keeps for the
    backward pass, casts of the weights included; peak: the most at once; preview: the most while a grid is drawn.
    available: of the device, None where unknown. checkpoint, latents, file: on disk.
    """

    parameters: int
    trainable: int
    waiting: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    peak: int
    preview: int
    available: int | None
    checkpoint: int
    latents: int
    file: int
    seconds_per_step: float
    seconds_preview: float
    seconds_caching: float
    seconds: float
    device: str
    advice: str

    def to_text(self) -> str:
        """A few lines to print before the first step."""
        share = 100 * self.trainable / self.parameters
        lines = [
            f"trains {self.trainable / 1e6:.2f} M of {self.parameters / 1e6:.2f} M parameters ({share:.1f} %)",
            f"memory on {self.device}: about {size_text(max(self.peak, self.preview))} at its highest ("
            + (f"the prior {size_text(self.waiting)}, " if self.waiting else "")
            + f"weights {size_text(self.weights)}, gradients {size_text(self.gradients)}, "
            f"optimizer {size_text(self.optimizer)}, average {size_text(self.average)}, "
            f"activations {size_text(self.activations)}; drawing samples {size_text(self.preview)})"
            + ("" if self.available is None else f", {size_text(self.available)} available"),
            f"disk: {size_text(self.checkpoint)} per checkpoint, {size_text(self.file)} for the finished file, "
            f"{size_text(self.latents)} of cached latents",
            "time: not measured, for want of memory"
            if math.isnan(self.seconds)
            else f"time: about {_duration(self.seconds)} ({_duration(self.seconds_per_step)} per step, "
            f"{_duration(self.seconds_preview)} per sample grid, {_duration(self.seconds_caching)} to encode the "
            "images)",
        ]
        return "\n".join([*lines, self.advice] if self.advice else lines)


def estimate(
    prior: Prior,
    config: TrainConfig,
    dataset_size: int | None = None,
    *,
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> Estimate:
    """What a run of `config` on `prior` needs on `device`; nothing is loaded there.

    dataset_size: images, for the latents on disk and the time to encode them (None: not counted). processes: among
    which a batch is split.
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
        choose_trainable(unet.train(), config.train, config.rank)
        return unet

    traced = trace_unet(prepared, batch, side, tokens, dtype, checkpointing=False)
    kept = traced.kept
    if config.gradient_checkpointing:
        # Only the blocks' inputs stay; during the backward pass one block's activations exist again.
        kept = trace_unet(prepared, batch, side, tokens, dtype, checkpointing=True).kept + traced.block_bytes
    total, trainable = traced.parameters, traced.trainable

    weights, gradients = 4 * total, 4 * trainable
    optimizer = (2 if config.optimizer == "adamw8bit" else 8) * trainable
    average = 4 * trainable if config.ema else 0
    waiting = bytes_of([*prior.unet.values(), *prior.autoencoder.parameters()]) if device.type == "cpu" else 0
    fixed = waiting + weights + optimizer + average + (CUDA_CONTEXT if device.type == "cuda" else 0)
    # Gradients grow while activations are freed, so the most is at the start of the backward pass, at its end (all
    # gradients and the first block's activations), or in the optimizer. They stay between passes that accumulate.
    start = kept + 2 * traced.largest + (gradients if config.accumulation > 1 else 0)
    end = gradients + traced.block_bytes + 2 * traced.largest
    temporaries = gradients if device.type != "cpu" else 0
    peak = fixed + max(start, end, gradients + temporaries)
    preview = 0
    if config.sample_every:
        drawn = sum(tensor.numel() for tensor in prior.unet.values()) * preview_dtype(device).itemsize
        preview = fixed + drawn + int(3 * min(config.sample_count, batch) * traced.largest / batch)

    available = free_bytes(device)
    # One block of a run that no memory holds may fill that memory by itself: not timed.
    fits = available is None or peak <= HOPELESS * available
    per_step, forward_s = _step_seconds(traced, config, device, dtype, batch) if fits else (math.nan, math.nan)
    predictions = 3 if config.sample_prompts else 1.5  # per image and step: base, domain, control
    pictures = max(2, len(config.sample_prompts)) * config.sample_count
    per_grid = pictures * config.sample_steps * predictions * forward_s if config.sample_every else 0.0
    grids = 1 + config.steps // config.sample_every if config.sample_every else 0
    encodings = (dataset_size or 0) * max(1, config.random_crops) * (2 if config.flip else 1)
    caching = encodings * _encoding_seconds(prior, config.resolution, device) if encodings and fits else 0.0
    validations = config.steps // config.validate_every if config.validate_every else 0
    held_out = min(256, config.held_out_share * (dataset_size or 0))
    is_lora = config.form == "full" and config.train == "low_rank"  # its file is the additions alone
    return Estimate(
        parameters=total,
        trainable=trainable,
        waiting=waiting,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        average=average,
        activations=kept,
        peak=peak,
        preview=preview,
        available=available,
        checkpoint=4 * trainable + average + optimizer,
        latents=encodings * 2 * 4 * prior.latent_channels * side * side,
        file=(trainable if is_lora else total) * DTYPES[config.file_dtype].itemsize,
        seconds_per_step=per_step,
        seconds_preview=per_grid,
        seconds_caching=caching,
        seconds=config.steps * per_step + grids * per_grid + caching + validations * held_out * 6 * forward_s,
        device=str(device),
        advice=_advice(max(peak, preview), fixed + gradients, available, config),
    )


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


def _step_seconds(
    traced: Trace, config: TrainConfig, device: torch.device, dtype: torch.dtype, batch: int
) -> tuple[float, float]:
    """(seconds per optimizer step, seconds of one image's forward pass) from the speed of the two kinds of block."""
    rates = [_seconds_per_flop(blocks, device, dtype, config.train == "all") for blocks in traced.blocks.values()]
    counts = [blocks.flops for blocks in traced.blocks.values()]
    both = sum(flops * rate for flops, rate in zip(counts, rates))
    both += (traced.flops - sum(counts)) * (rates[0] if rates else 0.0)
    backward = 3 if config.train == "all" else 2.2  # passes' worth of arithmetic, the forward one included
    if config.gradient_checkpointing:
        both *= (backward + 1) / backward
    tensor = torch.zeros(2**22, device=device)
    other = torch.ones_like(tensor)
    per_byte = timed(lambda: tensor.lerp_(other, 0.5), device) / (3 * 4 * tensor.numel())
    moved = traced.trainable * OPTIMIZER_TRAFFIC * per_byte
    return config.accumulation * both + moved, both / (backward * batch)


def _seconds_per_flop(blocks: Blocks, device: torch.device, dtype: torch.dtype, weights_learn: bool) -> float:
    """Seconds of forward and backward pass per FLOP of the forward pass, timed on one block of the real size."""
    batch = blocks.shapes[0][0]
    images = min(batch, TIMED_BATCH)
    module = _with_numbers(blocks.module).to(device).requires_grad_(weights_learn)
    inputs: list[Tensor | None] = [
        torch.randn(images, *shape[1:], device=device, requires_grad=index == 0)
        for index, shape in enumerate(blocks.shapes)
    ]
    if isinstance(module, TransformerBlock) and len(inputs) == 1:
        inputs.append(None)  # text-free: no context

    def run() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            module(*inputs).float().square().mean().backward()

    with torch.inference_mode(False), torch.enable_grad():
        return timed(run, device) / max(blocks.highest * images / batch, 1)


def _with_numbers(traced: nn.Module) -> nn.Module:
    """A module like a traced one, whose tensors hold no numbers, with some."""
    module = copy.copy(traced)
    module._parameters = {
        name: None if parameter is None else nn.Parameter(torch.randn(tuple(parameter.shape)) * 0.02)
        for name, parameter in traced._parameters.items()
    }
    module._modules = {name: None if child is None else _with_numbers(child) for name, child in traced._modules.items()}
    return module


def _encoding_seconds(prior: Prior, resolution: int, device: torch.device) -> float:
    """Seconds to encode one image, timed on a smaller one and scaled by area."""
    side = min(resolution, 512 if device.type == "cuda" else 64)
    image = torch.zeros(1, prior.autoencoder.config.in_channels, side, side, device=device)
    with prior.autoencoder_on(device):
        return timed(lambda: prior.encode(image), device) * (resolution / side) ** 2


def _advice(needed: int, fixed: int, available: int | None, config: TrainConfig) -> str:
    """What to change when it will not fit; "" when it will, or when nobody knows.

    fixed: what is needed whatever the batch and its resolution.
    """
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


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
