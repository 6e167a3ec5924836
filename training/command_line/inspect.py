"""``indomain inspect``: everything a model file knows about itself."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...guidance.errors import Problem, printable
from ...guidance.files import (
    TRAINING,
    DomainMetadata,
    GeneratorMetadata,
    ModelFile,
    holds_generator,
    read_generator,
    strip_unet_prefix,
    unet_layout,
)
from ...guidance.files.domain_metadata import FORMAT as DOMAIN_FORMAT
from ...guidance.files.generator_metadata import FORMAT as GENERATOR_FORMAT
from ...guidance.files.layouts import AUTOENCODER_PREFIX, TEXT_ENCODER_PREFIXES
from ...guidance.files.lora import TEXT_PREFIXES
from ...guidance.networks.unet_config import UNetConfig, unet_config_from_state_dict
from ...guidance.plain_json import parse_json
from ..domain.config import FORMS
from ..engine.checkpoints import MARK, TRAILER, load_checkpoint
from ..prior.families import FAMILIES
from .models import find_model
from .parser import DONE, add_command, add_option, add_output, print_result

MOST_SHOWN = 10_000  # characters of one fact of a file
CHECKPOINT_SUFFIX = ".ckpt"  # of old model files, and of this trainer's runs
DOWN = ".lora_down.weight"
Shapes = Mapping[str, tuple[tuple[int, ...], str]]  # of tensors, with their number formats


def add_inspect(commands: Any) -> None:
    command = add_command(
        commands,
        "inspect",
        _inspect,
        "tell everything a model file knows about itself",
        "Domain models of every form, LoRAs, checkpoints and UNets, and StyleGAN2 generators of every readable format.",
    )
    what = (
        "a .safetensors file, a generator's .pkl or .pt, a run's folder or checkpoint, or one that ships: "
        "mini-handwriting (domain model), mini_world (generator)"
    )
    add_option(command, "file", what, metavar="MODEL")
    add_output(command, "all of it as one JSON object", quiet=False)


def _inspect(options: argparse.Namespace) -> int:
    file = find_model(options.file, unfinished=True)
    print_result(inspect(file) if options.json else inspect_text(file))
    return DONE


def inspect(path: str | os.PathLike) -> dict[str, Any]:
    """Everything a model file knows about itself, as JSON values.

    kind: "domain model", "generator", "checkpoint", "UNet", "LoRA" or "training checkpoint" (of a run, to resume from);
    file: name, bytes, tensors, parameters, number formats. A domain model: form, architecture, latent space,
    prediction, prior, null context, errors of the constants, data, steps, training configuration; a generator:
    architecture, source, history; a checkpoint: family and parts; a LoRA: layers and their kinds, ranks, DoRA or not,
    prior, training configuration. Weights are read only where the header does not tell. Raises FileProblem for a file
    that is no model of these kinds.
    """
    path = Path(path)
    if path.suffix == CHECKPOINT_SUFFIX and path.is_file() and _ends_as_run_checkpoint(path):
        return _run_checkpoint(path)
    if holds_generator(path):
        return _generator(path)
    file = ModelFile(path)
    shapes, metadata = file.shapes(), file.metadata
    about = _file(path, [(math.prod(shape), dtype) for shape, dtype in shapes.values()])
    if any(key.endswith(DOWN) for key in file.keys):
        return {"kind": "LoRA", **about, **_low_rank(shapes, metadata)}
    layout = unet_layout(file.keys, path)
    unet = strip_unet_prefix({key: torch.empty(shape, device="meta") for key, (shape, _) in shapes.items()})
    parts = _parts(shapes, unet)
    if metadata.get("format") == DOMAIN_FORMAT:
        return {"kind": "domain model", **about, **_domain_model(DomainMetadata.from_strings(metadata, path), parts)}
    return {
        "kind": "checkpoint" if len(parts) > 1 else "UNet",
        **about,
        "form": form_of(layout),
        "parameters": parts,
        **_architecture(file, unet),
    }


def form_of(layout: str) -> str:
    """The form that a UNet layout of `guidance.files` is called in settings."""
    return layout if layout in FORMS else "full"


def _file(path: Path, tensors: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """tensors: how many numbers each holds, and their format."""
    formats: Counter[str] = Counter()
    for size, dtype in tensors:
        formats[dtype] += size
    numbers = dict(formats.most_common())
    facts = {"tensors": len(tensors), "parameters": sum(numbers.values()), "numbers": numbers}
    return {"file": {"path": str(path), "bytes": path.stat().st_size, **facts}}


def _parts(shapes: Shapes, unet: Mapping[str, Tensor]) -> dict[str, int]:
    """How many numbers UNet, autoencoder and text encoders of a file have."""
    parts = Counter({"unet": sum(tensor.numel() for tensor in unet.values())})
    prefixes = [(AUTOENCODER_PREFIX, "autoencoder"), *((prefix, name) for prefix, name, _ in TEXT_ENCODER_PREFIXES)]
    for prefix, name in prefixes:
        parts[name] += sum(math.prod(shape) for key, (shape, _) in shapes.items() if key.startswith(prefix))
    return {name: size for name, size in parts.items() if size}


def _architecture(file: ModelFile, unet: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a file without a domain model's metadata says of its UNet."""
    metadata = dict(file.metadata)
    stated = metadata.pop("config", None)  # the mini world's own files
    about: dict[str, Any] = {"architecture": None}
    try:
        config = UNetConfig.from_json(stated) if stated else unet_config_from_state_dict(unet)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        about["family"] = f"unknown ({error})"
    else:
        family = FAMILIES.get(config.context_dim or 0)
        about["architecture"] = config.to_dict()
        about["family"] = family.name if family else None
        about["latent_format"] = family.latent_format if family else metadata.get("latent_format")
    markers = [key for key in ("v_pred", "ztsnr", "edm_mean", "edm_vpred.sigma_max") if key in file.keys]
    return {**about, "markers": markers, "metadata": metadata}


