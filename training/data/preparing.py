"""From folders to a dataset: images are found, read, sorted into shapes and encoded once."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prior.prior import Prior
from .buckets import Size, cover, removed
from .content_index import INDEX, ContentIndex, Known
from .images import probe
from .latent_cache import LatentCache, default_cache_folder, log_warning
from .latent_dataset import LatentDataset
from .latent_store import Encode, LatentStore, at_once, default_room
from .parallel import in_order
from .problems import BadImage, CachingStopped, Cancelled, DataProblem
from .records import Cut, ImageRecord, record_of
from .remarks import MUCH, named_first, remarks, skipped_remark
from .settings import DataSettings
from .sources import Entry, content, image_entries, nothing_found, search
from .walking import Watch

MOST_WAITING = 2**29  # bytes of pixels that wait to be encoded, unless a single image has more

_Job = tuple[ImageRecord, Cut, Tensor, bool]  # a cut, its pixels [3, H, W], and whether it is the image's last


@dataclass(frozen=True)
class Callbacks:
    """progress(done, total) counts images, those found in the cache included; should_stop is asked all along.

    warn gets a sentence about what goes wrong and is mended.
    """

    progress: Callable[[int, int], None] = lambda done, total: None
    should_stop: Callable[[], bool] = lambda: False
    warn: Callable[[str], None] = log_warning


SILENT = Callbacks()


def open_dataset(
    settings: DataSettings,
    base: Prior,
    images: Tensor | Sequence[Tensor] | None = None,
    callbacks: Callbacks = SILENT,
    turn: int = 0,
    turns: int = 1,
    **limits: int,
) -> LatentDataset:
    """The dataset that the settings describe, encoded by `base`'s autoencoder.

    images: IMAGE tensors in 0..1 to train on as well as, or instead of, settings.data. turn of turns, limits: see
    `prepare`. callbacks.warn also hears of folders and shards that cannot be read to their end; what else is worth
    saying is in the dataset's notes. Raises what `prepare` does, and DataProblem when there is no image at all.

    An autoencoder on the CPU gets one image at a time, so that a latent depends on its image alone. On other devices it
    gets settings.caching_batch, of large ones fewer, where the last bits depend on the other images of the batch; their
    latents are cached apart.
    """
    entries: list[Entry] = [] if images is None else list(image_entries(images))
    ignored: Counter[str] = Counter()
    if settings.data or not entries:
        try:
            found = search(settings.data, Watch(callbacks.should_stop, settings.within or None))
        except Cancelled:
            raise CachingStopped(0, 0) from None
        if not found.entries:
            raise DataProblem(nothing_found(settings.data, found))
        entries += found.entries
        ignored = found.ignored
        if found.skipped:
            places = f"{len(found.skipped)} folders, shards or links could not be read to their end"
            callbacks.warn(f"{places}: {named_first(found.skipped)}.")
    device = next(base.autoencoder.parameters()).device.type
    alone = device == "cpu"
    vae = base.vae_id if alone else f"{base.vae_id} on {device}"
    cache = LatentCache(settings.cache or default_cache_folder(), vae, warn=callbacks.warn)
    batch = 1 if alone else settings.caching_batch
    return prepare(entries, base.encode, cache, settings, callbacks, batch, turn, turns, ignored, **limits)


def prepare(
    entries: Sequence[Entry],
    encode: Encode,
    cache: LatentCache,
    settings: DataSettings,
    callbacks: Callbacks = SILENT,
    batch: int = 8,
    turn: int = 0,
    turns: int = 1,
    ignored: Mapping[str, int] | None = None,
    memory_limit: int | None = None,
    workers: int | None = None,
) -> LatentDataset:
    """Read all entries, leave out what cannot be used, and encode what the cache lacks.

    batch: images of up to 512 x 512 pixels that the encoder gets at once; of larger ones fewer. turn of turns:
    processes that prepare the same images at once begin at different places and take over what the others have done.
    ignored: other files that were found, by ending, for the notes. memory_limit: bytes of latents to keep in memory
    (None: a quarter of what is free, at most 8 GiB); the rest is read from the cache when drawn.

    Raises DataProblem when nothing can be used, CachingStopped when should_stop said so, FileProblem for a cache that
    cannot be written.
    """
    room = default_room() if memory_limit is None else memory_limit
    store = LatentStore(cache, encode, settings.posterior == "sample", room, callbacks.warn)
    preparation = _Preparation(store, settings, callbacks, batch, workers)
    try:
        # Latents made in inference mode (ComfyUI's nodes run in it) could not be trained on.
        with torch.inference_mode(False), torch.no_grad():
            preparation.read(entries)
            preparation.encode(turn, turns)
    except Cancelled:
        raise CachingStopped(preparation.done, preparation.total) from None
    records, skipped = preparation.records, sorted(preparation.skipped)
    if not records:
        raise DataProblem(_nothing_usable(len(entries), skipped))
    lost = {record.entry.name: removed(*record.original, record.size) for record in records}
    notes = remarks(ignored or {}, {name: share for name, share in lost.items() if share > MUCH}, len(records))
    if skipped:
        notes.append(skipped_remark(skipped, preparation.faults))
    upscaled = sum(cover(record.original, record.size)[0] > record.original[0] for record in records)
    if upscaled:
        notes.append(f"{upscaled} of {len(records)} images are smaller than the resolution and were enlarged.")
    return LatentDataset(records, store, skipped, notes)


def _nothing_usable(count: int, skipped: Sequence[tuple[str, str]]) -> str:
    if not skipped:
        return "Expected images to train on, found none; name a folder with images or connect an IMAGE batch."
    name, reason = skipped[0]
    return (
        f"Expected images to train on, found none usable among {count}, the first: {name} {reason}; check-data lists "
        "all."
    )


class _Preparation:
    """Reads the headers of all images, then brings every cut of the usable ones into memory or cache.

    records, skipped, faults: the usable images sorted by content, (name, reason) of the others, and how many of them
    for which kind of reason.
    """

    def __init__(
        self, store: LatentStore, settings: DataSettings, callbacks: Callbacks, batch: int, workers: int | None
    ) -> None:
        self.store, self.settings, self.callbacks = store, settings, callbacks
        self.batch, self.workers = batch, workers
        self.records: list[ImageRecord] = []
        self.skipped: list[tuple[str, str]] = []
        self.faults: Counter[str] = Counter()
        self.done = self.total = 0

    def _skip(self, entry: Entry, kind: str, reason: object) -> None:
        self.skipped.append((entry.name, str(reason)))
        self.faults[kind] += 1

    def read(self, entries: Sequence[Entry]) -> None:
        """Make records of the images whose header can be read."""
        index, least = ContentIndex(self.store.cache.root / INDEX), self.settings.min_side
        self.total = len(entries)

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

        self.callbacks.progress(0, len(entries))
        looked = in_order(look, entries, self.workers, self.callbacks.should_stop)
        with closing(looked) as results, closing(index):
            for entry, known, stamp in results:
                if isinstance(known, BadImage):
                    self._skip(entry, known.kind, known)
                    continue
                index.add(stamp, known)
                if min(known.height, known.width) < least:
                    size = f"{known.width} x {known.height} pixels"
                    self._skip(entry, "too small", f"has {size}, less than min_side {least}")
                    continue
                self.records.append(record_of(entry, known, self.store.cache, self.settings))
        self.records.sort(key=lambda record: (record.content, record.entry.name))

    def encode(self, turn: int, turns: int) -> None:
        """Encode what the cache lacks; images whose pixels turn out to be bad are skipped."""
        self.total = len(self.records)
        self.copies = Counter(record.content for record in self.records)  # copies of one image are encoded once
        jobs = self._lacking()
        self.bad: dict[str, BadImage] = {}
        self.done = self.total - sum(self.copies[record.content] for record, _ in jobs)
        self.callbacks.progress(self.done, self.total)
        # Whole batches of one shape, beginning where no other process does.
        jobs.sort(key=lambda job: (job[0].size, job[0].content))
        start = len(jobs) * turn // max(turns, 1)
        jobs = jobs[start:] + jobs[:start]
        largest = max((len(cuts) * record.size[0] * record.size[1] for record, cuts in jobs), default=1)
        ahead = MOST_WAITING // (3 * 4 * largest)
        waiting: dict[Size, list[_Job]] = defaultdict(list)
        with closing(in_order(self._read_cuts, jobs, self.workers, self.callbacks.should_stop, ahead)) as results:
            for record, found in results:
                if isinstance(found, BadImage):
                    self.bad[record.content] = found
                    self.total -= self.copies[record.content]
                    self.callbacks.progress(self.done, self.total)
                    continue
                stored, read = found
                for key, latents in stored.items():
                    self.store.keep(key, *latents)
                self.done += 0 if read else self.copies[record.content]
                batch, most = waiting[record.size], at_once(self.batch, record.size)
                batch += [(record, cut, pixels, cut is read[-1][0]) for cut, pixels in read]
                while len(batch) >= most:
                    self._encode(batch[:most])
                    del batch[:most]
        for batch in waiting.values():
            if batch:
                self._encode(batch)
        for record in self.records:
            if record.content in self.bad:
                self._skip(record.entry, self.bad[record.content].kind, self.bad[record.content])
        self.records = [record for record in self.records if record.content not in self.bad]

    def _lacking(self) -> list[tuple[ImageRecord, list[Cut]]]:
        """Read what the cache has into memory; (record, cuts) of what it lacks."""

        def look(record: ImageRecord) -> tuple[ImageRecord, list[Cut]]:
            lacking = {}  # by key: two crops of one image may lie in the same place
            for cut in record.cuts:
                if self.store.room <= 0:  # no use in reading what cannot be kept
                    found = self.store.cache.has(cut.key)
                else:
                    stored = self.store.cache.get(cut.key)
                    found = stored is not None
                    if stored is not None:
                        with self.store.lock:
                            self.store.keep(cut.key, *stored)
                if not found:
                    lacking[cut.key] = cut
            return record, list(lacking.values())

        distinct = {record.content: record for record in reversed(self.records)}
        firsts = [distinct[content] for content in self.copies]
        with closing(in_order(look, firsts, self.workers, self.callbacks.should_stop)) as results:
            jobs = [(record, cuts) for record, cuts in results if cuts]
        return jobs

    def _read_cuts(
        self, job: tuple[ImageRecord, list[Cut]]
    ) -> tuple[ImageRecord, BadImage | tuple[dict[str, tuple[Tensor, Tensor]], list[tuple[Cut, Tensor]]]]:
        """(record, (latents by key that another process has stored meanwhile, cuts and pixels of the others))."""
        record, cuts = job
        found = {cut.key: self.store.cache.get(cut.key) for cut in cuts}
        stored = {key: latents for key, latents in found.items() if latents is not None}
        lacking = [cut for cut in cuts if cut.key not in stored]
        try:
            # What another process has encoded need not be read: an error now would leave it out here alone.
            return record, (stored, record.read(lacking) if lacking else [])
        except BadImage as error:
            return record, error

    def _encode(self, jobs: Sequence[_Job]) -> None:
        if self.callbacks.should_stop():
            raise Cancelled
        means, stds = self.store.encoded([pixels for _, _, pixels, _ in jobs], jobs[0][0])
        for (record, cut, _, last), mean, std in zip(jobs, means, stds):
            self.store.keep(cut.key, *self.store.cache.put(cut.key, mean, std))
            self.done += self.copies[record.content] if last else 0
        self.callbacks.progress(self.done, self.total)
