"""The autoencoder of a checkpoint, or of a file of its own, as a module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...guidance.errors import first_line
from ...guidance.files import FileProblem, ModelFile, check_finite
from ...guidance.files.layouts import AUTOENCODER_PREFIX
from ...guidance.files.recognise import AUTOENCODER, recognise_names, refusal
from ...guidance.networks.autoencoder import Autoencoder, autoencoder_config_from_state_dict

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def read_autoencoder(path: Path) -> Autoencoder:
    """The autoencoder in a file: a checkpoint, or a VAE alone. Raises FileProblem."""
    file = ModelFile(path)
    prefix = AUTOENCODER_PREFIX if any(key.startswith(AUTOENCODER_PREFIX) for key in file.keys) else ""
    if not any(key.startswith(f"{prefix}encoder.") for key in file.keys):
        raise FileProblem(refusal(path, AUTOENCODER, recognise_names(file.keys, file.metadata)))
    return build_autoencoder(file.tensors(prefix), path)


def build_autoencoder(weights: Mapping[str, Tensor], source: str | os.PathLike) -> Autoencoder:
    """The module in fp32, for inference. weights: LDM keys without prefix; `source` names them in errors.

    Tensors of other parts (losses, averages) are left out. Raises FileProblem.
    """
    plain: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if key.startswith(PARTS):
            # Some files have the attention's 1x1 convolutions as linear maps.
            is_linear = ".attn_1." in key and tensor.ndim == 2
            plain[key] = (tensor[..., None, None] if is_linear else tensor).float()
    check_finite(plain, source)
    try:
        with torch.device("meta"):
            network = Autoencoder(autoencoder_config_from_state_dict(plain))
        network.load_state_dict(plain, strict=True, assign=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise FileProblem(
            f"{source}: its autoencoder cannot be read ({first_line(error)}); name another file as vae."
        ) from error
    return network.eval().requires_grad_(False)
