"""Picture files without what they carry beside the picture: notes, thumbnails, EXIF blocks and further frames.

Pillow would unpack all of that whether or not anybody wants it. What says how the picture is turned is kept apart.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from .problems import BadImage

MOST_PIECES = 250_000  # chunks or segments of one file
MOST_SUB_BLOCKS = 2_200_000  # of a GIF, each of up to 255 bytes
USUAL_SCANS = 16  # passes of a progressive JPEG; encoders make about 10
MOST_SCANNED = 200_000_000  # pixels of a JPEG of more passes, times these
MOST_PROFILE = 2**20  # bytes of a PNG's colour profile, as Pillow has it
PNG_PICTURE = (b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"IDAT", b"IEND")
PNG_NOTES = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
GIF_BLOCK = re.compile(rb"[,!;]")
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # other than those within a pass
SCAN, END, ALONE = b"\xda", b"\xd9", (b"\x01", b"\xd8", b"\xd9")
FRAMES = [bytes([code]) for code in range(0xC0, 0xD0) if code not in (0xC4, 0xC8, 0xCC)]
APPLICATIONS = [bytes([code]) for code in (*range(0xE1, 0xF0), 0xFE)]


@dataclass(frozen=True)
class Contents:
    """A picture file for Pillow.

    exif, xmp: what may say how the picture is turned; in a WEBP or AVIF Pillow finds it. scans, pixels: a JPEG's passes
    and its size. kind: Pillow's name of the format, "" for one that is not read; `other` names that if it is known.
    extra: bytes that reading a TIFF or BMP takes beside its pixels.
    """

    data: bytes
    exif: bytes = b""
    xmp: bytes = b""
    scans: int = 1
    pixels: int = 0
    kind: str = ""
    other: str = ""
    extra: int = 0


def jpeg(data: bytes) -> Contents:
    """Without EXIF, XMP, comments, previews and further pictures; the colour profile and all that decodes stays."""
    kept, exif, xmp, at, pixels = [], [], b"", 2, 0
    for _ in range(MOST_PIECES):
        found = JPEG_MARKER.search(data, at)  # as Pillow does it, over whatever lies between two segments
        at = len(data) if found is None else found.start()
        marker, end = data[at + 1 : at + 2], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in ALONE:
            at += 2
            continue
        if not marker or end > len(data) or end < at + 4:
            return Contents(_without(data, kept, at), b"".join(exif), xmp)
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
        raise BadImage("corrupt", f"has more than {MOST_PIECES:,} segments")
    scans = _scans(data, at)
    if scans > USUAL_SCANS and scans * pixels > MOST_SCANNED:
        raise BadImage("too large", f"is stored in {scans:,} passes over {pixels:,} pixels; save it anew")
    return Contents(_without(data, kept, at), b"".join(exif), xmp, scans=scans, pixels=pixels)


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
        found = JPEG_MARKER.search(data, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
        if found is None:
            break
        at = found.start()
    return count


def png(data: bytes) -> Contents:
    """Without texts, EXIF and later frames."""
    kept, exif, xmp, at, dropped = [data[:8]], b"", b"", 8, False
    for _ in range(MOST_PIECES):
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if len(name) < 4 or end > len(data):
            kept.append(data[at:])
            break
        body = data[at + 8 : at + 8 + length] if name in PNG_NOTES else b""
        if name == b"eXIf":
            exif = exif or body
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
        raise BadImage("corrupt", f"has more than {MOST_PIECES:,} chunks")
    return Contents(b"".join(kept) if dropped else data, exif, xmp)


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


def gif(data: bytes) -> Contents:
    """The first frame alone, without comments."""
    if len(data) < 13:
        return Contents(data)
    at = 13 + _table(data[10])
    head, shown, frame = data[:at], b"", None
    for kind, start, end in _blocks(data, at):
        if kind == b"," and frame is not None:
            break
        if kind == b",":
            frame = data[start:end]
        elif frame is None and data[start + 1 : start + 2] == b"\xf9":
            shown = data[start:end]  # how the frame is shown; of several the last
    if frame is None:
        return Contents(data)
    return Contents(b"".join((head, shown, frame, b";")))


def _table(flags: int) -> int:
    """Bytes of a GIF's colour table."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _blocks(data: bytes, at: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of a GIF's frames (",") and extensions ("!") that are whole. Raises BadImage."""
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
            raise BadImage("corrupt", f"is a GIF of more than {MOST_SUB_BLOCKS:,} pieces")
        if at >= len(data):
            return
        at += 1
        yield kind, start, at
