"""Tensors inside pickles: torch's nested storage streams, read by a parser of their own.

`torch.storage._load_from_bytes` hands its bytes to `torch.load`. Here they are what torch's legacy format says they
are: four small pickles of protocol 2 (magic number, version, system, one persistent id), the list of keys, and the
numbers behind their count. Every claim a tensor makes about its storage is checked before a number is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inert_pickle import Budget, LongText, Name, Refused, Vocabulary, read_pickle, shown

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
MAX_DIMENSIONS = 8
MAX_EMPTY = 2**20  # that a view without numbers may have as a size, of a storage of any length
_MAX_WHOLE = 2**63  # of what torch itself can say about a tensor
STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Storage:
    """`numel` numbers of `dtype` as the raw bytes `data`."""

    dtype: torch.dtype
    numel: int
    data: memoryview


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
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def extent(self) -> int:
        """How many numbers of the storage lie between its first and its last; its own count where it is dense."""
        return 0 if 0 in self.shape else 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous copy, in its own number format or `dtype`."""
        if self.numel == 0:
            return torch.empty(self.shape, dtype=dtype or self.dtype)
        # A copy first: bytes of a file lie anywhere, numbers of a tensor at multiples of their size. Of its part only:
        # many tensors may lie in one storage.
        size = self.dtype.itemsize
        piece = self.storage.data[self.offset * size : (self.offset + self.extent) * size]
        tensor = torch.frombuffer(bytearray(piece), dtype=self.dtype).as_strided(self.shape, self.stride)
        return tensor.to(dtype or self.dtype).clone(memory_format=torch.contiguous_format)


def _whole(value: Any) -> bool:
    return type(value) is int


def _persistent(found: Any) -> tuple[torch.dtype, str, int]:
    if type(found) is not tuple or len(found) != 6 or found[0] != "storage":
        raise Refused("a persistent id that is not torch's ('storage', type, key, location, count, None)")
    _, kind, key, location, numel, view = found
    if type(kind) is not Name or type(key) is not str or type(location) is not str or view is not None:
        raise Refused("a storage described by other types than torch writes")
    if not _whole(numel) or not 0 <= numel < 2**48:
        raise Refused("a storage with an impossible count of numbers")
    return STORAGES[kind.name], key, numel


_VOCABULARY = Vocabulary(inert=frozenset(("torch", name) for name in STORAGES), persistent=_persistent)
_PLAIN = Vocabulary()


def read_storage(data: memoryview, budget: Budget) -> Storage:
    """The storage in the bytes that torch's `_load_from_bytes` was given. Raises Refused."""
    try:
        magic, end = read_pickle(data, 0, _PLAIN, budget)
        if not _whole(magic) or magic != MAGIC:
            raise Refused("another magic number than torch writes")
        version, end = read_pickle(data, end, _PLAIN, budget)
        if not _whole(version) or version != VERSION:
            found = version if _whole(version) else "unknown"
            raise Refused(f"version {found} of torch's format, where {VERSION} is read")
        system, end = read_pickle(data, end, _PLAIN, budget)
        if type(system) is not dict or system.get("little_endian") is not True:
            raise Refused("numbers that are not little-endian")
        described, end = read_pickle(data, end, _VOCABULARY, budget)
        if type(described) is not tuple or len(described) != 3 or type(described[0]) is not torch.dtype:
            raise Refused("something else than one storage")
        dtype, key, numel = described
        keys, end = read_pickle(data, end, _PLAIN, budget)
        if type(keys) is not list or len(keys) != 1 or type(keys[0]) is not str or keys[0] != key:
            raise Refused("a list of keys that is not the storage's own")
    except Refused as problem:
        raise Refused(f"in a tensor's storage {problem}") from None
    if len(data) - end < 8:
        raise Refused("in a tensor's storage a truncated stream: no count before the numbers")
    count = int.from_bytes(data[end : end + 8], "little", signed=True)
    size = torch.empty(0, dtype=dtype).element_size()
    numbers = data[end + 8 :]
    if count != numel or numel * size != len(numbers):
        raise Refused(
            f"a storage that claims {numel} numbers of {size} bytes, counts {count} and holds {len(numbers)} bytes"
        )
    return Storage(dtype, numel, numbers)


def load_from_bytes(name: Name, arguments: tuple, budget: Budget) -> Storage:
    """In the place of `torch.storage._load_from_bytes(bytes)`."""
    if len(arguments) != 1 or type(arguments[0]) is not memoryview:
        raise Refused(f"a call of {name} without bytes")
    return read_storage(arguments[0], budget)


def rebuild_tensor(name: Name, arguments: tuple, budget: Budget, *, views: bool = False) -> StoredTensor:
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
    if len(shape) > MAX_DIMENSIONS or not all(map(_whole, (offset, *shape, *stride))):
        raise Refused("a tensor with impossible sizes or strides")
    if min((offset, *shape, *stride)) < 0:
        raise Refused("a tensor with a negative offset, size or stride")
    if max((offset, *shape, *stride)) >= _MAX_WHOLE:
        raise Refused("a tensor with impossible sizes or strides")
    tensor = StoredTensor(storage, offset, shape, stride)
    end = offset + tensor.extent
    if 0 in shape:
        if not views and offset > storage.numel or max(shape) > max(storage.numel, MAX_EMPTY if views else 0):
            raise Refused("an empty tensor with impossible sizes")
    elif end > storage.numel:
        raise Refused(f"a tensor that reaches to number {end - 1} of a storage of {storage.numel} (out of bounds)")
    elif tensor.numel > storage.numel and not views:
        raise Refused(f"a tensor of {tensor.numel} numbers in a storage of {storage.numel}")
    return tensor


def rebuild_parameter(name: Name, arguments: tuple, budget: Budget) -> StoredTensor:
    """In the place of `torch._utils._rebuild_parameter(tensor, requires_grad, hooks)`."""
    if len(arguments) != 3 or type(arguments[0]) is not StoredTensor or type(arguments[1]) is not bool:
        raise Refused(f"a call of {name} with other arguments than torch writes")
    if type(arguments[2]) is not dict or arguments[2]:
        raise Refused(f"a call of {name} with hooks")
    return arguments[0]


def encode(name: Name, arguments: tuple, budget: Budget) -> memoryview:
    """In the place of `_codecs.encode(text, "latin1")`, which is how protocol 2 writes bytes."""
    if len(arguments) != 2 or arguments[1] != "latin1" or type(arguments[0]) not in (str, LongText):
        codec = arguments[1] if len(arguments) == 2 and type(arguments[1]) is str else "none"
        raise Refused(f"a call of {name} with the codec '{shown(codec)}', where only latin1 is read")
    text = arguments[0]
    budget.decoded -= len(text.data) if type(text) is LongText else len(text)
    if budget.decoded < 0:
        raise Refused("more binary data written as text than the file is long")
    try:
        return memoryview(text.latin1() if type(text) is LongText else text.encode("latin-1"))
    except UnicodeEncodeError:
        raise Refused("binary data written as text with characters beyond U+00FF") from None
