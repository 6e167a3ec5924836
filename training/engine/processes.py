"""One process, or several through `accelerate`: the only module that knows how many there are.

Several processes train data-parallel (every one holds the whole model); gradients are averaged by torch's
DistributedDataParallel. They share the run's folder, so machines need a common file system.
"""

from __future__ import annotations

import atexit
import os
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor, nn

from .settings import ConfigProblem

# The first process may encode images or draw samples for long while the others wait.
PATIENCE = timedelta(days=2)


class OneProcess:
    """The plain case: nothing to wrap, share or wait for."""

    rank, world = 0, 1

    def __init__(self, device: str = "auto") -> None:
        self.device = pick_device(device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in training; its parameters are the given model's."""
        return model

    def accumulating(self, model: nn.Module) -> AbstractContextManager:
        """Around a forward and backward pass whose gradients are not shared yet."""
        return nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return values

    def each(self, value: int) -> list[int]:
        """The values of all processes, in their order. value: below 2^63."""
        values = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        return self.total(values).tolist()

    def anywhere(self, flag: bool) -> bool:
        """Whether any process raised its flag."""
        return flag if self.world == 1 else bool(self.total(torch.tensor([float(flag)], device=self.device)).item())

    def wait(self) -> None:
        """Until every process is here."""


class Accelerated(OneProcess):
    """A process started by `accelerate launch` (or torchrun), through the optional package accelerate."""

    def __init__(self, device: str = "auto") -> None:
        try:
            from accelerate import Accelerator, InitProcessGroupKwargs
        except ImportError as error:
            raise ConfigProblem(
                "device: several processes need the package accelerate, which is not installed; pip install "
                "accelerate, or start one process."
            ) from error
        # Precision stays ours, so that one process and several compute alike.
        self._accelerator = Accelerator(
            cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
        )
        atexit.register(leave_group)
        refuse_sharding(self._accelerator.distributed_type.name)
        self.device = self._accelerator.device
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes

    def wrap(self, model: nn.Module) -> nn.Module:
        return self._accelerator.prepare_model(model)

    def accumulating(self, model: nn.Module) -> AbstractContextManager:
        return self._accelerator.no_sync(model)

    def total(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values, reduction="sum")

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def leave_group() -> None:
    """End this process's part in the group while Python still runs.

    Gloo's threads let go of what they summed a moment after the sum is known. One that does so while the interpreter
    ends aborts the process, and the launcher calls a finished run failed; torch has no call that waits for them.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.5)


def refuse_sharding(kind: str) -> None:
    """Raise ConfigProblem for accelerate's ways (by name) that replace the parameters which are optimized and saved."""
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ConfigProblem(
            f"device: expected processes that each hold the whole model, found accelerate set to {kind}; choose plain "
            "multi-GPU or multi-CPU with `accelerate config`."
        )


def open_processes(device: str = "auto") -> OneProcess:
    """The process as it was started: several when a launcher says so (WORLD_SIZE above 1), else one."""
    return Accelerated(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else OneProcess(device)


def pick_device(name: str) -> torch.device:
    """ "auto" is the first of CUDA (ROCm too), XPU and MPS that works, else the CPU. Raises ConfigProblem."""
    available = {
        "cuda": torch.cuda.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, works in available.items() if works))
    try:
        device = torch.device(name)
    except RuntimeError:  # no kind of device that torch knows
        raise ConfigProblem(f"device: expected auto, cpu, cuda, cuda:N, mps or xpu, found {name!r}.") from None
    if not available.get(device.type, False):
        raise ConfigProblem(
            f"device: expected one that works here ({', '.join(kind for kind, works in available.items() if works)}), "
            f"found {name}."
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigProblem(f"device: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}, found {name}.")
    return device


def check_batch(batch_size: int, world: int) -> None:
    """Raise ConfigProblem for a batch that `world` processes cannot share."""
    if batch_size % world:
        raise ConfigProblem(f"batch_size: expected a multiple of the {world} processes, found {batch_size}.")


def pick_precision(name: str, device: torch.device) -> str:
    """ "auto" is bf16 where a GPU computes in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if computes_in_bf16(device) else "fp32"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device is a GPU with bf16 of its own."""
    # Not is_bf16_supported: it also says yes to cards that emulate it, slowly.
    return device.type == "cuda" and bool(torch.version.hip or torch.cuda.get_device_capability(device)[0] >= 8)
