"""Torch checkpoints as plain data: what their pickles ask of torch is checked before torch reads them.

`torch.load(weights_only=True)` runs no foreign code, yet makes whatever its own list of names can make: a `bytearray`
of any length, copies of containers without end, tensors of memory that no file holds, records that grow when unpacked.
Here the same instructions go through `inert_pickle` first, with the names that checkpoints of tensors and Lightning's
trainer need and with arguments as torch writes them. What a file may make is bounded by its own size.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .inert_pickle import Budget, Name, Placeholder, Refused, Vocabulary, article, read_pickle, shown
from .storage_stream import MAGIC, MAX_DIMENSIONS, STORAGES, VERSION, Storage, StoredTensor, encode, rebuild_tensor

# A tensor takes 38 steps and at least 190 bytes of a file: SDXL's 2,500 take 95 thousand, a trainer's 5,000 twice that.
MAX_STEPS = 2_000_000
FREE_STEPS = 100_000  # of a file of any size; every further step needs 4 bytes of it
MAX_PICKLE = 2**27  # bytes; SDXL's has 300 thousand
MAX_DEPTH = 100
MAX_KEY = 2**57  # until 1.5 torch kept an optimizer's state by the addresses of its parameters
MAX_CLAIM = 4  # times the file's bytes that all its tensors together may have: tensors share storages
FREE_CLAIM = 2**20  # bytes that expanded tensors may have in a file of any size
_LEAST_CLAIM = 64  # bytes that an empty tensor counts as
_ORDERED = ("collections", "OrderedDict")
_NAMESPACE = ("argparse", "Namespace")
_UNTYPED = ("torch.storage", "UntypedStorage")
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_TENSOR_V3 = ("torch._utils", "_rebuild_tensor_v3")
_NUMPY_DTYPE = ("numpy", "dtype")
_NUMPY_SCALARS = (("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"))
# Keys of "callbacks" in what Lightning wrote until 1.5, Stable Diffusion's first files among it.
_CALLBACKS = (
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("pytorch_lightning.callbacks.early_stopping", "EarlyStopping"),
)
_STORAGES = {("torch", name): dtype for name, dtype in STORAGES.items()} | {
    ("torch", "ComplexFloatStorage"): torch.complex64,
    ("torch", "ComplexDoubleStorage"): torch.complex128,
    _UNTYPED: torch.uint8,
}
_UNTYPED_DTYPES = {  # which torch stores as bytes, and names at the tensor
    name: getattr(torch, name)
    for name in (
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "uint16",
        "uint32",
        "uint64",
        "complex32",
    )
    if hasattr(torch, name)
}
_DTYPES = {str(dtype).partition(".")[2] for dtype in _STORAGES.values()} | set(_UNTYPED_DTYPES)
_NUMBERS = {"b1": 1, "i1": 1, "i2": 2, "i4": 4, "i8": 8, "u1": 1, "u2": 2, "u4": 4, "u8": 8, "f2": 2, "f4": 4, "f8": 8}
_OF_TRAINERS = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "numpy", "typing", "functools")
_LOADING = threading.Lock()  # torch keeps one list of allowed names for all threads


def read_torch_pickle(path: Path, trailer: int = 0, mapped: bool = False) -> Any:
    """What `torch.load(weights_only=True)` makes of a checkpoint, after `check_torch_pickle`. Raises Refused.

    Beyond torch's own list it may hold Lightning's callbacks as keys, numpy's numbers, and argparse's options. mapped:
    tensors lie in the file until they are read.
    """
    check_torch_pickle(path, trailer)
    with _LOADING:
        known = torch.serialization.get_safe_globals()  # leaving the context would take away what others allowed
        ours = [entry for entry in _allowed() if entry not in known]
        with torch.serialization.safe_globals(ours):
            try:
                try:
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
                except UnicodeEncodeError:  # a folder's name that UTF-8 cannot hold, of which nothing can be mapped
                    with path.open("rb") as file:
                        return torch.load(file, map_location="cpu", weights_only=True)
            except (MemoryError, OSError):
                raise
            except Exception as error:  # torch raises whatever its parser met
                text = str(error).strip() or type(error).__name__
                named = re.search(r"WeightsUnpickler error: (.+)", text)  # behind advice to read it unsafely
                reason = (named[1] if named else text.splitlines()[0]).rstrip(".")
                raise Refused(f"what torch refuses: {shown(reason)}") from error


def check_torch_pickle(path: Path, trailer: int = 0) -> None:
    """Raise Refused for a checkpoint whose pickles want more than plain tensors, or more memory than the file has.

    trailer: bytes behind an archive that are not its own.
    """
    size = path.stat().st_size - trailer
    budget = Budget(opcodes=min(MAX_STEPS, FREE_STEPS + size // 4), decoded=size, depth=MAX_DEPTH)
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch tells them apart
            if trailer:
                raise Refused("something else than an archive of torch")
            mapped, reader = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), _Torch(size, None)
            try:
                with memoryview(mapped) as data:
                    _check_legacy(data, reader, budget)
            finally:
                # Else a cycle would keep what was read, and with it the file open, which Windows then keeps in place.
                vars(reader).clear()
                with contextlib.suppress(BufferError):  # an error may still refer to it, and goes before long
                    mapped.close()
            return
    data, records = _archive(path, size)
    _read(data, 0, _Torch(size, records).vocabulary, budget)


def _read(data: memoryview, start: int, vocabulary: Vocabulary, budget: Budget) -> tuple[Any, int]:
    if data[start : start + 1] == b"\x80" and len(data) > start + 1 and data[start + 1] > 3:
        raise Refused(
            f"pickle protocol {data[start + 1]}, of which torch reads nothing safely; save it with torch's "
            "default protocol, 2"
        )
    return read_pickle(data, start, vocabulary, budget)


def _check_legacy(data: memoryview, reader: _Torch, budget: Budget) -> None:
    """Torch's older format: five pickles, then for every key a count of numbers and the numbers."""
    values, end = [], 0
    for wanted in (MAGIC, VERSION, None, None, None):
        value, end = _read(data, end, reader.vocabulary, budget)
        if wanted is not None and (type(value) is not int or value != wanted):
            raise Refused("a pickle that torch.save did not write")
        values.append(value)
    keys = values[-1]
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise Refused("a list of keys that is not the storages' own")
    if len(set(keys)) != len(keys) or set(keys) != reader.storages.keys():
        raise Refused("a list of keys that is not the storages' own")
    for key in keys:
        storage = reader.storages[key]
        count = int.from_bytes(data[end : end + 8], "little", signed=True)
        end += 8 + storage.numel * storage.dtype.itemsize
        if end > len(data):
            raise Refused(f"a truncated file: {end} bytes expected, {len(data)} found")
        if count != storage.numel:
            raise Refused(f"a storage that claims {storage.numel} numbers and counts {count}")


