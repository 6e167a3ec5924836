"""Which files lie where in a .tar file, from its headers alone; no damage can mislead, hang or cost memory.

Python's own reader takes a damaged header for the end, loops forever over a negative size and raises errors of many
kinds. This one reads what WebDataset, GNU tar, bsdtar and Python write: ustar, GNU and pax headers with long names and
large sizes; sparse files and links are noted, folders and devices passed over.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .walking import Watch

BLOCK, REST = 512, 2**20  # bytes of a header and an end mark; looked at behind it, where only padding may be
MOST_NAME, MOST_PAX = 2**16, 2**20  # bytes of a long name and of a pax header
MOST_HEADERS = 2_000_000  # in one shard
PLAIN, WITHOUT_DATA, LONG_NAME, PAX = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6"), (b"L", b"K"), b"x"
OTHER_PAX, SPARSE = (b"X", b"g"), b"S"
NO_FILES = (b"3", b"4", b"5", b"6", b"D", b"V")  # devices, folders, pipes, and what GNU tar notes of the archive
SPARSE_FILES, OTHER_FILES = "sparse files in shards", "files of an unknown kind in shards"
NOTES = {b"1": "links in shards", b"2": "links in shards", b"M": "parts of files in shards"}
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


@dataclass(frozen=True)
class Member:
    """A file in a shard: `size` bytes at `offset`. note: what it is where that is no plain file, which is not read."""

    name: str
    offset: int
    size: int
    note: str = ""


class _Damage(Exception):
    """What is wrong; "{}" stands for the number of members before it."""


CUT_OFF = "is cut off after {}; copy it again"
DAMAGED = "is damaged or cut off after {}; copy it again"
NO_SIZE = "is damaged after {} (a header without a readable size); copy it again"


class NoShard(Exception):
    """A file whose very start is no tar."""


def members(path: Path, watch: Watch) -> tuple[list[Member], str]:
    """(the files whose bytes are all there, what is wrong: "" for a sound shard).

    Folders and devices are not among them; links and sparse files are, with a note. Raises NoShard, OSError, Cancelled.
    """
    found: list[Member] = []
    with open_plain(path) as file:
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
            raise NoShard(_other_kind(reader.start, reader.size))
    count = f"{reader.count} member" + "s" * (reader.count != 1)
    return found, fault.replace("{}", count)


def open_plain(path: Path) -> BinaryIO:
    """An ordinary file opened for reading. Raises OSError, also for a pipe or device, which might never answer."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    file = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(0, "is no ordinary file")
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


class _Headers:
    """Goes from header to header; yields files. count: how many of any kind there were before the end."""

    def __init__(self, file: BinaryIO, watch: Watch) -> None:
        self.file, self.watch = file, watch
        self.size = os.fstat(file.fileno()).st_size
        self.offset = self.count = 0
        self.start, self.first_is_none = b"", False

    def __iter__(self) -> Iterator[Member]:
        name, size, sparse = None, None, False  # what headers before a member say of it
        for number in range(MOST_HEADERS):
            self.watch.ask()
            header = self._header(number)
            if header is None:
                if name is not None or size is not None:
                    raise _Damage(DAMAGED)
                return
            kind, length = header[156:157], _number(header[124:136])
            if kind in LONG_NAME or kind == PAX or kind in OTHER_PAX:
                data = self._data(length, MOST_NAME if kind in LONG_NAME else MOST_PAX)
                if kind == b"L":
                    name = _text(data)
                elif kind == PAX:
                    told = _pax(data)
                    name, size = told.get("path", name), _decimal(told["size"]) if "size" in told else size
                    sparse = sparse or any(key.startswith("GNU.sparse.") for key in told)
                continue
            if kind == SPARSE:
                self._pass_sparse_map(header)
            length = length if size is None else size
            full = name if name is not None else _name(header)
            folder = kind == b"\0" and full.endswith("/")  # as before 1988
            taken = 0 if kind in WITHOUT_DATA or folder else length
            self.count += 1
            note = SPARSE_FILES if sparse or kind == SPARSE else NOTES.get(kind, "" if kind in PLAIN else OTHER_FILES)
            if self.offset + taken <= self.size and kind not in NO_FILES and not folder:
                yield Member(full, self.offset, taken, note)
            end = self.offset + -(-taken // BLOCK) * BLOCK
            if end > self.size:
                raise _Damage("is cut off within the last of its {}, or that one's size is damaged; copy it again")
            self.offset, name, size, sparse = end, None, None, False
        raise _Damage(f"has more than {MOST_HEADERS:,} members, of which {{}} were looked at; split it")

    def _header(self, number: int) -> bytes | None:
        """The next header; None at the end mark. A header that is none, or is cut off, ends the shard as well."""
        self.file.seek(self.offset)
        header = self.file.read(BLOCK)
        if number == 0:
            self.start = header
        if len(header) < BLOCK or not any(header):
            self.first_is_none = number == 0 and (any(header) or not header)
            return None
        try:
            sound = _number(header[148:156]) in _sums(header)
        except _Damage:
            sound = False
        if not sound:
            self.first_is_none = number == 0
            raise _Damage(DAMAGED)
        self.offset += BLOCK
        return header

    def _data(self, length: int, most: int) -> bytes:
        if length > most:
            raise _Damage("is damaged after {} (a name or header of impossible length); copy it again")
        data = self.file.read(length)
        if len(data) < length:
            raise _Damage(CUT_OFF)
        self.offset += -(-length // BLOCK) * BLOCK
        return data

    def _pass_sparse_map(self, header: bytes) -> None:
        more = header[482]
        while more:
            self.watch.ask()
            block = self.file.read(BLOCK)
            if len(block) < BLOCK:
                raise _Damage(CUT_OFF)
            self.offset, more = self.offset + BLOCK, block[504]


def _other_kind(start: bytes, size: int) -> str:
    packed = (f"a file packed with {name}" for mark, name in PACKED.items() if start.startswith(mark))
    return next(packed, "another file") if size else "an empty file"


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


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or base 256 where it is large. Raises _Damage; none is negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise _Damage(NO_SIZE)
    return int(digits or b"0", 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise _Damage(NO_SIZE)
    return int(text)


def _sums(header: bytes) -> tuple[int, int]:
    """The checksum of a header, and as some old programs counted it, with signed bytes."""
    body = header[:148] + b" " * 8 + header[156:]
    total = sum(body)
    return total, total - 256 * sum(byte > 127 for byte in body)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax(data: bytes) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header. Raises _Damage."""
    told, start = {}, 0
    while start < len(data) and data[start]:
        digits, space, _ = data[start : start + 12].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = data[start + len(digits) + 1 : start + length].partition(b"=")
        if not equals or not value.endswith(b"\n") or start + length > len(data):
            raise _Damage("is damaged after {} (a pax header that cannot be read); copy it again")
        told[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        start += length
    return told
