"""The architecture of a Stable Diffusion UNet: described, checked, and read from weights under LDM names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Problem
from .configuration import Configuration, one_of, whole_number, whole_numbers

NULL_TEXT_FORMS = ("none", "constant", "cached")
# Attention heads leave no trace in the weights. The published families: Stable Diffusion 1.x (context 768) splits every
# width into 8 heads, 2.x (1024), SDXL (2048) and the SDXL refiner (1280) into heads of 64 channels.
HEADS_BY_CONTEXT = {768: (8, -1), 1024: (-1, 64), 1280: (-1, 64), 2048: (-1, 64)}
PUBLISHED_MODEL_CHANNELS = (320, 384)
SDXL_ADM_CHANNELS = 2816


@dataclass(frozen=True)
class UNetConfig(Configuration):
    """The architecture of one UNet; `unet_config_from_state_dict` reads it from weights.

    `transformer_depth` counts transformer blocks per residual block of the input half, in order;
    `transformer_depth_output` per block of the output half, last block first (as ComfyUI's detection lists them).
    `transformer_depth_middle`: -1 leaves one residual block in the middle, -2 removes the middle (distilled models).
    One of `num_heads` (same count at every width) and `num_head_channels` (same width of a head) is positive.
    `null_text`: "none" takes text; "constant" has no cross-attention; "cached" has it over frozen keys and values.
    """

    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: tuple[int, ...]
    transformer_depth: tuple[int, ...]
    transformer_depth_middle: int
    transformer_depth_output: tuple[int, ...]
    context_dim: int | None
    in_channels: int = 4
    out_channels: int = 4
    num_heads: int = -1
    num_head_channels: int = -1
    use_linear_in_transformer: bool = False
    adm_in_channels: int | None = None
    null_text: str = "none"
    null_tokens: int = 77

    _NAME = "UNet"
    _RULES = {
        "num_res_blocks": whole_numbers(0),
        "transformer_depth": whole_numbers(0),
        "transformer_depth_middle": whole_number(-2),
        "transformer_depth_output": whole_numbers(0),
        "num_heads": whole_number(-1),
        "num_head_channels": whole_number(-1),
        "null_text": one_of(NULL_TEXT_FORMS),
        "null_tokens": whole_number(0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.num_heads > 0) == (self.num_head_channels > 0):
            raise self._problem("exactly one of num_heads and num_head_channels must be positive")
        if len(self.channel_mult) != len(self.num_res_blocks):
            raise self._problem("channel_mult and num_res_blocks must have the same levels")
        inputs, outputs = sum(self.num_res_blocks), sum(self.num_res_blocks) + len(self.num_res_blocks)
        if len(self.transformer_depth) != inputs or len(self.transformer_depth_output) != outputs:
            raise self._problem(f"expected {inputs} input and {outputs} output transformer depths")
        if self.null_text == "none" and self.context_dim is None and self._has_transformers():
            raise self._problem("a UNet that takes text needs context_dim")

    def _has_transformers(self) -> bool:
        return any(self.transformer_depth) or any(self.transformer_depth_output) or self.transformer_depth_middle > 0

    def heads_for(self, channels: int) -> int:
        """Number of attention heads at a width of `channels`."""
        heads = self.num_heads if self.num_heads > 0 else channels // self.num_head_channels
        if heads < 1 or channels % heads:
            raise self._problem(f"a width of {channels} channels cannot be split into heads")
        return heads


def unet_config_from_state_dict(
    state_dict: Mapping[str, Tensor], num_heads: int | None = None, num_head_channels: int | None = None
) -> UNetConfig:
    """Read the architecture from parameter names and shapes (keys such as `input_blocks.0.0.weight`, no prefix).

    Attention heads leave no trace in the weights: give one of `num_heads`, `num_head_channels`, or the rule of the
    published Stable Diffusion families is used. `context_dim` of a text-free UNet, which leaves no trace either, is
    its family's, or None for a UNet of no published family.
    Raises Problem when the keys are not such a UNet's or when self-attention reads the text.
    """
    model_channels, in_channels = _shape(state_dict, "input_blocks.0.0.weight")[:2]
    out_channels = _shape(state_dict, "out.2.weight")[0]
    depths = _transformer_depths(state_dict)
    num_res_blocks, channel_mult, transformer_depth = [0], [0], []
    for index in range(1, _count(state_dict, "input_blocks.")):
        if f"input_blocks.{index}.0.op.weight" in state_dict:  # the way down to the next level
            num_res_blocks.append(0)
            channel_mult.append(0)
        else:
            num_res_blocks[-1] += 1
            channel_mult[-1] = _shape(state_dict, f"input_blocks.{index}.0.out_layers.3.weight")[0] // model_channels
            transformer_depth.append(depths.get(f"input_blocks.{index}.1", 0))
    if "middle_block.1.proj_in.weight" in state_dict:
        middle = depths.get("middle_block.1", 0)
    else:
        middle = -1 if "middle_block.0.in_layers.0.weight" in state_dict else -2
    null_text, null_tokens, context_dim = _text_input(state_dict, depths)
    linear = any(len(_shape(state_dict, f"{prefix}.proj_in.weight")) == 2 for prefix in depths)
    adm = state_dict["label_emb.0.0.weight"].shape[1] if "label_emb.0.0.weight" in state_dict else None
    heads, head_channels = _heads(num_heads, num_head_channels, context_dim, model_channels, linear)
    return UNetConfig(
        in_channels=in_channels,
        out_channels=out_channels,
        model_channels=model_channels,
        channel_mult=tuple(channel_mult),
        num_res_blocks=tuple(num_res_blocks),
        transformer_depth=tuple(transformer_depth),
        transformer_depth_middle=middle,
        transformer_depth_output=tuple(
            depths.get(f"output_blocks.{index}.1", 0) for index in reversed(range(_count(state_dict, "output_blocks.")))
        ),
        context_dim=context_dim if null_text == "none" else _published_context_dim(model_channels, linear, adm),
        num_heads=heads,
        num_head_channels=head_channels,
        use_linear_in_transformer=linear,
        adm_in_channels=adm,
        null_text=null_text,
        null_tokens=null_tokens,
    )


def _shape(state_dict: Mapping[str, Tensor], key: str) -> torch.Size:
    if key not in state_dict:
        raise Problem(f"This is not a Stable Diffusion UNet in LDM layout: the tensor {key} is missing.")
    return state_dict[key].shape


def _count(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks there are, by the number behind the prefix."""
    numbers = (key.split(".")[1] for key in state_dict if key.startswith(prefix))
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)