def _archive(path: Path, size: int) -> tuple[memoryview, dict[str, int]]:
    """(data.pkl, the bytes of every record) of torch's newer format, where Python and torch read the same archive."""
    _check_directory(path, size)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len({member.filename.lower() for member in members}) != len(members):  # torch ignores case
                raise Refused("an archive with several records of one name")
            if any(member.filename != member.orig_filename for member in members):  # torch knows one of them alone
                raise Refused("an archive whose records have two names each")
            total = sum(member.file_size for member in members)
            packed = any(
                member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size
                for member in members
            )
            if packed or total > size:
                raise Refused(
                    f"an archive of {'packed' if packed else 'overlapping'} records ({total} bytes in a file of "
                    f"{size}), which torch never writes"
                )
            folder = members[0].filename.partition("/")[0] + "/"  # as torch finds it
            names = {member.filename: member for member in members}
            if folder + "data.pkl" not in names or folder + "constants.pkl" in names:
                raise Refused("an archive that is no checkpoint of tensors")
            if names[folder + "data.pkl"].file_size > MAX_PICKLE:
                raise Refused(f"more than {MAX_PICKLE >> 20} MiB of instructions")
            wanted = names[folder + "data.pkl"]
            if wanted.CRC == 0:  # as torch writes where its checksums are switched off; it never looks at them
                wanted.CRC = None  # so zipfile compares nothing
            data = memoryview(archive.read(wanted))
    except Refused:
        raise
    except (
        zipfile.BadZipFile,
        ValueError,
        NotImplementedError,
        RuntimeError,
        EOFError,
        IndexError,
        OverflowError,
        struct.error,
    ) as error:
        raise Refused(f"a damaged archive: {shown(str(error))}") from None
    prefix = folder + "data/"
    return data, {name.removeprefix(prefix): one.file_size for name, one in names.items() if name.startswith(prefix)}


