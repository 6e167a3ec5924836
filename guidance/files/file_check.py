"""Whether a path holds a model file at all: missing files, folders, and other kinds, told by their first bytes."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
import zipfile
from pathlib import Path

from ..errors import FileProblem

RUN_MARK, RUN_TRAILER = b"IDGSHA01", 40  # the checkpoint of a run ends with this mark and a digest, 40 bytes together
_PARTIAL_SUFFIXES = tuple(
    ".part .partial .crdownload .download .opdownload .incomplete .aria2 .tmp .!ut .!qb .filepart .unconfirmed".split()
)
_UNPACK = "unpack it and give the model file inside"
_ITSELF = "download the model itself"
# First bytes -> (what such a file is, what to do).
_MAGIC: dict[bytes, tuple[str, str]] = {
    b"GGUF": ("a GGUF file, which is quantised for other loaders", "use the original .safetensors"),
    b"\x1f\x8b": ("a gzip archive", _UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", _UNPACK),
    b"\x89PNG": ("a picture (PNG)", _ITSELF),
    b"\xff\xd8\xff": ("a picture (JPEG)", _ITSELF),
    b"RIFF": ("a picture or a sound", _ITSELF),
    b"\x89HDF": ("an HDF5 file (Keras)", "use PyTorch weights as .safetensors"),
    b"\x08\x03\x12": ("an ONNX network", "use PyTorch weights as .safetensors"),
    b"MZ": ("a program for Windows", "do not run it, and download the model from a source you trust"),
}
_WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<script", b"<?xml", b"<!--")
_TEXT_PICKLE = re.compile(rb"[\]}]|\((dp|lp|[ic]\w)|c[\w.]+\n[\w.]+\n")  # protocol 0, which is text


def existing_file(path: str | os.PathLike) -> Path:
    """The path of a file that may be a model. Raises FileProblem, saying what to do, for one that surely is none."""
    path = Path(path)
    if path.is_dir():
        names, what, advice = os.listdir(path), "a folder", "name the .safetensors file inside it"
        if "model_index.json" in names or any(name.startswith("diffusion_pytorch_model.") for name in names):
            what, advice = "a folder in diffusers' layout", "give the same model as one .safetensors file in LDM layout"
        raise FileProblem(f"{path}: expected a file, found {what}; {advice}.")
    if not path.is_file():
        raise FileProblem(f"{path}: expected a model file, found {_what_is_missing(path)}.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise FileProblem(f"{path}: cannot be read ({error.strerror}); check its permissions.") from error
    if size == 0:
        raise FileProblem(f"{path}: expected a model file, found an empty one; download or copy it again.")
    # aria2 keeps a second file beside a download that has its full size from the beginning.
    if path.name.lower().endswith(_PARTIAL_SUFFIXES) or os.path.lexists(f"{path}.aria2"):
        raise FileProblem(f"{path}: expected a model file, found an unfinished download; wait, or download it again.")
    found = _by_archive(path) if start.startswith(b"PK") else _by_first_bytes(start)
    if found is not None:
        raise FileProblem(f"{path}: expected a model file, found {found[0]}; {found[1]}.")
    return path


def _what_is_missing(path: Path) -> str:
    """What lies at a path instead of a file, and what to do, as the end of a sentence."""
    try:
        kind = os.lstat(path).st_mode
    except (OSError, ValueError):  # a name that no file can have
        near = _similar_name(path)
        if near:
            return f"nothing there, but {near} beside it; name that"
        return "nothing at this path; check name and folder"
    if stat.S_ISLNK(kind):
        return f"a link to {os.readlink(path)}, where no file is; name the file itself, or mend the link"
    return "a pipe, socket or device; name a file"


def _similar_name(path: Path) -> str | None:
    """A name in the folder that differs from the path's in capitals, in Unicode composition or by an ending."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold().strip(" .")

    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):
        return None
    wanted = plain(path.name)
    return next((name for name in names if wanted in (plain(name), plain(os.path.splitext(name)[0]))), None)


def _by_archive(path: Path) -> tuple[str, str] | None:
    """What a zip file is that is no torch checkpoint; None where it may be one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - RUN_TRAILER))
        if file.read(len(RUN_MARK)) == RUN_MARK:
            return "the checkpoint of a run of this project", "use the model that it writes, or resume it"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.lower() for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        return None  # a damaged one; how, its reader says
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program", "save the network's state_dict() where it was made"
    return None if any(name.endswith("data.pkl") for name in names) else ("a zip archive", _UNPACK)


def _by_first_bytes(start: bytes) -> tuple[str, str] | None:
    """What a file is that is no model; None where it may be one."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, found in _MAGIC.items():
        if start.startswith(magic):
            return found
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer instead of the weights", "run 'git lfs pull' or download the file itself"
    if text.startswith(_WEB_PAGE):
        return "a web page", "the download needs a login or the link is wrong; download the file itself"
    if start[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if not start.strip(b"\0"):
        return "nothing but zeros, an unfinished download", "download it again"
    if text.startswith((b"{", b"[")) and start[8:9] != b"{":
        return "JSON text", f"a configuration or a server's error is no model, {_ITSELF}"
    if _TEXT_PICKLE.match(start):
        return None
    if len(text) >= 8 and not re.search(rb"[^\t\r\n\x20-\x7e]", start):
        return "text", _ITSELF
    return None
