"""What a step will need, found before it by a forward pass on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .memory import available_memory

CUDA_CONTEXT = 600 * 2**20  # bytes: context, libraries' workspaces


@dataclass(frozen=True)
class Trace:
    """One forward pass without data: counts of parameters, and bytes.

    kept: what autograd keeps for the backward pass beside parameters and buffers; largest: of it, the largest tensor;
    block_bytes: of it, the most that one block keeps, which gradient checkpointing computes and holds again.
    """

    parameters: int
    trainable: int
    kept: int
    largest: int
    block_bytes: int


def trace(
    make: Callable[[], nn.Module], run: Callable[[nn.Module], object], block_types: tuple[type[nn.Module], ...] = ()
) -> Trace:
    """Run `run(make())` on tensors without data, which takes neither memory nor the network's arithmetic.

    block_types: the modules of `Trace.block_bytes`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, Tensor] = {}  # one tensor per storage; holding it keeps the identity unique
    per_block, block_bytes = [0], 0

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
                    stack.callback(module.register_forward_pre_hook(lambda *_: per_block.append(0)).remove)
                    stack.callback(module.register_forward_hook(leave).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing))
            run(network)
        sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    trainable = sum(count for count, learns in counts if learns)
    return Trace(sum(count for count, _ in counts), trainable, sum(sizes), max(sizes, default=0), block_bytes)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device, None where it cannot be asked for."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() if device.type == "cpu" else None


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors take, each counted on its own."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_text(device: torch.device | str, peak: int, parts: Mapping[str, int], available: int | None) -> str:
    """A line about a run's memory: its most, what it is made of, and what there is."""
    named = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    text = f"memory on {device}: about {size_text(peak)} at its highest ({named})"
    return text if available is None else f"{text}, {size_text(available)} available"


def size_text(count: float) -> str:
    """A number of bytes in words, such as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit != "MiB" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
