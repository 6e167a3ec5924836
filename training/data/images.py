"""Image files as 8-bit sRGB pictures, and pictures as tensors: every kind of file that folders of images really hold.

What is done to a file, in this order: first frame of an animation; 16-bit, 32-bit and floating-point grey scaled to 8
bits; an embedded colour profile applied (CMYK included) so that all pictures are sRGB; transparency laid over white;
EXIF orientation. Nothing is guessed about a damaged file: it is refused with the reason.

Only the formats of `containers.FORMATS` are opened. All threads together take at most MOST_DECODING bytes for pictures
that are being read, however small their files: what a picture will need is known from its header, who finds too few
left waits, and a picture that alone needs more is refused as too large. In numbers, 24 bytes a pixel for an AVIF of
more than 8 bits, 16 for a WEBP, 12 for another AVIF, 7 to 10 for a progressive JPEG, 4 for any other in colour and 1 or
2 for one in grey; converting them, which would take several times as much, is done tile by tile.
Measured with 8 threads that decode the same bomb at once, 26 of them: at most 421 MB more than before.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, features
from torch import Tensor

from ...guidance.errors import Problem
from .containers import FORMATS, NO_PICTURES, Contents, Excess, contents, orientation, tiff_end
from .memory import Budget

# Larger pictures are refused before they are decoded; Pillow's own limit, which other code may have switched off.
MOST_PIXELS = 178_956_970
MOST_DECODING = 400 * 2**20  # bytes
DECODING = Budget(MOST_DECODING)
TILE = 2**16  # pixels that are converted at once
TILE_BYTES = 48  # a pixel of a tile, for all its copies
ROW_BYTES = 16  # a row of a picture, beside its pixels
NATIVE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # a pixel in Pillow; 4 in other modes
MOST_PROFILE = 4 * 2**20  # bytes of a colour profile that is looked at
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WIDTH, HEIGHT, BITS, ORIENTATION = 256, 257, 258, 274  # TIFF tags
AV1_SETTINGS = re.compile(rb"av1C(?=...)", re.DOTALL)  # of an AVIF; the third byte behind it says whether it has 8 bits
OVERSHOOT = 2.0  # times its range that a floating-point picture may reach

Box = tuple[int, int, int, int]  # left, top, right, bottom


class DataProblem(Problem):
    """Images that cannot be trained on, in one sentence: what was expected, what was found, what to do."""


class BadImage(DataProblem):
    """One file that cannot be used.

    kind: "empty", "corrupt", "truncated", "too large", "too small" or "unreadable" (permissions, a lost drive).
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class ImageFacts:
    """What a file's header says; height and width in pixels after EXIF orientation."""

    height: int
    width: int
    format: str
    mode: str
    rotated: bool
    alpha: bool
    sixteen_bit: bool
    cmyk: bool
    animated: bool


def probe(data: bytes) -> ImageFacts:
    """Facts of an image file's content without decoding its pixels. Raises BadImage when it is none."""
    with _named_faults(data), _strictly():
        inside, image = _opened(data)
        turned, (height, width) = _turn(image, inside), _stored_size(image)
        if turned >= 5:
            height, width = width, height
        return ImageFacts(
            height=height,
            width=width,
            format=str(image.format),
            mode=image.mode,
            rotated=turned != 1,
            alpha=_has_alpha(image),
            sixteen_bit=_is_deep(image, data),
            cmyk=image.mode == "CMYK",
            animated=inside.animated or image.format in ("WEBP", "AVIF") and bool(getattr(image, "is_animated", False)),
        )


