"""What to cut out of one image, and the names of the cuts in the cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor

from .buckets import Size, assign, cover
from .content_index import INDEX, Known
from .images import crop_to, decoded, to_tensor
from .latent_cache import LatentCache
from .problems import BadImage
from .settings import DataSettings
from .sources import Entry, content


@dataclass(frozen=True)
class Cut:
    """One part of an image that is encoded: (top, left) in the scaled image, mirrored or not, and its cache key."""

    key: str
    crop: tuple[int, int]
    flipped: bool


@dataclass(frozen=True)
class ImageRecord:
    """One usable image. content: SHA-256 of its file; original, size: (height, width) in pixels of it and its cuts."""

    entry: Entry
    content: str
    original: Size
    size: Size
    cuts: tuple[Cut, ...]  # crops x (plain, flipped), crops first

    def read(self, cuts: list[Cut]) -> list[tuple[Cut, Tensor]]:
        """The cuts as tensors [3, H, W] in -1..1, the image decoded once. Raises BadImage."""
        with content(self.entry) as data:
            if hashlib.sha256(data).hexdigest() != self.content:
                raise BadImage(
                    "corrupt",
                    f"changed while it was being read, or {INDEX} in the cache folder is wrong about it; start again, "
                    "in the second case without that file",
                )
            with decoded(data, at_least=cover(self.original, self.size)) as image:
                return [
                    (cut, to_tensor(crop_to(image, self.original, self.size, cut.crop, cut.flipped))) for cut in cuts
                ]


def record_of(entry: Entry, known: Known, cache: LatentCache, settings: DataSettings) -> ImageRecord:
    """The shape nearest to the image's and its cuts, which follow from its content alone."""
    original = (known.height, known.width)
    size = assign(*original, settings.sizes)
    cuts = tuple(
        Cut(cache.key(known.content, size, crop, flipped), crop, flipped)
        for crop in _crops(known.content, original, size, settings.random_crops)
        for flipped in ((False, True) if settings.flip else (False,))
    )
    return ImageRecord(entry, known.content, original, size, cuts)


def _crops(content: str, original: Size, size: Size, count: int) -> list[tuple[int, int]]:
    """The centre (count 0), or `count` places uniform over the scaled image that follow from its content."""
    scaled = cover(original, size)
    spare = scaled[0] - size[0], scaled[1] - size[1]
    if count == 0:
        return [(spare[0] // 2, spare[1] // 2)]
    places = []
    for number in range(count):
        digest = hashlib.sha256(f"crop {number} {content}".encode()).digest()
        top, left = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
        places.append((top % (spare[0] + 1), left % (spare[1] + 1)))
    # An image of just the right shape has one place only; equal ones would be drawn, cached and counted twice.
    return places if len(set(places)) > 1 else places[:1]
