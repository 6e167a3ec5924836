"""Where images come from: folders, WebDataset tar shards, and image batches that are in memory already."""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from .images import BadImage, DataProblem

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SHARD = ".tar"
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
BLOCK, REST = 512, 2**20  # bytes of a tar's header and end mark; looked at behind it, where only padding may be
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
LOST_LINK = "is a link to nothing; connect the drive or fetch the file that it stands for"
OF_A_RUN = {"config.json", "log.jsonl"}  # both lie in the folder of every run


@dataclass(frozen=True)
class ImageEntry:
    """One image on disk: a file, or `size` bytes at `offset` of a shard. `name` is for messages and sorting."""

    name: str
    path: Path
    size: int
    offset: int = 0
    in_shard: bool = False

    def read(self) -> bytes:
        """The content of the image file. Raises BadImage when it cannot be read or the shard is cut off."""
        try:
            with open(self.path, "rb") as file:
                if not self.in_shard:
                    return file.read()
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error}); check its permissions"
            raise BadImage("unreadable", reason) from error
        if len(data) < self.size:
            raise BadImage("truncated", "lies where its shard ends too early; copy or download the shard again")
        return data

    def stamp(self) -> tuple[str, int, int, int] | None:
        """(identity, bytes, time of change, time of change of the entry itself, in ns), None: unknown.

        As long as it stays the same, so has the content. Programs set the first time as they like, unpackers to one
        that is in the archive; the second is the system's own (on Windows that of the file's creation).
        """
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        where = str(self.path.absolute())
        where = f"{where}!{self.offset}" if self.in_shard else where
        return where, status.st_size, status.st_mtime_ns, status.st_ctime_ns


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


@dataclass
class Found:
    """What a search came upon.

    skipped: (name, reason) of folders, shards and links that could not be read. ignored: how many files of which ending
    were no images, and how many images and folders were left out for what else.
    """

    entries: list[ImageEntry] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def find_images(data: Sequence[str | os.PathLike]) -> list[ImageEntry]:
    """All images under folders, files and .tar shards; see `search`. Raises DataProblem when there are none."""
    found = search(data)
    if not found.entries:
        raise DataProblem(nothing_found(data, found))
    return found.entries


def nothing_found(data: Sequence[str | os.PathLike], found: Found) -> str:
    """One sentence about a search that came upon no image."""
    where = ", ".join(str(one) for one in data) or "data"
    others = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in found.ignored.most_common(5))
    also = f", only other files ({others})" if others else ""
    if found.skipped:
        also += f", and {len(found.skipped)} unreadable places, the first {found.skipped[0][0]}: {found.skipped[0][1]}"
    kinds = ", ".join(SUFFIXES)
    return f"{where}: expected images ({kinds}), found none{also}; name a folder with images or .tar shards."


def search(data: Sequence[str | os.PathLike]) -> Found:
    """Look for images in folders (recursively, symbolic links followed once), single files and .tar shards.

    Patterns like ``shard-{0000..0003}.tar``, ``{train,more}/*.tar`` and ``~`` are expanded. Hidden files and folders
    and macOS' ``__MACOSX`` are left out, and so are training runs below a place, whose pictures show what was learned
    from the others. Each place's images are sorted by name; a file that is named twice counts once. Nothing is opened
    but shards, and of those only the headers are read. Raises DataProblem for a place that does not exist or a named
    shard that is none.
    """
    found, seen = Found(), set()
    for place in (path for one in data for path in expanded(os.fspath(one))):
        if place.is_dir():
            _search_folder(place, found, seen)
        elif not place.is_file():
            raise DataProblem(f"{place}: expected a folder of images or a shard, found nothing there; check the path.")
        elif place.name.lower().endswith(PACKED):
            raise DataProblem(
                f"{place}: expected a folder or an uncompressed .tar, found a packed archive; unpack it first."
            )
        elif place.suffix.lower() == SHARD:
            try:
                _search_shard(place, str(place), found, seen)
            except tarfile.TarError as error:
                raise DataProblem(
                    f"{place}: expected an uncompressed tar of images, found something else ({error}); make it again."
                ) from error
        else:
            _add(place, place.name, found, seen)
    return found


