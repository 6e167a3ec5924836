"""Torch checkpoints, new and legacy format, read as plain data without `torch.load`.

`torch.load(weights_only=True)` runs no code of a file, but makes whatever its list of allowed names can make. From a
small file it makes a bytearray of any length, copies of containers without end, dictionaries whose keys collide for
minutes, tensors of terabytes, and records that grow when unpacked. A check of the same instructions in front of it
would be a second reader, and could be deceived where the two read one archive differently. So this is the only reader:
`inert_pickle` with the names that checkpoints contain. What it makes is bounded by the size of the file; each attack is
in tests/guidance/files/test_torch_pickle_attacks.py.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .inert_pickle import Name, Placeholder, ReadingBudget, Refused, Vocabulary, read_pickle, shown
from .storage_stream import (
    COMMON_CALLS,
    MAX_DIMENSIONS,
    NUMPY_NAMES,
    STORAGES,
    Storage,
    described_storage,
    read_legacy,
    read_numbers,
    rebuild_parameter,
    rebuild_tensor,
)

MAX_CLAIM = 4  # times the file's bytes that all its tensors may have together: tensors share storages
FREE_CLAIM = 2**20  # bytes that tensors may have in a file of any size
_LEAST_CLAIM = 64  # bytes that any tensor counts as
_NAMES_BYTES = 2**24
_ALIGNMENT = 16  # bytes; numbers that lie elsewhere in a file are copied
_ORDERED = ("collections", "OrderedDict")
_NAMESPACE = ("argparse", "Namespace")  # rosinality's trainer keeps its options in one
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_TENSOR_V3 = ("torch._utils", "_rebuild_tensor_v3")
# Keys of "callbacks" in what Lightning wrote until 1.5, Stable Diffusion's first files among it.
_CALLBACKS = (
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("pytorch_lightning.callbacks.early_stopping", "EarlyStopping"),
)
# Number formats that torch stores as bytes, and names at the tensor; which of them exist depends on torch's version.
_UNTYPED_DTYPES = {
    ("torch", name): getattr(torch, name)
    for name in (
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("uint16", "uint32", "uint64", "complex32"),
    )
    if hasattr(torch, name)
}
_DTYPES = {("torch", str(dtype)[6:]) for dtype in STORAGES.values()}
_OF_TRAINERS = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "numpy", "typing", "functools")


def read_torch_pickle(path: Path, trailer: int = 0, mapped: bool = False) -> Any:
    """What a file holds that torch.save wrote: containers, numbers, texts and tensors. Raises Refused.

    Parameters become plain tensors, OrderedDict becomes dict; other objects that checkpoints commonly hold (numpy's
    numbers, argparse's options) become `Placeholder`s. trailer: bytes behind an archive that are not its own. mapped:
    tensors lie in the file until they are read (a private map: writing to them does not change the file).
    """
    with path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if mapped else mmap.ACCESS_READ)
    data = memoryview(whole)[: len(whole) - trailer]
    budget = ReadingBudget(decoded=len(data))
    if data[:4] == b"PK\x03\x04":
        instructions, records = _open_archive(path, data)
        reader = _Reader(len(data), records, mapped)
        return read_pickle(instructions, 0, reader.vocabulary(), budget)[0]
    if trailer:
        raise Refused("something else than an archive of torch")
    reader = _Reader(len(data), None, mapped)
    content, keys, position = read_legacy(data, reader.vocabulary(), budget)
    if set(keys) != reader.storages.keys():
        raise Refused("a list of keys that is not the storages' own")
    for key in keys:
        numbers, position = read_numbers(data, position, reader.storages[key])
        reader.bytes[key].numpy()[:] = np.frombuffer(numbers, np.uint8)
    return content


def names_part(path: Path) -> bytes:
    """The beginning of a torch checkpoint, unread; both formats have the names of everything there."""
    with path.open("rb") as file:
        return file.read(min(_NAMES_BYTES, path.stat().st_size))  # it sets aside what it is asked for


def _open_archive(path: Path, data: memoryview) -> tuple[memoryview, dict[str, memoryview]]:
    """The instructions (data.pkl) and the bytes of every storage by its key, of torch's newer format."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
        folder = next(iter(members), "").partition("/")[0]
        if f"{folder}/data.pkl" not in members or f"{folder}/constants.pkl" in members:
            raise Refused("an archive that is no checkpoint of tensors")
        records = {
            name: _record(data, member)
            for name, member in members.items()
            if name.startswith((f"{folder}/data.pkl", f"{folder}/data/", f"{folder}/byteorder"))
        }
        instructions = records[f"{folder}/data.pkl"]
        checksum = members[f"{folder}/data.pkl"].CRC
    except Refused:
        raise
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, LookupError, OverflowError, struct.error) as error:
        raise Refused(f"a damaged archive: {shown(str(error))}") from None
    if checksum not in (0, zlib.crc32(instructions)):  # torch writes 0 where its checksums are switched off
        raise Refused("a damaged archive: bad checksum of its instructions")
    if records.get(f"{folder}/byteorder", b"little") != b"little":
        raise Refused("numbers that are not little-endian")
    prefix = f"{folder}/data/"
    storages = {name.removeprefix(prefix): record for name, record in records.items() if name.startswith(prefix)}
    return instructions, storages