def _transformer_depths(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """How many transformer blocks there are under each prefix such as "input_blocks.1.1"."""
    depths: dict[str, int] = {}
    for key in state_dict:
        prefix, found, rest = key.partition(".transformer_blocks.")
        if found:
            depths[prefix] = max(depths.get(prefix, 0), int(rest.split(".")[0]) + 1)
        elif ".time_stack." in key or ".time_mixer." in key:
            raise Problem("This is a video UNet; only image UNets of the Stable Diffusion family are supported.")
    return depths


def _text_input(state_dict: Mapping[str, Tensor], prefixes: Collection[str]) -> tuple[str, int, int | None]:
    """(`null_text`, `null_tokens`, width of the text or None) of the transformers under these prefixes."""
    with_text = {key.partition(".transformer_blocks.")[0] for key in state_dict if ".attn2." in key}
    null_key = next((key for key in state_dict if key.endswith(".attn2.null_k")), None)
    context_dim = None
    for prefix in prefixes:
        first = f"{prefix}.transformer_blocks.0"
        keys, queries = (_shape(state_dict, f"{first}.attn1.to_{part}.weight") for part in "kq")
        if keys[1] != queries[0]:
            raise Problem(f"Self-attention {first}.attn1 reads the text (disable_self_attentions); use another UNet.")
        if prefix in with_text and null_key is None:
            context_dim = _shape(state_dict, f"{first}.attn2.to_k.weight")[1]
    if with_text and with_text != set(prefixes):
        raise Problem("Some transformer blocks of this UNet have cross-attention (attn2) and some do not.")
    if null_key is not None:
        return "cached", _shape(state_dict, null_key)[0], None
    return "constant" if prefixes and not with_text else "none", 77, context_dim


def _published_context_dim(model_channels: int, linear: bool, adm: int | None) -> int | None:
    if model_channels == 384:
        return 1280
    if model_channels != 320:
        return None
    if not linear:
        return 768
    return 2048 if adm is not None and adm >= SDXL_ADM_CHANNELS else 1024


def _heads(
    num_heads: int | None, num_head_channels: int | None, context_dim: int | None, model_channels: int, linear: bool
) -> tuple[int, int]:
    if num_heads is not None or num_head_channels is not None:
        return num_heads or -1, num_head_channels or -1
    if context_dim in HEADS_BY_CONTEXT:
        return HEADS_BY_CONTEXT[context_dim]
    if context_dim is None and model_channels in PUBLISHED_MODEL_CHANNELS:
        # Text-free weights of a published family: only 1.x projects into its transformers by convolution.
        return (-1, 64) if linear else (8, -1)
    raise Problem(f"This UNet (context {context_dim}) is of no published family: give its attention heads.")
