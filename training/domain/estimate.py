"""What a run will need before it starts: memory by a traced forward pass at the real size, time by timing two blocks.

The trace runs on tensors without data, so it costs neither memory nor the network's arithmetic, and it counts exactly
what autograd will keep.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...guidance.files import DTYPES
from ...guidance.networks.unet import ResBlock, TransformerBlock, UNet, UNetConfig
from ..engine.memory import available_memory
from ..engine.processes import pick_precision
from ..prior.prior import Prior
from .previews import preview_dtype
from .trainee import choose_trainable

if TYPE_CHECKING:
    from .config import TrainConfig

# Bytes an optimizer step moves for each trained number: AdamW reads 16 and writes 12, its temporaries and the average
# about as much again.
OPTIMIZER_TRAFFIC = 60
CUDA_CONTEXT = 600 * 2**20  # bytes: context, libraries' workspaces
SHORTEST_TIMING_S = 0.15
# Images in the timed batch: enough to fill a device, few enough that a batch too large to train is still timed.
TIMED_BATCH = 8


@dataclass(frozen=True)
class Estimate:
    """Bytes on the training device, bytes on the disk, seconds. Times are rough (often within a factor of 1.5).

    base: the prior and its autoencoder, which wait on the CPU (0 elsewhere). weights: of the UNet in fp32; gradients,
    optimizer, average: of what trains; activations: what a forward pass of one process' batch keeps for the backward
    pass, casts of the weights included; peak: the most at once; preview: the most while a grid is drawn. available: of
    the device, None where unknown. checkpoint, latents, file: on disk.
    """

    parameters: int
    trainable: int
    base: int
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
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """A few lines to print before the first step."""
        share = 100 * self.trainable / self.parameters
        lines = [
            f"trains {self.trainable / 1e6:.2f} M of {self.parameters / 1e6:.2f} M parameters ({share:.1f} %)",
            f"memory on {self.device}: about {size_text(max(self.peak, self.preview))} at its highest ("
            + (f"base {size_text(self.base)}, " if self.base else "")
            + f"weights {size_text(self.weights)}, gradients {size_text(self.gradients)}, "
            f"optimizer {size_text(self.optimizer)}, average {size_text(self.average)}, "
            f"activations {size_text(self.activations)}; drawing samples {size_text(self.preview)})"
            + ("" if self.available is None else f", {size_text(self.available)} available"),
            f"disk: {size_text(self.checkpoint)} per checkpoint, {size_text(self.file)} for the finished file, "
            f"{size_text(self.latents)} of cached latents",
            f"time: about {_duration(self.seconds)} ({_duration(self.seconds_per_step)} per step, "
            f"{_duration(self.seconds_preview)} per sample grid, {_duration(self.seconds_caching)} to encode the "
            "images)",
        ]
        return "\n".join([*lines, self.advice] if self.advice else lines)


@dataclass(frozen=True)
class Trace:
    """One forward pass without data: parameters, bytes kept for the backward pass, the largest such tensor, FLOPs.

    block_bytes: the most that one block (residual or transformer) keeps, which gradient checkpointing holds again.
    blocks: for residual and transformer blocks, their FLOPs and the module and inputs that cost most.
    """

    parameters: int
    trainable: int
    saved: int
    largest: int
    block_bytes: int
    flops: int
    blocks: dict[type, tuple[int, int, nn.Module, tuple[tuple[int, ...], ...]]]


def estimate(
    base: Prior,
    config: TrainConfig,
    dataset_size: int | None = None,
    *,
    device: torch.device | str = "cpu",
    processes: int = 1,
    precision: str = "",
) -> Estimate:
    """What a run of `config` on `base` needs on `device`; nothing is loaded there.

    dataset_size: images, for the latents on disk and the time to encode them (None: not counted). processes: among
    which a batch is split. precision: "fp32", "bf16" or "fp16" where the configuration leaves it open.
    """
    device = torch.device(device)
    precision = precision or (config.precision if config.precision in DTYPES else pick_precision("auto", device))
    dtype = DTYPES[precision]
    batch = max(1, config.batch_size // processes)
    side = config.resolution // base.factor
    unet_config = trained_config(base.config, config.form, base.null_context.tensor.shape[1])
    tokens = base.null_context.tensor.shape[1]

    def prepared() -> UNet:
        unet = UNet(unet_config)
        choose_trainable(unet.train(), config.train, config.rank, config.low_rank_alpha)
        return unet

    trace = trace_unet(prepared, batch, side, tokens, dtype, checkpointing=False)
    kept = trace.saved
    if config.gradient_checkpointing:
        # Only the blocks' inputs stay; during the backward pass one block's activations exist again.
        kept = trace_unet(prepared, batch, side, tokens, dtype, checkpointing=True).saved + trace.block_bytes
    total, trainable = trace.parameters, trace.trainable
    lora = config.form == "full" and config.train == "low_rank"  # its file is the additions alone

    weights, gradients = 4 * total, 4 * trainable
    optimizer = (2 if config.optimizer == "adamw8bit" else 8) * trainable
    average = 4 * trainable if config.ema else 0
    parts = [*base.unet.values(), *base.autoencoder.parameters()]
    waiting = sum(one.numel() * one.element_size() for one in parts) if device.type == "cpu" else 0
    fixed = waiting + weights + optimizer + average + (CUDA_CONTEXT if device.type == "cuda" else 0)
    # Gradients grow while activations are freed, so the most is at the start of the backward pass, at its end (all
    # gradients and the first block's activations), or in the optimizer. They stay between passes that accumulate.
    start = kept + 2 * trace.largest + (gradients if config.accumulation > 1 else 0)
    end = gradients + trace.block_bytes + 2 * trace.largest
    temporaries = gradients if device.type != "cpu" else 0
    peak = fixed + max(start, end, gradients + temporaries)
    drawn = preview_dtype(device)
    prior = sum(tensor.numel() for tensor in base.unet.values()) * torch.empty((), dtype=drawn).element_size()
    columns = min(config.sample_count, batch)
    preview = fixed + prior + int(3 * columns * trace.largest / batch) if config.sample_every else 0

    per_step, forward_s = _step_seconds(trace, config, device, dtype, trainable, batch)
    rows = max(2, len(config.sample_prompts))
    predictions = 3 if config.sample_prompts else 1.5  # per image and step: base, domain, control
    grids = 1 + config.steps // config.sample_every if config.sample_every else 0
    per_grid = rows * config.sample_count * config.sample_steps * predictions * forward_s if grids else 0.0
    variants = max(1, config.random_crops) * (2 if config.flip else 1)
    encodings = (dataset_size or 0) * variants
    caching = encodings * _encoding_seconds(base, config.resolution, device) if encodings else 0.0
    validations = config.steps // config.validate_every if config.validate_every else 0
    held_out = min(256, config.held_out_share * (dataset_size or 0))
    available = _available(device)
    latents = encodings * 2 * 4 * base.latent_channels * side * side
    return Estimate(
        total,
        trainable,
        waiting,
        weights,
        gradients,
        optimizer,
        average,
        kept,
        peak,
        preview,
        available,
        checkpoint=4 * trainable + average + optimizer,
        latents=latents,
        file=(trainable if lora else total) * (4 if config.file_dtype == "fp32" else 2),
        seconds_per_step=per_step,
        seconds_preview=per_grid,
        seconds_caching=caching,
        seconds=config.steps * per_step + grids * per_grid + caching + validations * held_out * 6 * forward_s,
        device=str(device),
        advice=_advice(max(peak, preview), fixed + gradients, available, config),
    )


def trained_config(config: UNetConfig, form: str, tokens: int) -> UNetConfig:
    """The architecture of the UNet that is trained, without making its weights."""
    if form == "full":
        return config
    return replace(config, null_text=form, null_tokens=tokens)


def trace_unet(
    make: Callable[[], UNet], batch: int, side: int, tokens: int, dtype: torch.dtype, checkpointing: bool
) -> Trace:
    """Run a forward pass on tensors without data and record what autograd keeps: x [batch, C, side, side]."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode():
        unet = make()
        unet.gradient_checkpointing = checkpointing
        config = unet.config
        x = torch.empty(batch, config.in_channels, side, side)
        cond: dict[str, Tensor] = {}
        if config.null_text == "none":
            cond["context"] = torch.empty(batch, tokens, config.context_dim)
        if config.adm_in_channels is not None:
            cond["y"] = torch.empty(batch, config.adm_in_channels)
        own = {id(parameter.untyped_storage()) for parameter in unet.parameters()}
        kept: dict[int, Tensor] = {}  # one tensor per storage; holding it keeps the identity unique
        per_block = [0]
        calls: list[tuple[str, nn.Module, tuple[tuple[int, ...], ...]]] = []

        def pack(tensor: Tensor) -> None:
            # Without a graph, and nothing for a backward pass, which never comes: a tensor that its own graph holds is
            # never freed.
            key = id(tensor.untyped_storage())
            if key not in own and key not in kept:
                kept[key] = tensor.detach()
                per_block[-1] += tensor.untyped_storage().nbytes()

        largest_block = 0

        def enter(module: nn.Module, inputs: tuple) -> None:
            per_block.append(0)
            calls.append((names[module], module, tuple(tuple(one.shape) for one in inputs if isinstance(one, Tensor))))

        def leave(*_: Any) -> None:
            nonlocal largest_block
            largest_block = max(largest_block, per_block.pop())

        names = {module: name for name, module in unet.named_modules()}
        with contextlib.ExitStack() as stack:
            if not checkpointing:
                for module in names:
                    if isinstance(module, (ResBlock, TransformerBlock)):
                        stack.callback(module.register_forward_pre_hook(enter).remove)
                        stack.callback(module.register_forward_hook(leave).remove)
            counter = stack.enter_context(FlopCounterMode(display=False))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing))
            stack.enter_context(torch.autocast("cpu", dtype, enabled=dtype is not torch.float32))
            unet(x, torch.zeros(batch, dtype=torch.long), **cond)
        sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
        counts = counter.get_flop_counts()
        blocks: dict[type, tuple[int, int, nn.Module, tuple]] = {}
        for name, module, shapes in calls:
            cost = sum(counts.get(f"UNet.{name}", {}).values())
            before = blocks.get(type(module), (0, 0, module, shapes))
            larger = (cost, module, shapes) if cost > before[1] else before[1:]
            blocks[type(module)] = (before[0] + cost, *larger)
        parameters = list(unet.parameters())
        return Trace(
            sum(one.numel() for one in parameters),
            sum(one.numel() for one in parameters if one.requires_grad),
            sum(sizes),
            max(sizes, default=0),
            largest_block,
            counter.get_total_flops(),
            blocks,
        )


