"""Handwritten digits as PNG files: a folder of images to try training on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ...guidance.errors import Problem
from ...guidance.files import FileProblem
from ...guidance.files.atomic import replacing
from . import render

DOMAINS = ("handwriting", "narrow")


def export_pictures(
    folder: Path,
    domain: str = "handwriting",
    count: int = 500,
    seed: int = 0,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write `count` handwritten digits as PNG files of 64 x 64 pixels, without captions or labels; their paths.

    They are the first `count` (1 to 8,000) of the rows that domain models are trained on, never held-out ones.
    domain: ``handwriting`` in its 16 colour pairs, drawn with `seed`, or ``narrow``, white on black. The same arguments
    give the same bytes. on_picture(done, total) is called after each file. Raises Problem for a count out of range and
    FileProblem for a folder that holds other files: a training run would take them for images of the domain.
    """
    folder, most = Path(folder), render.TRAIN_ROWS.stop
    if not 1 <= count <= most:
        raise Problem(f"Expected 1 to {most} images of the mini world, got {count}.")
    pairs = render.domain_pairs(domain)
    paths = [folder / f"{domain}-{number:04d}.png" for number in range(count)]
    if folder.exists() and not folder.is_dir():
        raise FileProblem(f"{folder}: expected a folder for the images, found a file; choose another name.")
    others = {path.name for path in folder.iterdir()} - {path.name for path in paths} if folder.is_dir() else set()
    if others:
        raise FileProblem(
            f"{folder}: expected an empty folder, found {len(others)} other files such as {min(others)}; choose "
            "another folder, or remove them."
        )
    pictures = render.handwritten(slice(0, count), pairs, render.step_generator(seed, 0))
    for done, (path, pixels) in enumerate(zip(paths, render.to_uint8(pictures.images)), start=1):
        with replacing(path) as file:
            Image.fromarray(pixels).save(file, "PNG")
        on_picture(done, count)
    return paths
