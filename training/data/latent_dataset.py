"""The images of a run as latents, drawn from with the caller's randomness."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ...guidance.errors import Problem
from .buckets import Size, cover
from .latent_store import LatentStore
from .records import ImageRecord


@dataclass(frozen=True)
class Sample:
    """One drawn training sample.

    latent: [C, h, w] fp32, scaled. original, size: (height, width) in pixels of the image and of the encoded picture;
    crop: (top, left) of the cut in the scaled image, in the mirrored one where the sample is mirrored. The three are
    SDXL's size conditioning.
    """

    latent: Tensor
    original: Size
    size: Size
    crop: tuple[int, int]


class LatentDataset:
    """A sequence of images as latents, in the order of their content hashes: independent of names and folders.

    The latents do not depend on what was cached before either, provided the VAE gives an image the same bits in any
    batch, or gets one image at a time (as on the CPU). Made by `open_dataset`. Drawing is a function of the index and
    the generator alone.

    skipped: (name, reason) of the images that could not be used. notes: sentences about the images and the files that
    they were found among. groups: indices by shape. content_hash: SHA-256 over the images' content hashes.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        store: LatentStore,
        skipped: Sequence[tuple[str, str]] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self._records, self._store = list(records), store
        self.skipped, self.notes = list(skipped), list(notes)
        groups: dict[Size, list[int]] = {}
        for index, record in enumerate(self._records):
            groups.setdefault(record.size, []).append(index)
        self.groups = dict(sorted(groups.items()))
        self.content_hash = hashlib.sha256("\n".join(r.content for r in self._records).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def draw(self, index: int, generator: Generator) -> Sample:
        """One sample of image `index`: crop, flip and posterior noise from `generator` (on the CPU)."""
        record, choice = self._records[index], 0
        if len(record.cuts) > 1:
            choice = int(torch.randint(len(record.cuts), (), generator=generator))
        cut = record.cuts[choice]
        mean, std = self._store.get(record, cut)
        if self._store.with_std and std is not None:
            latent = mean + std * torch.randn(mean.shape, generator=generator)
        else:
            latent = mean.clone()
        top, left = cut.crop
        if cut.flipped:
            left = cover(record.original, record.size)[1] - record.size[1] - left
        return Sample(latent, record.original, record.size, (top, left))

    def mean(self, index: int) -> Tensor:
        """Posterior mean [C, h, w] of image `index`, first crop, not flipped: the same at every call."""
        record = self._records[index]
        return self._store.get(record, record.cuts[0])[0].clone()

    def size_of(self, index: int) -> tuple[Size, tuple[int, int]]:
        """((height, width) of the original image, (top, left) of its first crop) of image `index`."""
        return self._records[index].original, self._records[index].cuts[0].crop

    def name_of(self, index: int) -> str:
        """What to call image `index` in messages: its path below the folder, or shard!member."""
        return self._records[index].entry.name

    def content_of(self, index: int) -> str:
        """SHA-256 of the file of image `index`."""
        return self._records[index].content

    def split(self, share: float, most: int = 256) -> tuple[LatentDataset, LatentDataset]:
        """(training part, held-out part): views that share memory and cache.

        Which part an image is in follows from its content, so it stays there when images are added (short of `most`,
        where the images with the smallest hashes remain). About `share` of the images are held out, at least one of ten
        or more; share 0: none. Copies of one image are always together.
        """
        if not 0.0 <= share < 1.0:
            raise Problem(f"share: expected a number from 0 to below 1, found {share}.")
        places = {record.content: _place_of(record.content) for record in self._records}
        order = sorted(places, key=places.__getitem__)
        chosen = [content for content in order if places[content] < share]
        if share > 0.0 and not chosen and len(order) >= 10:
            chosen = order[:1]
        held = set(chosen[: max(most, 0)])
        if len(held) == len(places):
            held = set()  # the few images there are must be trained on
        learned, held_out = ([r for r in self._records if (r.content in held) is wanted] for wanted in (False, True))
        return LatentDataset(learned, self._store), LatentDataset(held_out, self._store)


def _place_of(content: str) -> float:
    """A number in [0, 1) that follows from an image's content and from nothing else."""
    return int.from_bytes(hashlib.sha256(f"held out {content}".encode()).digest()[:6], "big") / 2.0**48
