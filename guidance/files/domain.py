"""Domain model files: a UNet in LDM keys as safetensors, read and written with every check."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileProblem, Problem
from ..networks.unet_config import unet_config_from_state_dict
from .domain_metadata import FORMAT, DomainMetadata
from .layouts import check_unet, check_unet_shapes, stated_prediction, strip_unet_prefix, unet_layout, unet_prefix
from .model_file import ModelFile
from .recognise import UNET, recognise_names, refusal
from .safetensors_file import write_safetensors
from .weights import check_finite

_LATENTS = {768: "sd15", 1024: "sd15", 2048: "sdxl", 1280: "sdxl"}  # of published families, by the width of their text


def read_domain_file(
    path: str | os.PathLike, *, latent_format: str | None = None, device: str = "cpu"
) -> tuple[dict[str, Tensor], DomainMetadata]:
    """A domain model: the UNet's tensors (LDM keys without prefix) and its metadata, checked in every respect.

    Text-free files of both forms, and full UNets (alone or inside a checkpoint, keys with or without their prefix).
    Without this project's metadata the architecture is read from the weights and the rest is left at None.
    latent_format: the latent space it has to work in; None accepts any. Raises FileProblem.
    """
    file = ModelFile(path)
    metadata, keys = file.metadata, file.keys
    layout = unet_layout(keys, path, metadata=metadata)
    kind = recognise_names(keys, metadata)
    if kind.group == "quantised":
        raise FileProblem(refusal(path, UNET, kind))
    own = metadata.get("format") == FORMAT
    described = DomainMetadata.from_strings(metadata, path) if own else None
    if described is not None:
        check_latent_format(described, latent_format, path)
        _check_form(described, layout, path)
        shapes = {key: shape for key, (shape, _) in file.shapes().items()}
        check_unet_shapes(strip_unet_prefix(shapes), described.config, path)
    state_dict = strip_unet_prefix(file.tensors(unet_prefix(keys), device))
    if described is None:
        try:
            config = unet_config_from_state_dict(state_dict)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise FileProblem(
                f"{path}: its architecture cannot be read from its weights ({str(error).rstrip('.')}); use a file with "
                "metadata, or a UNet of a published family."
            ) from error
        described = DomainMetadata(
            config,
            latent_format=_LATENTS.get(config.context_dim or 0) if config.model_channels in (320, 384) else None,
            prediction_type=stated_prediction(keys, metadata),
            zero_snr="ztsnr" in keys,
            domain_name=Path(path).stem,
            licence=metadata.get("modelspec.license", ""),
        )
        check_latent_format(described, latent_format, path)
        _check_form(described, layout, path)
        check_unet(state_dict, described.config, path)
    check_finite(state_dict, path)
    return state_dict, described


def _check_form(described: DomainMetadata, layout: str, path: str | os.PathLike) -> None:
    form = "none" if layout == "full" else layout
    if described.null_text != form:
        raise FileProblem(
            f"{path}: its metadata says text-free form '{described.null_text}', its weights are of form '{form}'; make "
            "the file again."
        )


def write_domain_file(path: str | os.PathLike, state_dict: Mapping[str, Tensor], metadata: DomainMetadata) -> Path:
    """Write a domain model atomically, after checking that weights and metadata belong together and are finite."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise FileProblem(f"{path}: expected a name that ends in .safetensors; domain models are safetensors files.")
    check_unet(state_dict, metadata.config, path)
    check_finite(state_dict, path)
    return write_safetensors(path, state_dict, metadata.to_strings())


def check_latent_format(metadata: DomainMetadata, expected: str | None, source: str | os.PathLike) -> None:
    """Raise FileProblem when a file was made for another latent space than `expected` (None accepts any)."""
    found = metadata.latent_format
    if expected is not None and found is not None and found != expected:
        raise FileProblem(
            f"{source}: expected a domain model for the latent space '{expected}', found one for '{found}'; use "
            "a domain model that was made from the same family as the prior."
        )


def prior_content_hash(state_dict: Mapping[str, Tensor], between: Callable[[], None] = lambda: None) -> str:
    """SHA-256 (hex) over sorted key, shape and fp16 bytes of the UNet's tensors, prefix and other parts ignored.

    So one UNet has one hash whether it lies alone or in a checkpoint, in fp32 or fp16. between is called before each
    tensor; what it raises ends the hashing, which takes seconds for each GB. Raises Problem where there is no UNet to
    hash.
    """
    digest = hashlib.sha256()
    unet = strip_unet_prefix(state_dict)
    if not unet:
        found = next(iter(state_dict), "none")
        raise Problem(f"Prior: expected the weights of a UNet in LDM layout to hash, found keys such as {found}.")
    for key in sorted(unet):
        between()
        tensor = unet[key]
        digest.update(f"{key}\n{','.join(str(size) for size in tensor.shape)}\n".encode())
        half = tensor.detach().to(device="cpu", dtype=torch.float16).contiguous()
        digest.update(half.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
