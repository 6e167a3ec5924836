"""Tensors inside pickles: torch's names for them, and its legacy format, in which every claim is checked.

The legacy format is five small pickles (magic number, version, system, content, list of keys), then the numbers of each
storage behind their count. Old checkpoints are such a stream; each tensor of an NVIDIA pickle carries one for its own
storage, which `torch.storage._load_from_bytes` would hand to `torch.load`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inert_pickle import Call, Name, Placeholder, ReadingBudget, Refused, Vocabulary, checked_key, read_pickle, shown

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
MAX_DIMENSIONS = 8
MAX_EMPTY = 2**20  # of one size of a view without numbers, whatever the length of its storage
STORAGES = {
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    ("torch", "ComplexFloatStorage"): torch.complex64,
    ("torch", "ComplexDoubleStorage"): torch.complex128,
    ("torch.storage", "UntypedStorage"): torch.uint8,
}


@dataclass(frozen=True)
class Storage:
    """`numel` numbers of `dtype`: the raw bytes `data` where they are at hand, else known by their `key` alone."""

    dtype: torch.dtype
    numel: int
    key: str
    data: memoryview = memoryview(b"")

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a storage, within its bounds; `load` makes it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """How many numbers of the storage lie between its first and its last; its own count where it is dense."""
        return 0 if 0 in self.shape else 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))

    def load(self, dtype: torch.dtype) -> Tensor:
        """A contiguous copy in `dtype`."""
        if self.numel == 0:
            return torch.empty(self.shape, dtype=dtype)
        # A copy first: bytes of a file lie anywhere, numbers of a tensor at multiples of their size. Only its own part:
        # many tensors may lie in one storage.
        size = self.dtype.itemsize
        piece = self.storage.data[self.offset * size : (self.offset + self.extent) * size]
        tensor = torch.frombuffer(bytearray(piece), dtype=self.dtype).as_strided(self.shape, self.stride)
        return tensor.to(dtype).clone(memory_format=torch.contiguous_format)


# --------------------------------------------------------------------------------------------------- the legacy format


def described_storage(found: Any) -> Storage:
    """The storage that a persistent id ('storage', type, key, location, count[, None]) describes, without its bytes."""
    if type(found) is not tuple or len(found) not in (5, 6) or found[0] != "storage":
        raise Refused("a persistent id that is not torch's ('storage', type, key, location, count, None)")
    _, kind, key, location, numel = found[:5]
    # The type of `kind` first: looking up nested tuples would recurse without a limit.
    known = type(kind) is Name and kind in STORAGES
    if not known or type(key) is not str or type(location) is not str or found[5:] not in ((), (None,)):
        raise Refused("a storage described by other types than torch writes")
    if type(numel) is not int or not 0 <= numel < 2**48:
        raise Refused("a storage with an impossible count of numbers")
    return Storage(STORAGES[kind], numel, key)


def read_legacy(data: memoryview, vocabulary: Vocabulary, budget: ReadingBudget) -> tuple[Any, list[str], int]:
    """The content of a legacy stream, the keys of its storages in order, and where their numbers begin."""
    values, end = [], 0
    for vocabulary_of_part in (_PLAIN, _PLAIN, _PLAIN, vocabulary, _PLAIN):
        value, end = read_pickle(data, end, vocabulary_of_part, budget)
        values.append(value)
        if len(values) == 1 and (type(value) is not int or value != MAGIC):
            raise Refused("another magic number than torch writes")
        if len(values) == 2 and (type(value) is not int or value != VERSION):
            found = value if type(value) is int else "unknown"
            raise Refused(f"version {found} of torch's format, where {VERSION} is read")
    _, _, system, content, keys = values
    if type(system) is not dict or system.get("little_endian", True) is not True:
        raise Refused("numbers that are not little-endian")
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise Refused("a list of keys that is not the storages' own")
    return content, keys, end


def read_numbers(data: memoryview, position: int, storage: Storage) -> tuple[memoryview, int]:
    """The bytes of a storage, which follow their count at `position`, and the position after them."""
    count = int.from_bytes(data[position : position + 8], "little", signed=True)
    end = position + 8 + storage.nbytes
    if count != storage.numel or end > len(data):
        raise Refused(
            f"a storage that claims {storage.numel} numbers of {storage.dtype.itemsize} bytes, counts {count} and "
            f"holds {max(len(data) - position - 8, 0)} bytes"
        )
    return data[position + 8 : end], end


def load_from_bytes(name: Name, arguments: tuple, budget: ReadingBudget) -> Storage:
    """In the place of `torch.storage._load_from_bytes(bytes)`: the one storage in the stream of a tensor."""
    if len(arguments) != 1 or type(arguments[0]) is not memoryview:
        raise Refused(f"a call of {name} without bytes")
    data = arguments[0]
    try:
        storage, keys, end = read_legacy(data, _STORAGE, budget)
        if type(storage) is not Storage or keys != [storage.key]:
            raise Refused("something else than one storage")
        numbers, end = read_numbers(data, end, storage)
    except Refused as problem:
        raise Refused(f"in a tensor's storage {problem}") from None
    if end != len(data):
        raise Refused(f"a storage that claims {storage.numel} numbers and holds {len(data) - end} bytes more")
    return Storage(storage.dtype, storage.numel, storage.key, numbers)


_PLAIN = Vocabulary()
_STORAGE = Vocabulary(inert=frozenset(STORAGES), persistent=described_storage)


# --------------------------------------------------------------------------------------------- what torch's names mean


def rebuild_tensor(name: Name, arguments: tuple, budget: ReadingBudget, *, views: bool = False) -> StoredTensor:
    """In the place of `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`.

    Raises Refused for a tensor that does not lie within its storage, or would be larger than it. views: whether it may
    be larger (expanded: strides of 0), and without numbers may lie anywhere; the caller then bounds its size.
    """
    if len(arguments) not in (6, 7) or arguments[6:] not in ((), (None,)):
        raise Refused(f"a call of {name} with other arguments than torch writes")
    storage, offset, shape, stride, requires_grad, hooks = arguments[:6]
    if type(storage) is not Storage or type(requires_grad) is not bool or type(hooks) is not dict or hooks:
        raise Refused(f"a call of {name} with other arguments than torch writes")
    if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride):
        raise Refused("a tensor whose sizes and strides do not belong together")
    numbers = (offset, *shape, *stride)
    if len(shape) > MAX_DIMENSIONS or any(type(number) is not int or number >= 2**63 for number in numbers):
        raise Refused("a tensor with impossible sizes or strides")
    if min(numbers) < 0:
        raise Refused("a tensor with a negative offset, size or stride")
    tensor = StoredTensor(storage, offset, shape, stride)
    end = offset + tensor.extent
    if 0 in shape:
        too_large = max(shape) > max(storage.numel, MAX_EMPTY if views else 0)
        uncountable = math.prod(max(size, 1) for size in shape) >= 2**60  # torch multiplies them all
        if too_large or uncountable or (offset > storage.numel and not views):
            raise Refused("an empty tensor with impossible sizes")
    elif end > storage.numel:
        raise Refused(f"a tensor that reaches to number {end - 1} of a storage of {storage.numel} (out of bounds)")
    elif tensor.numel > storage.numel and not views:
        raise Refused(f"a tensor of {tensor.numel} numbers in a storage of {storage.numel}")
    return tensor


def rebuild_parameter(name: Name, arguments: tuple, budget: ReadingBudget) -> StoredTensor | Tensor:
    """In the place of `_rebuild_parameter(tensor, requires_grad, hooks)`, also with attributes: the tensor alone."""
    if len(arguments) not in (3, 4) or type(arguments[0]) not in (StoredTensor, Tensor):
        raise Refused(f"a call of {name} with other arguments than torch writes")
    if type(arguments[2]) is not dict or arguments[2]:
        raise Refused(f"a call of {name} with hooks")
    return arguments[0]


def _placeholder(name: Name, arguments: tuple, budget: ReadingBudget) -> Placeholder:
    return Placeholder(name)


def empty_dict(name: Name, arguments: tuple, budget: ReadingBudget) -> dict:
    if arguments:
        raise Refused(f"a call of {name} with arguments, which torch never writes")
    return {}


def _set(name: Name, arguments: tuple, budget: ReadingBudget) -> set:
    if len(arguments) != 1 or type(arguments[0]) is not list:
        raise Refused(f"a call of {name} with other arguments than a list")
    budget.spend(8 * len(arguments[0]))  # the list may be kept and used again and again
    made: set = set()
    for key in arguments[0]:
        made.add(checked_key(key, budget, made))
    return made


def _encode(name: Name, arguments: tuple, budget: ReadingBudget) -> memoryview:
    """In the place of `_codecs.encode(text, "latin1")`, which is how protocol 2 writes bytes."""
    if len(arguments) != 2 or arguments[1] != "latin1" or type(arguments[0]) is not str:
        codec = arguments[1] if len(arguments) == 2 and type(arguments[1]) is str else "none"
        raise Refused(f"a call of {name} with the codec '{shown(codec)}', where only latin1 is read")
    budget.decoded -= len(arguments[0])
    if budget.decoded < 0:
        raise Refused("more binary data written as text than the file is long")
    try:
        return memoryview(arguments[0].encode("latin-1"))
    except UnicodeEncodeError:
        raise Refused("binary data written as text with characters beyond U+00FF") from None


# What stands in the place of calling the names that all pickles with tensors share.
COMMON_CALLS: dict[tuple[str, str], Call] = {
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("collections", "OrderedDict"): empty_dict,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _placeholder,
}
for _package in ("numpy.core", "numpy._core"):
    COMMON_CALLS[f"{_package}.multiarray", "scalar"] = _placeholder
    COMMON_CALLS[f"{_package}.multiarray", "_reconstruct"] = _placeholder
NUMPY_NAMES = frozenset(name for name in COMMON_CALLS if name[0].startswith("numpy"))
