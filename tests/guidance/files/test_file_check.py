"""What lies at a path that is no model file is told, with what to do."""

from __future__ import annotations

import os

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, read_keys, read_state_dict, write_safetensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)}


def test_a_name_that_is_nearly_right_is_told(tmp_path):
    write_safetensors(tmp_path / "Cafe\u0301 v2.safetensors", {"a": torch.zeros(1)})
    for name in ("Cafe\u0301 v2", "CAF\u00c9 V2", "caf\u00e9 v2.SAFETENSORS."):
        if (tmp_path / name).exists():
            continue  # on disks that know no capitals
        with pytest.raises(FileProblem, match="nothing there, but Cafe\u0301 v2.safetensors beside it; name"):
            read_keys(tmp_path / name)
    for name in ("Cafe\u0301", "v2.safetensors", "nowhere/Cafe\u0301 v2"):
        with pytest.raises(FileProblem, match="found nothing at this path"):
            read_keys(tmp_path / name)


def test_a_torchscript_program_is_named(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    with pytest.raises(FileProblem, match=r"found a TorchScript program; save the network's state_dict\(\)"):
        read_keys(tmp_path / "a.pt")


@pytest.mark.skipif(os.name != "posix", reason="links and pipes are POSIX")
def test_what_lies_in_a_files_place_is_told(tmp_path):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone.safetensors")
    with pytest.raises(FileProblem, match=r"link.safetensors: .* found a link to .*gone.safetensors, where no file is"):
        read_state_dict(tmp_path / "link.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(FileProblem, match="found a pipe, socket or device; name a file"):
        read_state_dict(tmp_path / "pipe.safetensors")
