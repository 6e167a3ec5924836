"""What a step will need, found before it: memory by a forward pass on tensors without data, time by timing parts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .memory import available_memory

CUDA_CONTEXT = 600 * 2**20  # bytes: context, libraries' workspaces
SHORTEST_TIMING_S = 0.15


@dataclass(frozen=True)
class Blocks:
    """All blocks of one type: the FLOPs of all of them, and FLOPs, module and input shapes of the costliest."""

    flops: int
    highest: int
    module: nn.Module
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Trace:
    """One forward pass without data: counts of parameters, bytes, FLOPs.

    kept: what autograd keeps for the backward pass beside parameters and buffers; largest: of it, the largest tensor;
    block_bytes: of it, the most that one block keeps, which gradient checkpointing computes and holds again. flops and
    blocks: 0 and empty where no types of blocks were asked for.
    """

    parameters: int
    trainable: int
    kept: int
    largest: int
    block_bytes: int
    flops: int
    blocks: dict[type, Blocks]


def trace(
    make: Callable[[], nn.Module], run: Callable[[nn.Module], object], block_types: tuple[type[nn.Module], ...] = ()
) -> Trace:
    """Run `run(make())` on tensors without data, which takes neither memory nor the network's arithmetic.

    block_types: modules to count the FLOPs and the kept bytes of.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    kept: dict[int, Tensor] = {}  # one tensor per storage; holding it keeps the identity unique
    per_block, block_bytes = [0], 0
    calls: list[tuple[nn.Module, tuple[tuple[int, ...], ...]]] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        per_block.append(0)
        calls.append((module, tuple(tuple(value.shape) for value in inputs if isinstance(value, Tensor))))

    def leave(*_: Any) -> None:
        nonlocal block_bytes
        block_bytes = max(block_bytes, per_block.pop())

    with FakeTensorMode(), torch.enable_grad():
        network = make()
        own = {id(tensor.untyped_storage()) for tensor in (*network.parameters(), *network.buffers())}

        def pack(tensor: Tensor) -> None:
            key = id(tensor.untyped_storage())
            if key not in own and key not in kept:
                # Detached: a tensor that its own graph holds is never freed, and no backward pass comes.
                kept[key] = tensor.detach()
                per_block[-1] += tensor.untyped_storage().nbytes()

        with ExitStack() as stack:
            for module in network.modules():
                if isinstance(module, block_types):
                    stack.callback(module.register_forward_pre_hook(enter).remove)
                    stack.callback(module.register_forward_hook(leave).remove)
            counter = stack.enter_context(FlopCounterMode(display=False)) if block_types else None
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing))
            run(network)
        sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
        parameters = list(network.parameters())
        return Trace(
            sum(parameter.numel() for parameter in parameters),
            sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            sum(sizes),
            max(sizes, default=0),
            block_bytes,
            counter.get_total_flops() if counter else 0,
            _by_type(network, calls, counter.get_flop_counts()) if counter else {},
        )


def _by_type(
    network: nn.Module, calls: list[tuple[nn.Module, tuple[tuple[int, ...], ...]]], counts: dict[str, dict[Any, int]]
) -> dict[type, Blocks]:
    """The blocks that were called with inputs of these shapes, by their type; counts: FLOPs by qualified name."""
    names = {module: f"{type(network).__name__}.{name}" for name, module in network.named_modules()}
    blocks: dict[type, Blocks] = {}
    for module, shapes in calls:
        flops = sum(counts.get(names[module], {}).values())
        found = blocks.get(type(module), Blocks(0, -1, module, shapes))
        highest = (flops, module, shapes) if flops > found.highest else (found.highest, found.module, found.shapes)
        blocks[type(module)] = Blocks(found.flops + flops, *highest)
    return blocks


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, after one to warm up; the fastest of a few."""

    def once() -> float:
        begin = time.perf_counter()
        run()
        if device.type in ("cuda", "xpu", "mps"):
            getattr(torch, device.type).synchronize()
        return time.perf_counter() - begin

    once()
    best, started = math.inf, time.perf_counter()
    while True:
        best = min(best, once())
        if time.perf_counter() - started > SHORTEST_TIMING_S:
            return best


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device, None where it cannot be asked for."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() if device.type == "cpu" else None


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors take, each counted on its own."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def size_text(count: float) -> str:
    """A number of bytes in words, such as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit != "MiB" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