def _check_directory(path: Path, size: int) -> None:
    """Refuse an archive whose directory does not end where its end says: readers differ in which they then take."""
    with path.open("rb") as file:
        start = max(0, size - 98)
        file.seek(start)
        tail = file.read(size - start).rjust(98, b"\0")
        if b"PK\x05\x06" in file.read():
            raise Refused("a damaged archive: another one begins behind it")
    end, locator, long_end = tail[-22:], tail[-42:-22], tail[:56]
    if end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0":
        raise Refused("a damaged archive: it does not end with its directory")
    length, offset = struct.unpack("<II", end[12:20])
    stop = size - 22
    if locator[:4] == b"PK\x06\x07":
        stop = size - 98
        if long_end[:4] != b"PK\x06\x06" or struct.unpack("<Q", locator[8:16])[0] != stop:
            raise Refused("a damaged archive: it does not end with its directory")
        length, offset = struct.unpack("<QQ", long_end[40:56])
    if offset + length != stop:
        raise Refused("a damaged archive: its directory is not where it is said to be")


class _NumpyDtype(Placeholder):
    __slots__ = ("itemsize",)


class _Torch:
    """What torch's names stand for in one file of `size` bytes.

    records: the bytes of every storage (None: they follow the pickles). storages: what was found, by key.
    """

    def __init__(self, size: int, records: Mapping[str, int] | None) -> None:
        self.size, self.records = size, records
        self.storages: dict[str, Storage] = {}
        self.kinds: dict[str, Name] = {}
        self.stored = self.claimed = 0  # bytes
        self.free = FREE_CLAIM
        self.copied: dict[int, Any] = {}
        self.vocabulary = Vocabulary(
            reduce={
                _TENSOR: self.tensor,
                _TENSOR_V3: self.tensor_v3,
                ("torch._utils", "_rebuild_tensor"): self.bare_tensor,
                ("torch._utils", "_rebuild_parameter"): self.parameter,
                ("torch._utils", "_rebuild_parameter_with_state"): self.parameter,
                ("torch._tensor", "_rebuild_from_type_v2"): self.tensor_with_state,
                ("torch", "Size"): self.shape,
                ("torch", "device"): self.device,
                _ORDERED: self.dictionary,
                ("collections", "Counter"): self.counter,
                ("builtins", "set"): self.set,
                ("__builtin__", "set"): self.set,
                ("_codecs", "encode"): encode,
                _NUMPY_DTYPE: self.numpy_dtype,
            }
            | dict.fromkeys(_NUMPY_SCALARS, self.numpy_scalar),
            new={_NAMESPACE: lambda name, arguments, budget: Placeholder(name)},
            build=frozenset((_ORDERED, _NAMESPACE, _NUMPY_DTYPE)),
            inert=frozenset((*_STORAGES, *_CALLBACKS, ("torch", "Tensor"), *(("torch", name) for name in _DTYPES))),
            persistent=self.storage,
            check_state=self.state,
            explain=_explain,
            key_range=MAX_KEY,
            other_keys=True,
            surrogates=True,
        )

    def storage(self, found: Any) -> Storage:
        if type(found) is not tuple or len(found) not in (5, 6) or type(found[0]) is not str or found[0] != "storage":
            raise Refused("a persistent id that is no storage")
        kind, key, location, numel = found[1:5]
        dtype = _STORAGES.get((kind.module, kind.name)) if type(kind) is Name else None
        if dtype is None or type(key) is not str or type(location) is not str or type(numel) is not int:
            raise Refused("a storage described by other types than torch writes")
        if found[5:] not in ((), (None,)):
            raise Refused("a view of a storage, as torch wrote before 0.4")
        known = self.storages.get(key)
        if known is not None:
            if self.kinds[key] != kind or known.numel != numel:  # torch goes by the first
                raise Refused(f"two descriptions of the storage {shown(key)}")
            return known
        claimed = numel * dtype.itemsize
        self.stored += claimed
        if numel < 0 or self.stored > self.size:
            raise Refused(f"storages that claim more than the {self.size} bytes of the file")
        if self.records is not None and self.records.get(key) != claimed:
            raise Refused(f"a storage of {claimed} bytes whose record {shown(key)} has {self.records.get(key, 'none')}")
        self.kinds[key], self.storages[key] = kind, Storage(dtype, numel, memoryview(b""))
        return self.storages[key]

    def tensor(self, name: Name, arguments: tuple, budget: Budget) -> StoredTensor:
        made = rebuild_tensor(name, arguments, budget, views=True)
        claim = made.numel * made.dtype.itemsize
        if made.numel > made.storage.numel:
            free = min(self.free, claim)
            self.free, claim = self.free - free, claim - free
        self.claimed += max(_LEAST_CLAIM, claim)
        if self.claimed > MAX_CLAIM * self.size:
            if made.numel > made.storage.numel:
                raise Refused(
                    f"a tensor of {made.numel} numbers in a storage of {made.storage.numel}, which is more than "
                    f"{MAX_CLAIM} times the {self.size} bytes of the file"
                )
            raise Refused(f"tensors that claim more than {MAX_CLAIM} times the {self.size} bytes of the file")
        return made

    def bare_tensor(self, name: Name, arguments: tuple, budget: Budget) -> StoredTensor:
        return self.tensor(name, (*arguments, False, {}) if len(arguments) == 4 else (), budget)

    def tensor_v3(self, name: Name, arguments: tuple, budget: Budget) -> StoredTensor:
        """As `_rebuild_tensor_v2`, with the storage as bytes and the number format at the end."""
        found = arguments[6] if len(arguments) in (7, 8) else None
        dtype = _UNTYPED_DTYPES.get(found.name) if type(found) is Name and found.module == "torch" else None
        storage = arguments[0] if arguments else None
        if dtype is None or type(storage) is not Storage or storage.dtype != torch.uint8:
            raise Refused(f"a call of {name} with other arguments than torch writes")
        numbers = Storage(dtype, storage.numel // dtype.itemsize, storage.data)
        return self.tensor(name, (numbers, *arguments[1:6], *arguments[7:]), budget)

    def parameter(self, name: Name, arguments: tuple, budget: Budget) -> StoredTensor:
        """`_rebuild_parameter(tensor, requires_grad, hooks)`, and the same with attributes."""
        wanted = 4 if name.name.endswith("_with_state") else 3
        if len(arguments) != wanted or type(arguments[0]) is not StoredTensor or type(arguments[1]) is not bool:
            raise Refused(f"a call of {name} with other arguments than torch writes")
        if type(arguments[2]) is not dict or arguments[2]:
            raise Refused(f"a call of {name} with hooks")
        if wanted == 4:
            self.attributes(torch.nn.Parameter, arguments[3])
        return arguments[0]

    def tensor_with_state(self, name: Name, arguments: tuple, budget: Budget) -> StoredTensor:
        """`_rebuild_from_type_v2(function, type, arguments, attributes)`, for torch's own tensors alone."""
        if len(arguments) != 4 or arguments[1] != Name("torch", "Tensor") or type(arguments[2]) is not tuple:
            raise Refused(f"a call of {name} with other arguments than torch writes")
        self.attributes(torch.Tensor, arguments[3])
        for function, make in ((_TENSOR, self.tensor), (_TENSOR_V3, self.tensor_v3)):
            if arguments[0] == Name(*function):
                return make(arguments[0], arguments[2], budget)
        raise Refused(f"a call of {name} with another function than torch writes")

    def shape(self, name: Name, arguments: tuple, budget: Budget) -> Placeholder:
        sizes = arguments[0] if len(arguments) == 1 else None
        if type(sizes) is not tuple or len(sizes) > MAX_DIMENSIONS or any(type(size) is not int for size in sizes):
            raise Refused(f"a call of {name} with other arguments than torch writes")
        return Placeholder(name)

    def device(self, name: Name, arguments: tuple, budget: Budget) -> Placeholder:
        if [type(one) for one in arguments] not in ([str], [str, int]) or len(arguments[0]) > 32:
            raise Refused(f"a call of {name} with other arguments than torch writes")
        return Placeholder(name)

    def dictionary(self, name: Name, arguments: tuple, budget: Budget) -> dict:
        if arguments:
            raise Refused(f"a call of {name} with arguments, which torch never writes")
        return {}

    def counter(self, name: Name, arguments: tuple, budget: Budget) -> dict:
        counts = arguments[0] if len(arguments) == 1 else {} if not arguments else None
        if type(counts) is not dict or any(type(count) is not int for count in counts.values()):
            raise Refused(f"a call of {name} with other arguments than counts")
        return dict(self.once(counts))

    def set(self, name: Name, arguments: tuple, budget: Budget) -> set:
        if len(arguments) != 1 or type(arguments[0]) is not list:
            raise Refused(f"a call of {name} with other arguments than a list")
        made: set = set()
        for key in self.once(arguments[0]):
            made.add(self.vocabulary.key(key, budget, made))
        return made

    def numpy_dtype(self, name: Name, arguments: tuple, budget: Budget) -> _NumpyDtype:
        code = arguments[0] if len(arguments) == 3 else None
        if type(code) is not str or code not in _NUMBERS or arguments[1:] != (False, True):
            raise Refused(f"a call of {name} for other things than numbers")
        made = _NumpyDtype(name)
        made.itemsize = _NUMBERS[code]
        return made

    def numpy_scalar(self, name: Name, arguments: tuple, budget: Budget) -> Placeholder:
        if len(arguments) != 2 or type(arguments[0]) is not _NumpyDtype or type(arguments[1]) is not memoryview:
            raise Refused(f"a call of {name} with other arguments than numpy writes")
        if len(arguments[1]) != arguments[0].itemsize:
            raise Refused(f"a number of {arguments[0].itemsize} bytes in {len(arguments[1])}")
        return Placeholder(name)

    def state(self, target: Any, state: Any) -> None:
        if type(target) is _NumpyDtype:
            if type(state) is not tuple or state not in [(3, order, None, None, None, -1, -1, 0) for order in "<|"]:
                raise Refused("a numpy number of another description than numpy writes")
        elif type(target) is dict:
            self.attributes(OrderedDict, state)
        else:
            self.attributes(object, state)

    def attributes(self, kind: type, state: Any) -> None:
        if state is None:
            return
        if type(state) is not dict:
            raise Refused(f"attributes that are {article(state)}")
        for key in self.once(state):
            if type(key) is not str or key.startswith("__") or hasattr(kind, key):
                raise Refused(f"the attribute {shown(str(key))}, which {kind.__name__} has itself")

    def once(self, container: Any) -> Any:
        """`container`, which torch will copy: again and again would make much of little."""
        if id(container) in self.copied:
            raise Refused(f"{article(container)} that is copied more than once, which torch never writes")
        self.copied[id(container)] = container
        return container


def _explain(module: str, name: str) -> str | None:
    if module.partition(".")[0] not in _OF_TRAINERS:
        return None
    return (
        f"the name {shown(f'{module}.{name}')}, which is not on the list of allowed names: the file holds objects of "
        "its trainer besides the weights, and torch does not read them as data either"
    )


def _allowed() -> list[tuple[Any, str]]:
    """What torch is told to allow for the time of one file: stand-ins, and numpy's own numbers."""

    class Namespace:
        """Stands for argparse.Namespace, in which rosinality's trainer keeps its options; made anew for every file."""

    Namespace.__module__ = "argparse"
    entries: list[tuple[Any, str]] = [(Namespace, ".".join(_NAMESPACE))]
    entries += [(type(name, (), {}), f"{module}.{name}") for module, name in _CALLBACKS]
    try:
        import numpy
    except ImportError:  # torch then refuses numpy's names itself
        return entries
    scalar = numpy.float64(0).__reduce__()[0]
    entries += [(scalar, ".".join(name)) for name in _NUMPY_SCALARS] + [(numpy.dtype, ".".join(_NUMPY_DTYPE))]
    kinds = {type(numpy.dtype(code)) for code in _NUMBERS}
    return entries + [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in kinds]
