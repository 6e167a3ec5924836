"""Images of the mini world's domains as files: a folder to try training on, and to compare one's own results with."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ...guidance.errors import Problem
from ...guidance.files import FileProblem
from ...guidance.files.atomic import replacing
from . import render
from .recipe.loop import step_generator

DOMAINS = ("handwriting", "narrow")
# Settings of the trainer that show handwriting in about a minute on two cores: ``indomain train --config mini_world``.
FIRST_RUN = {
    "base": "mini_world",
    "name": "first",
    "resolution": 64,
    "steps": 200,
    "batch_size": 32,
    "learning_rate": 8e-4,
    "warmup": 20,
    "schedule": "cosine",
    "ema": 0.98,
    "noisy_share": 0.5,
    "domain_weight": 1.2,
    "control_weight": 3.0,
    "sample_prompts": ("a red seven on a yellow background", "a blue three on a white background"),
    "sample_every": 100,
    "validate_every": 100,
    "checkpoint_every": 100,
}
# Settings of an adaptation in the miniature, about a minute on two cores: ``indomain adapt --config mini_world``. The
# source is grey: its colour layers have to learn too.
FIRST_ADAPTATION = {
    "generator": "mini_world",
    "base": "mini_world",
    "name": "first_adaptation",
    "prompt": "a yellow digit on a green background",
    "method": "csd",
    "scale": 7.5,
    "t_min": 300,
    "t_max": 900,
    "directional": 0.3,
    "latent_clamp": 0.0,
    "image_quantile": 0.0,
    "train": "synthesis",
    "freeze_bias": False,
    "steps": 150,
    "batch_size": 4,
    "learning_rate": 0.008,
    "ema": 0.95,
    "sample_every": 25,
}


def export_pictures(
    folder: Path,
    domain: str = "handwriting",
    count: int = 500,
    seed: int = 0,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write `count` handwritten digits as PNG files of 64 x 64 pixels, without captions or labels; their paths.

    They are the first `count` (1 to 8,000) of the rows that domain models are trained on; those that results are
    measured against are never written. domain: ``handwriting`` in its 16 colour pairs, drawn with `seed`, or
    ``narrow``, white on black. The same arguments give the same bytes. on_picture(done, total) is called after each
    file. Raises FileProblem where the folder holds anything else: a training run would take it for part of the domain.
    """
    folder = Path(folder)
    most = render.TRAIN_ROWS.stop
    if not 1 <= count <= most:
        raise Problem(f"Expected 1 to {most} images of the mini world, got {count}.")
    pairs = render.domain_pairs(domain)
    paths = [folder / f"{domain}-{i:04d}.png" for i in range(count)]
    if folder.exists() and not folder.is_dir():
        raise FileProblem(f"{folder}: expected a folder for the images, found a file; choose another name.")
    others = {path.name for path in folder.iterdir()} - {path.name for path in paths} if folder.is_dir() else set()
    if others:
        raise FileProblem(
            f"{folder}: expected an empty folder, found {len(others)} other files such as {min(others)}; choose "
            "another folder, or remove them."
        )
    pictures = render.handwritten(slice(0, count), pairs, step_generator(seed, 0))
    for i, (path, pixels) in enumerate(zip(paths, render.to_uint8(pictures.images))):
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        with replacing(path) as file:
            file.write(content.getvalue())
        on_picture(i + 1, count)
    return paths
