"""Picture files decoded by Pillow within a bound of memory over all threads, however small the files are.

What a picture will need is known from its header. A thread that finds too little left waits, and a picture that alone
needs more than MOST_DECODING is refused as too large. In numbers, 24 bytes a pixel for an AVIF of more than 8 bits, 16
for a WEBP, 12 for another AVIF, 7 to 10 for a progressive JPEG, 4 for any other in colour and 1 or 2 for one in grey.
Converting to 8-bit RGB, which would take several times as much, is done tile by tile. Measured with 8 threads that
decode the same bomb at once, 26 of them: at most 421 MB more than before.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFile, features

from .colours import Box, converter
from .containers import FORMATS, NO_PICTURES, Contents, contents
from .exif import HEIGHT, ORIENTATION, WIDTH, orientation
from .memory import MemoryBudget
from .problems import BadImage

# Larger pictures are refused before they are decoded; Pillow's own limit, which other code may have switched off.
MOST_PIXELS = 178_956_970
MOST_DECODING = 400 * 2**20  # bytes
DECODING = MemoryBudget(MOST_DECODING)
TILE = 2**16  # pixels that are converted at once
TILE_BYTES = 48  # a pixel of a tile, for all its copies
ROW_BYTES = 32  # a row of a picture beside its pixels: its address, and a few rows that decoders hold apart
NATIVE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # a pixel in Pillow; 4 in other modes
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
AV1_SETTINGS = re.compile(rb"av1C(?=...)", re.DOTALL)  # of an AVIF; the third byte behind it says whether it has 8 bits


@dataclass
class Header:
    """A picture file that is open and not decoded. turned: its EXIF orientation, 1..8."""

    contents: Contents
    image: Any  # of Pillow; which attributes it has depends on the format
    turned: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) after orientation; for TIFF some Pillows report it turned already, some do not."""
        tags = self.image.tag_v2 if self.contents.kind == "TIFF" else {}
        height, width = self.image.height, self.image.width
        if HEIGHT in tags and WIDTH in tags:
            height, width = int(tags[HEIGHT]), int(tags[WIDTH])
        return (width, height) if self.turned >= 5 else (height, width)


def opened(data: bytes) -> Header:
    """What is in a file, and its picture as Pillow knows it from the header alone. Raises BadImage."""
    inside = contents(data)
    if inside.kind == "":
        if inside.other:
            cure = "download the picture itself" if inside.other in NO_PICTURES else "save it as PNG"
            reason = f"is a file of another kind ({inside.other}), whatever its name says; {cure}"
            raise BadImage("corrupt", reason)
        raise Image.UnidentifiedImageError
    if inside.kind not in _readable():
        reason = f"is {inside.kind}, which the installed Pillow cannot read; update that or save it as PNG"
        raise BadImage("corrupt", reason)
    image = _plugin(inside)
    shape = f"{image.width} x {image.height}"
    if image.width * image.height > MOST_PIXELS:
        raise BadImage("too large", f"has {shape} pixels, more than {MOST_PIXELS}; scale it down")
    if image.width * image.height == 0:
        raise BadImage("corrupt", f"has no pixels ({shape})")
    return Header(inside, image, _turned(inside, image))


def _plugin(inside: Contents) -> Any:
    """What Pillow's plugin for the format makes of a file.

    `Image.open` would also compare the size with a limit that other code sets as it likes, and write warnings.
    """
    try:
        return Image.OPEN[inside.kind][0](io.BytesIO(inside.data), "")
    except (SyntaxError, IndexError, TypeError, struct.error) as error:
        raise Image.UnidentifiedImageError from error


@functools.lru_cache(maxsize=1)
def _readable() -> frozenset[str]:
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    built = {"WEBP": features.check("webp"), "AVIF": "avif" in features.modules and features.check("avif")}
    return frozenset(kind for kind in FORMATS if kind in Image.OPEN and built.get(kind, True))


def _turned(inside: Contents, image: Any) -> int:
    if inside.kind == "TIFF":
        value = image.tag_v2.get(ORIENTATION, 1)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    if inside.kind in ("WEBP", "AVIF"):
        return orientation(image.info.get("exif", b""), image.info.get("xmp", b""))
    return orientation(inside.exif, inside.xmp)


