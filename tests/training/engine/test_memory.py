"""Memory that ran out, in the words of several allocators, and what is said of it."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.training.adaptation.config import AdaptConfig
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.memory import available_memory, memory_problem


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_running_out_of_memory_is_recognised(error, expected):
    training = TrainConfig(base="m", data=("d",), batch_size=2, resolution=64)
    adapting = AdaptConfig(generator="g", base="m", batch_size=3, resolution=256)
    for config, sizes in ((training, "batch size 2 at 64 px"), (adapting, "batch size 3 at 256 px")):
        told = memory_problem(error, config)
        assert (told is not None and sizes in told) == expected


MIB = 2**20


def system(root, files):
    """A root of a file system with these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


def test_memory_is_the_least_of_what_the_system_and_the_control_groups_leave(tmp_path):
    meminfo = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable:    8192000 kB\n"}
    assert available_memory(system(tmp_path / "plain", meminfo)) == 8000 * MIB

    def group(place, most, used, cache, names=("max", "current"), kind="inactive_file"):
        return {
            f"sys/fs/cgroup/{place}memory.{names[0]}": f"{most}\n",
            f"sys/fs/cgroup/{place}memory.{names[1]}": f"{used * MIB}\n",
            f"sys/fs/cgroup/{place}memory.stat": f"anon 5\n{kind} {cache * MIB}\n",
        }

    # Second version: a job below a group with a limit of its own; the tighter one counts.
    second = {**meminfo, "proc/self/cgroup": "0::/batch/job\n", **group("batch/job/", "max", 300, 0)}
    assert available_memory(system(tmp_path / "free", second)) == 8000 * MIB
    second |= group("batch/", 1000 * MIB, 400, 100)
    assert available_memory(system(tmp_path / "second", second)) == 700 * MIB
    # In a container the group's path is the host's, and its own files lie at the root.
    inside = {**meminfo, "proc/self/cgroup": "0::/docker/3f\n", **group("", 500 * MIB, 600, 50)}
    assert available_memory(system(tmp_path / "inside", inside)) == 0
    first = {**meminfo, "proc/self/cgroup": "5:cpu:/\n4:memory:/job\n0::/\n"}
    first |= group("memory/job/", 2000 * MIB, 500, 0, ("limit_in_bytes", "usage_in_bytes"), "total_inactive_file")
    assert available_memory(system(tmp_path / "first", first)) == 1500 * MIB
    assert available_memory(tmp_path / "nothing") is None
