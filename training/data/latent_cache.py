"""Encoded images on disk, shared by all runs: keyed by content, VAE, size, crop and flip; safe for several processes.

One small safetensors file per encoded picture, with a digest over name and numbers. Files are written under a temporary
name and renamed; where the file system has hard links the first one written stays, so that processes that share a
folder read the same numbers. Nothing is flushed to the disk: an entry that a power failure tears fails its digest and
is encoded again, which costs far less than thousands of flushes.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...guidance.errors import logger
from ...guidance.files import FileProblem
from .buckets import Size

# Part of every key: raise it when pictures are decoded, scaled or stored differently.
PIPELINE = 4
MOST_WARNINGS = 10
ABANDONED_SECONDS = 24 * 3600.0


def default_cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where latents are kept unless a run says otherwise: ``latents`` in the user's cache folder for this project."""
    if environ.get("INDOMAIN_CACHE"):
        root = Path(os.path.expanduser(environ["INDOMAIN_CACHE"])).absolute()
    elif os.name == "nt" and environ.get("LOCALAPPDATA"):
        root = Path(environ["LOCALAPPDATA"]) / "indomain-guidance"
    elif environ.get("XDG_CACHE_HOME"):
        root = Path(os.path.expanduser(environ["XDG_CACHE_HOME"])).absolute() / "indomain-guidance"
    else:
        try:
            root = Path.home() / ".cache" / "indomain-guidance"
        except RuntimeError as error:  # a user without an entry, as in some containers
            text = "Expected a home folder to keep latents in, found none; set cache, or INDOMAIN_CACHE, to a folder."
            raise FileProblem(text) from error
    return root / "latents"


def log_warning(text: str) -> None:
    """Where warnings go unless the caller takes them."""
    logger(__name__).warning(text)


class LatentCache:
    """Posterior mean and standard deviation of encoded pictures, fp32, under a folder that may be deleted at any time.

    vae_id: content hash of the autoencoder. warn gets a sentence for each of the first damaged entries. Raises
    FileProblem when the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike, vae_id: str, warn: Callable[[str], None] = log_warning) -> None:
        self.root = Path(folder)
        self.folder = self.root / hashlib.sha256(vae_id.encode()).hexdigest()[:20]
        self.vae_id, self._warn, self._warned = vae_id, warn, 0
        self._scratch = self.folder / "unfinished"
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileProblem(
                f"{self.root}: could not be made a latent cache ({error.strerror or error}); set cache to a folder you "
                "can write to."
            ) from error
        self._forget_abandoned()

    def key(self, content: str, size: Size, crop: tuple[int, int] = (0, 0), flipped: bool = False) -> str:
        """Name of one encoded picture. content: SHA-256 of the image file; size, crop: (height, width), (top, left)."""
        parts = (PIPELINE, content, self.vae_id, *size, *crop, bool(flipped))
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    def path(self, key: str) -> Path:
        """The file of one entry, whether it is there or not."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether there is a file for the key, damaged or not."""
        return self.path(key).is_file()

    def get(self, key: str) -> tuple[Tensor, Tensor] | None:
        """(mean, std) [C, h, w] each, fp32; None when there is no entry. A damaged one is reported and removed."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._complain(f"{path}: cannot be read ({error.strerror or error}); the image is encoded again.")
            return None
        with suppress(SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
            tensors = load(data)
            mean, std = tensors["mean"], tensors["std"]
            if bytes(tensors["digest"].tolist()) == _digest(key, mean, std):
                return mean, std
        self._complain(f"{path}: expected cached latents, found a damaged file; the image is encoded again.")
        with suppress(OSError):
            path.unlink()
        return None

    def put(self, key: str, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Store an entry and return (mean, std) as `get` will, which is another process' when that was first.

        Raises FileProblem when the disk is full or the folder cannot be written.
        """
        # Copies of their own: as parts of a batch they would keep all of it in memory.
        mean, std = (part.detach().to("cpu", torch.float32, copy=True).contiguous() for part in (mean, std))
        digest = torch.tensor(list(_digest(key, mean, std)), dtype=torch.uint8)
        path, temporary = self.path(key), self._scratch / uuid.uuid4().hex
        try:
            for folder in (self._scratch, path.parent):  # somebody may have emptied the cache
                folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(save({"mean": mean, "std": std, "digest": digest}))
            placed = _place(temporary, path)
        except OSError as error:
            raise FileProblem(
                f"{path}: could not be written ({error.strerror or error}); free some space or set cache to another "
                "folder."
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink()
        other = None if placed else self.get(key)
        return other or (mean, std)

    def _complain(self, text: str) -> None:
        """Warn, but not once per image of a cache that is damaged altogether."""
        self._warned += 1
        if self._warned <= MOST_WARNINGS:
            more = " There are more of them, not listed here." if self._warned == MOST_WARNINGS else ""
            self._warn(text + more)

    def _forget_abandoned(self) -> None:
        """Remove unfinished files of processes that were killed, once they are a day old."""
        with suppress(OSError):
            for path in self._scratch.iterdir():
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                        path.unlink()


def _place(temporary: Path, path: Path) -> bool:
    """Give a finished file its name unless the name is taken; whether it got it."""
    try:
        os.link(temporary, path)  # unlike renaming, never replaces what another process has put there
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        pass
    try:
        os.replace(temporary, path)
    except PermissionError:
        # Windows: another process has just put its own there and is reading it.
        if not path.is_file():
            raise
        return False
    return True


def _digest(key: str, mean: Tensor, std: Tensor) -> bytes:
    digest = hashlib.sha256(f"{key} {mean.dtype} {list(mean.shape)} {list(std.shape)}".encode())
    for tensor in (mean, std):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
