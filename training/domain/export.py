"""Finished files: domain models and LoRAs, conversions between their forms, and what a file knows about itself.

Layouts and metadata are those of `guidance.files`; every file is written completely or not at all.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...guidance.errors import Problem, printable
from ...guidance.files import (
    TRAINING,
    DomainMetadata,
    FileProblem,
    GeneratorMetadata,
    ModelFile,
    convert_generator,
    file_tensors,
    holds_generator,
    read_domain_file,
    read_generator,
    strip_unet_prefix,
    unet_layout,
    write_domain_file,
    write_safetensors,
)
from ...guidance.files.domain_metadata import FORMAT as DOMAIN_FORMAT
from ...guidance.files.generator_metadata import FORMAT as GENERATOR_FORMAT
from ...guidance.files.layouts import AUTOENCODER_PREFIX, TEXT_ENCODER_PREFIXES, unet_prefix
from ...guidance.networks.unet_config import UNetConfig, unet_config_from_state_dict
from ...guidance.plain_json import parse_json
from ..engine.checkpoints import MARK, TRAILER, load_checkpoint
from ..engine.settings import ConfigProblem
from ..mini_world import MINI_WORLD
from ..prior.families import FAMILIES, NATIVE_RESOLUTIONS, native_resolution
from ..prior.opening import open_checkpoint, open_mini_world
from ..prior.prior import Prior
from .config import MIN_RESOLUTION, RESOLUTION_STEP
from .low_rank import kohya_tensors, low_rank_layers
from .trainee import FORMS, Trainee, start_model

if TYPE_CHECKING:
    from .config import TrainConfig

MOST_SHOWN = 10_000  # characters of one fact of a file
CHECKPOINT_SUFFIX = ".ckpt"  # of old model files, and of this trainer's runs
_KOHYA_BASES = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}


def write_domain_model(
    path: str | os.PathLike,
    weights: Mapping[str, Tensor],
    unet_config: UNetConfig,
    base: Prior,
    *,
    config: TrainConfig | None = None,
    file_dtype: str = "",
    steps: int = 0,
    dataset_size: int | None = None,
    dataset_hash: str | None = None,
    ema: float | None = None,
    null_text_error: Mapping[str, float] | None = None,
    name: str = "",
    licence: str = "",
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Write a domain model, and everything it should know about itself, to `path` (.safetensors).

    weights, unet_config: a trainee's (`Trainee.weights`, `.config`). config: the run's; name, licence, number format,
    resolution come from it unless given, and its public part is kept in the file. dataset_size in images. ema: decay
    of the average the weights are; None where they are no average. Raises FileProblem.
    """
    path = Path(path)
    fields = dict(extra or {})
    if config is not None:
        fields[TRAINING] = json.dumps(config.public_dict())
        name, licence = name or config.name, licence or config.licence
        file_dtype = file_dtype or config.file_dtype
    metadata = DomainMetadata(
        unet_config,
        latent_format=base.latent_format,
        prediction_type=base.prediction_type,
        zero_snr=base.zero_snr,
        null_text_error=dict(null_text_error or {}),
        null_context=base.null_context.to_dict(),
        prior_hash=base.prior_hash,
        domain_name=name or path.stem,
        dataset_size=dataset_size,
        dataset_hash=dataset_hash,
        steps=steps,
        ema=ema,
        resolution=None if config is None else config.resolution,
        licence=licence,
        extra=fields,
    )
    return write_domain_file(path, file_tensors(weights, file_dtype or "fp16", path), metadata)


