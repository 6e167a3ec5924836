"""``indomain sample``: pictures of a domain model, a LoRA or an image generator, saved with how they were made."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...guidance.files import (
    DTYPES,
    DomainMetadata,
    add_lora,
    check_latent_format,
    holds_lora,
    read_domain_file,
    read_keys,
    read_lora,
)
from ...guidance.files.atomic import replacing
from ...guidance.files.lora import TEXT_PREFIXES
from ...guidance.networks.stylegan2 import class_labels, latents_of_seeds
from ..adaptation.adapt import open_generator
from ..engine.processes import pick_device, pick_precision
from ..engine.settings import ConfigProblem, fields_of, kinds_of
from ..mini_world import MINI_WORLD
from ..prior.opening import open_prior
from ..prior.prior import Prior
from ..prior.settings import PriorSettings
from .console import Console
from .drawing import Artist, DrawingSettings, Drawn
from .models import comfyui_tokenizer, find_domain, find_generator
from .parser import DONE, add_command, add_device, add_option, add_output, add_setting, given, print_result, text, whole

# Settings of `DrawingSettings` whose default depends on the model.
SIZE = {"width": "the resolution it was trained at, else what the prior was made for", "height": "the width"}
OF_DOMAIN_MODELS, OF_LORAS = ("domain_weight", "domain_start", "domain_end"), ("strength",)


def add_sample(commands: Any) -> None:
    command = add_command(
        commands,
        "sample",
        _sample,
        "draw pictures with a base and a domain model or LoRA, or with an image generator",
        "In-domain guidance, base + w_d (domain - base) + w_c (prompt - base); a weight of 0 leaves its part out, "
        "--domain-weight 1 --control-weight 0 is the domain model alone. With a LoRA in kohya's layout, which is added "
        "to the base at --strength: base + w_c (prompt - base). Of an image generator, StyleGAN2 in any of the files "
        "that adapt takes, only count, seed, truncation, output and device matter.",
    )

    what = (
        "a domain model, LoRA or generator file, a run's folder, or one that ships: mini-handwriting (domain model), "
        "mini_world (generator)"
    )
    add_option(command, "domain", what, metavar="MODEL")
    add_option(command, "-b --base", "the prior, a file or mini_world (default: the run's)")
    add_option(command, "-p --prompt", "what to draw; again for more (default: none)", text, action="append")
    add_option(command, "--negative", "prompt of the base (default: empty)", text, default="")
    where = "folder (default: pictures); a picture whose name is taken gets a number behind it"
    add_option(command, "-o --output", where, default="pictures", metavar="DIR")
    add_option(command, "-c --count", "pictures per prompt (default 4)", whole(1, 1_000_000), default=4)
    add_option(command, "--seed", "of the first; the next one has N + 1", whole(0, 2**62), default=0)
    kinds = kinds_of(DrawingSettings)
    for field in fields_of(DrawingSettings):
        if field.name not in SIZE:
            add_setting(command, field, kinds[field.name])
    for name, otherwise in SIZE.items():
        add_option(command, f"--{name}", f"(default: {otherwise})", whole(64, 16384), metavar="PIXELS")
    truncation = "image generators only: 1 none, 0 the mean image (default 0.7)"
    add_option(command, "--truncation", truncation, float, default=0.7)
    add_option(command, "--vae", "another VAE than the checkpoint's", default="")
    tokenizer = "folder with CLIP's vocab.json and merges.txt (default: the run's, else ComfyUI's)"
    add_option(command, "--tokenizer", tokenizer, default="")
    command.add_argument(
        "--precision", choices=("auto", *DTYPES), default="auto", help="auto: bf16 on GPUs that have it, else fp32"
    )
    add_device(command)
    add_output(command, "one JSON object a picture")


def _sample(options: argparse.Namespace) -> int:
    for picture in draw(options, Console(quiet=options.quiet)):
        print_result(picture if options.json else picture["path"])
    return DONE


def draw(options: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """Draw what the options say; a description of each picture once its file is there."""
    generator = find_generator(options.domain)
    if generator is not None:
        yield from _draw_with_generator(options, generator, console)
        return
    file, run = find_domain(options.domain)
    is_lora = file.is_file() and holds_lora(file)
    others = OF_DOMAIN_MODELS if is_lora else OF_LORAS
    for name in given(options, others):
        what = "LoRA, which has --strength" if is_lora else "domain model, which has --domain-weight"
        raise ConfigProblem(f"{name}: expected none with a {what}; leave it out.")
    settings = DrawingSettings(**given(options, kinds_of(DrawingSettings).keys() - SIZE))
    device = pick_device(options.device)
    where: dict[str, Any] = {"device": device, "dtype": DTYPES[pick_precision(options.precision, device)]}
    if is_lora:
        artist = Artist(_with_lora(options, file, run, settings.strength, console), **where)
    else:
        artist = Artist(*_with_domain(options, file, run, console), **where)
    prior, resolution = artist.prior, artist.metadata.resolution if artist.metadata else None
    width = options.width or resolution or prior.native_resolution or 512
    settings = settings.with_changes(width=width, height=options.height or width)
    pictures = artist.draw(
        options.prompt or [""],
        range(options.seed, options.seed + options.count),
        settings,
        options.negative,
        lambda done, total: console.count("drawing", done, total),
    )
    chosen = {key: value for key, value in settings.to_dict().items() if key not in others}
    for number, drawn in enumerate(pictures):
        name = f"{number // options.count + 1:02d}-{slug(drawn.prompt)}-{drawn.seed}.png"
        asked = {"prompt": drawn.prompt, "negative": options.negative, "seed": drawn.seed, "base": prior.name}
        model = {"lora" if is_lora else "domain": file.name}
        about = {**asked, **model, **chosen, "samples_per_step": round(drawn.samples_per_step, 4)}
        yield {"path": str(save(drawn, Path(options.output) / name, about)), **about}


def _with_domain(
    options: argparse.Namespace, file: Path, run: PriorSettings | None, console: Console
) -> tuple[Prior, dict[str, Tensor], DomainMetadata]:
    """The prior, and a domain model's weights and what it says about itself."""
    weights, metadata = read_domain_file(file)
    prior = _open_prior(options, file, run, MINI_WORLD if metadata.latent_format == MINI_WORLD else "")
    check_latent_format(metadata, prior.latent_format, file)
    _warn_of_another_prior(metadata.prior_hash, prior, file, console)
    return prior, weights, metadata


