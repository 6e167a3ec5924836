"""Reading and writing tensors: every fault of a file gets its own sentence, and writing is atomic."""

from __future__ import annotations

import json
import os
import struct

import pytest
import safetensors.torch
import torch
from indomain_guidance.guidance.files import (
    FileProblem,
    ModelFile,
    check_finite,
    read_keys,
    read_metadata,
    read_state_dict,
    write_safetensors,
)
from indomain_guidance.guidance.files import safetensors_file as module

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)}


def header(entries, length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def raw_header(text):
    return struct.pack("<Q", len(text)) + text.encode()


def test_round_trip(tmp_path):
    path = write_safetensors(tmp_path / "new" / "a.safetensors", TENSORS, {"who": "me"})
    read = read_state_dict(path)
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[key], TENSORS[key]) for key in TENSORS)
    assert read["b.bias"].dtype == torch.float16
    assert read_metadata(path) == {"who": "me"} and set(read_keys(path)) == set(TENSORS)
    oracle = safetensors.torch.load_file(path)
    assert all(torch.equal(oracle[key], TENSORS[key]) for key in TENSORS)
    assert read_state_dict(path, prefix="a.").keys() == {"weight"}
    with pytest.raises(FileProblem, match="expected weights under 'c.', found none"):
        read_state_dict(path, prefix="c.")


def test_views_shared_and_strided_tensors_are_written(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    odd = {"whole": whole, "again": whole, "view": whole[1:], "turned": whole.t(), "scalar": torch.tensor(2.0)}
    odd["last"] = torch.rand(2, 4, 3, 3).to(memory_format=torch.channels_last)
    odd["trained"] = torch.nn.Parameter(torch.rand(2))
    read = read_state_dict(write_safetensors(tmp_path / "a.safetensors", odd))
    assert all(torch.equal(read[key], odd[key]) for key in odd)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = write_safetensors(tmp_path / "a.safetensors", TENSORS)
    before = path.read_bytes()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(FileProblem, match="could not be written.*No space left"):
        write_safetensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(ValueError, match="metadata must be strings"):
        write_safetensors(path, TENSORS, {"steps": 3})


def test_an_impossible_path_has_its_sentence(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.safetensors", tmp_path / ("a" * 300 + ".safetensors")):
        with pytest.raises(FileProblem, match="a.safetensors: could not be written") as caught:
            write_safetensors(path, TENSORS)
        assert "\n" not in str(caught.value)


def test_the_file_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), rename(*paths)))
    write_safetensors(tmp_path / "a.safetensors", TENSORS)
    assert calls[:2] == ["fsync", "replace"]


def test_each_fault_has_its_sentence(tmp_path):
    good = write_safetensors(tmp_path / "good.safetensors", TENSORS).read_bytes()
    overlapping = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}
    unknown_type = {"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}
    faults = {
        "": "expected a model file, found an empty one",
        good[:-5]: f"truncated: expected {len(good)} bytes, found {len(good) - 5}",
        good[:40]: "truncated: expected a header of",
        good[:5]: "expected a safetensors file, found something else",
        good + b"tail": "found a damaged one",
        b"<!DOCTYPE html><title>Log in</title>": "found a web page",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "found a Git LFS pointer",
        b"GGUF" + bytes(300): "found a GGUF file",
        b"hello world, no weights in here": "found text; download",
        header({"a": 1}): "found a damaged header",
        header({"a": {"dtype": "F32", "shape": [2]}}): "found a damaged header",
        struct.pack("<Q", 20) + b"{not json at all....": "found a damaged header",
        struct.pack("<Q", 200_005) + b'{"a":' + 200_000 * b"[": "found a damaged header (more than 64 lists",
        header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}): "not described by dtype, shape",
        header({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}): "not described by dtype, shape",
        header({"a": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}): "not described by dtype, shape",
        header(
            {"a": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}
        ): "65 dimensions, more than torch takes",
        header(
            {"a": {"dtype": "F32", "shape": [2**31, 2**31, 4], "data_offsets": [0, 8]}}
        ): "more numbers than its bytes",
        header({"a": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}): "more numbers than its bytes",
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}): "more numbers than its bytes",
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8.0]}}): "not described by dtype, shape",
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}): "not described by dtype, shape",
        header({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}): "not described by dtype, shape",
        header({"__metadata__": ["x"]}): "metadata that is no text",
        header({"__metadata__": None}): "metadata that is no text",
        raw_header('{"a": 1, "a": 2}'): "'a' stands twice",
        raw_header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, %s]}}' % ("9" * 310)): "310 digits",
        raw_header('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}'): "no float holds",
        raw_header('{"a": "%s"}' % ("x" * 2**25)): "a header of at most 32 MiB, found one of 32 MiB",
        header(overlapping) + bytes(8): "found a damaged one",
        header(unknown_type) + bytes(8): "found a damaged one",
        header({"__metadata__": {"a": "b"}}): "expected weights, found none",
        struct.pack("<Q", 2**40) + b"{}": "found something else",
    }
    path = tmp_path / "faulty.safetensors"
    for content, message in faults.items():
        path.write_bytes(content or b"")
        with pytest.raises(FileProblem) as caught:
            read_state_dict(path)
        text = str(caught.value)
        assert message in text, text
        assert text.startswith(f"{path}: ") and text.endswith(".") and "\n" not in text, text
    with pytest.raises(FileProblem, match="found nothing at this path"):
        read_state_dict(tmp_path / "absent.safetensors")
    with pytest.raises(FileProblem, match="found nothing at this path"):
        read_state_dict("a\0b.safetensors")
    with pytest.raises(FileProblem, match="found a folder"):
        read_metadata(tmp_path)


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


def test_a_header_is_read_once_whatever_is_asked(tmp_path, monkeypatch):
    path = write_safetensors(tmp_path / "a.safetensors", TENSORS, {"who": "me"})
    reads = []
    monkeypatch.setattr(module, "parse_json", lambda text, most: reads.append(len(text)) or json.loads(text))
    file = ModelFile(path)
    assert file.metadata == {"who": "me"} and set(file.keys) == set(TENSORS) == set(file.tensors())
    assert file.shapes() == {"a.weight": ((2, 3), "F32"), "b.bias": ((4,), "F16")}
    assert len(reads) == 1
    with pytest.raises(FileProblem, match="expected weights under 'c.'"):
        file.tensors("c.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_finiteness(dtype, bad):
    tensors = {"fine": torch.ones(5).to(dtype), "count": torch.tensor([3]), "broken": torch.ones(2, 3)}
    tensors["broken"][1, 1] = bad
    tensors["broken"] = tensors["broken"].to(dtype)
    if dtype == torch.float8_e4m3fn and not bool(tensors["broken"].float().isnan().any()):
        pytest.skip("this type has no infinity")
    with pytest.raises(
        FileProblem, match="model.safetensors: expected finite weights.* in 1 of the 6 numbers of broken"
    ):
        check_finite(tensors, "model.safetensors")
    tensors["broken"] = torch.ones(2, 3).to(dtype)
    check_finite(tensors, "model.safetensors")


# ---- pickles ----------------------------------------------------------------------------------------------------


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


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_written_file_is_as_readable_as_the_users_other_files(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    written = write_safetensors(tmp_path / "weights.safetensors", {"a": torch.zeros(2)})
    assert written.stat().st_mode == plain.stat().st_mode
