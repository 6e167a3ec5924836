"""Image files as 8-bit sRGB pictures, and pictures as tensors: every kind of file that folders of images really hold.

What is done to a file, in this order: first frame of an animation; 16-bit, 32-bit and floating-point grey scaled to 8
bits; an embedded colour profile applied (CMYK included) so that all pictures are sRGB; EXIF orientation; transparency
laid over white. Nothing is guessed about a damaged file: it is refused with the reason.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from ...guidance.errors import Problem

# Larger pictures are refused before they are decoded; Pillow's own limit, which other code may have switched off.
MOST_PIXELS = 178_956_970
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION, WIDTH, HEIGHT, BITS = 274, 256, 257, 258  # TIFF and EXIF tags
STRIPS, STRIP_BYTES, TILES, TILE_BYTES = 273, 279, 324, 325
OVERSHOOT = 2.0  # times its range that a floating-point picture may reach
PNG_WITH_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


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
    frames: int


def probe(data: bytes) -> ImageFacts:
    """Facts of an image file's content without decoding its pixels. Raises BadImage when it is none."""
    with _named_faults(data), _strictly(), _opened(data) as image:
        orientation, (height, width) = _orientation(image, data), _stored_size(image)
        if orientation >= 5:
            height, width = width, height
        return ImageFacts(
            height=height,
            width=width,
            format=str(image.format),
            mode=image.mode,
            rotated=orientation != 1,
            alpha=_has_alpha(image),
            sixteen_bit=_is_deep(image, data),
            cmyk=image.mode == "CMYK",
            frames=int(getattr(image, "n_frames", 1)),
        )


def decode(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The picture in an image file's content, mode RGB.

    at_least: (height, width) that will be needed after orientation; large JPEGs are then decoded at 1/2, 1/4 or 1/8,
    never below twice that size, which saves most of the time. Raises BadImage for files that are damaged or too large.
    """
    with _named_faults(data), _strictly(), _opened(data) as image:
        orientation = _orientation(image, data)
        if at_least is not None and image.format == "JPEG":
            height, width = at_least if orientation < 5 else at_least[::-1]
            image.draft(image.mode, (2 * width, 2 * height))
        image.load()
        if image.format == "TIFF":
            orientation = 1  # Pillow turns these while it loads them
        picture = _to_srgb(image, _deep_grey(image) if _needs_scaling(image) else image)
        if orientation in TURNS:
            picture = picture.transpose(TURNS[orientation])
        return _over_white(picture)


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
    except Exception as error:
        if not data:
            raise BadImage("empty", "is an empty file") from error
        if _ends_early(data) or "truncated" in str(error) or isinstance(error, EOFError):
            raise BadImage("truncated", "ends before the picture is complete; copy or download it again") from error
        if isinstance(error, Image.UnidentifiedImageError):
            raise BadImage("corrupt", "is not an image of a known kind, or its header is damaged") from error
        text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadImage("corrupt", f"is damaged ({text})") from error


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > MOST_PIXELS:
            shape = f"{image.width} x {image.height}"
            raise BadImage("too large", f"has {shape} pixels, more than {MOST_PIXELS}; scale it down")
        if image.width * image.height == 0:
            raise BadImage("corrupt", f"has no pixels ({image.width} x {image.height})")
        yield image


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
    if data.startswith((b"II*\0", b"MM\0*")):
        return _tiff_end(data) > len(data)
    return False


def _tiff_end(data: bytes) -> int:
    """How long a TIFF file must be for its directory and strips or tiles; 0 when they cannot be read."""
    directory = int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big")
    if directory + 2 > len(data):
        return directory + 2
    try:
        with Image.open(io.BytesIO(data)) as image:
            tags = image.tag_v2
            starts = tags.get(STRIPS) or tags.get(TILES) or ()
            lengths = tags.get(STRIP_BYTES) or tags.get(TILE_BYTES) or ()
            return max((start + length for start, length in zip(starts, lengths)), default=0)
    except Exception:  # it was damaged to begin with
        return 0


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation 1..8 before the pixels are loaded; 1 when there is none or it cannot be read."""
    value: object = 1
    if image.format == "TIFF":
        value = image.tag_v2.get(ORIENTATION, 1)
    elif image.format != "PNG" or any(mark in data for mark in PNG_WITH_ORIENTATION):
        with suppress(Exception):  # a damaged EXIF block is no reason to lose the picture
            value = image.getexif().get(ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


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


def _deep_grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits -> L, or LA where one value is transparent; Pillow itself would cut at 255.

    16-bit files use their whole range. 32-bit integers and floats do not say their range: it is taken as the smallest
    of 1 (floats only), 255, 65535 and 2^32 - 1 that holds the brightest pixel. Floats may reach twice as far, since
    interpolation leaves some a little above, and are cut there.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadImage("corrupt", "holds pixels that are NaN or infinite")
    is_16_bit = image.mode.startswith("I;16") or image.format == "PNG"
    ranges = (65535.0,) if is_16_bit else (255.0, 65535.0, 2.0**32 - 1)
    brightest = float(values.max())
    ranges, beyond = ((1.0, *ranges), OVERSHOOT) if image.mode == "F" else (ranges, 1.0)
    top = next((top for top in ranges if brightest <= beyond * top), ranges[-1])
    grey = Image.fromarray(np.rint(values.clip(0.0, top) * (255.0 / top)).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, picture: Image.Image) -> Image.Image:
    """RGB or RGBA in sRGB. picture: the image, its numbers scaled to 8 bits; the profile is the image's."""
    profile = image.info.get("icc_profile")
    if picture.mode == "CMYK":
        return _by_profile(picture, profile) or picture.convert("RGB")
    if not _has_alpha(picture):
        picture = picture.convert("RGB") if picture.mode != "L" or not profile else picture
        return _by_profile(picture, profile) or picture.convert("RGB")
    picture = picture.convert("RGBA")
    coloured = _by_profile(picture.convert("RGB"), profile)
    if coloured is not None:
        coloured.putalpha(picture.getchannel("A"))
    return coloured or picture


def _by_profile(picture: Image.Image, profile: bytes | None) -> Image.Image | None:
    """The picture converted from its embedded profile to sRGB; None where that is not needed or not possible."""
    if not profile:
        return None
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if picture.mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception:  # a damaged or unfitting profile, or a Pillow without littlecms: the numbers as they are
        return None


def _over_white(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")
