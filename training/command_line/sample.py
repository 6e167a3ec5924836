"""``indomain sample``: finds the files that its options name, draws, and saves pictures that say how they were made."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...guidance.files import (
    DTYPES,
    DomainMetadata,
    FileProblem,
    check_latent_format,
    holds_generator,
    read_domain_file,
)
from ...guidance.files.atomic import replacing
from ...guidance.networks.seeds import latents_of_seeds
from ..adaptation.config import AdaptConfig
from ..domain.config import TrainConfig
from ..engine.checkpoints import find_checkpoints
from ..engine.folder import CONFIG
from ..engine.processes import pick_device, pick_precision
from ..engine.settings import ConfigProblem
from ..engine.small_files import read_values
from ..mini_world import MINI_WORLD
from ..prior.opening import open_prior
from .console import Console, own_command
from .drawing import Artist, DrawingSettings, Drawn
from .kinds import kind_of


def run(options: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """Draw what the options of ``indomain sample`` say; a description of each picture once its file is there."""
    if options.count < 1:
        raise ConfigProblem(f"count: expected at least 1 picture, found {options.count}.")
    generator = find_generator(options.domain)
    if generator is not None:
        yield from _run_generator(options, generator, console)
        return
    path, trained = find_domain(options.domain)
    weights, metadata = read_domain_file(path)
    config = base_config(options, metadata, trained, path)
    settings = DrawingSettings(
        options.domain_weight,
        options.control_weight,
        options.domain_start,
        options.domain_end,
        options.steps,
        options.method,
        options.spacing,
        batch=options.batch_size,
    )
    device = pick_device(options.device)
    base = open_prior(config.base, vae=config.vae, tokenizer=config.tokenizer)
    width = options.width or metadata.resolution or base.native_resolution or 512
    settings = replace(settings, size=(options.height or width, width))
    check_latent_format(metadata, base.latent_format, path)
    if metadata.prior_hash and metadata.prior_hash != base.prior_hash:
        console.warn(f"{path.name} was made from another prior than {base.name}; pictures may suffer.")
    artist = Artist(base, weights, metadata, device=device, dtype=DTYPES[pick_precision(options.precision, device)])
    del weights
    prompts = options.prompt or [""]
    seeds = range(options.seed, options.seed + options.count)
    pictures = artist.draw(
        prompts, seeds, settings, options.negative, lambda done, total: console.count("drawing", done, total)
    )
    for number, drawn in enumerate(pictures):
        prompt_number = number // options.count
        target = Path(options.output) / f"{prompt_number + 1:02d}-{slug(drawn.prompt)}-{drawn.seed}.png"
        about = describe(drawn, settings, options.negative, path, base.name)
        yield {"path": str(save(drawn, target, about)), **about}


def _run_generator(options: argparse.Namespace, path: str, console: Console) -> Iterator[dict[str, Any]]:
    """Pictures of an image generator, one a seed; a conditional one draws its classes in turn."""
    from ..adaptation.adapt import open_generator

    if any(options.prompt or ()) or options.negative:
        raise ConfigProblem("prompt: expected none for an image generator, which makes what it was adapted to.")
    loaded = open_generator(path)
    for note in loaded.notes:
        console.warn(note)
    generator, name = loaded.generator.to(pick_device(options.device)), Path(path).name
    config, device = generator.config, next(generator.parameters()).device
    for number, seed in enumerate(range(options.seed, options.seed + options.count)):
        z = latents_of_seeds([seed], config.z_dim).to(device)
        label = number % config.c_dim if config.c_dim else None
        c = None if label is None else torch.eye(config.c_dim)[[label]].to(device)
        with torch.no_grad():
            pixels = generator(z, c, options.truncation)[0].expand(3, -1, -1).cpu()
        about = {"generator": name, "seed": seed, "truncation": options.truncation, "label": label}
        about |= {"width": config.width, "height": config.height}
        target = Path(options.output) / f"{slug(Path(path).stem)}-{seed}.png"
        target = save(Drawn("", seed, pixels, 0.0), target, about)
        console.count("drawing", number + 1, options.count)
        yield {"path": str(target), **about}


def find_generator(name: str) -> str | None:
    """The generator that a name stands for: a file, a run's folder, mini_world; None where it is something else.

    Raises FileProblem for the folder of an adaptation that is not finished.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            return None
        config, file = _run_in(path)
        return str(_finished(file, path, "generator")) if isinstance(config, AdaptConfig) else None
    if name == MINI_WORLD:
        return name
    return name if path.is_file() and holds_generator(path) else None