def _step_seconds(
    trace: Trace, config: TrainConfig, device: torch.device, dtype: torch.dtype, trainable: int, batch: int
) -> tuple[float, float]:
    """(seconds per optimizer step, seconds of one image's forward pass) from the speed of the two kinds of block."""
    both, rest = 0.0, trace.flops
    rates = []
    for kind, (flops, _, _, _) in trace.blocks.items():
        rate = _seconds_per_flop(trace.blocks[kind], device, dtype, config.train == "all")
        rates.append(rate)
        both += flops * rate
        rest -= flops
    both += rest * (rates[0] if rates else 0.0)
    backward = 3 if config.train == "all" else 2.2  # passes' worth of arithmetic, the forward one included
    if config.gradient_checkpointing:
        both *= (backward + 1) / backward
    moved = trainable * OPTIMIZER_TRAFFIC * _seconds_per_byte(device)
    return config.accumulation * both + moved, both / (backward * batch)


def _seconds_per_flop(
    block: tuple[int, int, nn.Module, tuple], device: torch.device, dtype: torch.dtype, weights_learn: bool
) -> float:
    """Seconds of forward and backward pass per FLOP of the forward pass, timed on one block of the real size."""
    _, cost, traced, shapes = block
    batch = shapes[0][0]
    images = min(batch, TIMED_BATCH)
    module = _with_numbers(traced).to(device).requires_grad_(weights_learn)
    inputs = [
        torch.randn(images, *shape[1:], device=device, requires_grad=index == 0) for index, shape in enumerate(shapes)
    ]
    if isinstance(module, TransformerBlock) and len(inputs) == 1:
        inputs.append(None)  # text-free: no context

    def run() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            module(*inputs).float().square().mean().backward()

    with torch.inference_mode(False), torch.enable_grad():
        return _timed(run, device) / max(cost * images / batch, 1)


