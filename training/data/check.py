"""What training would find in a folder of images: a report that lists and counts, and never changes anything."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from .buckets import Size, assign, cover, removed
from .images import ImageFacts, decode, probe
from .parallel import in_order
from .problems import BadImage, Cancelled
from .remarks import MUCH, remarks
from .settings import DataSettings
from .sources import Entry, content, nothing_found, search
from .walking import Watch

# Kinds of images that are not used, and facts about images that are, with their titles in the text.
FAULTS = {
    "corrupt": "damaged or cut off",
    "unreadable": "cannot be read",
    "too_large": "too large to decode",
    "too_small": "shorter side below {min_side} pixels",
}
FACTS = {"alpha": "with transparency, laid over white", "rotated": "turned by their EXIF orientation"}
SHOWN_EQUAL = 4
SHOWN = 10  # names per list in the text; the dictionary has all


@dataclass
class DataReport:
    """Names are paths below the folders, or shard!member; one image may be in several lists.

    ok: how many would be trained on, of `total`; bad: how many not. faults: of those the reasons by name, by kind, see
    FAULTS. Used, but worth knowing: facts (names by FACTS), upscaled (smaller than their shape), cropped (what share is
    cut away, 0..1, where it is more than a third), same_file (groups of equal files). buckets: images per shape
    "WIDTHxHEIGHT". places: folders, shards and links that could not be read. ignored: other files by ending, folders of
    runs. nothing: a sentence where no image was found.
    """

    data: list[str]
    resolution: int
    min_side: int
    total: int = 0
    ok: int = 0
    bad: int = 0
    faults: dict[str, dict[str, str]] = field(default_factory=lambda: {kind: {} for kind in FAULTS})
    facts: dict[str, list[str]] = field(default_factory=lambda: {fact: [] for fact in FACTS})
    upscaled: list[str] = field(default_factory=list)
    cropped: dict[str, float] = field(default_factory=dict)
    same_file: list[list[str]] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    buckets: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    stopped: bool = False
    nothing: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """For people: counts, and the first names of every list."""
        if self.nothing:
            return self.nothing
        lines = [f"{self.total} images in {', '.join(self.data)}: {self.ok} can be used, {self.bad} cannot."]
        if self.stopped:
            lines.append("Stopped before all images were seen.")
        for kind, title in FAULTS.items():
            lines += _listed(title.format(min_side=self.min_side), _reasons(self.faults[kind]))
        lines += _listed("folders, shards and links with faults", _reasons(self.places))
        lines += _listed(f"smaller than their shape at resolution {self.resolution}, enlarged", self.upscaled)
        lines += _listed("groups of equal files", [_equal(group) for group in self.same_file])
        for fact, title in FACTS.items():
            lines += _listed(title, self.facts[fact])
        for title, counts in (("formats", self.formats), ("shapes", self.buckets)):
            if counts:
                lines.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        return "\n".join([*lines, *remarks(self.ignored, self.cropped, self.ok)])


def check_data(
    data: Sequence[str | os.PathLike],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    workers: int | None = None,
    **more: Any,
) -> DataReport:
    """Decode every image under `data` completely and report; see `DataReport` and, for the places, `search`.

    more: other settings that the images are judged by, see `DataSettings`.
    No image at all is no error here: the report says so in `nothing`. Raises DataProblem for places that do not exist.
    """
    settings = DataSettings(data=tuple(os.fspath(place) for place in data), **more)
    report, sizes = DataReport(list(settings.data), settings.resolution, settings.min_side), settings.sizes
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
    formats, shapes = Counter(), Counter()
    looked = in_order(lambda entry: _look(entry, sizes), found.entries, workers, should_stop)
    with suppress(Cancelled), closing(looked) as looks:
        report.stopped = True  # until all were seen
        for entry, facts, digest in looks:
            name, report.total = entry.name, report.total + 1
            if isinstance(facts, BadImage):
                report.faults[facts.kind.replace(" ", "_")][name] = str(facts)
            else:
                by_content[digest].append(name)
                formats[facts.format] += 1
                size = _sort_in(report, name, facts, sizes)
                shapes[size] += name not in report.faults["too_small"]
            progress(report.total, len(found.entries))
        report.stopped = False
    report.bad = sum(map(len, report.faults.values()))
    report.ok = report.total - report.bad
    report.same_file = [names for names in by_content.values() if len(names) > 1]
    report.formats = dict(formats.most_common())
    report.buckets = {f"{width}x{height}": count for (height, width), count in sorted(shapes.items()) if count}
    return report


def _look(entry: Entry, sizes: Sequence[Size]) -> tuple[Entry, ImageFacts | BadImage, str]:
    """(entry, what it is, SHA-256 of its file), once all of it is decoded, as small as training would decode it."""
    try:
        with content(entry) as data:
            facts = probe(data)
            original = (facts.height, facts.width)
            decode(data, cover(original, assign(*original, sizes)))
            return entry, facts, hashlib.sha256(data).hexdigest()
    except BadImage as error:
        # An empty file is one kind of damage; the reason says which.
        return entry, BadImage("corrupt", str(error)) if error.kind == "empty" else error, ""


def _sort_in(report: DataReport, name: str, facts: ImageFacts, sizes: Sequence[Size]) -> Size:
    """Put a good image into the lists it belongs to; its shape."""
    original = (facts.height, facts.width)
    size = assign(*original, sizes)
    if min(original) < report.min_side:
        report.faults["too_small"][name] = f"has {facts.width} x {facts.height} pixels"
    else:
        if cover(original, size)[0] > facts.height:
            report.upscaled.append(name)
        if removed(*original, size) > MUCH:
            report.cropped[name] = round(removed(*original, size), 4)
    for fact, names in report.facts.items():
        if getattr(facts, fact):
            names.append(name)
    return size


def _equal(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN_EQUAL} more" if len(names) > SHOWN_EQUAL else ""
    return " = ".join(names[:SHOWN_EQUAL]) + rest


def _reasons(faults: Mapping[str, str]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in faults.items()]


def _listed(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    rest = [f"  ... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{title} ({len(names)}):", *(f"  {name}" for name in names[:SHOWN]), *rest]
