"""What a trainer would find in a folder of images: a report that lists and counts, and never changes anything."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from .buckets import Size, assign, bucket_sizes, removed
from .images import BadImage, ImageFacts, cover, pixel_digest, probe
from .parallel import in_order
from .remarks import MUCH, remarks
from .sources import Entry, content, nothing_found, search
from .walking import Cancelled, Watch

SIZE_CLASSES = {limit: f"below {limit:g} MP" for limit in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32)}  # megapixels
SIZE_CLASSES[float("inf")] = "32 MP and more"
SHOWN_EQUAL = 4
SHOWN = 10  # names per list in the text; the dictionary has all


@dataclass
class DataReport:
    """Names are paths below the folders, or shard!member; one image may be in several lists.

    ok: how many would be trained on, of `total`. Not used: corrupt, truncated, unreadable, too_large and too_small (the
    last by min_side), with a reason each. Used, but worth knowing: upscaled (smaller than their shape), cropped (what
    share is cut away, 0..1, where it is more than a third), same_file and
    same_picture (groups of equal files, and of different files with equal pixels), alpha (laid over white), rotated (by
    EXIF), sixteen_bit, cmyk, animated (first frame). buckets: images per shape "WIDTHxHEIGHT". megapixels: images per
    size class. places: folders, shards and links that could not be read. ignored: other files by ending, folders
    of runs.
    """

    data: list[str]
    resolution: int
    min_side: int
    total: int = 0
    ok: int = 0
    corrupt: dict[str, str] = field(default_factory=dict)
    truncated: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    too_large: dict[str, str] = field(default_factory=dict)
    too_small: dict[str, str] = field(default_factory=dict)
    upscaled: list[str] = field(default_factory=list)
    cropped: dict[str, float] = field(default_factory=dict)
    same_file: list[list[str]] = field(default_factory=list)
    same_picture: list[list[str]] = field(default_factory=list)
    alpha: list[str] = field(default_factory=list)
    rotated: list[str] = field(default_factory=list)
    sixteen_bit: list[str] = field(default_factory=list)
    cmyk: list[str] = field(default_factory=list)
    animated: list[str] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    buckets: dict[str, int] = field(default_factory=dict)
    megapixels: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    stopped: bool = False
    nothing: str = ""

    @property
    def bad(self) -> int:
        """How many images would be left out."""
        return sum(len(one) for one in (self.corrupt, self.truncated, self.unreadable, self.too_large, self.too_small))

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "bad": self.bad}

    def to_text(self) -> str:
        """For people: counts, and the first names of every list."""
        if self.nothing:
            return self.nothing
        lines = [f"{self.total} images in {', '.join(self.data)}: {self.ok} can be used, {self.bad} cannot."]
        if self.stopped:
            lines.append("Stopped before all images were seen.")
        for title, faults in (
            ("damaged", self.corrupt),
            ("broken off", self.truncated),
            ("cannot be read", self.unreadable),
            ("too large to decode", self.too_large),
            (f"shorter side below {self.min_side} pixels", self.too_small),
            ("folders, shards and links with faults", self.places),
        ):
            lines += _listed(title, [f"{name}: {reason}" for name, reason in faults.items()])
        lines += _listed(f"smaller than their shape at resolution {self.resolution}, enlarged", self.upscaled)
        lines += _listed("groups of equal files", [_equal(group) for group in self.same_file])
        lines += _listed("groups of equal pictures in different files", [_equal(group) for group in self.same_picture])
        lines += _listed("with transparency, laid over white", self.alpha)
        lines += _listed("turned by their EXIF orientation", self.rotated)
        lines += _listed("with more than 8 bits per channel, reduced to 8", self.sixteen_bit)
        lines += _listed("CMYK, converted to sRGB", self.cmyk)
        lines += _listed("animated, first frame used", self.animated)
        for title, counts in (("formats", self.formats), ("shapes", self.buckets), ("sizes", self.megapixels)):
            if counts:
                lines.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        return "\n".join([*lines, *remarks(self.ignored, self.cropped, self.ok)])


@dataclass(frozen=True)
class _Look:
    entry: Entry
    fault: BadImage | None = None
    facts: ImageFacts | None = None
    content: str = ""
    pixels: str = ""


def check_data(
    data: Sequence[str | os.PathLike],
    *,
    resolution: int = 512,
    min_side: int = 0,
    bucket_step: int = 64,
    bucket_max_ratio: float = 2.0,
    buckets: bool = True,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    workers: int | None = None,
) -> DataReport:
    """Decode every image under `data` completely and report; see `DataReport` and, for the places, `search`.

    No image at all is no error here: the report says so in `nothing`. Raises DataProblem for places that do not exist.
    """
    progress, should_stop = progress or (lambda done, total: None), should_stop or (lambda: False)
    report = DataReport([os.fspath(one) for one in data], resolution, min_side)
    sizes = bucket_sizes(resolution, bucket_step, bucket_max_ratio) if buckets else [(resolution, resolution)]
    try:
        found = search(data, Watch(should_stop))
    except Cancelled:
        report.stopped = True
        return report
    report.places, report.ignored = dict(found.skipped), dict(found.ignored.most_common())
    if not found.entries:
        report.nothing = nothing_found(data, found)
        return report
    by_content: dict[str, list[str]] = defaultdict(list)
    by_pixels: dict[str, dict[str, str]] = defaultdict(dict)
    formats, shapes, classes = Counter(), Counter(), Counter()

    def look(entry: Entry) -> _Look:
        return _look(entry, sizes)

    with suppress(Cancelled), closing(in_order(look, found.entries, workers, should_stop)) as looks:
        report.stopped = True  # until all were seen
        for look in looks:
            name, report.total = look.entry.name, report.total + 1
            if look.facts is not None and look.fault is None:
                size = _sort_in(report, name, look.facts, sizes)
                by_content[look.content].append(name)
                by_pixels[look.pixels].setdefault(look.content, name)
                formats[look.facts.format] += 1
                classes[_size_class(look.facts)] += 1
                if name not in report.too_small:
                    shapes[size] += 1
            elif look.fault is not None:
                getattr(report, look.fault.kind.replace(" ", "_"))[name] = str(look.fault)
            progress(report.total, len(found.entries))
            if should_stop() and report.total < len(found.entries):
                break
        else:
            report.stopped = False
    report.ok = report.total - report.bad
    report.same_file = [names for names in by_content.values() if len(names) > 1]
    report.same_picture = [list(names.values()) for names in by_pixels.values() if len(names) > 1]
    report.formats = dict(formats.most_common())
    report.buckets = {f"{width}x{height}": count for (height, width), count in sorted(shapes.items())}
    report.megapixels = {name: classes[name] for name in SIZE_CLASSES.values() if classes[name]}
    return report


def _look(entry: Entry, sizes: Sequence[Size]) -> _Look:
    try:
        with content(entry) as data:
            facts = probe(data)
            return _Look(entry, None, facts, hashlib.sha256(data).hexdigest(), _pixels(data, facts, sizes))
    except BadImage as error:
        # An empty file is one kind of damage; the reason says which.
        return _Look(entry, BadImage("corrupt", str(error)) if error.kind == "empty" else error)


def _pixels(data: bytes, facts: ImageFacts, sizes: Sequence[Size]) -> str:
    """A digest of the picture; where all of it is too large, of it as small as training would decode it."""
    try:
        return pixel_digest(data)
    except BadImage as error:
        if error.kind != "too large":
            raise
        original = (facts.height, facts.width)
        return pixel_digest(data, cover(original, assign(*original, sizes)))


def _sort_in(report: DataReport, name: str, facts: ImageFacts, sizes: Sequence[Size]) -> Size:
    """Put a good image into the lists it belongs to; its shape."""
    original = (facts.height, facts.width)
    size = assign(*original, sizes)
    if min(original) < report.min_side:
        report.too_small[name] = f"has {facts.width} x {facts.height} pixels"
    elif cover(original, size)[0] > facts.height:
        report.upscaled.append(name)
    if name not in report.too_small and removed(*original, size) > MUCH:
        report.cropped[name] = round(removed(*original, size), 4)
    for wanted, names in (
        (facts.alpha, report.alpha),
        (facts.rotated, report.rotated),
        (facts.sixteen_bit, report.sixteen_bit),
        (facts.cmyk, report.cmyk),
        (facts.animated, report.animated),
    ):
        if wanted:
            names.append(name)
    return size


def _size_class(facts: ImageFacts) -> str:
    pixels = facts.height * facts.width / 1e6
    return next(name for limit, name in SIZE_CLASSES.items() if pixels < limit)


def _equal(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN_EQUAL} more" if len(names) > SHOWN_EQUAL else ""
    return " = ".join(names[:SHOWN_EQUAL]) + rest


def _listed(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    rest = [f"  ... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{title} ({len(names)}):", *(f"  {name}" for name in names[:SHOWN]), *rest]
