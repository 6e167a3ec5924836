"""Loaded pictures of every mode as 8-bit sRGB, transparency laid over white."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

from .problems import BadImage

Box = tuple[int, int, int, int]  # left, top, right, bottom
Convert = Callable[[Image.Image], Image.Image]
MOST_PROFILE = 4 * 2**20  # bytes of a colour profile that is looked at
OVERSHOOT = 2.0  # times its range that a floating-point picture may reach


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def is_deep_grey(image: Image.Image) -> bool:
    """Whether Pillow keeps more than 8 bits of it: grey of 16 or 32 bits, or floats."""
    return image.mode.startswith("I") or image.mode == "F"


def converter(image: Image.Image, boxes: Iterable[Box]) -> Convert:
    """What makes RGB in sRGB of any part of a loaded image, transparency laid over white.

    boxes: parts that cover the image and can be looked at one after the other. Raises BadImage for pixels that are no
    numbers.
    """
    grey = _deep_grey(image, boxes) if is_deep_grey(image) else lambda part: part
    mode = grey(image.crop((0, 0, 1, 1))).mode
    clear = mode in ("LA", "RGBA") or (not is_deep_grey(image) and has_alpha(image))
    profile = image.info.get("icc_profile")
    profile = profile if profile and len(profile) <= MOST_PROFILE else None
    plain = "CMYK" if mode == "CMYK" else "L" if mode == "L" and profile and not clear else "RGB"
    to_srgb = _profile_transform(profile, plain) or (lambda part: part.convert("RGB"))

    def coloured(part: Image.Image) -> Image.Image:
        return to_srgb(part if part.mode == plain else part.convert(plain))

    def convert(part: Image.Image) -> Image.Image:
        part = grey(part)
        if not clear:
            return coloured(part)
        part = part.convert("RGBA")
        rgb = coloured(part.convert("RGB"))
        rgb.putalpha(part.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", part.size, (255, 255, 255, 255)), rgb).convert("RGB")

    return convert


def _deep_grey(image: Image.Image, boxes: Iterable[Box]) -> Convert:
    """What makes L of grey of more than 8 bits, or LA where one value is transparent; Pillow itself would cut at 255.

    16-bit files use their whole range. 32-bit integers and floats do not say their range: it is taken as the smallest
    of 1 (floats only), 255, 65535 and 2^32 - 1 that holds the brightest pixel. Floats may reach twice as far, since
    interpolation leaves some a little above, and are cut there.
    """
    top = 65535.0
    if not (image.mode.startswith("I;16") or image.format == "PNG"):
        brightest = -np.inf
        for box in boxes:
            values = np.asarray(image.crop(box))
            if not np.isfinite(values).all():
                raise BadImage("corrupt", "holds pixels that are NaN or infinite")
            brightest = max(brightest, float(values.max()))
        ranges, beyond = (255.0, 65535.0, 2.0**32 - 1), 1.0
        if image.mode == "F":
            ranges, beyond = (1.0, *ranges), OVERSHOOT
        top = next((most for most in ranges if brightest <= beyond * most), ranges[-1])
    clear = image.info.get("transparency")

    def scaled(part: Image.Image) -> Image.Image:
        values = np.asarray(part).astype(np.float64)
        grey = Image.fromarray(np.rint(values.clip(0.0, top) * (255.0 / top)).astype(np.uint8))
        if isinstance(clear, int):
            grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        return grey

    return scaled


def _profile_transform(profile: bytes | None, mode: str) -> Convert | None:
    """From an embedded profile to sRGB for pixels of `mode`; None where that is not needed or not possible."""
    if not profile:
        return None
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # a damaged or unfitting profile, or a Pillow without littlecms: the numbers as they are
        return None

    def to_srgb(part: Image.Image) -> Image.Image:
        made = ImageCms.applyTransform(part, transform)
        assert made is not None  # it is None only when the part itself is changed
        return made

    return to_srgb
