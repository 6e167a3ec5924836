"""Encoded cuts by key: in memory as far as they fit, else in the cache, else encoded again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..engine.memory import available_memory
from .buckets import Size
from .latent_cache import LatentCache
from .problems import BadImage, DataProblem
from .records import Cut, ImageRecord

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
MOST_MEMORY, UNKNOWN_MEMORY = 8 * 2**30, 2 * 2**30  # bytes of latents in memory; where nobody says what is free
BATCH_AREA = 512 * 512  # pixels of an image up to which a whole batch is encoded at once


@dataclass
class LatentStore:
    """encode: images [B, 3, H, W] in -1..1 -> (mean, std) of their scaled latents, [B, C, h, w] each.

    with_std: whether standard deviations are kept. room: bytes that are left in memory. keep is for one thread at a
    time, get for any.
    """

    cache: LatentCache
    encode: Encode
    with_std: bool
    room: int
    warn: Callable[[str], None]
    lock: threading.Lock = field(default_factory=threading.Lock)
    _held: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    _warned: bool = False

    def keep(self, key: str, mean: Tensor, std: Tensor) -> None:
        """Keep an encoded cut in memory if there is room."""
        if key in self._held:
            return
        kept = (mean, std if self.with_std else None)
        size = sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)
        if size > self.room:
            self.room = 0  # from here on the cache is read when something is drawn
            return
        self.room -= size
        self._held[key] = kept

    def get(self, record: ImageRecord, cut: Cut) -> tuple[Tensor, Tensor | None]:
        """(mean, std) of a cut, [C, h, w] each. Raises DataProblem where its image is needed again and not there."""
        found = self._held.get(cut.key) or self.cache.get(cut.key)
        if found is not None:
            return found
        with self.lock:
            name = record.entry.name
            if not self._warned:
                self.warn(f"{name}: its cached latents are gone; such images are encoded again (said once).")
            self._warned = True
            try:
                ((_, pixels),) = record.read([cut])
            except BadImage as error:
                raise DataProblem(f"{name}: expected the image of before, which {error}.") from error
            mean, std = self.encoded([pixels], record)
            return self.cache.put(cut.key, mean[0], std[0])

    def encoded(self, pixels: Sequence[Tensor], record: ImageRecord) -> tuple[Tensor, Tensor]:
        """(mean, std) fp32 on the CPU of a batch that begins with a cut of `record`. Raises DataProblem for NaN."""
        # What inference mode (ComfyUI's nodes run in it) makes could not be trained on; only a copy leaves it.
        with torch.inference_mode(False), torch.no_grad():
            mean, std = (made.detach().to("cpu", torch.float32) for made in self.encode(torch.stack(list(pixels))))
            mean, std = (made.clone() if made.is_inference() else made for made in (mean, std))
        if not bool(mean.isfinite().all() and std.isfinite().all()):
            raise DataProblem(
                f"{record.entry.name}: expected finite latents of it and its batch, found NaN or infinity from the "
                "VAE; run the VAE in float32 or use another one."
            )
        return mean, std


def at_once(batch: int, size: Size) -> int:
    """How many pictures of a size the encoder gets at once, so that large ones take no more memory than usual ones."""
    return max(1, min(batch, batch * BATCH_AREA // (size[0] * size[1])))


def default_room() -> int:
    """Bytes of latents to keep in memory: a quarter of what is free, at most MOST_MEMORY."""
    free = available_memory()
    return min(MOST_MEMORY, (4 * UNKNOWN_MEMORY if free is None else free) // 4)
