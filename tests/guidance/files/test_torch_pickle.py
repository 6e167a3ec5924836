"""Torch checkpoints: read as torch reads them, without torch, in time and memory that the file's size justifies."""

from __future__ import annotations

import collections
import gc
import random
import re
import struct
import sys
import time
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, read_keys, read_state_dict
from indomain_guidance.guidance.files import torch_pickle as module
from indomain_guidance.guidance.files.inert_pickle import MAX_NUMBER_KEYS, MAX_STEPS

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


# ------------------------------------------------------------------------------------------------------ what is read


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
def test_weights_that_torch_stores_as_bytes(tmp_path, name):
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


# ----------------------------------------------------------------------------------------------------------- attacks

_DICT = b"ccollections\nOrderedDict\n)R"
_FULL = b"}q\0(" + b"".join(text(f"k{n}") + b"N" for n in range(40)) + b"u"
_LIST = b"](" + b"".join(b"K" + bytes([n]) for n in range(40)) + b"eq\0"
_AGAIN = b"ctorch._utils\n_rebuild_tensor_v2\nq\2h\1R" + b"h\2h\1R" * 30_000
ATTACKS = {
    "bytearray": (b"cbuiltins\nbytearray\n" + number(400_000_000) + b"\x85R", "builtins.bytearray"),
    "tensor of a length": (b"ctorch\nTensor\n" + number(400_000_000) + b"\x85R", "a call of torch.Tensor"),
    "new tensor": (b"ctorch\nTensor\n)\x81", "an instance of torch.Tensor"),
    "storage of a length": (b"ctorch.storage\nUntypedStorage\n" + number(2**30) + b"\x85R", "UntypedStorage, which is"),
    "storage beyond the file": (storage(10**8), "storages that claim more than"),
    "many storages": (b"".join(storage(40, str(n)) for n in range(9)), "claim more than|record|one value"),
    "negative storage": (storage(-5), "impossible count"),
    "storage of no record": (storage(2, "7"), "a storage of 8 bytes|list of keys"),
    "two descriptions": (storage(4) + storage(2, kind=b"ctorch\nDoubleStorage\n") + b"\x86", "two descriptions"),
    "view of a storage": (storage(4)[:-2] + b"NK\0K\1\x87tQ", "a persistent id|described by other types"),
    "tensor beyond its storage": (tensor(4, 10**9), "reaches to number 999999999"),
    "tensor with a far offset": (tensor(4, 2, offset=2**40), "out of bounds"),
    "tensor that repeats": (tensor(4, 10**12, stride=0), "tensors of 4000000000000 bytes, more than 4 times"),
    "tensor with a negative stride": (tensor(4, 2, stride=-1), "negative"),
    "one tensor again and again": (b"(" + tensor(4, 4).replace(b"tR", b"tq\1R") + _AGAIN + b"t", "more than 4 times"),
    "tensors without numbers": (b"(" + tensor(4, 0).replace(b"tR", b"tq\1R") + _AGAIN + b"t", "more than 4 times"),
    "empty of exabytes": (
        tensor(4, 0)
        .replace(number(0) + b"\x85", number(0) + number(2**60) + b"\x86")
        .replace(number(1) + b"\x85", number(1) + number(1) + b"\x86"),
        "impossible sizes",
    ),
    "counts of a text": (b"ccollections\nCounter\n" + text("abc") + b"\x85R", "other arguments than counts"),
    "set made again and again": (
        _LIST + b"(cbuiltins\nset\nq\1h\0\x85R" + b"h\1h\0\x85R" * 30_000 + b"t\x86",
        "more than 1000000 steps",
    ),
    "set of a text": (b"cbuiltins\nset\n" + text("abc") + b"\x85R", "other arguments than a list"),
    "set that collides": (
        b"cbuiltins\nset\n](" + number(2**61 - 1) + number(2**62 - 2) + b"e\x85R",
        "a key that is an int",
    ),
    "key that is nested": (b"}" + b")" + b"\x85" * 100_000 + b"Ns", "a key that is a tuple"),
    "dictionary of a list": (b"ccollections\nOrderedDict\n]\x85R", "OrderedDict with arguments"),
    "parameter of no tensor": (b"ctorch._utils\n_rebuild_parameter\nK\1\x88" + _DICT + b"\x87R", "other arguments"),
    "tensor by another function": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\ndevice\nctorch\nTensor\n" + text("cpu") + b"\x85NtR",
        "another function than torch writes",
    ),
    "tensor of another type": (b"ctorch._tensor\n_rebuild_from_type_v2\n(Nctorch\nSize\n)NtR", "other arguments than"),
    "size of a list": (b"ctorch\nSize\n]\x85R", "a call of torch.Size with"),
    "long size": (b"ctorch\nSize\n(" + b"K\1" * 50 + b"t\x85R", "a call of torch.Size with"),
    "layout": (b"ctorch.serialization\n_get_layout\n" + text("torch.strided") + b"\x85R", "_get_layout"),
    "another codec": (b"c_codecs\nencode\n" + text("ab") + text("zip") + b"\x86R", "the codec 'zip'"),
    "decoded again and again": (
        b"("
        + text("a" * 250)
        + b"q\0c_codecs\nencode\nq\1"
        + text("latin1")
        + b"q\2h\1h\0h\2\x86R"
        + b"h\1h\0h\2\x86R" * 200
        + b"t",
        "more binary data",
    ),
    "steps without end": (b"(" + b"N" * 1_000_000 + b"t", "more than 1000000 steps"),
    "text without end": (b"X\xff\xff\xff\xff", "truncated stream"),
    "a name of its own": (b"cindomain_guidance\nrun\n)R", "the name indomain_guidance.run, which is not on the list"),
    "a trainer's object": (b"comegaconf.dictconfig\nDictConfig\n)\x81", "objects of its trainer besides the weights"),
    "a system call": (b"cposix\nsystem\n" + text("echo") + b"\x85R", "the name posix.system"),
    "defaultdict": (b"ccollections\ndefaultdict\n)R", "collections.defaultdict"),
    "sparse": (b"ctorch._utils\n_rebuild_sparse_tensor\n)R", "_rebuild_sparse_tensor"),
    "no tensor storage": (b"torch" + b"Q", "BINPERSID|instruction|mark"),
}
# Read, because nothing is made of them: states and counts are not copied, what numpy would make is not made, and
# nothing here walks into what is nested.
HARMLESS = {
    "attributes copied again": _FULL + b"(" + (_DICT + b"h\0b") * 1000 + b"t\x86",
    "counts copied again": _FULL.replace(b"N", b"K\1") + b"(" + b"ccollections\nCounter\nh\0\x85R" * 1000 + b"t\x86",
    "methods as attributes": _DICT + b"}" + text("__class__") + b"Nsb",
    "options with a method": b"cargparse\nNamespace\n)\x81}" + text("__setstate__") + b"Nsb",
    "numbers of numpy without end": b"cnumpy\ndtype\n" + text("V400000000") + b"\x89\x88\x87R",
    "objects of numpy": b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("O8") + b"\x85RN\x86R",
    "deep tuples": b"N" + b"\x85" * 400_000,
    "deep lists": b"]" * 9000 + b"a" * 8999,
    "deep dictionaries": (b"}" + text("a")) * 9000 + b"N" + b"s" * 9000,
}


