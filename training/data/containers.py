"""Picture files before Pillow sees them: which kind they are, and their picture without what else they carry.

Pillow reads some forty formats, one of which (EPS) starts another program, and unpacks texts, thumbnails, EXIF blocks
and further frames of those that are meant whether or not anybody wants them. Here a file is known by its first bytes,
whatever its name says, and notes and later frames are cut away; only what says how the picture is turned is kept.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from ...guidance.errors import Problem

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")  # the only ones that Pillow is let read
MOST_PIECES = 250_000  # chunks or segments of one file
MOST_NOTES = 32 * 2**20  # bytes that the entries of a TIFF or EXIF directory take once they are read
MOST_SUB_BLOCKS = 2_200_000  # of a GIF, each of up to 255 bytes
MOST_RLE = 4 * 2**20  # bytes of a run-length BMP, which Pillow unpacks in Python
USUAL_SCANS = 16  # passes of a progressive JPEG; encoders make about 10
MOST_SCANNED = 200_000_000  # pixels of a JPEG of more passes, times these
MOST_PROFILE = 2**20  # bytes of a PNG's colour profile, as Pillow has it
MOST_MARKS = 16  # places of an AVIF where an EXIF block may begin
ORIENTATION, WIDTH, HEIGHT, BITS, COMPRESSION, ROWS_PER_STRIP = 274, 256, 257, 258, 259, 278  # TIFF and EXIF tags
STRIPS, STRIP_BYTES, TILES, TILE_BYTES, TILE_WIDTH, TILE_HEIGHT = 273, 279, 324, 325, 322, 323
BYTES_OF_A_NUMBER = 64  # in a tuple of Python's
SUB_DIRECTORIES = (34665, 34853, 40965)
# None, CCITT, LZW, JPEG, Deflate, PackBits, Zstandard; others need memory that their header alone decides on.
COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 50000)
PNG_PICTURE = (b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"IDAT", b"IEND")
PNG_NOTES = (b"eXIf", b"acTL", b"tEXt", b"zTXt", b"iTXt")
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:=["\']|>)([1-8])')
GIF_BLOCK = re.compile(rb"[,!;]")
OUR_PPM = re.compile(rb"P6\n\d+ \d+\n255\n")
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG, other than those within a pass
SCAN, END, ALONE = b"\xda", b"\xd9", (b"\x01", b"\xd8", b"\xd9")
FRAMES = [bytes([one]) for one in range(0xC0, 0xD0) if one not in (0xC4, 0xC8, 0xCC)]
APPLICATIONS = [bytes([one]) for one in (*range(0xE1, 0xF0), 0xFE)]
OTHERS = {
    "HEIC": rb"....ftyp(?:hei|hev|mif1|msf1)",
    "JPEG XL": rb"\xff\n|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "Photoshop": rb"8BPS",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "PDF": rb"%PDF",
    "Windows icon": rb"\x00\x00[\x01\x02]\x00(?!\0\0)",
    "Targa": rb".[\0\1][\1-\3\x09-\x0b]\0\0[\0\1]\0",
    "OpenEXR": rb"v/1\x01",
    "DDS": rb"DDS ",
    "XML or HTML": rb"\s*<",
    "portable": rb"P[1-7fF]\s",
    "QOI": rb"qoif",
    "GIMP": rb"gimp xcf",
    "Git LFS pointer": rb"version https://git-lfs",
}
NO_PICTURES = ("XML or HTML", "Git LFS pointer")  # of OTHERS: what a server may send in the place of one


class Excess(Exception):
    """A file whose small size is no measure of what it would take to read. kind: a kind of BadImage."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Contents:
    """A picture file for Pillow. kind: "" for a format that is not meant, and `other` names it if it is known.

    exif, xmp: what may say how the picture is turned; in a WEBP or AVIF Pillow finds it. scans, pixels: a JPEG's passes
    and its size. extra: bytes that reading a TIFF or BMP takes beside its pixels.
    """

    kind: str
    data: bytes
    exif: bytes = b""
    xmp: bytes = b""
    animated: bool = False
    scans: int = 1
    pixels: int = 0
    extra: int = 0
    other: str = ""


def contents(data: bytes) -> Contents:
    """What is in a picture file. Raises Excess; a file that is damaged comes back as it is, for Pillow to say how."""
    kind = _kind(data)
    reader = {"JPEG": _jpeg, "PNG": _png, "GIF": _gif, "TIFF": _tiff, "AVIF": _avif, "BMP": _bmp}.get(kind)
    if reader is not None:
        return reader(data)
    other = "" if kind else next((name for name, mark in OTHERS.items() if re.match(mark, data, re.DOTALL)), "")
    return Contents(kind, data, other=other)