def decode(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The picture in an image file's content, mode RGB.

    at_least: (height, width) that will be needed after orientation; a larger picture is made smaller by a whole number
    while it is converted (a JPEG already while it is decoded), which saves most of the time and memory: never below
    twice that size, and never below it where there is not memory enough for that. Raises BadImage for files that are
    damaged or too large.
    """
    with decoded(data, at_least) as picture:
        return picture


@contextmanager
def decoded(data: bytes, at_least: tuple[int, int] | None = None) -> Iterator[Image.Image]:
    """The picture of `decode`, which counts against MOST_DECODING until the end of the block."""
    with ExitStack() as stack:
        with _named_faults(data), _strictly():
            reading = stack.enter_context(_Reading(data, at_least))
            picture = reading.picture()
        yield picture


def pixel_digest(data: bytes, at_least: tuple[int, int] | None = None) -> str:
    """A digest of the picture of `decode`: equal for equal pictures. Takes less memory than the picture would."""
    with _named_faults(data), _strictly(), _Reading(data, at_least, whole=False) as reading:
        digest = hashlib.sha256(f"{reading.size}".encode())
        for _, tile in reading.tiles():
            digest.update(tile.tobytes())
        return digest.hexdigest()


def load_image(file: str | Path | BinaryIO | bytes) -> Image.Image:
    """The picture in an image file, an open file or a file's content, mode RGB. Raises BadImage."""
    if isinstance(file, bytes):
        return decode(file)
    try:
        data = Path(file).read_bytes() if isinstance(file, (str, Path)) else file.read()
    except OSError as error:
        raise BadImage("unreadable", f"cannot be read ({error.strerror or error}); check its permissions") from error
    return decode(data)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> [3, H, W] fp32 in -1..1; 0 and 255 become -1 and 1 exactly."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def cover(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture scaled, aspect ratio kept, until it just covers `size`."""
    scale = max(size[0] / original[0], size[1] / original[1])
    return max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))


def crop_to(
    image: Image.Image, original: tuple[int, int], size: tuple[int, int], crop: tuple[int, int], flipped: bool = False
) -> Image.Image:
    """The part of a picture that one training sample sees: scaled to cover `size` (Lanczos, antialiased) and cut out.

    original: (height, width) of the file's picture, of which `image` may be a smaller copy. crop: (top, left) in pixels
    of the scaled picture, as SDXL counts them. flipped: mirror left and right afterwards. A picture of exactly `size`
    comes back unchanged.
    """
    (height, width), (top, left), scaled = size, crop, cover(original, size)
    down, right = image.height / scaled[0], image.width / scaled[1]
    box = (left * right, top * down, min((left + width) * right, image.width), min((top + height) * down, image.height))
    cut = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else cut


# ------------------------------------------------------------------------------------------------------- inside a file


_strict_lock = threading.Lock()
_strict_users = 0
_strict_before = False


@contextmanager
def _strictly() -> Iterator[None]:
    """Pillow raises for truncated files, also where other code has told it to fill the rest with grey.

    That switch is global and many node packs set it; it is off while any thread is in here and set back by the last.
    """
    global _strict_users, _strict_before
    with _strict_lock:
        if _strict_users == 0:
            _strict_before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _strict_users += 1
    try:
        yield
    finally:
        with _strict_lock:
            _strict_users -= 1
            if _strict_users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _strict_before


@contextmanager
def _named_faults(data: bytes) -> Iterator[None]:
    """Turn whatever Pillow's many readers raise into BadImage; they are not documented to raise one kind only."""
    try:
        yield
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too large", f"has more than {MOST_PIXELS} pixels; scale it down") from error
    except MemoryError as error:
        raise BadImage("too large", "does not fit into memory; scale it down") from error
    except Excess as error:
        raise BadImage(error.kind, str(error)) from error
    except Exception as error:
        if not data:
            raise BadImage("empty", "is an empty file") from error
        if _ends_early(data) or "truncated" in str(error) or isinstance(error, EOFError):
            raise BadImage("truncated", "ends before the picture is complete; copy or download it again") from error
        if isinstance(error, Image.UnidentifiedImageError):
            raise BadImage("corrupt", "is not an image of a known kind, or its header is damaged") from error
        text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadImage("corrupt", f"is damaged ({text})") from error


def _opened(data: bytes) -> tuple[Contents, Image.Image]:
    """What is in a file, and its picture as Pillow knows it from the header alone."""
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
    if image.width * image.height > MOST_PIXELS:
        shape = f"{image.width} x {image.height}"
        raise BadImage("too large", f"has {shape} pixels, more than {MOST_PIXELS}; scale it down")
    if image.width * image.height == 0:
        raise BadImage("corrupt", f"has no pixels ({image.width} x {image.height})")
    return inside, image


def _plugin(inside: Contents) -> Image.Image:
    """What Pillow's plugin for the format makes of a file.

    `Image.open` would also compare the size with a limit that other code sets as it likes, and write warnings.
    """
    try:
        return Image.OPEN[inside.kind][0](io.BytesIO(inside.data), None)
    except (SyntaxError, IndexError, TypeError, struct.error) as error:
        raise Image.UnidentifiedImageError from error


@functools.lru_cache(maxsize=1)
def _readable() -> frozenset[str]:
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    built = {"WEBP": features.check("webp"), "AVIF": "avif" in features.modules and features.check("avif")}
    return frozenset(one for one in FORMATS if one in Image.OPEN and built.get(one, True))


