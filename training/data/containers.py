"""Which kind of picture a file is, by its first bytes, and its picture alone, before Pillow sees it.

Pillow reads some forty formats, one of which (EPS) starts another program. Here a file is known by its first bytes,
whatever its name says, and only the formats that folders of images hold are passed on.
"""

from __future__ import annotations

import re
from dataclasses import replace

from . import exif, stripping
from .problems import BadImage
from .stripping import Contents

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")  # the only ones that Pillow is let read
MOST_RLE = 4 * 2**20  # bytes of a run-length BMP, which Pillow unpacks in Python
OUR_PPM = re.compile(rb"P6\n\d+ \d+\n255\n")
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


def contents(data: bytes) -> Contents:
    """What is in a picture file. Raises BadImage for one that would take far more memory or time than its size says.

    A file that is damaged comes back as it is, for Pillow to say how.
    """
    kind = _kind(data)
    strip = {"JPEG": stripping.jpeg, "PNG": stripping.png, "GIF": stripping.gif}.get(kind)
    if strip is not None:
        return replace(strip(data), kind=kind)
    if kind == "AVIF":
        exif.check_blocks(data)
    extra = {"TIFF": exif.tiff_memory, "BMP": _bmp_memory}.get(kind, lambda data: 0)(data)
    other = "" if kind else next((name for name, mark in OTHERS.items() if re.match(mark, data, re.DOTALL)), "")
    return Contents(data, kind=kind, other=other, extra=extra)


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


def _bmp_memory(data: bytes) -> int:
    """Bytes that unpacking a run-length BMP takes. Raises BadImage for a large one."""
    if len(data) < 34 or data[14:15] == b"\x0c" or data[30:34] not in (b"\1\0\0\0", b"\2\0\0\0"):
        return 0
    if len(data) > MOST_RLE:
        raise BadImage("too large", f"is a packed BMP of more than {MOST_RLE:,} bytes; save it as PNG")
    width, height = (abs(int.from_bytes(data[at : at + 4], "little", signed=True)) for at in (18, 22))
    return 3 * width * height
