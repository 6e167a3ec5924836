"""Image files as 8-bit sRGB pictures, and pictures as tensors.

What is done to a file, in this order: first frame of an animation; 16-bit, 32-bit and floating-point grey scaled to 8
bits; an embedded colour profile applied (CMYK included) so that all pictures are sRGB; transparency laid over white;
EXIF orientation. Nothing is guessed about a damaged file: it is refused with the reason. Only the formats of
`containers.FORMATS` are opened, within the memory that `decoding` bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .buckets import Size, cover
from .colours import has_alpha
from .decoding import Decoding, opened, reading


@dataclass(frozen=True)
class ImageFacts:
    """What a file's header says; height and width in pixels after EXIF orientation."""

    height: int
    width: int
    format: str
    rotated: bool
    alpha: bool


def probe(data: bytes) -> ImageFacts:
    """Facts of an image file's content without decoding its pixels. Raises BadImage when it is none."""
    with reading(data):
        header = opened(data)
        image, (height, width) = header.image, header.size
        return ImageFacts(height, width, str(image.format), header.turned != 1, has_alpha(image))


def decode(data: bytes, at_least: Size | None = None) -> Image.Image:
    """The picture in an image file's content, mode RGB.

    at_least: (height, width) that will be needed after orientation; a larger picture is made smaller by a whole number
    while it is converted (a JPEG already while it is decoded), which saves most of the time and memory: never below
    twice that size, and never below it where there is not memory enough for that. Raises BadImage for files that are
    damaged or too large.
    """
    with decoded(data, at_least) as picture:
        return picture


@contextmanager
def decoded(data: bytes, at_least: Size | None = None) -> Iterator[Image.Image]:
    """The picture of `decode`, whose memory counts as used until the end of the block."""
    with ExitStack() as stack:
        with reading(data):
            picture = stack.enter_context(Decoding(data, at_least)).picture()
        yield picture


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> [3, H, W] fp32 in -1..1; 0 and 255 become -1 and 1 exactly."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def crop_to(
    image: Image.Image, original: Size, size: Size, crop: tuple[int, int], flipped: bool = False
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