class _Reading:
    """One picture while it is decoded and converted, tile by tile; within its block its memory is held.

    size: (width, height) of the result. Raises BadImage when it would take more than there is for all.
    """

    def __init__(self, data: bytes, at_least: tuple[int, int] | None, whole: bool = True) -> None:
        inside, self.image = _opened(data)
        self.turned = _turn(self.image, inside)
        if at_least is not None and self.image.format == "JPEG":
            height, width = at_least if self.turned < 5 else at_least[::-1]
            self.image.draft(self.image.mode, (2 * width, 2 * height))
        width, height = self.image.size
        if self.turned >= 5 and inside.kind != "TIFF":
            width, height = height, width
        if inside.kind == "TIFF":
            height, width = _stored_size(self.image)
            if self.turned >= 5:
                width, height = height, width
        self.full, self.factor, most = (width, height), 1, 1
        if at_least is not None:
            self.factor = max(1, min(height // (2 * at_least[0]), width // (2 * at_least[1])))
            most = min(height // at_least[0], width // at_least[1])
        decoding = _need(self.image, inside, self.turned) + TILE_BYTES * min(TILE, width * height)
        while True:
            self.size = -(-width // self.factor), -(-height // self.factor)
            self.need = decoding + 4 * self.size[0] * self.size[1] * whole
            if self.need <= MOST_DECODING or self.factor >= most:
                break
            self.factor += 1

    def __enter__(self) -> _Reading:
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
            self.convert = _converter(self.image, self._boxes)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.image = self.convert = None
        self._stack.close()

    def picture(self) -> Image.Image:
        """All of it, mode RGB."""
        picture = Image.new("RGB", self.size)
        for box, tile in self.tiles():
            picture.paste(tile, box)
        return picture

    def tiles(self) -> Iterator[tuple[Box, Image.Image]]:
        """(where it lies in the result, a tile in mode RGB), row by row."""
        for full, box in self._boxes(self.factor):
            tile = self.convert(self.image.crop(_untouched(full, self.full, self.turned)))
            tile = tile.transpose(TURNS[self.turned]) if self.turned in TURNS else tile
            yield box, tile.reduce(self.factor) if self.factor > 1 else tile

    def _boxes(self, factor: int = 1) -> Iterator[tuple[Box, Box]]:
        """(box of the turned picture, box of the result), covering them with tiles of about TILE pixels."""
        width, height = self.full
        rows = max(1, TILE // width // factor)
        columns = max(1, TILE // (rows * factor) // factor)
        for top in range(0, -(-height // factor), rows):
            for left in range(0, -(-width // factor), columns):
                box = left, top, min(left + columns, -(-width // factor)), min(top + rows, -(-height // factor))
                full = (box[0] * factor, box[1] * factor, min(box[2] * factor, width), min(box[3] * factor, height))
                yield full, box


def _need(image: Image.Image, inside: Contents, turned: int) -> int:
    """Bytes that decoding the image takes at its peak, from its header; measured, see the module's description."""
    native = NATIVE_BYTES.get(image.mode, 4)
    each = float(native)
    if inside.kind == "WEBP":
        each = 16.0
    elif inside.kind == "AVIF":
        each = 24.0 if any(inside.data[one.end() + 2] & 0x40 for one in AV1_SETTINGS.finditer(inside.data)) else 12.0
    elif inside.kind in ("GIF", "BMP", "PPM"):
        each = native + 1.0  # run lengths, unpacked in Python
    elif inside.kind == "TIFF":
        each = native * (2.0 if turned != 1 else 1.0) + 1.0
    # Pillow knows each row by an address; decoders hold a few rows apart.
    rows = ROW_BYTES * max(image.size) + 4 * 4 * max(image.size)
    need = int(each * image.width * image.height) + rows + inside.extra + len(inside.data) + 2**20
    if inside.kind == "JPEG" and (inside.scans > 1 or image.info.get("progressive")):
        # All coefficients are kept, of two bytes each, at the size that the file has.
        across, down = (max(one[index] for one in image.layer) for index in (1, 2))
        need += sum(2 * inside.pixels * one[1] * one[2] // (across * down) for one in image.layer)
    return need


def _untouched(box: Box, size: tuple[int, int], turned: int) -> Box:
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


def _ends_early(data: bytes) -> bool:
    """Whether the end mark of the common formats is missing, which tells a broken-off copy from damage elsewhere."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-4096:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-4096:]
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b";")
    if data.startswith(b"RIFF"):
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    if data.startswith(b"BM"):
        return len(data) < int.from_bytes(data[2:6], "little")
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return tiff_end(data) > len(data)
    return False


def _turn(image: Image.Image, inside: Contents) -> int:
    """EXIF orientation 1..8 before the pixels are loaded; 1 when there is none or it cannot be read."""
    if inside.kind == "TIFF":
        value = image.tag_v2.get(ORIENTATION, 1)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    exif, xmp = inside.exif, inside.xmp
    if inside.kind in ("WEBP", "AVIF"):
        exif, xmp = image.info.get("exif", b""), image.info.get("xmp", b"")
    return orientation(exif, xmp)


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) before orientation; for TIFF some Pillows report it turned already."""
    if image.format == "TIFF" and WIDTH in image.tag_v2 and HEIGHT in image.tag_v2:
        return int(image.tag_v2[HEIGHT]), int(image.tag_v2[WIDTH])
    return image.height, image.width


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _is_deep(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":
        return data[24:25] == b"\x10"  # bit depth in IHDR; Pillow hands 16-bit colour over as 8-bit
    if image.format == "TIFF":
        bits = image.tag_v2.get(BITS, 8)
        return max(bits if isinstance(bits, tuple) else (bits,)) > 8
    return _needs_scaling(image)


def _needs_scaling(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _converter(
    image: Image.Image, boxes: Callable[[], Iterator[tuple[Box, Box]]]
) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB in sRGB of any part of a loaded image, transparency laid over white."""
    grey = _deep_grey(image, boxes) if _needs_scaling(image) else lambda part: part
    mode = grey(image.crop((0, 0, 1, 1))).mode
    clear = mode in ("LA", "RGBA") or (not _needs_scaling(image) and _has_alpha(image))
    profile = image.info.get("icc_profile")
    profile = profile if profile and len(profile) <= MOST_PROFILE else None
    plain = "CMYK" if mode == "CMYK" else "L" if mode == "L" and profile and not clear else "RGB"
    transform = _transform(profile, plain)

    def coloured(part: Image.Image) -> Image.Image:
        if transform is None:
            return part if part.mode == "RGB" else part.convert("RGB")
        from PIL import ImageCms

        return ImageCms.applyTransform(part if part.mode == plain else part.convert(plain), transform)

    def convert(part: Image.Image) -> Image.Image:
        part = grey(part)
        if not clear:
            return coloured(part)
        part = part.convert("RGBA")
        if transform is not None:
            rgb = coloured(part.convert("RGB"))
            rgb.putalpha(part.getchannel("A"))
            part = rgb
        return Image.alpha_composite(Image.new("RGBA", part.size, (255, 255, 255, 255)), part).convert("RGB")

    return convert


def _deep_grey(
    image: Image.Image, boxes: Callable[[], Iterator[tuple[Box, Box]]]
) -> Callable[[Image.Image], Image.Image]:
    """What makes L of grey of more than 8 bits, or LA where one value is transparent; Pillow itself would cut at 255.

    16-bit files use their whole range. 32-bit integers and floats do not say their range: it is taken as the smallest
    of 1 (floats only), 255, 65535 and 2^32 - 1 that holds the brightest pixel. Floats may reach twice as far, since
    interpolation leaves some a little above, and are cut there.
    """
    top = 65535.0
    if not (image.mode.startswith("I;16") or image.format == "PNG"):
        brightest = -np.inf
        for _, box in boxes():
            values = np.asarray(image.crop(box))
            if not np.isfinite(values).all():
                raise BadImage("corrupt", "holds pixels that are NaN or infinite")
            brightest = max(brightest, float(values.max()))
        ranges, beyond = (255.0, 65535.0, 2.0**32 - 1), 1.0
        if image.mode == "F":
            ranges, beyond = (1.0, *ranges), OVERSHOOT
        top = next((one for one in ranges if brightest <= beyond * one), ranges[-1])
    clear = image.info.get("transparency")

    def scaled(part: Image.Image) -> Image.Image:
        values = np.asarray(part).astype(np.float64)
        grey = Image.fromarray(np.rint(values.clip(0.0, top) * (255.0 / top)).astype(np.uint8))
        if isinstance(clear, int):
            grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        return grey

    return scaled


def _transform(profile: bytes | None, mode: str) -> object | None:
    """From an embedded profile to sRGB for pixels of `mode`; None where that is not needed or not possible."""
    if not profile:
        return None
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # a damaged or unfitting profile, or a Pillow without littlecms: the numbers as they are
        return None
