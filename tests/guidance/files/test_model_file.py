"""Model files: pickles read as plain data, and files under wrong names."""

from __future__ import annotations

import os

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, read_keys, read_metadata, read_state_dict, write_safetensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)}


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["INDOMAIN_TEST_EVIL"],)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_pickles_are_read_as_plain_data(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"model{suffix}"
    torch.save({"state_dict": {**TENSORS, "epoch": 3}, "global_step": 5}, path)
    read = read_state_dict(path)
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[key], TENSORS[key]) for key in TENSORS)
    assert read_metadata(path) == {} and set(read_keys(path)) == set(TENSORS)
    torch.save(TENSORS, path)
    assert read_state_dict(path, prefix="b.").keys() == {"bias"}


def test_pickles_run_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("INDOMAIN_TEST_EVIL", str(tmp_path / "evil"))
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(2), "b": Evil()}, path)
    with pytest.raises(FileProblem, match="cannot be read safely"):
        read_state_dict(path)
    assert not (tmp_path / "evil").exists()
    torch.load(path, weights_only=False)  # the payload is live: a careless reader would have run it
    assert (tmp_path / "evil").exists()


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu128", "3.0.0a0"])
def test_pickles_are_read_with_every_torch(tmp_path, version, monkeypatch):
    path = tmp_path / "model.pt"
    torch.save(TENSORS, path)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch, "load", lambda *values, **more: pytest.fail("torch was asked to read it"))
    assert read_state_dict(path).keys() == TENSORS.keys()


def test_other_pickles_and_disguises(tmp_path):
    path = tmp_path / "model.pt"
    torch.save([torch.zeros(2)], path)
    with pytest.raises(FileProblem, match="dictionary of tensors, found list"):
        read_state_dict(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(FileProblem, match="expected weights, found none"):
        read_state_dict(path)
    path.write_bytes(write_safetensors(tmp_path / "a.safetensors", TENSORS).read_bytes())
    assert read_state_dict(path).keys() == TENSORS.keys()  # safetensors under the wrong name
    whole = tmp_path / "whole.pt"
    torch.save(TENSORS, whole)
    path.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(FileProblem, match="cannot be read safely"):
        read_state_dict(path)
