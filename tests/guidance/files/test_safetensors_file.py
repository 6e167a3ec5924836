"""Reading and writing safetensors: every fault of a file gets its own sentence."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import torch
from indomain_guidance.guidance.files import (
    FileProblem,
    ModelFile,
    read_keys,
    read_metadata,
    read_state_dict,
    write_safetensors,
)

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


def test_tensors_are_counted_however_their_fields_are_written(tmp_path):
    path = tmp_path / "many.safetensors"
    entry = '{"dtype": "F32", "shape": [0], "data\\u005foffsets": [0, 0]}'
    path.write_bytes(raw_header("{" + ", ".join(f'"{number}": {entry}' for number in range(50_001)) + "}"))
    with pytest.raises(FileProblem, match="at most 50000 tensors, found 50001; use another"):
        read_state_dict(path)


def test_each_fault_has_its_sentence(tmp_path):
    good = write_safetensors(tmp_path / "good.safetensors", TENSORS).read_bytes()
    faults = {
        "": "expected a model file, found an empty one",
        good[:-5]: "damaged or truncated one",
        good[:40]: "damaged or truncated one",
        good[:5]: "expected a safetensors file, found something else",
        good + b"tail": "damaged or truncated one",
        b"<!DOCTYPE html><title>Log in</title>": "found a web page",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "found a Git LFS pointer",
        b"GGUF" + bytes(300): "found a GGUF file",
        b"hello world, no weights in here": "found text; download",
        header({"__metadata__": {"a": "b"}}): "expected weights, found none",
        raw_header('{"a": "%s"}' % ("x" * 2**25)): "a header of at most 32 MiB, found one of 32 MiB",
    }
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    damaged = [
        header({"a": 1}),
        header({"a": {"dtype": "F32", "shape": [2]}}),
        struct.pack("<Q", 20) + b"{not json at all....",
        struct.pack("<Q", 200_005) + b'{"a":' + 200_000 * b"[",
        *(header({"a": entry | {"shape": shape}}) for shape in ([-2], 2, [2**63, 0], [2**31, 2**31, 4], [3])),
        *(header({"a": entry | {"data_offsets": ends}}) for ends in ([8, 4], [0, 8.0], [8], [0, 2**70])),
        header({"a": entry | {"dtype": ["F32"]}}),
        header({"a": entry | {"dtype": "F33"}}) + bytes(8),
        header({"a": entry, "b": entry}) + bytes(8),
        header({"__metadata__": ["x"]}),
        raw_header('{"a": 1, "a": 2}'),
        raw_header('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}'),
        struct.pack("<Q", 2**40) + b"{}",
    ]
    faults |= dict.fromkeys(damaged, "damaged or truncated one (Error while deserializing header")
    empty = entry | {"data_offsets": [0, 0]}  # the library does not look at what has no numbers
    faults[header({"a": empty | {"shape": [0] + [1] * 64}})] = "65 dimensions, more than torch takes"
    for shape in ([2**62, 0], [2**63, 0], [2**64 - 1, 0], [0, 2**30, 2**31]):
        faults[header({"a": empty | {"shape": shape}})] = "damaged or truncated one ("
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


def test_what_the_header_says(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", TENSORS, {"who": "me"})
    file = ModelFile(path)
    assert file.metadata == {"who": "me"} and set(file.keys) == set(TENSORS) == set(file.tensors())
    assert file.shapes() == {"a.weight": ((2, 3), "F32"), "b.bias": ((4,), "F16")}
    with pytest.raises(FileProblem, match="expected weights under 'c.'"):
        file.tensors("c.")