@pytest.fixture(autouse=True)
def torch_for_comparison(monkeypatch):
    """torch.load is for what a test expects; asked by the reader, it fails."""
    load = torch.load

    def only_from_here(*values, **more):
        if sys._getframe(1).f_globals["__name__"] != __name__:
            pytest.fail("torch was asked to read it")
        return load(*values, **more)

    monkeypatch.setattr(torch, "load", only_from_here)


def memory() -> int:
    """The most bytes of memory that this process has had since `forget`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def forget() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return memory()


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_and_take_no_memory(tmp_path, name):
    code, reason = ATTACKS[name]
    for path in (
        zipped(tmp_path / "a.ckpt", PLAIN_STATE[2:] + code + b"s.", {"0": bytes(16)}),
        legacy(tmp_path / "b.ckpt", PLAIN_STATE[2:] + code + b"s.", numbers=bytes(24)),
    ):
        gc.collect()
        tracemalloc.start()
        begin = time.process_time()
        try:
            found = refused(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert re.search(reason, found), found
        assert peak < 2**21 + 150 * path.stat().st_size and time.process_time() - begin < 5


def test_weights_only_alone_is_no_bound(tmp_path, streams):
    """What torch.load(weights_only=True) makes of small files, for which the reader above makes nothing."""
    path = tmp_path / "a.ckpt"

    def made(code: bytes, packed: bool = False):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + code + b".")
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/data/0", bytes(4 * 10**7 if packed else 16))
        return expected(path)

    assert len(made(ATTACKS["bytearray"][0].replace(number(400_000_000), number(10**7)))) == 10**7
    assert path.stat().st_size < 1000
    assert made(tensor(4, 10**12, stride=0)).numel() == 10**12 and path.stat().st_size < 1000
    assert made(tensor(10**7, 10**7), packed=True).nbytes == 4 * 10**7 and path.stat().st_size < 10**5
    copies = made(HARMLESS["attributes copied again"])[1]
    assert sum(len(vars(copy)) for copy in copies) == 40 * 1000 and path.stat().st_size < 10**4
    keys = [streams.colliding(15, count) for count in (5_000, 20_000)]
    seconds = []
    for values in keys:
        begin = time.process_time()
        made(b"}(" + b"".join(b"\x8a\x08" + value.to_bytes(8, "little") + b"N" for value in values) + b"u")
        seconds.append(time.process_time() - begin)
    assert seconds[1] > 6 * seconds[0]  # four times the keys, sixteen times the work of a dictionary


@pytest.mark.parametrize("name", HARMLESS)
def test_what_nothing_is_made_of_is_read(tmp_path, name):
    code = PLAIN_STATE[2:] + HARMLESS[name] + b"s" + text("w") + tensor(4, 4) + b"s."
    for path in (
        zipped(tmp_path / "a.ckpt", code, {"0": bytes(16)}),
        legacy(tmp_path / "b.ckpt", code, b"\x80\x02]" + text("0") + b"a.", number(4)[2:10] + bytes(16)),
    ):
        gc.collect()
        tracemalloc.start()
        begin = time.process_time()
        try:
            assert read_state_dict(path).keys() == {"w"}
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2**21 + 150 * path.stat().st_size and time.process_time() - begin < 5


def test_keys_that_collide_take_no_time(tmp_path, streams):
    keys = {"chosen": streams.colliding(15, 10_500), "multiples": [n << 40 for n in range(1, 2**17)]}
    for name, values in keys.items():
        code = b"}(" + b"".join(b"\x8a\x08" + value.to_bytes(8, "little") + b"N" for value in values) + b"u"
        for path in (
            zipped(tmp_path / "a.ckpt", PLAIN_STATE[2:] + code + b"s."),
            legacy(tmp_path / "b.ckpt", PLAIN_STATE[2:] + code + b"s."),
        ):
            begin = time.process_time()
            assert re.search(r"more than (10000 numbers as keys|\d+ steps)", refused(path)), name
            assert time.process_time() - begin < 3, name


def test_one_key_again_and_again_takes_no_time(tmp_path):
    """Each would meet all that collide with it: numbers too small to be counted, None, and what equals a number."""
    fillers, slot = [2**15 + 1], 6
    while len(fillers) < MAX_NUMBER_KEYS:
        fillers.append(slot)
        slot = (5 * slot + 1) % 2**15
    filled = b"}(" + b"".join(b"J" + struct.pack("<i", value) + b"N" for value in fillers)
    for code in (
        filled + b"K\1N" * 60_000 + b"u",
        b"}(" + b"NN" * 9 + b"u",
        b"}(K\1N\x88Nu",
        b"}K\1NsK\1Ns",
        b"cbuiltins\nset\n](K\1K\1e\x85R",
        b"cbuiltins\nset\n](NNe\x85R",
    ):
        for path in (
            zipped(tmp_path / "a.ckpt", PLAIN_STATE[2:] + code + b"s."),
            legacy(tmp_path / "b.ckpt", PLAIN_STATE[2:] + code + b"s."),
        ):
            begin = time.process_time()
            assert "one key twice" in refused(path) and time.process_time() - begin < 1


def test_numbers_of_kept_values_do_not_collide(tmp_path, streams):
    numbers = streams.colliding(15, 10_500)
    put, get = (b"".join(code + struct.pack("<I", one) for one in numbers) for code in (b"r", b"j"))
    for code in (put, put[: 5 * 10_500] + b"(" + get[5 * 10_500 :] + b"t", b"r\xff\xff\xff\xff"):
        for path in (
            zipped(tmp_path / "a.ckpt", PLAIN_STATE[2:] + b"N" + code + b"s."),
            legacy(tmp_path / "b.ckpt", PLAIN_STATE[2:] + b"N" + code + b"s."),
        ):
            assert re.search(r"a value kept under the number \d+ after \d+ others", refused(path))


def test_kept_values_may_be_numbered_from_one(tmp_path):
    """As Python 2 wrote them."""
    path = tmp_path / "a.pt"
    values = b"}q\1(" + text("b") + b"q\2" + b"]q\3(h\2h\2e" + text("a") + b"q\4" + tensor(4, 4) + b"u."
    zipped(path, values, {"0": bytes(16)})
    read = module.read_torch_pickle(path)
    assert read["b"] == expected(path)["b"] == ["b", "b"] and torch.equal(read["a"], torch.zeros(4))


def test_archives_that_torch_did_not_write(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"PK\x03\x04")
    assert "a damaged archive" in refused(path)
    zipped(path, b"N.")
    with zipfile.ZipFile(path, "a") as more:
        more.writestr("archive/constants.pkl", b"\x80\x02N.")
    assert "TorchScript" in refused(path)
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/Data.pkl", b"\x80\x02N.")
    assert "no checkpoint of tensors" in refused(path)
    data = bytearray(zipped(path, PLAIN_STATE[2:] + text("abc") + b"s.").read_bytes())
    data[data.index(b"abc")] = ord("x")
    path.write_bytes(data)
    assert "bad checksum of its instructions" in refused(path)
    zipped(path, b"N.")
    data = path.read_bytes()
    directory = data.index(b"PK\x01\x02")
    path.write_bytes(data[: directory + 42] + struct.pack("<I", 7) + data[directory + 46 :])
    assert "a record that is not where it is said to be" in refused(path)


def test_records_that_grow_are_refused(tmp_path):
    path, code = tmp_path / "a.ckpt", b"}" + text("a") + tensor(10**7, 10**7) + b"s."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", b"\x80\x02" + code)
        made.writestr("archive/data/0", bytes(4 * 10**7))
    assert path.stat().st_size < 10**5
    assert re.search(r"an archive of packed records, which torch never writes", refused(path))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is Linux's to tell")
def test_what_is_read_takes_memory_by_the_size_of_its_file(tmp_path):
    """The most that a file of 100 kB may make: empty dictionaries, tensors without numbers, one tensor many times."""
    one = tensor(4, 0).replace(b"tR", b"tq\1R") + b"ctorch._utils\n_rebuild_tensor_v2\nq\2h\1R"
    most = {
        "dictionaries": b"(ccollections\nOrderedDict\nq\0)R" + b"h\0)R" * 25_000 + b"t",
        "lists": b"(" + b"]" * 90_000 + b"t",
        "tensors": b"(" + one + b"h\2h\1R" * 5_000 + b"t" + text("a" * 60_000) + b"\x86",
    }
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.ones(2)}, path)
    read_state_dict(path)
    for name, code in most.items():
        zipped(path, b"}(" + text("b") + code + text("a") + tensor(4, 4) + b"u.", {"0": bytes(16)})
        gc.collect()
        before, begin = forget(), time.process_time()
        assert read_state_dict(path).keys() == {"a"}, name
        assert memory() - before < 2**25 and time.process_time() - begin < 5, name


def test_damaged_files_are_read_or_refused(tmp_path):
    path, originals = tmp_path / "a.ckpt", []
    for new in (True, False):
        torch.save({"state_dict": network().state_dict(), "epoch": 3}, path, _use_new_zipfile_serialization=new)
        originals.append(path.read_bytes())
    generator, kinds = random.Random(5), {"read": 0, "refused": 0}
    for turn in range(300):
        data = bytearray(originals[turn % 2])
        if turn % 3 == 0:
            del data[generator.randrange(9, len(data)) :]
        for _ in range(generator.choice((1, 1, 5))):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            read_state_dict(path)
            kinds["read"] += 1
        except FileProblem as problem:
            assert "\n" not in str(problem) and len(str(problem)) < 600
            kinds["refused"] += 1
    assert kinds["refused"] > 100
