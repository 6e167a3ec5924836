"""Directories of TIFF files and EXIF blocks: read in place, so that no entry of them can cost memory."""

from __future__ import annotations

import re
import struct
from contextlib import suppress

from ...guidance.errors import Problem
from .problems import BadImage

MOST_NOTES = 32 * 2**20  # bytes that the entries of a directory take once Pillow has read them
MOST_BLOCKS = 16  # places of an AVIF where an EXIF block may begin
BYTES_OF_A_NUMBER = 64  # in a tuple of Python's
ORIENTATION, WIDTH, HEIGHT, BITS, COMPRESSION, ROWS_PER_STRIP = 274, 256, 257, 258, 259, 278  # tags
TILE_WIDTH, TILE_HEIGHT = 322, 323
SUB_DIRECTORIES = (34665, 34853, 40965)
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:=["\']|>)([1-8])')
# None, CCITT, LZW, JPEG, Deflate, PackBits, Zstandard; others need memory that their header alone decides on.
COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 50000)


class Directory:
    """The first directory of a TIFF file or EXIF block that begins at `start`; nothing of it is copied or unpacked.

    Raises Problem or struct.error for one that cannot be read.
    """

    SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
    BYTES = (1, 2, 7)
    NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}

    def __init__(self, data: bytes, start: int = 0, at: int | None = None) -> None:
        self.data, self.start = data, start
        self.entries: dict[int, tuple[int, int, int, int]] = {}  # tag: type, count, place and bytes of the values
        self.order = {b"II": "<", b"MM": ">"}.get(data[start : start + 2], "")
        version = self._read("H", start + 2)[0] if self.order else 0
        if version not in (42, 43):
            raise Problem("no TIFF")
        offset, number, entry = ("I", "H", "HHI4s") if version == 42 else ("Q", "Q", "HHQ8s")
        self.at = self._read(offset, start + (4 if version == 42 else 8))[0] if at is None else at
        count, at = self._read(number, start + self.at)[0], start + self.at + struct.calcsize(f"<{number}")
        size, pointer = struct.calcsize(f"<{entry}"), struct.calcsize(f"<{offset}")
        for place in range(at, min(at + count * size, len(data) - size + 1), size):
            tag, kind, length, value = self._read(entry, place)
            bytes_ = length * self.SIZES.get(kind, 1)
            where = place + size - pointer
            if bytes_ > pointer:
                where = start + struct.unpack(self.order + offset, value)[0]
            self.entries[tag] = kind, length, where, bytes_

    def _read(self, form: str, at: int) -> tuple:
        return struct.unpack_from(self.order + form, self.data, at)

    def numbers(self, tag: int) -> tuple[int, ...]:
        """The whole numbers of an entry, () where there are none or it reaches beyond the end."""
        kind, length, where, size = self.entries.get(tag, (0, 0, 0, 0))
        if kind not in self.NUMBERS or where + size > len(self.data) or size > MOST_NOTES:
            return ()
        return self._read(f"{length}{self.NUMBERS[kind]}", where)

    def number(self, tag: int, default: int) -> int:
        """The first whole number of an entry."""
        return (self.numbers(tag) or (default,))[0]

    def cost(self) -> int:
        """Bytes that Pillow makes of the entries, which it copies one by one. Raises BadImage for a bomb of them."""
        directories: list[Directory] = [self]
        for tag in SUB_DIRECTORIES:
            for at in self.numbers(tag)[:1]:
                with suppress(ValueError, struct.error):
                    directories.append(Directory(self.data, self.start, at))
        entries = (entry for directory in directories for entry in directory.entries.values())
        whole = [entry for entry in entries if entry[2] + entry[3] <= len(self.data)]
        plain = sum(size for kind, _, _, size in whole if kind in self.BYTES)
        numbers = sum(length for kind, length, _, _ in whole if kind not in self.BYTES) * BYTES_OF_A_NUMBER
        if plain > max(MOST_NOTES, len(self.data)) or numbers > MOST_NOTES:
            raise BadImage("corrupt", f"has notes beside the picture that would take {plain + numbers:,} bytes")
        return plain + numbers


def orientation(exif: bytes, xmp: bytes) -> int:
    """How a picture is turned, 1..8 as EXIF counts, from its EXIF block or else its XMP; 1 where neither says."""
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    try:
        numbers = Directory(exif, start).numbers(ORIENTATION)
    except (ValueError, struct.error):  # a damaged EXIF block is no reason to lose the picture
        numbers = ()
    found = XMP_ORIENTATION.search(xmp)
    if not numbers and found:
        return int(found[1])
    return numbers[0] if len(numbers) == 1 and 1 <= numbers[0] <= 8 else 1


def tiff_memory(data: bytes) -> int:
    """Bytes that reading a TIFF takes beside its pixels. Raises BadImage for one whose header alone decides on them."""
    try:
        directory = Directory(data)
    except (ValueError, struct.error):
        return 0  # damaged, for Pillow to say how
    extra = 2 * directory.cost()  # it reads them twice
    compression, rows = directory.number(COMPRESSION, 1), directory.number(ROWS_PER_STRIP, 2**32 - 1)
    width, height = directory.number(WIDTH, 0), directory.number(HEIGHT, 0)
    tile_width, tile_height = directory.number(TILE_WIDTH, 0), directory.number(TILE_HEIGHT, 0)
    if compression not in COMPRESSIONS:
        reason = f"is packed in a way that is not read (TIFF compression {compression}); save it as PNG"
        raise BadImage("corrupt", reason)
    if tile_width * tile_height > 4 * width * height + 2**22:
        reason = f"has tiles of {tile_width} x {tile_height} pixels, larger than itself; save it as PNG"
        raise BadImage("corrupt", reason)
    if compression != 1:  # libtiff unpacks a strip or tile at once, from a copy of the file
        bits = sum(directory.numbers(BITS)[:8]) or 8
        extra += len(data) + bits * max(width * min(rows, height), tile_width * tile_height) // 8
    return extra


def check_blocks(data: bytes) -> None:
    """Raise BadImage for a file whose EXIF blocks, wherever they lie, would take much memory; Pillow unpacks them."""
    for number, mark in enumerate(re.finditer(rb"II\*\0|MM\0\*", data)):
        if number == MOST_BLOCKS:
            raise BadImage("corrupt", f"has more than {MOST_BLOCKS} EXIF blocks")
        try:
            directory = Directory(data, mark.start())
        except (ValueError, struct.error):  # other bytes that look like one
            continue
        directory.cost()
