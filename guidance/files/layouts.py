"""Key layouts of Stable Diffusion checkpoints: prefixes, what a set of keys is, and whether a UNet is complete."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import FileProblem, Problem
from ..networks.unet import UNet
from ..networks.unet_config import UNetConfig
from .recognise import UNET, recognise_names, refusal
from .weights import check_shapes, shapes_of

T = TypeVar("T")
MOST_BLOCKS = 1000  # and levels, of a UNet; Stable Diffusion XL has 90
UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
UNET_PARTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
AUTOENCODER_PREFIX = "first_stage_model."
# (prefix in a checkpoint, name of the encoder, OpenCLIP layout)
TEXT_ENCODER_PREFIXES = (
    ("cond_stage_model.transformer.", "clip_l", False),
    ("conditioner.embedders.0.transformer.", "clip_l", False),
    ("cond_stage_model.model.", "clip_h", True),
    ("conditioner.embedders.0.model.", "clip_h", True),
    ("conditioner.embedders.1.model.", "clip_g", True),
)


def unet_prefix(keys: Iterable[str]) -> str:
    """The prefix of UNet keys: one of `UNET_PREFIXES`, or "" when they have none or there is no UNet."""
    keys = list(keys)
    for prefix in UNET_PREFIXES:
        if any(key.startswith(prefix) for key in keys):
            return prefix
    return ""


def strip_unet_prefix(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Only the entries of the UNet, keys without prefix, whatever else the state dict holds."""
    prefix = unet_prefix(state_dict)
    stripped = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    return {key: tensor for key, tensor in stripped.items() if key.startswith(UNET_PARTS)}


def unet_layout(
    keys: Iterable[str], source: str | os.PathLike, *, wanted: str = UNET, metadata: Mapping[str, str] | None = None
) -> str:
    """ "constant", "cached" (text-free) or "full" (takes text) for UNet keys, with or without their prefix.

    Raises FileProblem saying what the file is when it is no Stable Diffusion UNet in LDM layout, and what to give
    instead where UNET or BASE is `wanted`. metadata: the file's own, which may say what it is.
    """
    keys = list(keys)
    prefix = unet_prefix(keys)
    # A ControlNet has the input half of such a UNet; only the output half makes an image.
    if f"{prefix}input_blocks.0.0.weight" not in keys or not any(k.startswith(f"{prefix}output_blocks.") for k in keys):
        raise FileProblem(refusal(source, wanted, recognise_names(keys, metadata)))
    if any("time_stack." in key for key in keys):
        raise FileProblem(f"{source}: expected a UNet for images, found a video UNet; use one of the prior's family.")
    if any(key.endswith(".attn2.null_k") for key in keys):
        return "cached"
    if any(".attn2." in key for key in keys):
        return "full"
    return "constant" if any(".transformer_blocks." in key for key in keys) else "full"


def stated_prediction(keys: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """The prediction type that a file states, None where it does not: the marker key of v-models, or ModelSpec."""
    if "v_pred" in keys:
        return "v_prediction"
    stated = metadata.get("modelspec.prediction_type", "").lower()
    return {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}.get(stated)


def check_unet(state_dict: Mapping[str, Tensor], config: UNetConfig, source: str | os.PathLike) -> None:
    """Raise FileProblem where the names and shapes of tensors are not those of the architecture."""
    check_unet_shapes(shapes_of(state_dict), config, source)


def check_unet_shapes(shapes: Mapping[str, Sequence[int]], config: UNetConfig, source: str | os.PathLike) -> None:
    """`check_unet` by the shapes that a file's header states, before any tensor is made."""
    # A damaged configuration must not take time and memory: a block is some kilobytes here even without its numbers.
    depths = [*config.transformer_depth, *config.transformer_depth_output, config.transformer_depth_middle]
    blocks = sum(depths) + sum(config.num_res_blocks) + len(config.num_res_blocks)
    try:
        if blocks > min(MOST_BLOCKS, len(shapes)):
            raise Problem(f"it has {blocks} blocks, in a file of {len(shapes)} tensors")
        with torch.device("meta"):
            expected = shapes_of(UNet(config).state_dict())
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise FileProblem(
            f"{source}: the architecture its metadata describes cannot be built ({error}); make the file again."
        ) from error
    check_shapes(shapes, expected, "its architecture", source)
