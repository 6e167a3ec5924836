"""Torch checkpoints: read as torch reads them, without torch, in time and memory that the file's size justifies."""

from __future__ import annotations

import collections
import gc
import random
import re
import sys
import types
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from indomain_guidance.guidance.files import read_keys, read_state_dict
from indomain_guidance.guidance.files import torch_pickle as module
from indomain_guidance.guidance.files.inert_pickle import MAX_STEPS
from indomain_guidance.tests.guidance.files.torch_files import BOTH, expected, network, refused, same, tensors, trained


@BOTH
@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_every_kind_of_tensor_is_read_as_torch_reads_it(tmp_path, new, protocol):
    path, content = tmp_path / "a.pt", tensors()
    torch.save(content, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    read = read_state_dict(path)
    same(read, expected(path))
    assert read["rows"].untyped_storage().data_ptr() == read["whole"].untyped_storage().data_ptr()
    assert type(read["parameter"]) is torch.Tensor and not hasattr(read["tagged"], "note")


@pytest.mark.parametrize("name", sorted(name for _, name in module._UNTYPED_DTYPES))
def test_number_formats_that_torch_stores_as_bytes(tmp_path, name):
    path, values = tmp_path / "a.ckpt", torch.arange(32, dtype=torch.uint8).view(getattr(torch, name))
    torch.save({"a": values, "part": values[2:4], "bytes": torch.ones(3).untyped_storage()}, path)
    same(read_state_dict(path), {key: value for key, value in expected(path).items() if key != "bytes"})


@BOTH
def test_a_trainers_checkpoint_gives_its_weights(tmp_path, new):
    path = tmp_path / "last.ckpt"
    torch.save(trained(), path, _use_new_zipfile_serialization=new)
    found = expected(path)
    assert found["state_dict"]._metadata and found["lr_schedulers"][0]["milestones"] == collections.Counter([3, 7])
    same(read_state_dict(path), found["state_dict"])
    assert set(read_keys(path)) == set(network().state_dict())


@BOTH
def test_what_torch_alone_refuses_of_old_trainers(tmp_path, new, monkeypatch):
    """Lightning's classes as keys, numpy's numbers and arrays, as the first Stable Diffusion files have them."""
    name, class_name = module._CALLBACKS[0]
    callback = type(class_name, (), {"__module__": name})
    for part in (name.split(".")[0], ".".join(name.split(".")[:2]), name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    setattr(sys.modules[name], class_name, callback)
    path, content = tmp_path / "sd.ckpt", trained()
    numbers = [numpy.dtype(code).type(1) for code in ("b1", "i8", "u2", "f2", "f4", "f8")]
    content["callbacks"] = {callback: {"best_model_score": numbers, "scale": numpy.float64(0.5), "all": numpy.ones(3)}}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    with pytest.raises(Exception, match="Unsupported global"):
        expected(path)
    same(read_state_dict(path), content["state_dict"])
    content["callbacks"] = {"made": collections.defaultdict(int), "scale": random.Random(0)}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    assert "collections.defaultdict, which is not on the list of allowed names" in refused(path)


@BOTH
def test_large_checkpoints_stay_far_from_the_bounds(tmp_path, new):
    """SDXL has 2,500 tensors, a trainer's file 5,000: a file of few bytes may have as many, a large one ten times."""
    path = tmp_path / "a.ckpt"
    content = {f"model.diffusion_model.input_blocks.{n}.weight": torch.zeros(1) for n in range(5_000)}
    torch.save({"state_dict": content}, path, _use_new_zipfile_serialization=new)
    assert len(read_state_dict(path)) == 5_000 and MAX_STEPS > 5 * 38 * 5_000


@BOTH
def test_tensors_that_repeat_numbers_and_ones_without(tmp_path, new):
    path, base = tmp_path / "a.pt", torch.arange(30.0).reshape(5, 6)
    long = torch.zeros(2**20 + 30, dtype=torch.int8)
    content = {
        "one": torch.zeros(1).expand(1000),
        "rows": torch.arange(3.0)[:, None].expand(3, 50),
        "base": base,
        "windows": torch.arange(20.0).unfold(0, 5, 1),
        "none": base[5:],
        "beyond": base.flatten()[::7][5:],
        "last": long[-9:][9:],
        "tall": long[:, None][:, :0],
        "wide": base[:, 6:].expand(5, 0),
    }
    assert content["beyond"].storage_offset() > base.numel()
    torch.save(content, path, _use_new_zipfile_serialization=new)
    same(read_state_dict(path), expected(path))
    torch.save({"b": torch.zeros(1).expand(1000)}, path, _use_new_zipfile_serialization=new)
    assert path.stat().st_size < 2000
    same(read_state_dict(path), expected(path))
    torch.save({"a": base, "b": torch.zeros(1).expand(10**9)}, path, _use_new_zipfile_serialization=new)
    assert re.search(r"tensors of 4\d{9} bytes, more than 4 times the \d+ of the file", refused(path))


@BOTH
def test_keys_that_are_neither_texts_nor_whole_numbers(tmp_path, new):
    path, inf = tmp_path / "a.pt", float("inf")
    keys = [None, True, 0.5, -0.25, inf, -inf, 1e300, (), ("a", 2, None, 0.5), tuple(range(8)), "\udc80", ("\udfff",)]
    content = {"a": torch.ones(2), "more": dict.fromkeys(keys, 1), "some": {(1, 2), 0.5}}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    same(read_state_dict(path), {"a": content["a"]})
    read = module.read_torch_pickle(path)
    assert read["more"] == expected(path)["more"] == content["more"] and read["some"] == content["some"]
    torch.save({"\udc80": torch.ones(1)}, path, _use_new_zipfile_serialization=new)
    assert read_state_dict(path).keys() == {"\udc80"} and read_keys(path) == ["\udc80"]
    for key, kind in (
        (float("nan"), "float"),
        (tuple(range(9)), "tuple"),
        ((1, (2,)), "tuple"),
        (b"a", "memoryview"),
        ((1, float("nan")), "float"),
        ((2**57,), "int"),
    ):
        torch.save({"a": torch.ones(2), "more": {key: 1}}, path, _use_new_zipfile_serialization=new)
        assert re.search(f"a key that is an? {kind}", refused(path))
    torch.save(
        {"a": torch.ones(2), "more": {(n, -1): 1 for n in range(1001)}}, path, _use_new_zipfile_serialization=new
    )
    assert "more than 10000 numbers as keys" in refused(path)


def test_files_without_checksums(tmp_path):
    path, before = tmp_path / "a.pt", torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(4.0)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    same(read_state_dict(path), expected(path))
    with zipfile.ZipFile(path) as archive:
        assert {member.CRC for member in archive.infolist()} == {0}
        with pytest.raises(zipfile.BadZipFile):
            archive.read("a/data.pkl")


@BOTH
@pytest.mark.parametrize("mapped", [True, False])
def test_tensors_lie_in_the_file_only_where_that_is_asked(tmp_path, new, mapped):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=new)
    before = path.read_bytes()
    found = module.read_torch_pickle(path, mapped=mapped)["a"]
    found += 1
    assert path.read_bytes() == before and torch.equal(found, torch.arange(4.0) + 1)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells which files are mapped")
def test_a_mapped_file_is_closed(tmp_path):
    """Without waiting for the garbage collector: Windows keeps open files in their places."""
    path = tmp_path / "a.pt"
    gc.disable()
    try:
        for new in (True, False):
            torch.save({"a": torch.ones(2), "raw": b"\xff\0"}, path, _use_new_zipfile_serialization=new)
            tensors = read_state_dict(path)
            assert str(path) not in Path("/proc/self/maps").read_text() and tensors
    finally:
        gc.enable()


@BOTH
def test_an_optimizers_state_by_addresses(tmp_path, new):
    """As torch 1.0 to 1.5 saved it."""
    path, keys = tmp_path / "a.pt", [140_435_163_178_672 + 72 * n for n in range(500)]
    state = {key: {"step": 3, "exp_avg": torch.ones(2)} for key in keys}
    content = {"a": torch.ones(2), "optim": {"state": state, "param_groups": [{"params": keys}]}}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    same(read_state_dict(path), {"a": content["a"]})
    assert list(module.read_torch_pickle(path)["optim"]["state"]) == keys


def test_numbers_of_other_machines_and_of_other_writers(tmp_path):
    path, whole = tmp_path / "a.pt", tmp_path / "whole.pt"
    torch.save({"a": torch.arange(4.0)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:  # stored anew, without zip64
        for name in source.namelist():
            target.writestr(name, source.read(name))
    same(read_state_dict(path), expected(whole))
    torch.save({"a": torch.ones(2)}, path, pickle_protocol=4)  # which torch itself reads only by running it
    same(read_state_dict(path), {"a": torch.ones(2)})
    path.write_bytes(whole.read_bytes().replace(b"little", b"bigger"))
    assert "numbers that are not little-endian" in refused(path)