def write_low_rank(
    path: str | os.PathLike,
    trainee: Trainee,
    base: Prior,
    *,
    values: Mapping[str, Tensor] | None = None,
    config: TrainConfig | None = None,
    file_dtype: str = "",
    steps: int = 0,
    dataset_size: int | None = None,
) -> Path:
    """Write the low-rank additions of a `full` trainee as a LoRA in kohya's layout, which loads onto the prior.

    values: the trained tensors to write, such as their average. A text-free UNet has other layers than the prior, so
    its additions are merged into a domain model instead (`Trainee.weights`); raises ValueError for one.
    """
    layers = low_rank_layers(trainee.unet)
    if trainee.form != "full" or not layers:
        raise Problem(
            f"LoRA: expected a model of form full trained with low_rank, got form {trainee.form} trained with "
            f"{trainee.train}; write it as a domain model."
        )
    path = Path(path)
    file_dtype = file_dtype or (config.file_dtype if config is not None else "fp16")
    tensors = kohya_tensors(trainee.unet, trainee.config, values, torch.float32)
    layer = next(iter(layers.values()))
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(layer.rank),
        "ss_network_alpha": repr(float(layer.rank)),
        "ss_base_model_version": _KOHYA_BASES.get(base.config.context_dim, base.latent_format),
        "ss_steps": str(steps),
        "ss_v2": str(base.config.context_dim == 1024),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": config.name if config is not None else path.stem,
        "prior_hash": base.prior_hash,
    }
    if dataset_size is not None:
        metadata["ss_num_train_images"] = str(dataset_size)
    if config is not None:
        metadata[TRAINING] = json.dumps(config.public_dict())
        if config.licence:
            metadata["modelspec.license"] = config.licence
    return write_safetensors(path, file_tensors(tensors, file_dtype, path), metadata)


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
    if form and form not in FORMS:
        raise Problem(f"Expected form to be one of {', '.join(FORMS)}, got {form!r}.")
    if resolution is not None and (resolution < MIN_RESOLUTION or resolution % RESOLUTION_STEP):
        raise ConfigProblem(
            f"resolution: expected a multiple of {RESOLUTION_STEP} pixels from {MIN_RESOLUTION} on, found {resolution}."
        )
    target = Path(target)
    if str(source) != MINI_WORLD:
        source = Path(source)
        if target.exists() and source.exists() and target.samefile(source):
            raise FileProblem(f"{target}: expected another file to write than the one to read; choose another name.")
        if holds_generator(source):
            if form:
                raise FileProblem(f"{source}: expected a checkpoint to make the form {form} from, found a generator.")
            return convert_generator(source, target, dtype=file_dtype or "fp32", name=name)
        file_dtype = file_dtype or "fp16"
        file = ModelFile(source)
        keys, own = file.keys, form_of(unet_layout(file.keys, source))
        alone = file.metadata.get("format") == DOMAIN_FORMAT or own != "full"
        if alone or (form in ("", "full") and not any(key.startswith(AUTOENCODER_PREFIX) for key in keys)):
            return _convert_domain(source, target, form, own, file_dtype, name)
        base = open_checkpoint(source, prediction=prediction)
    else:
        base = open_mini_world(prediction)
    resolution = resolution or base.native_resolution or 512
    trainee = start_model(base, form or "full", resolution=resolution, device=device, on_probe=on_probe)
    return write_domain_model(
        target,
        trainee.weights(),
        trainee.config,
        base,
        file_dtype=file_dtype or "fp16",
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


def form_of(layout: str) -> str:
    """The form that a UNet layout of `guidance.files` is called in a configuration."""
    return layout if layout in FORMS else "full"


def inspect(path: str | os.PathLike) -> dict[str, Any]:
    """Everything a model file knows about itself, as JSON values.

    kind: "domain model", "generator", "checkpoint", "UNet", "LoRA" or "training checkpoint" (of a run, to resume from);
    file: name, bytes, tensors, parameters, number formats. A domain model: form, architecture, latent space,
    prediction, prior, null context, errors of the constants, data, steps, training configuration; a generator:
    architecture, source, history; a checkpoint: family and parts. Weights are read only where the header does not tell.
    Raises FileProblem for a file that is no model of these kinds.
    """
    path = Path(path)
    if path.suffix == CHECKPOINT_SUFFIX and path.is_file() and _ends_as_run_checkpoint(path):
        return _inspect_run(path)
    if holds_generator(path):
        return _inspect_generator(path)
    file = ModelFile(path)
    keys, metadata, shapes = file.keys, file.metadata, file.shapes()
    formats: Counter = Counter()
    for shape, dtype in shapes.values():
        formats[dtype] += _count(shape)
    about: dict[str, Any] = {
        "kind": "",
        "file": {
            "path": str(path),
            "bytes": path.stat().st_size,
            "tensors": len(keys),
            "parameters": sum(formats.values()),
            "numbers": dict(formats.most_common()),
        },
    }
    if any(key.endswith(".lora_down.weight") for key in keys):
        return about | _inspect_low_rank(shapes, metadata)
    layout = unet_layout(keys, path)
    prefix = unet_prefix(keys)
    unet = {
        key.removeprefix(prefix): torch.empty(shape, device="meta")
        for key, (shape, _) in shapes.items()
        if key.startswith(prefix)
    }
    unet = strip_unet_prefix(unet)
    parts = {
        "unet": sum(tensor.numel() for tensor in unet.values()),
        "autoencoder": sum(_count(shape) for key, (shape, _) in shapes.items() if key.startswith(AUTOENCODER_PREFIX)),
    }
    for text_prefix, name, _ in TEXT_ENCODER_PREFIXES:
        size = sum(_count(shape) for key, (shape, _) in shapes.items() if key.startswith(text_prefix))
        if size:
            parts[name] = parts.get(name, 0) + size
    parts = {name: size for name, size in parts.items() if size}
    if metadata.get("format") == DOMAIN_FORMAT:
        return about | _inspect_domain(DomainMetadata.from_strings(metadata, path), parts)
    about["kind"] = "checkpoint" if len(parts) > 1 else "UNet"
    about["form"], about["parameters"] = form_of(layout), parts
    metadata = dict(metadata)
    stated = metadata.pop("config", None)  # the mini world's own files
    try:
        config = UNetConfig.from_json(stated) if stated else unet_config_from_state_dict(unet)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        about["architecture"], about["family"] = None, f"unknown ({error})"
    else:
        family = FAMILIES.get(config.context_dim)
        about["architecture"] = config.to_dict()
        about["family"] = family.name if family else None
        about["latent_format"] = family.latent_format if family else metadata.get("latent_format")
    about["markers"] = [key for key in ("v_pred", "ztsnr", "edm_mean", "edm_vpred.sigma_max") if key in keys]
    about["metadata"] = metadata
    return about


def base_resolution(base: str) -> int | None:
    """The side in pixels that a base was made for, from its file's header; None where that does not tell."""
    if base == MINI_WORLD:
        return NATIVE_RESOLUTIONS[MINI_WORLD]
    about = inspect(base)
    architecture = about.get("architecture") or {}
    is_v = "v_pred" in about.get("markers", ())
    return native_resolution(about.get("latent_format") or "", architecture.get("context_dim"), is_v)


def _inspect_domain(described: DomainMetadata, parts: Mapping[str, int]) -> dict[str, Any]:
    extra = dict(described.extra)
    training = _note(extra.pop(TRAINING, None))
    return {
        "kind": "domain model",
        "name": described.domain_name,
        "form": form_of(described.null_text),
        "trained": described.steps > 0,
        "steps": described.steps,
        "ema": described.ema,
        "resolution": described.resolution,
        "dataset": {"images": described.dataset_size, "sha256": described.dataset_hash},
        "latent_format": described.latent_format,
        "prediction_type": described.prediction_type,
        "zero_snr": described.zero_snr,
        "prior_sha256": described.prior_hash,
        "null_context": dict(described.null_context),
        "null_text_error": dict(described.null_text_error),
        "licence": described.licence,
        "parameters": dict(parts),
        "architecture": described.config.to_dict(),
        "training": training,
        "extra": extra,
    }


def _note(text: str | None) -> Any:
    """What a note of metadata says; a damaged one as it is."""
    try:
        return parse_json(text) if text else None
    except Problem:
        return text


def _inspect_generator(path: Path) -> dict[str, Any]:
    file = ModelFile(path) if is_safetensors(path) else None
    notes: tuple[str, ...] = ()
    formats: Counter = Counter()
    if file is not None and file.metadata.get("format") == GENERATOR_FORMAT:
        described, config = GeneratorMetadata.from_strings(file.metadata, path)
        shapes = file.shapes()
        for shape, dtype in shapes.values():
            formats[dtype] += _count(shape)
    else:
        loaded = read_generator(path, prefer_converted=False)
        described, config, notes = loaded.metadata, loaded.generator.config, loaded.notes
        shapes = loaded.generator.state_dict()
        formats["F32 as read"] = sum(tensor.numel() for tensor in shapes.values())
    return {
        "kind": "generator",
        "file": {
            "path": str(path),
            "bytes": path.stat().st_size,
            "tensors": len(shapes),
            "parameters": sum(formats.values()),
            "numbers": dict(formats),
        },
        "name": described.name,
        "resolution": config.resolution,
        "licence": described.licence,
        "source": {
            "format": described.source_format,
            "class": described.class_name,
            "sha256": described.source_sha256,
            "code_sha256": described.source_code_sha256,
        },
        "history": [dict(entry) for entry in described.history],
        "architecture": config.to_dict(),
        "notes": list(notes),
        "extra": dict(described.extra),
    }


def _ends_as_run_checkpoint(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TRAILER))
        return file.read(len(MARK)) == MARK