def _kind(data: bytes) -> str:
    """Pillow's name of the format that a file's first bytes are those of; "" for all that are not meant."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data[4:8] == b"ftyp" and any(data[at : at + 4] in (b"avif", b"avis") for at in range(8, min(len(data), 64), 4)):
        return "AVIF"
    if data.startswith(b"BM"):
        return "BMP"
    return "PPM" if OUR_PPM.match(data) else ""


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


class Directory:
    """The first directory of a TIFF file or EXIF block that begins at `start`; nothing of it is copied or unpacked.

    Raises Problem or struct.error for one that cannot be read.
    """

    SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
    BYTES = (1, 2, 7)
    NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}

    def __init__(self, data: bytes, start: int = 0, at: int | None = None) -> None:
        self.data, self.start, self.entries = data, start, {}
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

    def cost(self) -> int:
        """Bytes that Pillow makes of the entries, which it copies one by one. Raises Excess for a bomb of them."""
        directories = [self]
        for tag in SUB_DIRECTORIES:
            for at in self.numbers(tag)[:1]:
                with suppress(ValueError, struct.error):
                    directories.append(Directory(self.data, self.start, at))
        entries = (entry for one in directories for entry in one.entries.values())
        whole = [entry for entry in entries if entry[2] + entry[3] <= len(self.data)]
        plain = sum(size for kind, _, _, size in whole if kind in self.BYTES)
        numbers = sum(length for kind, length, _, _ in whole if kind not in self.BYTES) * BYTES_OF_A_NUMBER
        if plain > max(MOST_NOTES, len(self.data)) or numbers > MOST_NOTES:
            raise Excess("corrupt", f"has notes beside the picture that would take {plain + numbers:,} bytes")
        return plain + numbers


def _tiff(data: bytes) -> Contents:
    try:
        directory = Directory(data)
    except (ValueError, struct.error):
        return Contents("TIFF", data)
    extra = 2 * directory.cost()  # it reads them twice
    compression, tile_width, tile_height, width, height, rows = (
        (directory.numbers(tag) or (default,))[0]
        for tag, default in (
            (COMPRESSION, 1),
            (TILE_WIDTH, 0),
            (TILE_HEIGHT, 0),
            (WIDTH, 0),
            (HEIGHT, 0),
            (ROWS_PER_STRIP, 2**32 - 1),
        )
    )
    if compression not in COMPRESSIONS:
        raise Excess("corrupt", f"is packed in a way that is not read (TIFF compression {compression}); save it as PNG")
    if tile_width * tile_height > 4 * width * height + 2**22:
        raise Excess("corrupt", f"has tiles of {tile_width} x {tile_height} pixels, larger than itself; save it as PNG")
    if compression != 1:  # libtiff unpacks a strip or tile at once, from a copy of the file
        bits = sum(directory.numbers(BITS)[:8]) or 8
        extra += len(data) + bits * max(width * min(rows, height), tile_width * tile_height) // 8
    return Contents("TIFF", data, extra=extra)


def tiff_end(data: bytes) -> int:
    """How long a TIFF file must be for its directory and strips or tiles; 0 when they cannot be read."""
    try:
        directory = Directory(data)
    except struct.error:  # its directory lies behind the end
        return len(data) + 1
    except ValueError:
        return 0
    starts = directory.numbers(STRIPS) or directory.numbers(TILES)
    lengths = directory.numbers(STRIP_BYTES) or directory.numbers(TILE_BYTES)
    return max((start + length for start, length in zip(starts, lengths)), default=0)


def _avif(data: bytes) -> Contents:
    # Pillow unpacks the EXIF block, wherever it lies.
    for number, mark in enumerate(re.finditer(rb"II\*\0|MM\0\*", data)):
        if number == MOST_MARKS:
            raise Excess("corrupt", f"has more than {MOST_MARKS} EXIF blocks")
        with suppress(ValueError, struct.error):
            Directory(data, mark.start()).cost()
    return Contents("AVIF", data)


def _bmp(data: bytes) -> Contents:
    packed = len(data) >= 34 and data[14:15] != b"\x0c" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0")
    if packed and len(data) > MOST_RLE:
        raise Excess("too large", f"is a packed BMP of more than {MOST_RLE:,} bytes; save it as PNG")
    sides = [abs(int.from_bytes(data[at : at + 4], "little", signed=True)) for at in (18, 22)]
    return Contents("BMP", data, extra=3 * sides[0] * sides[1] if packed else 0)


# ---------------------------------------------------------------------------------------------------------- JPEG, PNG


def _jpeg(data: bytes) -> Contents:
    """Without EXIF, XMP, comments, previews and further pictures; the colour profile and all that decodes stays."""
    kept, exif, xmp, at, pixels = [], [], b"", 2, 0
    for _ in range(MOST_PIECES):
        found = MARKER.search(data, at)  # as Pillow does it, over whatever lies between two segments
        at = len(data) if found is None else found.start()
        marker, end = data[at + 1 : at + 2], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in ALONE:
            at += 2
            continue
        if not marker or end > len(data) or end < at + 4:
            return Contents("JPEG", _without(data, kept, at), b"".join(exif), xmp)
        if marker == SCAN:
            break
        body = data[at + 4 : end]
        if marker == b"\xe1" and body.startswith(b"Exif\0\0"):
            exif.append(body[6:])
        elif marker == b"\xe1" and body.startswith(b"http://ns.adobe.com/xap/"):
            xmp = xmp or body
        elif marker in FRAMES:
            pixels = int.from_bytes(body[1:3], "big") * int.from_bytes(body[3:5], "big")
        if marker not in APPLICATIONS or body.startswith((b"ICC_PROFILE\0", b"Adobe")):
            kept.append((at, end))
        at = end
    else:
        raise Excess("corrupt", f"has more than {MOST_PIECES:,} segments")
    scans = _scans(data, at)
    if scans > USUAL_SCANS and scans * pixels > MOST_SCANNED:
        raise Excess("too large", f"is stored in {scans:,} passes over {pixels:,} pixels; save it anew")
    return Contents("JPEG", _without(data, kept, at), b"".join(exif), xmp, scans=scans, pixels=pixels)


def _without(data: bytes, kept: list[tuple[int, int]], rest: int) -> bytes:
    """A JPEG of these segments and everything from `rest` on; itself where that is all."""
    if sum(end - start for start, end in kept) == rest - 2:
        return data
    return b"".join((data[:2], *(data[start:end] for start, end in kept), data[rest:]))


def _scans(data: bytes, at: int) -> int:
    """How many passes a JPEG makes from the first one, at `at`, to its end; counted no further than matters."""
    count = 0
    while count < MOST_PIECES and data[at + 1 : at + 2] not in (END, b""):
        count += data[at + 1 : at + 2] == SCAN
        found = MARKER.search(data, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
        if found is None:
            break
        at = found.start()
    return count


def _png(data: bytes) -> Contents:
    """Without texts, EXIF and later frames."""
    kept, exif, xmp, at, animated, dropped = [data[:8]], b"", b"", 8, False, False
    for _ in range(MOST_PIECES):
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if len(name) < 4 or end > len(data):
            kept.append(data[at:])
            break
        body = data[at + 8 : at + 8 + length] if name in PNG_NOTES else b""
        if name == b"eXIf":
            exif = exif or body
        elif name == b"acTL":
            animated = int.from_bytes(body[:4], "big") > 1
        elif body.startswith(b"XML:com.adobe.xmp\0"):
            xmp = xmp or _text(name, body)
        elif body.startswith(b"Raw profile type exif\0"):
            exif = exif or _from_hexadecimal(_text(name, body))
        if name in PNG_PICTURE and not (name == b"iCCP" and _unpacked_length(data[at + 8 : end]) > MOST_PROFILE):
            kept.append(data[at:end])
        else:
            dropped = True
        at = end
        if name == b"IEND":
            break
    else:
        raise Excess("corrupt", f"has more than {MOST_PIECES:,} chunks")
    return Contents("PNG", b"".join(kept) if dropped else data, exif, xmp, animated)


def _unpacked_length(body: bytes) -> int:
    """Bytes of a PNG's colour profile, counted to just beyond MOST_PROFILE."""
    with suppress(zlib.error):
        return len(zlib.decompressobj().decompress(body.partition(b"\0")[2][1:], MOST_PROFILE + 1))
    return 0