class Decoding:
    """One picture while it is decoded and converted, tile by tile; within its block its memory is held.

    at_least: see `images.decode`. size: (width, height) of the result. Raises BadImage when it would take more than
    there is for all.
    """

    def __init__(self, data: bytes, at_least: tuple[int, int] | None) -> None:
        self.header = header = opened(data)
        self.image, self.turned = header.image, header.turned
        if at_least is not None and self.image.format == "JPEG":
            height, width = at_least if self.turned < 5 else at_least[::-1]
            self.image.draft(self.image.mode, (2 * width, 2 * height))
        height, width = header.size
        self.full, self.factor, most = (width, height), 1, 1
        if at_least is not None:
            self.factor = max(1, min(height // (2 * at_least[0]), width // (2 * at_least[1])))
            most = min(height // at_least[0], width // at_least[1])
        decoding = _need(header) + TILE_BYTES * min(TILE, width * height)
        while True:
            self.size = -(-width // self.factor), -(-height // self.factor)
            self.need = decoding + 4 * self.size[0] * self.size[1]
            if self.need <= MOST_DECODING or self.factor >= most:
                break
            self.factor += 1

    def __enter__(self) -> Decoding:
        with ExitStack() as stack:
            try:
                stack.enter_context(DECODING.hold(self.need))
            except MemoryError as error:
                mib, most = self.need / 2**20, MOST_DECODING // 2**20
                shape = f"{self.full[0]} x {self.full[1]}"
                reason = f"has {shape} pixels, which take {mib:,.0f} MiB to decode, more than {most}; scale it down"
                raise BadImage("too large", reason) from error
            self.image.load()
            if self.image.format == "TIFF":
                self.turned = 1  # Pillow turns these while it loads them
            self.convert = converter(self.image, (box for box, _ in self._boxes()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        del self.image, self.header, self.convert
        self._stack.close()

    def picture(self) -> Image.Image:
        """All of it, mode RGB."""
        picture = Image.new("RGB", self.size)
        for full, box in self._boxes(self.factor):
            tile = self.convert(self.image.crop(_stored_box(full, self.full, self.turned)))
            tile = tile.transpose(TURNS[self.turned]) if self.turned in TURNS else tile
            picture.paste(tile.reduce(self.factor) if self.factor > 1 else tile, box)
        return picture

    def _boxes(self, factor: int = 1) -> Iterator[tuple[Box, Box]]:
        """(box of the turned picture, box of the result), covering them with tiles of about TILE pixels."""
        width, height = self.full
        across, down = -(-width // factor), -(-height // factor)
        rows = max(1, TILE // width // factor)
        columns = max(1, TILE // (rows * factor) // factor)
        for top in range(0, down, rows):
            for left in range(0, across, columns):
                right, bottom = min(left + columns, across), min(top + rows, down)
                full = (left * factor, top * factor, min(right * factor, width), min(bottom * factor, height))
                yield full, (left, top, right, bottom)


def _need(header: Header) -> int:
    """Bytes that decoding takes at its peak, from the header; measured, see the module's description."""
    inside, image = header.contents, header.image
    native = NATIVE_BYTES.get(image.mode, 4)
    each = float(native)
    if inside.kind == "WEBP":
        each = 16.0
    elif inside.kind == "AVIF":
        settings = AV1_SETTINGS.finditer(inside.data)
        each = 24.0 if any(inside.data[mark.end() + 2] & 0x40 for mark in settings) else 12.0
    elif inside.kind in ("GIF", "BMP", "PPM"):
        each = native + 1.0  # run lengths, unpacked in Python
    elif inside.kind == "TIFF":
        each = native * (2.0 if header.turned != 1 else 1.0) + 1.0
    need = int(each * image.width * image.height) + ROW_BYTES * max(image.size)
    need += inside.extra + len(inside.data) + 2**20
    if inside.kind == "JPEG" and (inside.scans > 1 or image.info.get("progressive")):
        # All coefficients are kept, of two bytes each, at the size that the file has.
        across, down = (max(layer[index] for layer in image.layer) for index in (1, 2))
        need += sum(2 * inside.pixels * layer[1] * layer[2] // (across * down) for layer in image.layer)
    return need


def _stored_box(box: Box, size: tuple[int, int], turned: int) -> Box:
    """Where a box of a turned picture of (width, height) `size` lies in the one that is stored."""
    (left, top, right, bottom), (width, height) = box, size
    return {
        2: (width - right, top, width - left, bottom),
        3: (width - right, height - bottom, width - left, height - top),
        4: (left, height - bottom, right, height - top),
        5: (top, left, bottom, right),
        6: (top, width - right, bottom, width - left),
        7: (height - bottom, width - right, height - top, width - left),
        8: (height - bottom, left, height - top, right),
    }.get(turned, box)


# -------------------------------------------------------------------------------------------------------------- faults


_strict_lock = threading.Lock()
_strict_users = 0
_strict_before = False


@contextmanager
def reading(data: bytes) -> Iterator[None]:
    """Within the block whatever Pillow's many readers raise becomes BadImage, also for truncated files.

    The readers are not documented to raise one kind only. Pillow can be told to fill truncated files with grey; that
    switch is global and many node packs set it. It is off while any thread is in here, and the last one sets it back.
    """
    global _strict_users, _strict_before
    with _strict_lock:
        if _strict_users == 0:
            _strict_before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _strict_users += 1
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        raise _bad_image(data, error) from error
    finally:
        with _strict_lock:
            _strict_users -= 1
            if _strict_users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _strict_before


def _bad_image(data: bytes, error: Exception) -> BadImage:
    if isinstance(error, MemoryError):
        return BadImage("too large", "does not fit into memory; scale it down")
    if not data:
        return BadImage("empty", "is an empty file")
    if isinstance(error, Image.UnidentifiedImageError):
        return BadImage("corrupt", "is not an image of a known kind, or its header is damaged")
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return BadImage("corrupt", f"is damaged or cut off ({text}); copy or download it again")