def _with_numbers(traced: nn.Module) -> nn.Module:
    """A module like a traced one, whose tensors hold no numbers, with some."""
    module = copy.copy(traced)
    module._parameters = {
        name: None if one is None else nn.Parameter(torch.randn(tuple(one.shape)) * 0.02)
        for name, one in traced._parameters.items()
    }
    module._modules = {name: None if one is None else _with_numbers(one) for name, one in traced._modules.items()}
    return module


def _seconds_per_byte(device: torch.device) -> float:
    tensor = torch.zeros(2**22, device=device)
    other = torch.ones_like(tensor)
    return _timed(lambda: tensor.lerp_(other, 0.5), device) / (3 * 4 * tensor.numel())


def _timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, after one to warm up; the fastest of a few."""

    def wait() -> None:
        if device.type in ("cuda", "xpu", "mps"):
            getattr(torch, device.type).synchronize()

    run()
    wait()
    best, started = math.inf, time.perf_counter()
    while True:
        begin = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() - started > SHORTEST_TIMING_S:
            return best


def _encoding_seconds(base: Prior, resolution: int, device: torch.device) -> float:
    """Seconds to encode one image, timed on a smaller one and scaled by area."""
    side = min(resolution, 512 if device.type == "cuda" else 64)
    image = torch.zeros(1, base.autoencoder.config.in_channels, side, side, device=device)
    with base.autoencoder_on(device):
        return _timed(lambda: base.encode(image), device) * (resolution / side) ** 2


def _available(device: torch.device) -> int | None:
    """Free memory of the device in bytes, where it can be asked for."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() if device.type == "cpu" else None


def _advice(needed: int, fixed: int, available: int | None, config: TrainConfig) -> str:
    """What to change when it will not fit; "" when it will, or when nobody knows.

    fixed: what is needed whatever the batch and its resolution.
    """
    if available is None or needed <= available:
        return ""
    ways = []
    if fixed > available:
        if config.train != "low_rank":
            ways.append("train self_attention or low_rank" if config.train == "all" else "train low_rank")
        if config.optimizer != "adamw8bit":
            ways.append("optimizer adamw8bit")
        if config.ema:
            ways.append("ema 0")
        return (
            f"This is more than the {size_text(available)} available, and {size_text(fixed)} of it are needed whatever "
            "the batch: try " + ", ".join(ways or ["another device"]) + "."
        )
    if not config.gradient_checkpointing:
        ways.append("gradient_checkpointing")
    if config.batch_size > 1:
        ways.append(f"batch_size 1 with accumulation {config.batch_size * config.accumulation}")
    if config.train == "all":
        ways.append("train self_attention or low_rank")
    if config.resolution > 256:
        ways.append("a lower resolution")
    return f"This is more than the {size_text(available)} available: try " + ", ".join(ways or ["another device"]) + "."


def size_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit in ("B", "KiB") else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
