"""Where images come from: folders, WebDataset tar shards, and image batches that are in memory already."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...guidance.errors import printable
from ..engine.paths import is_of_windows
from ..engine.small_files import open_regular
from .kinds import PACKED, SHARD, SUFFIXES, ending, masked
from .memory import MemoryBudget
from .patterns import expanded, nearly
from .problems import BadImage, DataProblem
from .remarks import MASK
from .shards import Member, NoShard, members
from .walking import LOST_LINK, Watch, walk

MOST_BYTES = 512 * 2**20  # of one image file, and of all that are in memory at once
READING = MemoryBudget(MOST_BYTES)
ADDRESS = re.compile(r"(https?|ftp|s3|gs|hf):/", re.IGNORECASE)
LONGEST_NAME = 10_000  # characters of an image's name in messages; no system has longer paths

Places = Sequence[str | os.PathLike]


@dataclass(frozen=True)
class ImageEntry:
    """One image on disk: a file, or `size` bytes at `offset` of a shard. `name` is for messages and sorting."""

    name: str
    path: Path
    size: int
    offset: int = 0
    in_shard: bool = False

    def read(self) -> bytes:
        """The content of the image file. Raises BadImage if unreadable, too large or its shard is cut off."""
        try:
            with open_regular(self.path) as file:
                file.seek(self.offset)
                size = self.size if self.in_shard else os.fstat(file.fileno()).st_size
                if size > MOST_BYTES:
                    raise BadImage("too large", f"has {size:,} bytes, more than {MOST_BYTES:,}; save it smaller")
                data = file.read(size)
        except FileNotFoundError as error:
            raise BadImage("unreadable", "was there when it was looked for and is gone; start again") from error
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error}); check its permissions"
            raise BadImage("unreadable", reason) from error
        if self.in_shard and len(data) < size:
            raise BadImage("corrupt", "lies where its shard ends too early; copy or download the shard again")
        return data

    def stamp(self) -> tuple[str, int, int, int] | None:
        """(path, bytes, time of change, the system's own time of change, in ns); None when the file cannot be asked.

        While it stays the same, the content does. Programs set the first time as they like, the second they cannot. On
        Windows, where a new file takes over the second time with a name, it is the file's number instead.
        """
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        where = f"{self.path.absolute()}" + (f"!{self.offset}" if self.in_shard else "")
        own = status.st_ino % 2**63 if os.name == "nt" else status.st_ctime_ns
        return where, status.st_size, status.st_mtime_ns, own


@dataclass(frozen=True)
class MemoryEntry:
    """One image [H, W, 3 or 4] of numbers in 0..1 that is in memory; the tensor is shared, not copied."""

    name: str
    pixels: Tensor
    size: int = 0

    def read(self) -> bytes:
        """The picture as a PPM file with 8 bits per channel, transparency laid over white."""
        pixels = self.pixels.detach().to("cpu", torch.float32)
        if not bool(pixels.isfinite().all()):
            raise BadImage("corrupt", "holds pixels that are NaN or infinite")
        pixels = pixels.clamp(0.0, 1.0)
        if pixels.shape[2] == 4:
            pixels = pixels[..., :3] * pixels[..., 3:] + 1.0 - pixels[..., 3:]
        data = (pixels * 255.0).round().to(torch.uint8).contiguous().numpy().tobytes()
        return b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + data

    def stamp(self) -> None:
        """Nothing on disk tells whether the content is the same."""
        return None


Entry = ImageEntry | MemoryEntry


@contextmanager
def content(entry: Entry) -> Iterator[bytes]:
    """What `entry.read` gives, within the block; all threads together hold at most MOST_BYTES."""
    with READING.hold(min(entry.size, MOST_BYTES)):
        yield entry.read()


@dataclass
class Found:
    """What a search found.

    skipped: (name, reason) of folders, shards and links that could not be read. ignored: how many files of which ending
    are no images, and how many images and folders were left out for another reason.
    """

    entries: list[ImageEntry] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def find_images(data: Places, watch: Watch | None = None) -> list[ImageEntry]:
    """All images under folders, files and .tar shards; see `search`. Raises DataProblem when there are none."""
    found = search(data, watch)
    if not found.entries:
        raise DataProblem(nothing_found(data, found))
    return found.entries


def nothing_found(data: Places, found: Found) -> str:
    """One sentence about a search that found no image."""
    where = ", ".join(map(str, data)) or "data"
    others = ", ".join(f"{count} {kind or 'without ending'}" for kind, count in found.ignored.most_common(5))
    also = f", only other files ({others})" if others else ""
    if found.skipped:
        place, reason = found.skipped[0]
        also += f"; what could not be read ({len(found.skipped)}): {place} {reason}"
        also += " ..." if len(found.skipped) > 1 else ""
    cure = " Unpack archives first." if any(kind in PACKED for kind in found.ignored) else ""
    kinds = ", ".join(SUFFIXES)
    return f"{where}: expected images ({kinds}), found none{also}. Name a folder with images or .tar shards.{cure}"


def search(data: Places, watch: Watch | None = None) -> Found:
    """Look for images in folders (recursively, symbolic links followed once), single files and .tar shards.

    Patterns like ``shard-{0000..0003}.tar``, ``{train,more}/*.tar`` and ``~`` are expanded. Hidden files and folders
    and macOS' ``__MACOSX`` are left out, and so are training runs below a place, whose pictures are made by a model,
    and masks that lie beside their pictures. Each place's images are sorted by name; a file that is named twice counts
    once. Of shards the headers are read, other files are not opened. A damaged shard is among the skipped.

    Raises DataProblem for a place that does not exist or lies outside of the watch's folders, and what `Watch.look`
    does.
    """
    searching = _Search(watch or Watch())
    for place, allowed in searching.places(data):
        if not allowed:
            raise DataProblem(f"{place}: expected a place in the folders that may be read, found one outside.")
        if os.path.isdir(place):
            searching.folder(place)
        elif os.path.isfile(place):
            searching.file(place, str(place) if ending(place.name) == SHARD else place.name)
        else:
            raise DataProblem(_not_there(place, searching.watch))
    return searching.found


def fingerprint(data: Places, watch: Watch | None = None) -> str:
    """Changes when a file that `search` would see is added, removed, changed or replaced by another one.

    A file replaced by one of the same size and time counts as another. Nothing is opened; what is not there is passed
    over. Raises DataProblem for patterns without end, and what `Watch.look` does.
    """
    digest, searching = hashlib.sha256(), _Search(watch or Watch())
    for place, allowed in searching.places(data):
        if not allowed:
            continue
        inside = walk(place, searching.watch, _unwanted) if os.path.isdir(place) else ()
        for path in (place, *(entry.path for entry in inside if entry.kind == "file")):
            stamp = ImageEntry("", path, 0).stamp()
            if stamp is not None and not os.path.isdir(path):
                digest.update(f"{stamp}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def image_entries(images: Tensor | Sequence[Tensor], name: str = "image") -> list[MemoryEntry]:
    """Entries for images in memory: [B, H, W, C], or any number of [H, W, C] or [B, H, W, C], C = 3 or 4, in 0..1.

    Raises DataProblem for other shapes and for no images at all.
    """
    batches = [images] if isinstance(images, Tensor) else list(images)
    single = []
    for batch in batches:
        if batch.ndim not in (3, 4) or batch.shape[-1] not in (3, 4) or 0 in batch.shape[-3:]:
            raise DataProblem(f"Expected images [B, H, W, 3 or 4], found a tensor of shape {list(batch.shape)}.")
        single.extend(batch.unbind(0) if batch.ndim == 4 else [batch])
    if not single:
        raise DataProblem("Expected at least one image, found an empty batch; connect images or name a folder.")
    return [
        MemoryEntry(f"{name} {number}", pixels, pixels.shape[0] * pixels.shape[1] * 3)
        for number, pixels in enumerate(single, start=1)
    ]


# ------------------------------------------------------------------------------------------------------------ searching


def _not_there(place: Path, watch: Watch) -> str:
    """One sentence about a place that is no file and no folder."""
    text = f"{place}: expected a folder of images or a shard, found "
    if os.path.lexists(place):
        fault = LOST_LINK if os.path.islink(place) else "is neither a file nor a folder"
        return f"{text}something that {fault}."
    if is_of_windows(str(place)) or (os.name == "posix" and str(place).startswith("//")):
        return f"{text}a path as Windows writes it; write it as this system does (/mnt/... in WSL)."
    if ADDRESS.match(str(place)):
        return f"{text}the address of a server; download what lies there first."
    other = nearly(str(place), watch)
    return f"{text}nothing there, but {other}; write it so." if other else f"{text}nothing there; check the path."


def _label(name: object) -> str:
    """What to call a file in messages: in one line, whatever its name holds."""
    return printable(name, LONGEST_NAME).replace("\n", "\\n")


def _unwanted(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


class _Search:
    """One search: what it has found, and which files it has seen."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.found, self.seen = watch, Found(), set()

    def places(self, data: Places) -> Iterator[tuple[Path, bool]]:
        """(file or folder that a pattern stands for, whether it may be read)."""
        for pattern in data:
            for place in expanded(os.fspath(pattern), self.watch):
                self.watch.look()
                yield place, self.watch.allows(place)

    def folder(self, root: Path) -> None:
        files: list[tuple[tuple[str, ...], Path]] = []
        for entry in walk(root, self.watch, _unwanted):
            kind = ending(entry.path.name)
            if entry.kind == "left out":
                self.found.ignored[entry.note] += 1
            elif entry.kind == "fault" and kind in (*SUFFIXES, SHARD, ""):  # without ending it may be a folder
                self.found.skipped.append((_label(entry.path), entry.note))
            elif entry.kind == "file" and kind in (*SUFFIXES, SHARD):
                files.append((entry.parts, entry.path))
            else:
                self.found.ignored[kind] += 1
        pictures = {(*parts[:-1], Path(parts[-1]).stem) for parts, _ in files}
        for parts, path in sorted(files):
            picture = masked(Path(parts[-1]).stem)
            if picture is not None and (*parts[:-1], picture) in pictures:
                self.found.ignored[MASK] += 1
            else:
                self.file(path, "/".join(parts))

    def file(self, path: Path, name: str) -> None:
        """Add a file that may be an image or a shard; name: what to call it."""
        kind, place = ending(path.name), _label(path)
        if kind in PACKED:
            reason = "is a packed archive, and only folders and .tar are read; unpack it first"
            self.found.skipped.append((place, reason))
            return
        if kind not in (*SUFFIXES, SHARD):
            self.found.ignored[kind] += 1
            return
        real = os.path.normcase(os.path.realpath(path))
        if real in self.seen:
            return
        self.seen.add(real)
        try:
            if kind == SHARD:
                self.shard(path, name)
            else:
                self.found.entries.append(ImageEntry(_label(name), path, path.stat().st_size))
        except NoShard as error:
            self.found.skipped.append((place, f"is no uncompressed tar of images but {error}; make it again"))
        except OSError as error:
            self.found.skipped.append((place, f"cannot be read ({error.strerror or error})"))

    def shard(self, path: Path, name: str) -> None:
        """Add a shard's images in the order they are in. Raises NoShard, OSError."""
        found, (plain, fault) = self.found, members(path, self.watch)
        if fault:
            found.skipped.append((_label(path), fault))
        wanted = [member for member in plain if not any(map(_unwanted, _parts(member.name)))]
        # As unpacking leaves a name that was added again.
        latest = {member.name: member for member in wanted if not member.note}
        chosen = _one_per_key(list(latest.values()))
        for member in wanted:
            kind = ending(member.name)
            if member.note:
                found.ignored[member.note if kind in SUFFIXES else kind] += 1
            elif latest[member.name] is not member:
                found.ignored["replaced by a later one of their name"] += 1
            elif chosen.get(member.name) is member:
                label = _label(f"{name}!{member.name}")
                found.entries.append(ImageEntry(label, path, member.size, member.offset, True))
            else:
                found.ignored["of samples with another image" if kind in SUFFIXES else kind] += 1


def _parts(name: str) -> list[str]:
    return name.replace("\\", "/").split("/")


def _one_per_key(members: Sequence[Member]) -> dict[str, Member]:
    """The images of WebDataset samples, by name: members of one key (the name up to the first dot) are one sample.

    A sample's ``KEY.jpg`` (or the first of the other endings) is its image, and ``KEY.mask.png`` beside it is not.
    Where no name is KEY and an ending alone, dots are part of the file names, and all are images.
    """
    samples: dict[str, list[tuple[str, Member]]] = {}
    for member in members:
        if ending(member.name) in SUFFIXES:
            *folders, base = _parts(member.name)
            key, _, endings = base.rstrip(" .").partition(".")
            samples.setdefault("/".join((*folders, key)), []).append((f".{endings}".lower(), member))
    chosen = {}
    for images in samples.values():
        plain = [(SUFFIXES.index(kind), index) for index, (kind, _) in enumerate(images) if kind in SUFFIXES]
        for _, member in [images[min(plain)[1]]] if plain else images:
            chosen[member.name] = member
    return chosen
