"""Which files lie where in a .tar file, from its headers alone; no damage can mislead, hang or cost memory.

Python's own reader parses single headers here, but does not go from one to the next: it takes a damaged header for the
end, loops forever over a negative size and raises errors of many kinds. Sparse files and links are noted, folders and
devices passed over.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..engine.small_files import open_regular
from .walking import Watch

BLOCK, REST = 512, 2**20  # bytes of a header and an end mark; looked at behind it, where only padding may be
MOST_NAME, MOST_PAX = 2**16, 2**20  # bytes of a long name and of a pax header
MOST_HEADERS = 2_000_000  # in one shard
PLAIN, WITHOUT_DATA = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6")
LONG_NAMES, PAX, OTHER_PAX, SPARSE = (b"L", b"K"), b"x", (b"X", b"g"), b"S"
NO_FILES = (b"3", b"4", b"5", b"6", b"D", b"V")  # devices, folders, pipes, and what GNU tar notes of the archive
SPARSE_FILES, OTHER_FILES = "sparse files in shards", "files of an unknown kind in shards"
NOTES = {b"1": "links in shards", b"2": "links in shards", b"M": "parts of files in shards"}
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
DAMAGED = "is damaged or cut off after {}; copy it again"


@dataclass(frozen=True)
class Member:
    """A file in a shard: `size` bytes at `offset`. note: what it is where that is no plain file, which is not read."""

    name: str
    offset: int
    size: int
    note: str = ""


class _Damage(Exception):
    """What is wrong; "{}" stands for the number of members before it."""


class NoShard(Exception):
    """A file whose very start is no tar."""


def members(path: Path, watch: Watch) -> tuple[list[Member], str]:
    """(the files whose bytes are all there, what is wrong: "" for a sound shard).

    Folders and devices are not among them; links and sparse files are, with a note. Raises NoShard, OSError, Cancelled.
    """
    found: list[Member] = []
    with open_regular(path) as file:
        reader = _Headers(file, watch)
        try:
            for member in reader:
                found.append(member)
            fault = _fault_at_end(file, reader.offset)
            if not fault and not reader.count:
                fault = "is an archive of nothing; if images should be in it, copy it again"
        except _Damage as damage:
            fault = str(damage)
        except OSError as error:
            fault = f"cannot be read after {{}} ({error.strerror or error}); copy it again"
        if reader.count == 0 and reader.first_is_none:
            packed = (f"a file packed with {name}" for mark, name in PACKED.items() if reader.block.startswith(mark))
            raise NoShard(next(packed, "another file") if reader.size else "an empty file")
    return found, fault.replace("{}", f"{reader.count} member" + "s" * (reader.count != 1))


class _Headers:
    """Goes from header to header; yields files. count: how many of any kind there were before the end."""

    def __init__(self, file: BinaryIO, watch: Watch) -> None:
        self.file, self.watch = file, watch
        self.size = os.fstat(file.fileno()).st_size
        self.offset = self.count = 0
        self.block, self.first_is_none = b"", False

    def __iter__(self) -> Iterator[Member]:
        name, size, sparse = None, None, False  # what headers before a member say of it
        for number in range(MOST_HEADERS):
            self.watch.ask()
            header = self._header(number)
            if header is None:
                if name is not None or size is not None:
                    raise _Damage(DAMAGED)
                return
            kind = header.type
            if kind in LONG_NAMES or kind == PAX or kind in OTHER_PAX:
                data = self._data(header.size, MOST_NAME if kind in LONG_NAMES else MOST_PAX)
                if kind == b"L":
                    name = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
                elif kind == PAX:
                    told = _pax(data)
                    name, size = told.get("path", name), int(told["size"]) if "size" in told else size
                    sparse = sparse or any(key.startswith("GNU.sparse.") for key in told)
                continue
            if kind == SPARSE:
                self._pass_sparse_map()
            taken = 0 if kind in WITHOUT_DATA else header.size if size is None else size
            self.count += 1
            note = SPARSE_FILES if sparse or kind == SPARSE else NOTES.get(kind, "" if kind in PLAIN else OTHER_FILES)
            if self.offset + taken <= self.size and kind not in NO_FILES:
                yield Member(header.name if name is None else name, self.offset, taken, note)
            end = self.offset + -(-taken // BLOCK) * BLOCK
            if end > self.size:
                raise _Damage("is cut off within the last of its {}, or that one's size is damaged; copy it again")
            self.offset, name, size, sparse = end, None, None, False
        raise _Damage(f"has more than {MOST_HEADERS:,} members, of which {{}} were looked at; split it")

    def _header(self, number: int) -> tarfile.TarInfo | None:
        """The next header; None at the end mark. A header that is none, or is cut off, ends the shard as well."""
        self.file.seek(self.offset)
        self.block = block = self.file.read(BLOCK)
        if len(block) < BLOCK or not any(block):
            self.first_is_none = number == 0 and (any(block) or not block)
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            header = None
        if header is None or header.size < 0:
            self.first_is_none = number == 0
            raise _Damage(DAMAGED)
        self.offset += BLOCK
        return header

    def _data(self, length: int, most: int) -> bytes:
        data = self.file.read(min(length, most))
        if len(data) < length:
            raise _Damage(DAMAGED)
        self.offset += -(-length // BLOCK) * BLOCK
        return data

    def _pass_sparse_map(self) -> None:
        more = self.block[482]
        while more:
            self.watch.ask()
            more = self._data(BLOCK, BLOCK)[504]


def _fault_at_end(file: BinaryIO, offset: int) -> str:
    """What is wrong where the members end, "{}" standing for their number; "" for an end mark and no more."""
    file.seek(offset)
    mark, rest = file.read(BLOCK), file.read(REST)
    if not mark:
        return "ends after {} without an end mark, so more of them may be missing; copy it again"
    if len(mark) < BLOCK or any(mark):
        return DAMAGED
    if any(rest):
        return "goes on behind the end mark after {}, of which nothing is read; make one tar of all"
    return ""


def _pax(data: bytes) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header; a "size" among them is a number. Raises _Damage."""
    told, start = {}, 0
    while start < len(data) and data[start]:
        digits, space, _ = data[start : start + 12].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = data[start + len(digits) + 1 : start + length].partition(b"=")
        number = value[:-1]
        is_size = number.isdigit() and len(number) <= 20
        if not equals or not value.endswith(b"\n") or start + length > len(data) or (key == b"size" and not is_size):
            raise _Damage(DAMAGED)
        told[key.decode("utf-8", "surrogateescape")] = number.decode("utf-8", "surrogateescape")
        start += length
    return told