def _domain_model(described: DomainMetadata, parts: Mapping[str, int]) -> dict[str, Any]:
    facts, extra = {**vars(described)}, dict(described.extra)
    training = _training(extra.pop(TRAINING, None))
    del facts["config"]
    facts |= {"form": form_of(described.null_text), "trained": described.steps > 0, "parameters": dict(parts)}
    return {**facts, "architecture": described.config.to_dict(), "training": training, "extra": extra}


def _low_rank(shapes: Shapes, metadata: Mapping[str, str]) -> dict[str, Any]:
    """text_layers: those of a text encoder among the layers, in files of other programs."""
    downs = {key: shape for key, (shape, _) in shapes.items() if key.endswith(DOWN)}
    convolutions = sum(len(shape) == 4 for shape in downs.values())
    return {
        "layers": len(downs),
        "kinds": {"linear": len(downs) - convolutions, "convolution": convolutions},
        "text_layers": sum(key.startswith(TEXT_PREFIXES) for key in downs) or None,
        "dora": any(key.endswith(".dora_scale") for key in shapes),
        "ranks": sorted({shape[0] for shape in downs.values() if shape}),
        "prior_hash": metadata.get("prior_hash"),
        "training": _training(metadata.get(TRAINING)),
        "metadata": {key: value for key, value in metadata.items() if key not in (TRAINING, "prior_hash")},
    }


def _training(text: str | None) -> Any:
    """The settings that metadata holds as JSON; damaged ones as they are."""
    try:
        return parse_json(text) if text else None
    except Problem:
        return text


def _generator(path: Path) -> dict[str, Any]:
    file = ModelFile(path) if _is_safetensors(path) else None
    notes: tuple[str, ...] = ()
    if file is not None and file.metadata.get("format") == GENERATOR_FORMAT:
        described, config = GeneratorMetadata.from_strings(file.metadata, path)
        tensors = [(math.prod(shape), dtype) for shape, dtype in file.shapes().values()]
    else:
        loaded = read_generator(path)
        described, config, notes = loaded.metadata, loaded.generator.config, loaded.notes
        tensors = [(tensor.numel(), "F32 as read") for tensor in loaded.generator.state_dict().values()]
    return {
        "kind": "generator",
        **_file(path, tensors),
        "resolution": config.resolution,
        **vars(described),
        "architecture": config.to_dict(),
        "notes": list(notes),
    }


def _is_safetensors(path: Path) -> bool:
    """Whether a file starts as a .safetensors file does, whatever it is called."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _ends_as_run_checkpoint(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TRAILER))
        return file.read(len(MARK)) == MARK


def _run_checkpoint(path: Path) -> dict[str, Any]:
    state = load_checkpoint(path)
    tensors = [(tensor.numel(), str(tensor.dtype).removeprefix("torch.")) for tensor in state["weights"].values()]
    return {
        "kind": "training checkpoint",
        **_file(path, tensors),
        "name": state["config"].get("name"),
        "step": state["step"],
        "dataset": state.get("dataset"),  # of a training; an adaptation has neither images nor a prior to start from
        "prior_hash": state.get("prior"),
        "facts": dict(state["facts"]),
        "training": dict(state["config"]),
    }


def inspect_text(path: str | os.PathLike) -> str:
    """`inspect` for reading: one fact a line, the errors of the constants summed up in one."""
    about = inspect(path)
    file, kind, errors = about.pop("file"), about.pop("kind"), about.pop("null_text_error", None)
    numbers = f"{file['parameters'] / 1e6:.2f} M numbers in {file['tensors']} tensors ({', '.join(file['numbers'])})"
    facts = {"file": file["path"], "kind": kind, "size": f"{file['bytes'] / 2**20:.1f} MiB, {numbers}"}
    facts |= {key.replace("_", " "): _shown(value) for key, value in about.items()}
    if errors:
        worst = max(errors, key=errors.__getitem__)
        facts["constants"] = (
            f"error of the {len(errors)} blocks: median {median(errors.values()):.3f}, worst {errors[worst]:.3f} in "
            f"{worst}"
        )
    told = {name: value for name, value in facts.items() if value not in (None, "")}
    return "\n".join(f"{name + ':':<18} {printable(value, MOST_SHOWN)}" for name, value in told.items())


def _shown(value: Any) -> Any:
    """One fact of a file in a line."""
    if isinstance(value, dict):
        told = {name.replace("_", " "): part for name, part in value.items() if part not in (None, "")}
        return ", ".join(f"{name} {_short(part)}" for name, part in told.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_short, value)) if isinstance(value, list) else value


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)
