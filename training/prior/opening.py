"""Open a prior: a checkpoint of Stable Diffusion 1.x, 2.x or XL, the mini world, or tensors that are in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...guidance.errors import Problem
from ...guidance.files import FileProblem, ModelFile, check_finite, check_unet, strip_unet_prefix, unet_layout
from ...guidance.files.layouts import unet_prefix
from ...guidance.files.recognise import BASE, recognise_names, refusal
from ...guidance.networks.unet_config import UNetConfig, unet_config_from_state_dict
from ...guidance.null_text import FLOAT8, NullContext
from ..engine.settings import CONNECTED_PREFIX, ConfigProblem
from ..mini_world import MINI_WORLD, assets
from ..mini_world.tokens import tokenize
from .autoencoder import build_autoencoder, read_autoencoder
from .families import FAMILIES, LATENT_SCALES, check_trainable
from .prediction import check_prediction, resolve_prediction
from .prior import Prior
from .text_encoders import Text, TextEncoders


def open_prior(base: str, *, vae: str = "", tokenizer: str = "", prediction: str = "auto") -> Prior:
    """The prior that the setting `base` names, a file or mini_world; the others as in `open_checkpoint`.

    Raises FileProblem for a file that cannot be trained from, ValueError for settings that do not fit it.
    """
    if base.startswith(CONNECTED_PREFIX):
        raise ConfigProblem(
            f"base: expected a checkpoint file or mini_world, found '{base}', models that were connected in ComfyUI; "
            "continue there, or give --base FILE with the checkpoint that they came from."
        )
    with torch.inference_mode(False):
        if base != MINI_WORLD:
            return open_checkpoint(base, vae=vae, tokenizer=tokenizer, prediction=prediction)
        if vae:
            raise ConfigProblem(f"vae: expected none for the mini world, which has its own, found {vae}.")
        return open_mini_world(prediction)


def open_mini_world(prediction: str = "auto") -> Prior:
    """The shipped miniature; it is an epsilon model and has its own words."""
    if prediction not in ("auto", "epsilon"):
        raise Problem(f"Expected prediction auto or epsilon for the mini world, got {prediction!r}.")
    autoencoder, scale = assets.load_autoencoder()
    encoder, _ = assets.load_text_encoder()
    weights, config = assets.load_prior()

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Text:
        return Text(encoder(torch.stack([tokenize(prompt) for prompt in prompts]))[0])

    description = {"text_encoder": MINI_WORLD, "layer": "-1", "empty": "encoded empty prompt"}
    return Prior(
        name="the mini world",
        unet=weights,
        config=config,
        prediction_type="epsilon",
        zero_snr=False,
        latent_format=MINI_WORLD,
        latent_scale=scale,
        null_context=NullContext(encode([""]).context, description),
        autoencoder=autoencoder,
        text_encoder=encode,
    )


def open_checkpoint(path: str | os.PathLike, *, vae: str = "", tokenizer: str = "", prediction: str = "auto") -> Prior:
    """The prior in a full checkpoint of Stable Diffusion 1.x, 2.x or XL in LDM layout.

    vae: another file to take the autoencoder from ("" keeps the checkpoint's). tokenizer: folder with vocab.json and
    merges.txt, needed only for prompts that are not empty. prediction: see `resolve_prediction`. The text encoders are
    read when needed and let go again. Raises FileProblem and ValueError.
    """
    check_prediction(prediction)
    path = Path(path)
    file = ModelFile(path)
    keys, metadata = file.keys, file.metadata
    _check_kind(path, keys, metadata)
    state_dict = strip_unet_prefix(file.tensors(unet_prefix(keys)))
    del file  # of a pickle it holds the whole content
    weights = {key: _trainable(tensor) for key, tensor in state_dict.items()}
    del state_dict
    try:
        config = unet_config_from_state_dict(weights)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise FileProblem(
            f"{path}: its architecture cannot be read ({str(error).rstrip('.')}); use Stable Diffusion 1.x, 2.x or XL."
        ) from error
    check_trainable(config, path)
    check_unet(weights, config, path)
    check_finite(weights, path)
    autoencoder = read_autoencoder(Path(vae) if vae else path)
    family = FAMILIES[config.context_dim or 0]
    encoders = TextEncoders(path, family, tokenizer)
    empty = encoders.encode_empty()
    if empty.tensor.shape[2] != config.context_dim:
        raise FileProblem(
            f"{path}: expected text of width {config.context_dim} for its UNet ({family.name}), found text encoders of "
            f"width {empty.tensor.shape[2]}; the parts of this file do not belong together."
        )
    prediction, zero_snr, notes = resolve_prediction(
        prediction, path.name, keys, metadata, weights, config, empty.tensor
    )
    return Prior(
        name=path.name,
        unet=weights,
        config=config,
        prediction_type=prediction,
        zero_snr=zero_snr,
        latent_format=family.latent_format,
        latent_scale=LATENT_SCALES[family.latent_format],
        null_context=empty,
        autoencoder=autoencoder,
        text_encoder=encoders.encode if tokenizer else None,
        notes=tuple(notes),
    )


def prior_from_tensors(
    unet: Mapping[str, Tensor],
    config: UNetConfig,
    autoencoder: Mapping[str, Tensor],
    *,
    name: str = "prior",
    **more: Any,
) -> Prior:
    """A prior of tensors that are already in memory, such as those of ComfyUI's MODEL, CLIP and VAE.

    unet, autoencoder: LDM keys without prefix; more: the other fields of `Prior`. Raises FileProblem for weights that
    cannot be trained from.
    """
    check_trainable(config, name)
    check_unet(unet, config, name)
    with torch.inference_mode(False):
        weights = {key: _trainable(tensor) for key, tensor in unet.items()}
        vae = build_autoencoder({key: _trainable(tensor) for key, tensor in autoencoder.items()}, name)
        return Prior(name=name, unet=weights, config=config, autoencoder=vae, **more)


def _check_kind(path: Path, keys: Sequence[str], metadata: Mapping[str, str]) -> None:
    """Raise FileProblem, from the tensors' names alone, for a file that is no full checkpoint to train from."""
    if unet_layout(keys, path, wanted=BASE, metadata=metadata) != "full":
        raise FileProblem(
            f"{path}: expected the checkpoint of a prior, found a text-free UNet; train from the checkpoint it was "
            "made of."
        )
    kind = recognise_names(keys, metadata)
    if kind.group in ("quantised", "unet", "domain"):
        raise FileProblem(refusal(path, BASE, kind))
    for marker in ("edm_mean", "edm_vpred.sigma_max"):
        if marker in keys:
            raise FileProblem(
                f"{path}: expected an eps- or v-model on Stable Diffusion's noise schedule, found an EDM model "
                f"(marker {marker}), whose noise is another; use another base."
            )


def _trainable(tensor: Tensor) -> Tensor:
    """On the CPU, fit for autograd, fp8 as fp16 (exactly); shared with the input where it can be.

    What was made under inference mode, as ComfyUI's nodes do, could never be trained: it is copied.
    """
    tensor = tensor.detach()
    if tensor.dtype in FLOAT8:
        tensor = tensor.half()
    return tensor.clone().cpu() if tensor.is_inference() else tensor.cpu()
