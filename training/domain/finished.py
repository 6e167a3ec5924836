"""The files that a finished run writes: a domain model, or a LoRA. Written completely or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...guidance.errors import Problem
from ...guidance.files import TRAINING, DomainMetadata, file_tensors, lora_tensors, write_domain_file, write_safetensors
from ...guidance.networks.low_rank import low_rank_layers
from ...guidance.networks.unet_config import UNetConfig
from ..engine.run_settings import RunSettings
from ..prior.prior import Prior
from .trainee import Trainee

# What kohya's tools call the priors, by the width of their text.
_KOHYA_PRIORS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}


def write_domain_model(
    path: str | os.PathLike,
    weights: Mapping[str, Tensor],
    unet_config: UNetConfig,
    prior: Prior,
    *,
    config: RunSettings | None = None,
    file_dtype: str = "",
    name: str = "",
    **facts: Any,
) -> Path:
    """Write a domain model, and everything it should know about itself, to `path` (.safetensors).

    weights, unet_config: a trainee's (`Trainee.weights`, `.config`). config: the run's; name, licence and number format
    come from it, and its public part is kept in the file. file_dtype, name: of a model without a run.
    facts: of what it learned, such as steps and dataset_size (`DomainMetadata`). Raises FileProblem.
    """
    path = Path(path)
    if config is not None:
        name, file_dtype = config.name, file_dtype or config.file_dtype
        facts["licence"] = config.licence
        facts["extra"] = {TRAINING: json.dumps(config.public_dict())}
    metadata = DomainMetadata(
        unet_config,
        latent_format=prior.latent_format,
        prediction_type=prior.prediction_type,
        zero_snr=prior.zero_snr,
        null_context=prior.null_context.to_dict(),
        prior_hash=prior.prior_hash,
        domain_name=name or path.stem,
        **facts,
    )
    return write_domain_file(path, file_tensors(weights, file_dtype or "fp16", path), metadata)


def write_low_rank(
    path: str | os.PathLike,
    trainee: Trainee,
    prior: Prior,
    *,
    values: Mapping[str, Tensor] | None = None,
    config: RunSettings | None = None,
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
    tensors = lora_tensors(trainee.unet, trainee.config, values)
    rank = max(layer.rank for layer in layers.values())  # narrow layers have less
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": repr(float(rank)),
        "ss_base_model_version": _KOHYA_PRIORS.get(prior.config.context_dim or 0, prior.latent_format),
        "ss_steps": str(steps),
        "ss_v2": str(prior.config.context_dim == 1024),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": config.name if config is not None else path.stem,
        "prior_hash": prior.prior_hash,
    }
    if dataset_size is not None:
        metadata["ss_num_train_images"] = str(dataset_size)
    if config is not None:
        metadata[TRAINING] = json.dumps(config.public_dict())
        if config.licence:
            metadata["modelspec.license"] = config.licence
    return write_safetensors(path, file_tensors(tensors, file_dtype, path), metadata)
