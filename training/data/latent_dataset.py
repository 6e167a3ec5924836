"""The images of a run as latents: each usable one encoded once, cached, and drawn from with the caller's randomness."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from ...guidance.errors import Problem
from .buckets import Size, assign, bucket_sizes, removed
from .content_index import ContentIndex, Known
from .images import BadImage, DataProblem, cover, crop_to, decoded, probe, to_tensor
from .latent_cache import LatentCache, default_cache_folder, log_warning
from .parallel import in_order
from .remarks import MUCH, remarks
from .sources import Entry, content, image_entries, nothing_found, search
from .walking import Cancelled, Watch

if TYPE_CHECKING:
    from ..domain.config import TrainConfig
    from ..prior.prior import Prior

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
INDEX = "content-index.jsonl"  # in the cache folder
POSTERIORS = ("sample", "mean")
MOST_MEMORY = 8 * 2**30  # bytes of latents kept in memory, or a quarter of the machine's, whichever is less
MOST_WAITING = 2**29  # bytes of pixels that wait to be encoded, unless a single image has more
LOOKS = 64  # files between two looks at should_stop while reading
BATCH_AREA = 512 * 512  # pixels of an image up to which a whole batch is encoded at once


class CachingStopped(Cancelled):
    """Somebody asked to stop while images were encoded; what is done stays in the cache."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"Stopped after {done} of {total} images were encoded; they stay in the cache.")
        self.done, self.total = done, total


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


@dataclass(frozen=True)
class _Picture:
    """One encoded variant of an image: what to cut out, and its name in the cache."""

    key: str
    crop: tuple[int, int]
    flipped: bool


@dataclass(frozen=True)
class _Record:
    entry: Entry
    content: str
    original: Size
    size: Size
    pictures: tuple[_Picture, ...]  # crops x (plain, flipped), crops first


@dataclass
class _Store:
    """Encoded pictures by key: in memory as far as they fit, else in the cache, else encoded again."""

    cache: LatentCache
    encode: Encode
    with_std: bool
    room: int
    warn: Callable[[str], None]
    held: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    warned: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, key: str, mean: Tensor, std: Tensor) -> None:
        if key in self.held:
            return
        kept = (mean, std if self.with_std else None)
        size = sum(one.numel() * one.element_size() for one in kept if one is not None)
        if size > self.room:
            self.room = 0  # from here on the cache is read when something is drawn
            return
        self.room -= size
        self.held[key] = kept

    def get(self, record: _Record, picture: _Picture) -> tuple[Tensor, Tensor | None]:
        held = self.held.get(picture.key)
        if held is not None:
            return held
        found = self.cache.get(picture.key)
        if found is not None:
            return found
        with self.lock:
            if not self.warned:
                name = record.entry.name
                self.warn(f"{name}: its cached latents are gone; such images are encoded again (said once).")
            self.warned = True
            try:
                ((_, pixels),) = _cut(record, [picture])
            except BadImage as error:
                raise DataProblem(f"{record.entry.name}: expected the image of before, which {error}.") from error
            mean, std = _encoded(self.encode, [pixels], record)
            return self.cache.put(picture.key, mean[0], std[0])


