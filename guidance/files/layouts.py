"""Key layouts of Stable Diffusion checkpoints: prefixes, what a set of keys is, and whether a UNet is complete."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import FileProblem, Problem
from ..networks.text_encoder import text_encoder_from_openclip
from ..networks.unet import UNet
from ..networks.unet_config import UNetConfig
from .inert_pickle import shown
from .recognise import UNET, refusal

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


@dataclass
class Checkpoint:
    """The parts of a full checkpoint, keys without prefix; text encoders in Hugging Face layout by name.

    Names: "clip_l" (Stable Diffusion 1.x, SDXL), "clip_h" (2.x), "clip_g" (SDXL and its refiner).
    `other` keeps keys of no known part (markers such as `v_pred`, EMA copies, schedules).
    """

    unet: dict[str, Tensor] = field(default_factory=dict)
    autoencoder: dict[str, Tensor] = field(default_factory=dict)
    text_encoders: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)


def split_checkpoint(state_dict: Mapping[str, Tensor]) -> Checkpoint:
    """Split a full checkpoint into UNet, autoencoder and text encoders, converting OpenCLIP towers."""
    parts = Checkpoint()
    openclip: dict[str, dict[str, Tensor]] = {}
    prefix = unet_prefix(state_dict)
    for key, tensor in state_dict.items():
        if prefix and key.startswith(prefix):
            parts.unet[key.removeprefix(prefix)] = tensor
            continue
        if key.startswith(AUTOENCODER_PREFIX):
            parts.autoencoder[key.removeprefix(AUTOENCODER_PREFIX)] = tensor
            continue
        for text_prefix, name, is_openclip in TEXT_ENCODER_PREFIXES:
            if key.startswith(text_prefix):
                target = openclip if is_openclip else parts.text_encoders
                target.setdefault(name, {})[key.removeprefix(text_prefix)] = tensor
                break
        else:
            known = not prefix and key.startswith(UNET_PARTS)
            (parts.unet if known else parts.other)[key] = tensor
    for name, tower in openclip.items():
        converted = text_encoder_from_openclip(tower)
        # 2.x in its later layout and the refiner share a prefix; only their widths (1024, 1280) tell them apart.
        width = converted["text_model.final_layer_norm.weight"].shape[0]
        parts.text_encoders["clip_g" if width == 1280 else name] = converted
    for encoder in parts.text_encoders.values():
        # Old files keep a buffer of position numbers that is not a weight.
        encoder.pop("text_model.embeddings.position_ids", None)
    return parts


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
        raise FileProblem(refusal(source, wanted, keys, metadata))
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
    """Compare names and shapes with those of the architecture; raise FileProblem naming the first difference."""
    check_unet_shapes({key: tuple(tensor.shape) for key, tensor in state_dict.items()}, config, source)


def check_unet_shapes(shapes: Mapping[str, tuple[int, ...]], config: UNetConfig, source: str | os.PathLike) -> None:
    """`check_unet` by the shapes that a file's header states, before any tensor is made."""
    # A damaged configuration must not take time and memory: a block is some kilobytes here even without its numbers.
    depths = [*config.transformer_depth, *config.transformer_depth_output, config.transformer_depth_middle]
    blocks = sum(depths) + sum(config.num_res_blocks) + len(config.num_res_blocks)
    try:
        if blocks > min(MOST_BLOCKS, len(shapes)):
            raise Problem(f"it has {blocks} blocks, in a file of {len(shapes)} tensors")
        with torch.device("meta"):
            expected = UNet(config).state_dict()
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise FileProblem(
            f"{source}: the architecture its metadata describes cannot be built ({error}); make the file again."
        ) from error
    missing = [key for key in expected if key not in shapes]
    unexpected = [key for key in shapes if key not in expected]
    if missing or unexpected:
        raise FileProblem(
            f"{source}: expected the {len(expected)} tensors of its architecture, found {len(missing)} missing and "
            f"{len(unexpected)} unknown, first {shown((missing or unexpected)[0])}; the file is incomplete or made by "
            "another version."
        )
    for key, tensor in expected.items():
        if tuple(shapes[key]) != tuple(tensor.shape):
            raise FileProblem(
                f"{source}: expected {key} of shape {list(tensor.shape)}, found {list(shapes[key])}; the "
                "weights and the configuration of this file do not belong together."
            )
