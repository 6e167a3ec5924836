"""The pictures of a run: folders that a prompt names, IMAGE batches written as files, and what a run has drawn."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from glob import has_magic
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import numpy as np
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image
from torch import Tensor

from ....guidance.errors import Problem
from ....guidance.files import FileProblem
from ..allowed_folders import allowed_folders, check_allowed
from ..progress import ProgressBar, uncancelled
from .prior import NODE

MINI_WORLD_DOMAINS = ("handwriting", "narrow")
MOST_LOOKED_FOR_CHANGES = 250_000  # files and folders, some seconds on a disk


def resolve_data(text: str, node: str = NODE) -> tuple[str, ...]:
    """The paths in the folder input, divided by ";" or lines; relative ones lie in ComfyUI's input folder.

    node: whose messages they are. Raises FileProblem for a path that is not there or that no prompt may name. Patterns
    are left to the trainer.
    """
    from ....training.data.patterns import as_on_disk
    from ....training.data.walking import Watch

    allowed = allowed_folders()
    paths = _paths(text, allowed, node)
    for path in paths:
        if not has_magic(path) and "{" not in path and not os.path.lexists(as_on_disk(path, Watch(within=allowed))):
            raise FileProblem(
                f"{node}: expected a folder of images, found nothing at {path}; give a full path, or the name of a "
                "folder in ComfyUI's input folder."
            )
    return tuple(paths)


def _paths(text: str, allowed: Sequence[str] | None, node: str = NODE) -> list[str]:
    parts = (part.strip().strip('"') for part in text.replace("\n", ";").split(";"))
    return [_path(part, allowed, node) for part in parts if part]


def _path(text: str, allowed: Sequence[str] | None, node: str) -> str:
    """The path of one part: as it stands where something lies there, else without quotes, or that of a file:// URL."""
    from ....training.engine.paths import is_of_windows, meant_path, plain_path

    plain = plain_path(text)
    if plain != text:
        with suppress(FileProblem):
            path = check_allowed(text, node, allowed)
            if os.path.lexists(path):
                return path
    if allowed is None and is_of_windows(plain):
        plain = meant_path(plain)
    return check_allowed(plain, node, allowed)


def data_fingerprint(text: str) -> str | float:
    """Changes when a file in one of the folders is added, removed or replaced; for ComfyUI's cache of node outputs.

    NaN, which equals nothing, where there is too much to look at or the folders cannot be trained on.
    """
    from ....training.data.problems import Cancelled
    from ....training.data.sources import fingerprint
    from ....training.data.walking import Watch

    try:
        allowed = allowed_folders()
        watch = Watch(comfy.model_management.processing_interrupted, allowed, most=MOST_LOOKED_FOR_CHANGES)
        return fingerprint(_paths(text, allowed), watch)
    except Cancelled:  # ComfyUI would take an exception here for a node without fingerprint; it cancels before the node
        return ""
    except Problem:
        return float("nan")


def write_images(batches: Sequence[Tensor], folder: Path, node: str = NODE) -> Path:
    """Write IMAGE batches ([B, H, W, C] in 0..1) as PNG files into a folder, all named by their content."""
    pictures, names = [], []
    for batch in batches:
        for image in uncancelled(batch):
            image = image.detach().float().cpu()
            if not bool(image.isfinite().all()):
                raise Problem(f"{node}: expected finite images, found NaN; check the node that makes them.")
            pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy()
            pictures.append(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            names.append(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:24])
    folder = folder / f"images-{hashlib.sha256(''.join(sorted(names)).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    progress = ProgressBar(len(pictures))
    for name, pixels in zip(names, pictures):
        path = folder / f"{name}.png"
        if not path.exists():
            temporary = folder / f".{name}.tmp"
            Image.fromarray(pixels).save(temporary, format="PNG", compress_level=1)
            os.replace(temporary, path)
        progress.update(1)
    return folder


def check_data(text: str, images: Sequence[Tensor] | None, node: str = NODE, needed: bool = True) -> tuple[str, ...]:
    """The folders that `text` names; none where there are images instead.

    Raises Problem for both, and for neither where some are needed.
    """
    folders = resolve_data(text, node)
    if folders and images:
        raise Problem(
            f"{node}: expected an image folder or the images input, found both; empty the one or disconnect the other."
        )
    if needed and not folders and not images:
        raise Problem(f"{node}: expected images to train on, found none; name an image folder or connect images.")
    return folders


def data_of(folders: Sequence[str], images: Sequence[Tensor] | None, run: Path, node: str = NODE) -> dict[str, Any]:
    """The configuration's fields for the images; IMAGE batches are written into the run's folder."""
    if images:
        return {"data": (str(write_images(images, run, node)),), "within": ()}
    return {"data": tuple(folders), "within": allowed_folders() or ()}


def load_image(path: Path | None) -> Tensor | None:
    """A picture as IMAGE [1, H, W, 3]; None where there is none."""
    if path is None or not Path(path).is_file():
        return None
    with Image.open(path, formats=("PNG",)) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0)[None]


def or_skipped(image: Tensor | None) -> Any:
    """The image; for None what makes ComfyUI skip the nodes that would have used it."""
    return ExecutionBlocker(None) if image is None else image


def mini_world_images(domain: str, count: int, seed: int) -> tuple[Path, Tensor]:
    """Handwriting in the colours of a mini world's domain: (folder in ComfyUI's input folder, IMAGE batch)."""
    from ....training.mini_world.pictures import export_pictures

    folder = Path(folder_paths.get_input_directory()) / "mini_world" / f"{domain}-{count}-seed-{seed}"
    progress = ProgressBar(count)
    paths = export_pictures(folder, domain, count, seed, progress.update_absolute)
    images = [load_image(path) for path in uncancelled(paths)]
    return folder, torch.cat([image for image in images if image is not None])