def _text(name: bytes, body: bytes) -> bytes:
    """What a PNG's text chunk says, the first MiB of it."""
    rest = body.partition(b"\0")[2]
    packed = name == b"zTXt"
    if name == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return zlib.decompressobj().decompress(rest[packed * (name == b"zTXt") :], 2**20) if packed else rest
    except zlib.error:
        return b""


def _from_hexadecimal(text: bytes) -> bytes:
    """The EXIF block in what ImageMagick writes: newline, name, length, and hexadecimal digits in lines."""
    try:
        return bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))
    except ValueError:
        return b""


# ---------------------------------------------------------------------------------------------------------------- GIF


def _gif(data: bytes) -> Contents:
    """The first frame alone, without comments."""
    if len(data) < 13:
        return Contents("GIF", data)
    at = 13 + _table(data[10])
    head, shown, frame, animated = data[:at], b"", None, False
    for kind, start, end in _blocks(data, at):
        if kind == b"," and frame is not None:
            animated = True
            break
        if kind == b",":
            frame = data[start:end]
        elif frame is None and data[start + 1 : start + 2] == b"\xf9":
            shown = data[start:end]  # how the frame is shown; of several the last
    if frame is None:
        return Contents("GIF", data)
    return Contents("GIF", b"".join((head, shown, frame, b";")), animated=animated)


def _table(flags: int) -> int:
    """Bytes of a GIF's colour table."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _blocks(data: bytes, at: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of a GIF's frames (",") and extensions ("!") that are whole. Raises Excess."""
    parts = 0
    while True:
        found = GIF_BLOCK.search(data, at)
        if found is None or found[0] == b";" or len(data) < found.start() + 11:
            return
        start, kind = found.start(), found[0]
        at = start + (11 + _table(data[start + 9]) if kind == b"," else 2)
        while at < len(data) and data[at]:
            at, parts = at + data[at] + 1, parts + 1
        parts += 1
        if parts > MOST_SUB_BLOCKS:
            raise Excess("corrupt", f"is a GIF of more than {MOST_SUB_BLOCKS:,} pieces")
        if at >= len(data):
            return
        at += 1
        yield kind, start, at