def find_domain(name: str) -> tuple[Path, TrainConfig | None]:
    """The file a name stands for, and the configuration of its run where the name is a run's folder.

    A file, a run's folder, or the name of a domain model that ships. Raises FileProblem where nothing is.
    """
    path = Path(name)
    if path.is_dir():
        config, file = _run_in(path)
        return _finished(file, path, "domain model"), config
    if not path.exists() and path.name == name:
        from ..mini_world.assets import domain_unets_dir

        shipped = domain_unets_dir() / f"{name}.safetensors"
        if shipped.is_file():
            return shipped, None
    return path, None


def find_model(name: str, unfinished: bool = False) -> str:
    """The file of whatever model a name stands for: all that `find_generator` and `find_domain` know.

    unfinished: a run that is not finished stands for its last checkpoint. Raises FileProblem.
    """
    path = Path(name)
    if unfinished and (path / CONFIG).is_file():
        file = _run_in(path)[1]
        kept = find_checkpoints(path)
        if kept and not file.is_file():
            return str(kept[-1][1])
    if name == MINI_WORLD:
        from ..mini_world.assets import generators_dir

        return str(generators_dir() / "mini-handwriting.safetensors")
    return find_generator(name) or str(find_domain(name)[0])


def _run_in(folder: Path) -> tuple[TrainConfig | AdaptConfig, Path]:
    """The configuration of the run in a folder, and where its finished file is or will be. Raises FileProblem."""
    settings = folder / CONFIG
    if not settings.is_file():
        raise FileProblem(f"{folder}: expected a model's file or a run's folder, found no {CONFIG} in it.")
    config = kind_of(read_values(settings), str(settings)).read(settings)
    return config, folder / f"{config.name}.safetensors"


def _finished(file: Path, folder: Path, what: str) -> Path:
    if not file.is_file():
        raise FileProblem(
            f"{file}: expected the run's finished {what}, found none; go on with {own_command('resume', folder)}."
        )
    return file


def base_config(
    options: argparse.Namespace, metadata: DomainMetadata, trained: TrainConfig | None, path: Path
) -> TrainConfig:
    """What `open_prior` needs: the prior, its VAE and tokenizer, from the options, the run, or what the file says."""
    base = options.base or (trained.base if trained else "")
    if not base and metadata.latent_format == "mini_world":
        base = MINI_WORLD
    if not base:
        raise ConfigProblem(f"expected --base FILE, the checkpoint that {path.name} was made from.")
    vae = options.vae or (trained.vae if trained and not options.base else "")
    tokenizer = options.tokenizer or (trained.tokenizer if trained else "") or comfyui_tokenizer()
    return TrainConfig(base=base, vae=vae, tokenizer=tokenizer)


def comfyui_tokenizer() -> str:
    """The folder of CLIP's tokenizer in the ComfyUI that run.py found, "" where there is none."""
    comfyui = os.environ.get("INDOMAIN_COMFYUI_PATH", "")
    folder = os.path.join(comfyui, "comfy", "sd1_tokenizer") if comfyui else ""
    return folder if folder and os.path.isfile(os.path.join(folder, "vocab.json")) else ""


def slug(prompt: str) -> str:
    """A prompt as part of a file name on any system."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:48].rstrip("-") or "picture"


def describe(drawn: Drawn, settings: DrawingSettings, negative: str, domain: Path, base: str) -> dict[str, Any]:
    """How a picture was made, as JSON values."""
    height, width = settings.size
    return {
        "prompt": drawn.prompt,
        "negative": negative,
        "seed": drawn.seed,
        "base": base,
        "domain": domain.name,
        "domain_weight": settings.domain_weight,
        "control_weight": settings.control_weight,
        "domain_start": settings.domain_start,
        "domain_end": settings.domain_end,
        "steps": settings.steps,
        "method": settings.method,
        "spacing": settings.spacing,
        "width": width,
        "height": height,
        "samples_per_step": round(drawn.samples_per_step, 4),
    }


def free_path(path: Path) -> Path:
    """The path, or where its name is taken, with the next number behind it, as ComfyUI's SaveImage counts."""
    numbered = re.compile(re.escape(path.stem) + r"_(\d+)" + re.escape(path.suffix))
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    taken = [int(match[1]) for match in map(numbered.fullmatch, names) if match] + [1] * (path.name in names)
    return path.with_name(f"{path.stem}_{max(taken) + 1:05d}{path.suffix}") if taken else path


def save(drawn: Drawn, path: Path, about: dict[str, Any]) -> Path:
    """Write a picture as PNG with its description in the text field "indomain", replacing none; where it went."""
    from PIL import Image, PngImagePlugin

    values = ((drawn.pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    text = PngImagePlugin.PngInfo()
    text.add_text("indomain", json.dumps(about))
    path = free_path(path)
    with replacing(path) as file:
        Image.fromarray(values.permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG", pnginfo=text)
    return path