def _record(data: memoryview, member: zipfile.ZipInfo) -> memoryview:
    """Where a record's bytes lie in the file."""
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise Refused("an archive of packed records, which torch never writes")
    header = data[member.header_offset : member.header_offset + 30]
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise Refused("a damaged archive: a record that is not where it is said to be")
    start = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))  # behind a name and an extra field
    if start + member.file_size > len(data):
        raise Refused("a damaged archive: a record that reaches beyond the end")
    return data[start : start + member.file_size]


class _Reader:
    """What torch's names stand for in one file of `size` bytes.

    records: the bytes of every storage by its key; None for the legacy format, where they follow the instructions and
    `bytes` is filled afterwards. storages, bytes: what was found, by key.
    """

    def __init__(self, size: int, records: Mapping[str, memoryview] | None, mapped: bool) -> None:
        self.size, self.records, self.mapped = size, records, mapped
        self.storages: dict[str, Storage] = {}
        self.bytes: dict[str, Tensor] = {}
        self.stored = self.claimed = 0  # bytes of the storages, and of the tensors in them

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(
            reduce=COMMON_CALLS
            | {
                _TENSOR: self.tensor,
                _TENSOR_V3: self.tensor_v3,
                ("torch._utils", "_rebuild_tensor"): self.bare_tensor,
                ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
                ("torch._tensor", "_rebuild_from_type_v2"): self.tensor_with_attributes,
                ("torch", "Size"): _shape,
                ("torch", "device"): lambda name, arguments, budget: Placeholder(name),
                ("collections", "Counter"): _counter,
            },
            new={_NAMESPACE: lambda name, arguments, budget: Placeholder(name)},
            build=NUMPY_NAMES | {_ORDERED, _NAMESPACE},
            inert=frozenset(
                (*STORAGES, *_CALLBACKS, *_DTYPES, *_UNTYPED_DTYPES, ("torch", "Tensor"), ("numpy", "ndarray"))
            ),
            persistent=self.storage,
            explain=_explain,
        )

    def storage(self, found: Any) -> Storage:
        """The storage that a persistent id describes; its bytes go to `bytes`."""
        storage = described_storage(found)
        key = storage.key
        known = self.storages.setdefault(key, storage)
        if known != storage:
            raise Refused(f"two descriptions of the storage {shown(key)}")
        if key in self.bytes:
            return known
        self.stored += storage.nbytes
        if self.stored > self.size:
            raise Refused(f"storages that claim more than the {self.size} bytes of the file")
        piece = None if self.records is None else self.records.get(key, b"")
        if piece is not None and len(piece) != storage.nbytes:
            raise Refused(f"a storage of {storage.nbytes} bytes whose record {shown(key)} has {len(piece)}")
        if piece and self.mapped:
            self.bytes[key] = torch.frombuffer(piece, dtype=torch.uint8)
        if key not in self.bytes or self.bytes[key].data_ptr() % _ALIGNMENT:
            self.bytes[key] = torch.empty(storage.nbytes, dtype=torch.uint8)
            if piece:
                self.bytes[key].numpy()[:] = np.frombuffer(piece, np.uint8)
        return storage

    def tensor(self, name: Name, arguments: tuple, budget: ReadingBudget) -> Tensor:
        stored = rebuild_tensor(name, arguments, budget, views=True)
        self.claimed += max(_LEAST_CLAIM, stored.numel * stored.dtype.itemsize)
        if self.claimed > MAX_CLAIM * self.size + FREE_CLAIM:
            raise Refused(f"tensors of {self.claimed} bytes, more than {MAX_CLAIM} times the {self.size} of the file")
        storage = self.bytes[stored.storage.key].untyped_storage()
        return torch.empty(0, dtype=stored.dtype).set_(storage, stored.offset, stored.shape, stored.stride)

    def bare_tensor(self, name: Name, arguments: tuple, budget: ReadingBudget) -> Tensor:
        """As `_rebuild_tensor_v2`, without the last two arguments."""
        return self.tensor(name, (*arguments, False, {}) if len(arguments) == 4 else (), budget)

    def tensor_v3(self, name: Name, arguments: tuple, budget: ReadingBudget) -> Tensor:
        """As `_rebuild_tensor_v2`, with the storage as bytes and the number format at the end."""
        dtype = _UNTYPED_DTYPES.get(arguments[6]) if len(arguments) in (7, 8) and type(arguments[6]) is Name else None
        storage = arguments[0] if arguments else None
        if dtype is None or type(storage) is not Storage or storage.dtype != torch.uint8:
            raise Refused(f"a call of {name} with other arguments than torch writes")
        numbers = Storage(dtype, storage.numel // dtype.itemsize, storage.key)
        return self.tensor(name, (numbers, *arguments[1:6], *arguments[7:]), budget)

    def tensor_with_attributes(self, name: Name, arguments: tuple, budget: ReadingBudget) -> Tensor:
        """`_rebuild_from_type_v2(function, type, arguments, attributes)` of torch's own tensors, without attributes."""
        if len(arguments) != 4 or arguments[1] != ("torch", "Tensor") or type(arguments[2]) is not tuple:
            raise Refused(f"a call of {name} with other arguments than torch writes")
        if arguments[0] == _TENSOR:
            return self.tensor(arguments[0], arguments[2], budget)
        if arguments[0] == _TENSOR_V3:
            return self.tensor_v3(arguments[0], arguments[2], budget)
        raise Refused(f"a call of {name} with another function than torch writes")


def _shape(name: Name, arguments: tuple, budget: ReadingBudget) -> tuple:
    sizes = arguments[0] if len(arguments) == 1 else None
    if type(sizes) is not tuple or len(sizes) > MAX_DIMENSIONS:
        raise Refused(f"a call of {name} with other arguments than torch writes")
    return sizes


def _counter(name: Name, arguments: tuple, budget: ReadingBudget) -> dict:
    counts = arguments[0] if arguments else {}
    if len(arguments) > 1 or type(counts) is not dict:
        raise Refused(f"a call of {name} with other arguments than counts")
    return counts


def _explain(module: str, name: str) -> str | None:
    if module.partition(".")[0] not in _OF_TRAINERS:
        return None
    return (
        f"the name {shown(f'{module}.{name}')}, which is not on the list of allowed names: the file holds objects of "
        "its trainer besides the weights"
    )
