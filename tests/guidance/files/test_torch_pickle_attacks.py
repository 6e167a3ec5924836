"""Hostile torch checkpoints are refused, or read without harm, in time and memory that their size justifies."""

from __future__ import annotations

import gc
import random
import re
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, read_state_dict
from indomain_guidance.guidance.files import torch_pickle as module
from indomain_guidance.guidance.files.inert_pickle import MAX_NUMBER_KEYS
from indomain_guidance.tests.guidance.files.torch_files import (
    PLAIN_STATE,
    expected,
    legacy,
    network,
    number,
    refused,
    storage,
    tensor,
    text,
    zipped,
)

pytestmark = pytest.mark.slow

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
    "storage of a list": (
        b"(" + text("storage") + b"]" + text("0") + text("cpu") + number(4) + b"tQ",
        "described by other types",
    ),
    "storage of nested tuples": (
        b"(" + text("storage") + b")" + b"\x85" * 150_000 + text("0") + text("cpu") + number(4) + b"tQ",
        "described by other types",
    ),
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
    "empty of sizes beyond counting": (
        tensor(4, 0)
        .replace(number(0) + b"\x85", b"(" + number(2**20) * 7 + number(0) + b"t")
        .replace(number(1) + b"\x85", b"(" + number(1) * 8 + b"t"),
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
    "deep tuples": b"N" + b"\x85" * 150_000,
    "deep lists": b"]" * 9000 + b"a" * 8999,
    "deep dictionaries": (b"}" + text("a")) * 9000 + b"N" + b"s" * 9000,
}


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
    large = b"}q\0(" + b"".join(text(f"k{n}") + b"N" for n in range(1000)) + b"u"
    copies = made(large + b"(" + (_DICT + b"h\0b") * 300 + b"t\x86")[1]
    assert sum(len(vars(copy)) for copy in copies) == 300_000 > 10 * path.stat().st_size
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
