"""What torch would be asked to do by a checkpoint's pickles, checked before torch reads them.

`torch.load(weights_only=True)` runs no foreign code, yet makes whatever its own list of names can make: a `bytearray`
of any length, copies of containers without end, tensors of memory that no file holds. Here the same instructions go
through `inert_pickle` first, with the few names that a checkpoint of plain tensors needs.
"""

from __future__ import annotations

import mmap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .inert_pickle import Budget, Name, Placeholder, Refused, Vocabulary, read_pickle, shown
from .storage_stream import STORAGES

LEGACY_PICKLES = 5  # magic number, version, system, content, keys; the numbers follow
_ORDERED = ("collections", "OrderedDict")
_NAMESPACE = ("argparse", "Namespace")
_DTYPES = {str(dtype).partition(".")[2] for dtype in STORAGES.values()}


def check_torch_pickle(path: Path) -> None:
    """Raise Refused for a checkpoint whose pickles want more than plain tensors, or more memory than the file has."""
    vocabulary, budget = _vocabulary(path.stat().st_size), Budget()
    for data, count in _pickles(path):
        end = 0
        for _ in range(count):
            _, end = read_pickle(data, end, vocabulary, budget)


def _pickles(path: Path) -> Iterator[tuple[memoryview, int]]:
    """(bytes, how many pickles they begin with): every data.pkl of an archive, or the older format's whole file."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch tells them apart
            # Not closed by hand: what was read may still refer to it.
            yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), LEGACY_PICKLES
            return
    try:
        with zipfile.ZipFile(path) as archive:
            members = [one for one in archive.infolist() if one.filename.rpartition("/")[2] == "data.pkl"]
            contents = [archive.read(member) for member in members]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise Refused(f"a damaged archive: {shown(str(error))}") from None
    yield from ((memoryview(content), 1) for content in contents)


def _vocabulary(size: int) -> Vocabulary:
    storages: dict[str, int] = {}

    def storage(found: Any) -> Placeholder:
        if type(found) is not tuple or len(found) not in (5, 6) or type(found[0]) is not str or found[0] != "storage":
            raise Refused("a persistent id that is no storage")
        kind, key, numel = found[1], found[2], found[4]
        if type(kind) is not Name or kind.name not in STORAGES or type(key) is not str or type(numel) is not int:
            raise Refused("a storage described by other types than torch writes")
        storages[key] = max(storages.get(key, 0), numel * STORAGES[kind.name].itemsize)
        if numel < 0 or numel > size or sum(storages.values()) > size:
            raise Refused(f"storages that claim more than the {size} bytes of the file")
        return Placeholder(kind)

    def placeholder(name: Name, arguments: tuple, budget: Budget) -> Placeholder:
        return Placeholder(name)

    def dictionary(name: Name, arguments: tuple, budget: Budget) -> dict:
        if arguments:
            raise Refused(f"a call of {name} with arguments, which torch never writes")
        return {}

    return Vocabulary(
        reduce={
            _ORDERED: dictionary, ("torch._utils", "_rebuild_tensor_v2"): placeholder,
            ("torch._utils", "_rebuild_parameter"): placeholder, ("torch", "device"): placeholder,
        },
        new={_NAMESPACE: placeholder}, build=frozenset((_ORDERED, _NAMESPACE)),
        inert=frozenset(("torch", name) for name in (*STORAGES, *_DTYPES)), persistent=storage,
    )  # fmt: skip
