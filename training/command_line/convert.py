"""``indomain convert``: a domain model file from a checkpoint, or a generator file from a pickle."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...guidance.files import (
    DTYPES,
    FileProblem,
    ModelFile,
    convert_generator,
    file_tensors,
    holds_generator,
    read_domain_file,
    unet_layout,
    write_domain_file,
)
from ...guidance.files.domain_metadata import FORMAT as DOMAIN_FORMAT
from ...guidance.files.layouts import AUTOENCODER_PREFIX
from ..domain.config import FORMS, TrainConfig
from ..domain.finished import write_domain_model
from ..domain.trainee import start_model
from ..engine.processes import pick_device
from ..mini_world import MINI_WORLD
from ..prior.opening import open_checkpoint, open_mini_world
from .console import Console
from .inspect import form_of, inspect
from .models import find_model
from .parser import DONE, add_command, add_device, add_option, add_output, as_usage, given, print_result, text, whole


def add_convert(commands: Any) -> None:
    prediction = TrainConfig.__dataclass_fields__["prediction"].metadata
    command = add_command(
        commands,
        "convert",
        _convert,
        "make a domain model file from a checkpoint, or a generator file from a pickle",
        "From a checkpoint: its UNet alone, or with --form cached or constant an untrained text-free one. From a "
        "domain model: the same in another number format. From a StyleGAN2 generator (NVIDIA's .pkl, rosinality's or "
        "StyleGAN-NADA's .pt): the generator as .safetensors, read without running anything that the file contains.",
    )
    what = (
        "a checkpoint, a domain model, a generator, a finished run's folder, or one that ships: mini_world "
        "(checkpoint), mini-handwriting (domain model)"
    )
    add_option(command, "source", what, metavar="FROM")
    add_option(command, "target", "the .safetensors file to write", metavar="TO")
    command.add_argument(
        "--form",
        choices=FORMS,
        default="",
        help="from a checkpoint: cached, constant (which is measured, so takes a while) or full (default)",
    )
    command.add_argument(
        "--file-dtype", choices=DTYPES, default="", help="numbers of the file (default fp16; a generator's fp32)"
    )
    command.add_argument("--prediction", choices=prediction["choices"], default="auto", help=prediction["help"])
    side = (
        "form constant: size of the pictures it is measured on (default: what the checkpoint was made for, 512 for SD "
        "1.5, 1024 for SDXL)"
    )
    add_option(command, "--resolution", side, whole(64, 8192), metavar="PIXELS")
    add_option(command, "--name", "what to call the model (default: the file's name)", text, default="")
    add_device(command)
    command.add_argument("--overwrite", action="store_true", help="replace TO if it exists")
    add_output(command, "what inspect says of the new file")


def _convert(options: argparse.Namespace) -> int:
    source = options.source if options.source == MINI_WORLD else find_model(options.source)
    if os.path.exists(options.target) and not options.overwrite:
        raise FileProblem(f"{options.target}: expected a new file to write, found one there; add --overwrite.")
    console = Console(quiet=options.quiet)
    written = convert(
        source,
        options.target,
        **given(options, ("form", "file_dtype", "prediction", "resolution", "name")),
        device=as_usage(lambda: pick_device(options.device)),
        on_probe=lambda done, total: console.count("measuring", done, total),
    )
    print_result(inspect(written) if options.json else str(written))
    return DONE


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    form: str = "",
    file_dtype: str = "",
    prediction: str = "auto",
    resolution: int | None = None,
    name: str = "",
    device: torch.device | str = "cpu",
    on_probe: Callable[[int, int], None] | None = None,
) -> Path:
    """Make a domain file out of a checkpoint ("mini_world" for the shipped prior) or out of another domain file.

    From a checkpoint, form "cached" or "constant" gives an untrained text-free UNet, "full" its UNet alone; `constant`
    is measured at `resolution` pixels (None: what the checkpoint was made for) on `device`. From a domain file (form ""
    or its own) the number format changes and its knowledge about itself is kept. From a StyleGAN2 generator of any
    readable format: a generator file, which nothing leads back from. file_dtype: "fp16" where it is "", a generator's
    "fp32". Raises FileProblem and ValueError; `source` is never written to.
    """
    if resolution is not None:
        TrainConfig(base=MINI_WORLD, resolution=resolution)  # refuses one that no run could have
    target = Path(target)
    if str(source) == MINI_WORLD:
        prior = open_mini_world(prediction)
    else:
        source = Path(source)
        if target.exists() and source.exists() and target.samefile(source):
            raise FileProblem(f"{target}: expected another file to write than the one to read; choose another name.")
        if holds_generator(source):
            if form:
                raise FileProblem(f"{source}: expected a checkpoint to make the form {form} from, found a generator.")
            return convert_generator(source, target, dtype=file_dtype or "fp32", name=name)
        file = ModelFile(source)
        own = form_of(unet_layout(file.keys, source))
        alone = file.metadata.get("format") == DOMAIN_FORMAT or own != "full"
        if alone or (form in ("", "full") and not any(key.startswith(AUTOENCODER_PREFIX) for key in file.keys)):
            return _convert_domain(source, target, form, own, file_dtype or "fp16", name)
        prior = open_checkpoint(source, prediction=prediction)
    resolution = resolution or prior.native_resolution or 512
    trainee = start_model(prior, form or "full", resolution=resolution, device=device, on_probe=on_probe)
    return write_domain_model(
        target,
        trainee.weights(),
        trainee.config,
        prior,
        file_dtype=file_dtype,
        null_text_error=trainee.null_text_error,
        name=name,
    )


def _convert_domain(source: Path, target: Path, form: str, own: str, file_dtype: str, name: str) -> Path:
    if form and form != own:
        raise FileProblem(
            f"{source}: expected a full checkpoint to make the form {form} from, found a UNet of form {own} alone, "
            "which lacks the text encoder (and, text-free, the text); convert the checkpoint it was made of."
        )
    weights, metadata = read_domain_file(source)
    if name:
        metadata = replace(metadata, domain_name=name)
    return write_domain_file(target, file_tensors(weights, file_dtype, target), metadata)