def image_entries(images: Tensor | Sequence[Tensor], name: str = "image") -> list[MemoryEntry]:
    """Entries for images in memory: [B, H, W, C] or any number of [H, W, C] or [B, H, W, C], C = 3 or 4, in 0..1.

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


def expanded(pattern: str) -> Iterator[Path]:
    """The paths a pattern stands for; itself where a file or folder has that very name."""
    if not pattern:
        raise DataProblem("Expected a folder of images or a shard, found an empty path; . is the folder you are in.")
    path = Path(os.path.expanduser(pattern))
    if path.exists():
        yield path
        return
    for one in _without_braces(str(path)):
        if Path(one).exists() or not has_magic(one):
            yield Path(one)
            continue
        matches = sorted(glob(one, recursive=True))
        if not matches:
            raise DataProblem(f"{one}: expected images or shards, found nothing that fits the pattern; check the path.")
        yield from map(Path, matches)


def _without_braces(pattern: str) -> list[str]:
    parts = BRACES.split(pattern)  # text, choice, text, choice, ..., text
    choices = [[part] if index % 2 == 0 else _choices(part) for index, part in enumerate(parts)]
    return ["".join(combination) for combination in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    numbers = RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last = (int(text) for text in numbers.groups())
    step = 1 if last >= first else -1
    width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
    return [str(number).zfill(width) for number in range(first, last + step, step)]


def _unwanted(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def _search_folder(root: Path, found: Found, seen: set[str]) -> None:
    files: list[tuple[tuple[str, ...], Path]] = []
    waiting, visited = [(root, ())], {os.path.realpath(root)}
    while waiting:
        folder, parts = waiting.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            found.skipped.append((str(folder), f"cannot be read ({error.strerror or error}); check its permissions"))
            continue
        if parts and OF_A_RUN <= {entry.name for entry in entries}:
            found.ignored["folders of runs"] += 1
            continue
        deeper = []
        for entry in entries:
            if _unwanted(entry.name):
                continue
            fault = ""
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
                if not is_folder and not is_file and entry.is_symlink():
                    fault = LOST_LINK
            except OSError as error:  # a link to itself, a drive that fails
                is_folder, is_file, fault = False, False, f"cannot be read ({error.strerror or error})"
            if is_folder:
                # Links, and Windows' junctions, which do not look like links, may lead back to where it has been.
                real = os.path.realpath(entry.path)
                if real not in visited:
                    visited.add(real)
                    deeper.append((Path(entry.path), (*parts, entry.name)))
            elif is_file:
                files.append(((*parts, entry.name), Path(entry.path)))
            elif fault:
                _miss(Path(entry.path), fault, found)
        waiting.extend(reversed(deeper))
    for parts, path in sorted(files):
        if path.suffix.lower() == SHARD:
            try:
                _search_shard(path, "/".join(parts), found, seen)
            except tarfile.TarError as error:
                found.skipped.append((str(path), f"is no uncompressed tar of images ({error})"))
        else:
            _add(path, "/".join(parts), found, seen)


def _miss(path: Path, fault: str, found: Found) -> None:
    """Tell of what is not there to look at; what its name says to be no image is ignored as if it were."""
    ending = path.suffix.lower()
    if ending in (*SUFFIXES, SHARD, ""):  # without ending it may be a folder
        found.skipped.append((str(path), fault))
    else:
        found.ignored[ending] += 1


def _add(path: Path, name: str, found: Found, seen: set[str]) -> None:
    if path.suffix.lower() not in SUFFIXES:
        found.ignored[path.suffix.lower()] += 1
        return
    real = os.path.realpath(path)
    if real not in seen:
        seen.add(real)
        try:
            found.entries.append(ImageEntry(name, path, path.stat().st_size))
        except OSError as error:
            found.skipped.append((str(path), f"cannot be read ({error.strerror or error})"))


def _search_shard(path: Path, name: str, found: Found, seen: set[str]) -> None:
    """Add a shard's images in the order they are in. Raises tarfile.TarError when its very start is no tar."""
    real = os.path.realpath(path)
    if real in seen:
        return
    seen.add(real)
    members: list[tarfile.TarInfo] = []
    try:
        # "r:" refuses compressed archives, in which nothing can be found without unpacking all before it.
        with tarfile.open(path, "r:") as shard:
            try:
                for member in shard:
                    members.append(member)
                fault = _fault_at_end(path, shard.offset)
            except (tarfile.TarError, OSError) as error:
                fault = f"is damaged after {{}} members ({error}); copy it again"
            if fault:
                found.skipped.append((str(path), fault.replace("{}", str(len(members)))))
    except OSError as error:
        found.skipped.append((str(path), f"cannot be read ({error.strerror or error})"))
        return
    plain = [member for member in members if member.isreg() and not member.issparse()]
    wanted = [member for member in plain if not any(map(_unwanted, PurePosixPath(member.name).parts))]
    latest = {member.name: member for member in wanted}  # as unpacking leaves a name that was added again
    chosen = _one_per_key(list(latest.values()))
    for member in wanted:
        if latest[member.name] is not member:
            found.ignored["replaced by a later one of their name"] += 1
        elif member.name in chosen and chosen[member.name] is member:
            found.entries.append(ImageEntry(f"{name}!{member.name}", path, member.size, member.offset_data, True))
        elif PurePosixPath(member.name).suffix.lower() not in SUFFIXES:
            found.ignored[PurePosixPath(member.name).suffix.lower()] += 1
        else:
            found.ignored["of samples with another image"] += 1


def _fault_at_end(path: Path, offset: int) -> str:
    """What is wrong where the members of a tar end, "{}" standing for their number; "" for an end mark and no more.

    tarfile takes any header but the first that is damaged or cut off for the end of the archive.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        mark, rest = file.read(BLOCK), file.read(REST)
    if not mark:
        return "ends after {} members without an end mark, so more of them may be missing; copy it again"
    if len(mark) < BLOCK or any(mark):
        return "is damaged or cut off after {} members; copy it again"
    if any(rest):
        return "goes on behind the end mark after {} members, of which nothing is read; make one tar of all"
    return ""


def _one_per_key(members: Sequence[tarfile.TarInfo]) -> dict[str, tarfile.TarInfo]:
    """The image of each WebDataset sample: members of one key (the name up to the first dot) belong together.

    A sample's ``KEY.jpg`` (or the first of the other endings) is its image, and ``KEY.mask.png`` beside it is not.
    Without a plain one all its images count, because then the dots are just part of file names.
    """
    samples: dict[str, list[tuple[str, tarfile.TarInfo]]] = {}
    for member in members:
        folder, _, base = member.name.rpartition("/")
        key, _, ending = base.partition(".")
        if PurePosixPath(base).suffix.lower() in SUFFIXES:
            samples.setdefault(f"{folder}/{key}", []).append((f".{ending}".lower(), member))
    chosen = {}
    for images in samples.values():
        plain = [(SUFFIXES.index(ending), index) for index, (ending, _) in enumerate(images) if ending in SUFFIXES]
        for _, member in [images[min(plain)[1]]] if plain else images:
            chosen[member.name] = member
    return chosen
