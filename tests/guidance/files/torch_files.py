"""Torch checkpoints for tests: written by torch, or instruction by instruction."""

from __future__ import annotations

import struct
import zipfile

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, read_state_dict

BOTH = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
PLAIN_STATE = b"\x80\x02}X\x01\0\0\0a"


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))


def trained():
    """A state dict with _metadata, and what Lightning's trainer keeps beside it."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    net(torch.rand(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7])
    return {
        "epoch": 3,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": net.state_dict(),
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {
                "best_model_score": torch.tensor(0.25),
                "best_model_path": "",
                "dirpath": "a/b",
                "best_k_models": {},
            }
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "size": torch.Size([1, 4]),
            "device": torch.device("cuda", 1),
            "dtype": torch.float16,
            "names": {"a", "b"},
            "raw": b"\xff\0",
        },
        "loops": {"fit_loop": {"state_dict": {}, "total": {"ready": 3, "done": None, "last": False}}},
    }


def tensors():
    base = torch.arange(48.0).reshape(6, 8)
    tagged, parameter = torch.ones(3), torch.nn.Parameter(torch.rand(4, requires_grad=True))
    tagged.note, parameter.sharded = "mine", True
    made = {
        "whole": base,
        "rows": base[1:4],
        "turned": base.t(),
        "every": base[:, ::2],
        "again": base,
        "last": torch.rand(2, 4, 3, 3).to(memory_format=torch.channels_last),
        "number": torch.tensor(2.5),
        "none": torch.zeros(0, 5),
        "trained": torch.nn.Parameter(torch.rand(2, 3)),
        "tagged": tagged,
        "parameter": parameter,
        "frozen": torch.nn.Parameter(torch.rand(2), requires_grad=False),
        "flags": torch.tensor([True, False]),
    }
    for name in ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "complex64"):
        made[name] = torch.arange(5).to(getattr(torch, name))
    return made


def expected(path):
    """What torch makes of the file on its own."""
    return torch.load(path, map_location="cpu", weights_only=True)


def same(read, wanted):
    assert read.keys() == wanted.keys()
    for key, value in wanted.items():
        assert read[key].dtype == value.dtype and read[key].stride() == value.stride(), key
        left, right = (
            one.detach().contiguous().view(torch.uint8) if value.numel() and value.ndim else one.detach()
            for one in (read[key], value)
        )
        assert torch.equal(left, right) and not read[key].requires_grad, key


def refused(path) -> str:
    with pytest.raises(FileProblem) as caught:
        read_state_dict(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.endswith(".") and "\n" not in text and len(text) < 600, text
    return text


def zipped(path, code: bytes, records=(), start=b"\x80\x02"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", start + code)
        archive.writestr("archive/version", "3\n")
        for name, content in dict(records).items():
            archive.writestr(f"archive/data/{name}", content)
    return path


def legacy(path, code: bytes, keys=b"\x80\x02].", numbers=b"", start=b"\x80\x02"):
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    path.write_bytes(magic + b"\x80\x02M\xe9\x03.\x80\x02}." + start + code + keys + numbers)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def storage(numel: int, key="0", kind=b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(numel: int, shape: int, stride=1, offset=0) -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage(numel)
        + number(offset)
        + number(shape)
        + b"\x85"
        + number(stride)
        + b"\x85\x89ccollections\nOrderedDict\n)RtR"
    )
