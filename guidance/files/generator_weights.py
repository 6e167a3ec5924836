"""From named tensors to a StyleGAN2 generator: found in a file's content, compared with the architecture, assembled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileProblem, Problem, first_line
from ..networks.stylegan2 import StyleGAN2
from ..networks.stylegan2_config import GeneratorConfig, generator_config_from_state_dict
from . import rosinality
from .generator_metadata import GeneratorMetadata
from .inert_pickle import article, shown
from .nested import AVERAGED, ROUGH, Ambiguous, FoundGenerator, all_names, find_generator
from .recognise import GENERATOR, Kind, recognise_names, refusal
from .weights import check_finite, check_shapes, shapes_of

MAX_RESOLUTION = 2**14
MEAN_SAMPLES = 10_000  # latents that the mean style is measured on where a file has none
MAX_FEATURES = 2**15  # of a latent and its label on their way to a style, all layers together, for measuring it
NOISE_SEED = 0  # of the constant noise where a file has none


@dataclass(frozen=True)
class LoadedGenerator:
    """A generator on the CPU (float32, evaluation mode, no gradients), its metadata, and remarks worth showing."""

    generator: StyleGAN2
    metadata: GeneratorMetadata
    notes: tuple[str, ...] = ()


def generator_in(path: Path, content: Any, metadata: GeneratorMetadata, stated: Mapping[str, Any]) -> LoadedGenerator:
    """The generator somewhere within the content of a file, wherever a tool has put it. Raises FileProblem.

    stated: the metadata of the file, which may say what it is instead.
    """
    try:
        found = find_generator(content)
    except Ambiguous as problem:
        raise FileProblem(f"{path}: expected one StyleGAN2 generator, found {problem}; give one alone.") from None
    if found is None and not isinstance(content, Mapping):
        raise FileProblem(refusal(path, GENERATOR, Kind(article(content))))
    if found is None:
        raise FileProblem(refusal(path, GENERATOR, recognise_names(all_names(content), stated)))
    notes = []
    if found.place in ROUGH:
        notes.append(
            f"The file has no averaged generator (g_ema); its {found.place} is used, whose images are rougher."
        )
    elif not found.alone and found.place not in AVERAGED:
        notes.append(f"Read from {shown(found.place)} of the file; what else it holds is left out.")
    metadata = replace(metadata, source_format=metadata.source_format or f"{found.layout} checkpoint")
    weights = _plain_weights(path, found.tensors)
    if found.layout != "NVIDIA":
        return _from_rosinality(path, found, weights, metadata, notes)
    notes.append(
        "The file says nothing of its architecture; activations are taken as unbounded and the mapping's "
        "learning rate multiplier as 0.01."
    )
    return assemble_generator(path, weights, metadata, notes)


def _plain_weights(path: Path, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Named tensors in float32 that are no larger together than the file. Raises FileProblem for anything else."""
    size = path.stat().st_size
    needed = 0
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise FileProblem(f"{path}: expected a StyleGAN2 generator, found no tensor as {shown(str(key))}.")
        _check_is_number(path, key, value)
        needed += value.numel() * value.element_size()
    if needed > size:  # strides of 0, or one storage under many names
        raise FileProblem(f"{path}: expected at most {size} bytes of weights, found claims of {needed}; it is damaged.")
    return {key: tensor.to(torch.float32).contiguous() for key, tensor in weights.items()}


def _check_is_number(path: Path, key: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise FileProblem(f"{path}: expected weights as plain numbers, found {tensor.dtype} in {shown(key)}.")


def _from_rosinality(
    path: Path, found: FoundGenerator, weights: dict[str, Tensor], metadata: GeneratorMetadata, notes: list[str]
) -> LoadedGenerator:
    try:
        if found.layout == "BasicSR":
            weights = rosinality.from_basicsr(weights)
        tensors = rosinality.to_nvidia(weights, found.mean)
    except ValueError as problem:
        raise FileProblem(
            f"{path}: expected a StyleGAN2 generator in the layout of {found.layout}, found that {problem}; use a "
            "checkpoint of the unchanged network."
        ) from problem
    missing = rosinality.noise_without_constants(tensors)
    if 4 * sum(height * width for height, width in missing.values()) > path.stat().st_size:
        raise FileProblem(f"{path}: expected noise of at most the file's size, found more; the file is damaged.")
    if missing:
        random = torch.Generator().manual_seed(NOISE_SEED)
        tensors |= {key: torch.randn(missing[key], generator=random) for key in sorted(missing)}
        notes.append(
            "The file has no constant noise; it was drawn from a fixed seed, so that images differ in details from "
            "others of this network."
        )
    return assemble_generator(path, tensors, metadata, notes, img_channels=3, architecture="skip")


def assemble_generator(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: GeneratorMetadata,
    notes: list[str],
    config: GeneratorConfig | None = None,
    **hints: Any,
) -> LoadedGenerator:
    """The generator of tensors under NVIDIA's names, after names and shapes are compared with the architecture's.

    config: the architecture; None reads it from the tensors, with `hints` for what they do not show. A missing mean
    style is measured. Raises FileProblem, naming the first difference.
    """
    for key, tensor in tensors.items():
        _check_is_number(path, key, tensor)
    check_finite(tensors, path)
    try:
        if config is None:
            config = generator_config_from_state_dict(tensors, **hints)
        if config.resolution > MAX_RESOLUTION or config.mapping_layers > len(tensors):
            raise Problem(f"{config.mapping_layers} mapping layers, {len(config.channels)} resolutions")
        with torch.device("meta"):
            generator = StyleGAN2(config)
    except (ValueError, TypeError, RuntimeError) as problem:
        raise FileProblem(
            f"{path}: expected a StyleGAN2 generator, found another network ({first_line(problem)}); use a file of "
            "the unchanged architecture."
        ) from problem
    averaged = "mapping.w_avg" in tensors
    expected = shapes_of(generator.state_dict())
    if not averaged:
        expected.pop("mapping.w_avg")
    shapes = {key: shape for key, shape in shapes_of(tensors).items() if not key.endswith(".resample_filter")}
    check_shapes(shapes, expected, "a StyleGAN2 generator", path)
    plain = {key: tensor.to(torch.float32).contiguous() for key, tensor in tensors.items()}
    if not averaged:
        plain["mapping.w_avg"] = torch.zeros(config.w_dim)
    try:
        generator.load_state_dict(plain, assign=True)
    except (ValueError, RuntimeError) as problem:
        raise FileProblem(f"{path}: expected a StyleGAN2 generator, found that {first_line(problem)}.") from problem
    generator.eval().requires_grad_(False)
    if not averaged:
        features = config.c_dim + sum(generator.mapping.widths)
        if features > MAX_FEATURES:
            raise FileProblem(
                f"{path}: expected a mean style (mapping.w_avg), or at most {MAX_FEATURES} features in all layers of "
                f"the mapping to measure it on, found {features}; the file is damaged or of another network."
            )
        generator.mapping.w_avg.copy_(generator.mean_style(MEAN_SAMPLES))
        notes = [*notes, f"The file has no mean style for all layers; it was measured on {MEAN_SAMPLES} latents."]
    return LoadedGenerator(generator, metadata, tuple(notes))