def _inspect_run(path: Path) -> dict[str, Any]:
    state = load_checkpoint(path)
    weights = state["weights"].values()
    formats = Counter()
    for tensor in weights:
        formats[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return {
        "kind": "training checkpoint",
        "file": {
            "path": str(path),
            "bytes": path.stat().st_size,
            "tensors": len(weights),
            "parameters": sum(formats.values()),
            "numbers": dict(formats),
        },
        "name": state["config"]["name"],
        "step": state["step"],
        "dataset": dict(state["dataset"]),
        "prior_sha256": state["prior"],
        "facts": dict(state["facts"]),
        "training": dict(state["config"]),
    }


def _inspect_low_rank(shapes: Mapping[str, tuple], metadata: Mapping[str, str]) -> dict[str, Any]:
    downs = {key: shape for key, (shape, _) in shapes.items() if key.endswith(".lora_down.weight")}
    return {
        "kind": "LoRA",
        "layers": len(downs),
        "ranks": sorted({shape[0] for shape in downs.values()}),
        "training": _note(metadata.get(TRAINING)),
        "metadata": {key: value for key, value in metadata.items() if key != TRAINING},
    }


def inspect_text(path: str | os.PathLike) -> str:
    """`inspect` for reading: one fact a line, the errors of the constants summed up in one."""
    about = inspect(path)
    lines: list[str] = []

    def add(label: str, value: Any) -> None:
        if value not in (None, "", {}, []):
            lines.append(f"{label + ':':<18} {printable(value, MOST_SHOWN)}")

    file = about.pop("file")
    add("file", file["path"])
    add("kind", about.pop("kind"))
    add(
        "size",
        f"{file['bytes'] / 2**20:.1f} MiB, {file['parameters'] / 1e6:.2f} M numbers in {file['tensors']} "
        f"tensors ({', '.join(file['numbers'])})",
    )
    errors = about.pop("null_text_error", None)
    for key, value in about.items():
        label = key.replace("_", " ")
        if isinstance(value, dict):
            shown = ", ".join(
                f"{name.replace('_', ' ')} {_short(part)}" for name, part in value.items() if part not in (None, "")
            )
            add(label, shown)
        elif isinstance(value, bool):
            add(label, "yes" if value else "no")
        elif isinstance(value, list):
            add(label, ", ".join(map(_short, value)))
        else:
            add(label, value)
    if errors:
        worst = max(errors, key=errors.get)
        add(
            "constants",
            f"error of the {len(errors)} blocks: median {median(errors.values()):.3f}, worst "
            f"{errors[worst]:.3f} in {worst}",
        )
    return "\n".join(lines)


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)


def is_safetensors(path: Path) -> bool:
    """Whether a file starts as a .safetensors file does, whatever it is called."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