def _with_lora(
    options: argparse.Namespace, file: Path, run: PriorSettings | None, strength: float, console: Console
) -> Prior:
    """The prior with a LoRA in its UNet."""
    lora, metadata = read_lora(file)
    stated = metadata.get("prior_hash")
    of_mini_world = stated and not options.base and run is None and stated == open_prior(MINI_WORLD).prior_hash
    prior = _open_prior(options, file, run, MINI_WORLD if of_mini_world else "")
    _warn_of_another_prior(stated, prior, file, console)
    if any(key.startswith(TEXT_PREFIXES) for key in read_keys(file)):
        console.warn(f"{file.name} changes text encoders too, which is left out here; in ComfyUI pictures will differ.")
    return dataclasses.replace(prior, unet=add_lora(prior.unet, lora, prior.config, strength, file))


def _open_prior(options: argparse.Namespace, file: Path, run: PriorSettings | None, otherwise: str) -> Prior:
    """The prior of a model, its VAE and tokenizer: from the options, the run, or `otherwise`, what the file says."""
    base = options.base or (run.base if run else "") or otherwise
    if not base:
        raise ConfigProblem(f"expected --base FILE, the checkpoint that {file.name} was made from.")
    vae = options.vae or (run.vae if run and not options.base else "")
    return open_prior(
        base, vae=vae, tokenizer=options.tokenizer or (run.tokenizer if run else "") or comfyui_tokenizer()
    )


def _warn_of_another_prior(stated: str | None, prior: Prior, file: Path, console: Console) -> None:
    if stated and stated != prior.prior_hash:
        console.warn(f"{file.name} was made from another prior than {prior.name}; pictures may suffer.")


def _draw_with_generator(options: argparse.Namespace, file: str, console: Console) -> Iterator[dict[str, Any]]:
    """Pictures of an image generator, one a seed; a conditional one draws its classes in turn."""
    if any(options.prompt or ()) or options.negative:
        raise ConfigProblem("prompt: expected none for an image generator, which makes what it was adapted to.")
    loaded = open_generator(file)
    for note in loaded.notes:
        console.warn(note)
    generator, name = loaded.generator.to(pick_device(options.device)), Path(file).name
    config, device = generator.config, next(generator.parameters()).device
    for number, seed in enumerate(range(options.seed, options.seed + options.count)):
        z = latents_of_seeds([seed], config.z_dim).to(device)
        label = number % config.c_dim if config.c_dim else None
        c = None if label is None else class_labels([label], config.c_dim).to(device)
        with torch.no_grad():
            pixels = generator(z, c, options.truncation)[0].expand(3, -1, -1).cpu()
        about = {"generator": name, "seed": seed, "truncation": options.truncation, "label": label}
        about |= {"width": config.width, "height": config.height}
        target = save(Drawn("", seed, pixels, 0.0), Path(options.output) / f"{slug(Path(file).stem)}-{seed}.png", about)
        console.count("drawing", number + 1, options.count)
        yield {"path": str(target), **about}


def slug(prompt: str) -> str:
    """A prompt as part of a file name on any system."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:48].rstrip("-") or "picture"


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