class LatentDataset:
    """A sequence of images as latents, in the order of their content hashes: independent of names and folders.

    The latents do not depend on what was cached before either, provided the VAE gives an image the same bits in any
    batch, or gets one image at a time (`prepare`'s batch 1, which `open_dataset` uses on the CPU). Made by
    `open_dataset` or `LatentDataset.prepare`. Drawing is a function of the index and the generator alone.

    skipped: (name, reason) of the images that could not be used; faults: how many for which kind of reason. upscaled:
    how many were enlarged. cropped: {name: share} of those that lose more than a third. notes: what `remarks` says of
    the files that they were found among. content_hash: SHA-256 over the images' content hashes.
    """

    def __init__(
        self,
        records: Sequence[_Record],
        store: _Store,
        posterior: str,
        skipped: Sequence[tuple[str, str]] = (),
        faults: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._records, self._store, self._posterior = list(records), store, posterior
        self.skipped, self.faults, self.notes = list(skipped), Counter(faults), []
        lost = {record.entry.name: removed(*record.original, record.size) for record in self._records}
        self.cropped = {name: share for name, share in lost.items() if share > MUCH}
        self.upscaled = sum(cover(r.original, r.size)[0] > r.original[0] for r in self._records)
        self.groups: dict[Size, list[int]] = {}
        for index, record in enumerate(self._records):
            self.groups.setdefault(record.size, []).append(index)
        self.groups = dict(sorted(self.groups.items()))
        self.content_hash = hashlib.sha256("\n".join(r.content for r in self._records).encode()).hexdigest()

    @classmethod
    def prepare(
        cls,
        entries: Sequence[Entry],
        encode: Encode,
        cache: LatentCache,
        *,
        sizes: Sequence[Size],
        flip: bool = False,
        random_crops: int = 0,
        posterior: str = "sample",
        batch: int = 8,
        min_side: int = 0,
        progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        warn: Callable[[str], None] | None = None,
        turn: int = 0,
        turns: int = 1,
        memory_limit: int | None = None,
        workers: int | None = None,
    ) -> LatentDataset:
        """Read all entries, leave out what cannot be used, and encode what the cache lacks.

        encode: images [B, 3, H, W] in -1..1 -> (mean, std) of their scaled latents, [B, C, h, w] each. sizes: shapes to
        choose from (`bucket_sizes`). flip: draw every image mirrored half of the time. random_crops: 0 the centre; k: k
        cuts per image whose places follow from its content. posterior: "sample" or "mean". batch: images of up to 512 x
        512 pixels that the encoder gets at once; of larger ones fewer. min_side: images with a shorter side are skipped
        (0: none). progress(done, total) counts images, those found in the cache included. turn of turns: processes that
        prepare the same images at once begin at different places and take over what the others have done. memory_limit:
        bytes of latents to keep in memory (None: a quarter of the machine's, at most 8 GiB); the rest is read from the
        cache when drawn.

        Raises DataProblem when nothing can be used, CachingStopped when should_stop said so, FileProblem for a cache
        that cannot be written.
        """
        if posterior not in POSTERIORS:
            raise Problem(f"posterior: expected one of {', '.join(POSTERIORS)}, found {posterior!r}.")
        progress, should_stop = progress or (lambda done, total: None), should_stop or (lambda: False)
        warn = warn or log_warning
        # Latents made in inference mode (ComfyUI's nodes run in it) could not be trained on.
        with torch.inference_mode(False), torch.no_grad():
            records, skipped, faults = _read_all(
                entries, cache, sizes, flip, random_crops, min_side, progress, should_stop, workers
            )
            limit = _memory_limit() if memory_limit is None else memory_limit
            store = _Store(cache, encode, posterior == "sample", limit, warn)
            filling = _Filling(records, store, batch, progress, should_stop, workers)
            bad = filling.run(turn, turns)
        for record in records:
            if record.content in bad:
                skipped.append((record.entry.name, str(bad[record.content])))
                faults[bad[record.content].kind] += 1
        usable = [record for record in records if record.content not in bad]
        skipped.sort()
        if not usable:
            raise DataProblem(_nothing_usable(len(entries), skipped))
        return cls(usable, store, posterior, skipped, faults)

    def __len__(self) -> int:
        return len(self._records)

    def draw(self, index: int, generator: Generator) -> Sample:
        """One sample of image `index`: crop, flip and posterior noise from `generator` (on the CPU)."""
        record = self._records[index]
        choice = 0
        if len(record.pictures) > 1:
            choice = int(torch.randint(len(record.pictures), (), generator=generator))
        picture = record.pictures[choice]
        mean, std = self._store.get(record, picture)
        if self._posterior == "sample":
            latent = mean + std * torch.randn(mean.shape, generator=generator)
        else:
            latent = mean.clone()
        top, left = picture.crop
        if picture.flipped:
            left = cover(record.original, record.size)[1] - record.size[1] - left
        return Sample(latent, record.original, record.size, (top, left))

    def latent(self, index: int, generator: Generator) -> Tensor:
        """The latent [C, h, w] of `draw`."""
        return self.draw(index, generator).latent

    def mean(self, index: int) -> Tensor:
        """Posterior mean [C, h, w] of image `index`, first crop, not flipped: the same at every call."""
        record = self._records[index]
        return self._store.get(record, record.pictures[0])[0].clone()

    def size_of(self, index: int) -> tuple[Size, tuple[int, int]]:
        """((height, width) of the original image, (top, left) of its first crop) of image `index`."""
        return self._records[index].original, self._records[index].pictures[0].crop

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
        parts = ([r for r in self._records if (r.content in held) is wanted] for wanted in (False, True))
        train, held_out = (
            LatentDataset(part, self._store, self._posterior, self.skipped, self.faults) for part in parts
        )
        return train, held_out


def open_dataset(
    config: TrainConfig, base: Prior, images: Tensor | Sequence[Tensor] | None = None, **callbacks: Any
) -> LatentDataset:
    """The dataset a configuration describes, encoded by `base`'s autoencoder.

    images: IMAGE tensors in 0..1 to train on as well as, or instead of, config.data. callbacks: progress, should_stop,
    warn, turn, turns, memory_limit and workers of `LatentDataset.prepare`. warn also hears of folders and shards that
    cannot be read to their end; what else is worth saying is in the dataset's notes. Raises what `prepare` does, and
    DataProblem when there is no image at all.

    An autoencoder on the CPU gets one image at a time, so that a latent depends on its image alone. On other devices it
    gets config.caching_batch, of large ones fewer, where the last bits depend on the company; their latents are cached
    apart.
    """
    entries: list[Entry] = [] if images is None else list(image_entries(images))
    ignored: Counter[str] = Counter()
    warn = callbacks.get("warn") or log_warning
    if config.data or not entries:
        try:
            found = search(config.data, Watch(callbacks.get("should_stop"), config.within or None))
        except Cancelled:
            raise CachingStopped(0, 0) from None
        if not found.entries:
            raise DataProblem(nothing_found(config.data, found))
        entries += found.entries
        ignored = found.ignored
        if found.skipped:
            named = "; ".join(f"{name} {reason}" for name, reason in found.skipped[:3])
            more = f"; and {len(found.skipped) - 3} more" if len(found.skipped) > 3 else ""
            warn(f"{len(found.skipped)} folders, shards or links could not be read to their end: {named}{more}.")
    square = [(config.resolution, config.resolution)]
    sizes = bucket_sizes(config.resolution, config.bucket_step, config.bucket_max_ratio) if config.buckets else square
    device = next(base.autoencoder.parameters()).device.type
    alone = device == "cpu"
    vae_id = base.vae_id if alone else f"{base.vae_id} on {device}"
    dataset = LatentDataset.prepare(
        entries,
        base.encode,
        LatentCache(config.cache or default_cache_folder(), vae_id, warn=warn),
        sizes=sizes,
        flip=config.flip,
        random_crops=config.random_crops,
        posterior=config.posterior,
        batch=1 if alone else config.caching_batch,
        min_side=config.min_side,
        **callbacks,
    )
    dataset.notes = remarks(ignored, dataset.cropped, len(dataset))
    return dataset


# ------------------------------------------------------------------------------------------------------------- reading


def _read_all(
    entries: Sequence[Entry],
    cache: LatentCache,
    sizes: Sequence[Size],
    flip: bool,
    random_crops: int,
    min_side: int,
    progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
    workers: int | None,
) -> tuple[list[_Record], list[tuple[str, str]], Counter[str]]:
    """Records of the images whose header can be read, sorted by content; (name, reason) of the others; their kinds."""
    index = ContentIndex(cache.root / INDEX)

    def look(entry: Entry) -> tuple[Entry, Known | BadImage, tuple[str, int, int, int] | None]:
        known = index.look_up(entry)
        if known is not None:
            return entry, known, None
        stamp = entry.stamp()
        try:
            with content(entry) as data:
                facts = probe(data)
                return entry, Known(hashlib.sha256(data).hexdigest(), facts.height, facts.width), stamp
        except BadImage as error:
            return entry, error, None

    records, skipped, faults = [], [], Counter()
    with _stops(0, len(entries)), closing(in_order(look, entries, workers, should_stop)) as results, closing(index):
        for number, (entry, known, stamp) in enumerate(results):
            if number % LOOKS == 0:
                if should_stop():
                    raise CachingStopped(0, len(entries))
                progress(0, len(entries))
            if isinstance(known, BadImage):
                skipped.append((entry.name, str(known)))
                faults[known.kind] += 1
                continue
            index.add(stamp, known)
            if min(known.height, known.width) < min_side:
                reason = f"has {known.width} x {known.height} pixels, less than min_side {min_side}"
                skipped.append((entry.name, reason))
                faults["too small"] += 1
                continue
            records.append(_record(entry, known, cache, sizes, flip, random_crops))
    return sorted(records, key=lambda record: (record.content, record.entry.name)), skipped, faults


@contextmanager
def _stops(done: int, total: int) -> Iterator[None]:
    """Say how far it was when somebody asked to stop while a thread was at work."""
    try:
        yield
    except CachingStopped:
        raise
    except Cancelled:
        raise CachingStopped(done, total) from None


def _record(
    entry: Entry, known: Known, cache: LatentCache, sizes: Sequence[Size], flip: bool, random_crops: int
) -> _Record:
    original = (known.height, known.width)
    size = assign(*original, sizes)
    pictures = tuple(
        _Picture(cache.key(known.content, size, crop, flipped), crop, flipped)
        for crop in _crops(known.content, original, size, random_crops)
        for flipped in ((False, True) if flip else (False,))
    )
    return _Record(entry, known.content, original, size, pictures)


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


def _place_of(content: str) -> float:
    """A number in [0, 1) that follows from an image's content and from nothing else."""
    return int.from_bytes(hashlib.sha256(f"held out {content}".encode()).digest()[:6], "big") / 2.0**48


def _nothing_usable(count: int, skipped: Sequence[tuple[str, str]]) -> str:
    if not skipped:
        return "Expected images to train on, found none; name a folder with images or connect an IMAGE batch."
    name, reason = skipped[0]
    return (
        f"Expected images to train on, found none usable among {count}, the first: {name} {reason}; check-data lists "
        "all."
    )


# ------------------------------------------------------------------------------------------------------------ encoding


def at_once_of(batch: int, size: Size) -> int:
    """How many pictures of a size the encoder gets at once, so that large ones take no more memory than usual ones."""
    return max(1, min(batch, batch * BATCH_AREA // (size[0] * size[1])))


def _cut(record: _Record, pictures: Sequence[_Picture]) -> list[tuple[_Picture, Tensor]]:
    """The pictures of one image as tensors [3, H, W], decoded once. Raises BadImage."""
    with content(record.entry) as data:
        if hashlib.sha256(data).hexdigest() != record.content:
            raise BadImage(
                "corrupt",
                f"changed while it was being read, or {INDEX} in the cache folder is wrong about it; start again, in "
                "the second case without that file",
            )
        with decoded(data, at_least=cover(record.original, record.size)) as image:
            return [
                (picture, to_tensor(crop_to(image, record.original, record.size, picture.crop, picture.flipped)))
                for picture in pictures
            ]


def _encoded(encode: Encode, pixels: Sequence[Tensor], record: _Record) -> tuple[Tensor, Tensor]:
    """(mean, std) fp32 on the CPU of a batch of pictures; latents that are not finite are an error."""
    with torch.inference_mode(False), torch.no_grad():
        mean, std = (one.detach().to("cpu", torch.float32) for one in encode(torch.stack(list(pixels))))
        # A VAE that was loaded in inference mode gives tensors that only a copy takes out of it.
        mean, std = (one.clone() if one.is_inference() else one for one in (mean, std))
    if not bool(mean.isfinite().all() and std.isfinite().all()):
        raise DataProblem(
            f"{record.entry.name}: expected finite latents of it and its batch, found NaN or infinity from the VAE; "
            "run the VAE in float32 or use another one."
        )
    return mean, std


@dataclass
class _Filling:
    """Bringing every picture of the records into memory or cache."""

    records: Sequence[_Record]
    store: _Store
    batch: int
    progress: Callable[[int, int], None]
    should_stop: Callable[[], bool]
    workers: int | None

    def run(self, turn: int, turns: int) -> dict[str, BadImage]:
        """{content: what is wrong} of the images whose pixels turned out to be bad."""
        self.total, self.bad = len(self.records), {}
        self.owners: dict[str, list[_Record]] = defaultdict(list)  # copies of one image are encoded once
        for record in self.records:
            self.owners[record.content].append(record)
        self.lacking: dict[str, set[str]] = {}
        jobs = self._load()
        self.done = self.total - sum(len(self.owners[record.content]) for record, _ in jobs)
        self.progress(self.done, self.total)
        # Whole batches of one shape, beginning where no other process does.
        jobs.sort(key=lambda job: (job[0].size, job[0].content))
        start = len(jobs) * turn // max(turns, 1)
        pending: dict[Size, list[tuple[_Record, _Picture, Tensor]]] = defaultdict(list)
        jobs = jobs[start:] + jobs[:start]
        largest = max((len(lacking) * record.size[0] * record.size[1] for record, lacking in jobs), default=1)
        ahead = MOST_WAITING // (3 * 4 * largest)
        made = in_order(self._make, jobs, self.workers, self.should_stop, ahead)
        with _stops(self.done, self.total), closing(made) as results:
            for record, made in results:
                if self.should_stop():
                    raise CachingStopped(self.done, self.total)
                if isinstance(made, BadImage):
                    self._skip(record, made)
                    continue
                waiting = pending[record.size]
                for picture, pixels, stored in made:
                    if stored is not None:
                        self._finish(record, picture, *stored)
                    else:
                        waiting.append((record, picture, pixels))
                at_once = at_once_of(self.batch, record.size)
                while len(waiting) >= at_once:
                    self._encode(waiting[:at_once])
                    del waiting[:at_once]
        for waiting in pending.values():
            if waiting:
                if self.should_stop():
                    raise CachingStopped(self.done, self.total)
                self._encode(waiting)
        return self.bad

    def _load(self) -> list[tuple[_Record, list[_Picture]]]:
        """Read what the cache has; (record, pictures) of what it lacks."""

        def look(record: _Record) -> tuple[_Record, list[_Picture]]:
            lacking = []
            for picture in record.pictures:
                if self.store.room <= 0:  # no use in reading what cannot be kept
                    found = self.store.cache.has(picture.key)
                else:
                    stored = self.store.cache.get(picture.key)
                    found = stored is not None
                    if stored is not None:
                        with self.store.lock:
                            self.store.keep(picture.key, *stored)
                if not found:
                    lacking.append(picture)
            return record, lacking

        jobs = []
        distinct = [owners[0] for owners in self.owners.values()]
        with _stops(0, self.total), closing(in_order(look, distinct, self.workers, self.should_stop)) as results:
            for number, (record, lacking) in enumerate(results):
                if number % LOOKS == 0 and self.should_stop():
                    raise CachingStopped(number, self.total)
                if lacking:
                    # By key: two crops of one image may lie in the same place.
                    by_key = {picture.key: picture for picture in lacking}
                    self.lacking[record.content] = set(by_key)
                    jobs.append((record, list(by_key.values())))
        return jobs

    def _make(
        self, job: tuple[_Record, list[_Picture]]
    ) -> tuple[_Record, BadImage | list[tuple[_Picture, Tensor | None, tuple[Tensor, Tensor] | None]]]:
        """(record, [(picture, pixels, None) or (picture, None, what another process stored meanwhile)])."""
        record, pictures = job
        stored = {picture.key: self.store.cache.get(picture.key) for picture in pictures}
        lacking = [picture for picture in pictures if stored[picture.key] is None]
        try:
            # What another process has encoded need not be read: an error now would leave it out here alone.
            cut = _cut(record, lacking) if lacking else []
        except BadImage as error:
            return record, error
        done = [(picture, None, stored[picture.key]) for picture in pictures if stored[picture.key] is not None]
        return record, done + [(picture, pixels, None) for picture, pixels in cut]

    def _encode(self, jobs: Sequence[tuple[_Record, _Picture, Tensor]]) -> None:
        means, stds = _encoded(self.store.encode, [pixels for _, _, pixels in jobs], jobs[0][0])
        for (record, picture, _), mean, std in zip(jobs, means, stds):
            self._finish(record, picture, *self.store.cache.put(picture.key, mean, std))
        self.progress(self.done, self.total)

    def _finish(self, record: _Record, picture: _Picture, mean: Tensor, std: Tensor) -> None:
        self.store.keep(picture.key, mean, std)
        lacking = self.lacking[record.content]
        lacking.discard(picture.key)
        if not lacking:
            self.done += len(self.owners[record.content])

    def _skip(self, record: _Record, error: BadImage) -> None:
        self.bad[record.content] = error
        self.total -= len(self.owners[record.content])
        self.progress(self.done, self.total)


def _memory_limit() -> int:
    """Bytes of latents to keep in memory: a quarter of the machine's, at most MOST_MEMORY."""
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        installed = _windows_memory()
    return min(MOST_MEMORY, installed // 4)


def _windows_memory() -> int:
    import ctypes

    kilobytes = ctypes.c_ulonglong(8 * 2**20)  # stays 8 GiB where the system does not say
    with suppress(AttributeError, OSError):
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
    return kilobytes.value * 1024
