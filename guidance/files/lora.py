"""LoRA files of Stable Diffusion's UNet in kohya's layout, which ComfyUI, diffusers and most other programs read.

Per layer `NAME.lora_down.weight` [r, in, ...] (A), `NAME.lora_up.weight` [out, r, ...] (B), `NAME.alpha`, and with DoRA
`NAME.dora_scale` [1, in, ...] (m), which diffusers does not read. alpha / r is the scale of B A; files of this project
have alpha = r and the scale in B, since some readers overlook alpha.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import FileProblem
from ..networks.low_rank import DOWN, MAGNITUDE, UP, low_rank_layers, with_addition
from ..networks.unet_config import UNetConfig
from .inert_pickle import shown
from .model_file import ModelFile
from .recognise import recognise_names
from .weights import check_finite

# Families whose LoRA files name layers as diffusers does; others (SDXL) keep the LDM names.
DIFFUSERS_NAMED_CONTEXTS = (768, 1024)
PREFIX, TEXT_PREFIXES = "lora_unet_", ("lora_te_", "lora_te1_", "lora_te2_")
_PARTS = {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE_BLOCKS = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}


@torch.no_grad()
def lora_tensors(unet: nn.Module, config: UNetConfig, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The additions of a network (`add_low_rank`) as the tensors of a LoRA file.

    values: tensors to use instead of the module's own, by name, such as their average.
    """
    own = {**unet.state_dict(), **(values or {})}
    tensors: dict[str, Tensor] = {}
    for name, layer in low_rank_layers(unet).items():
        public = lora_name(name, config)
        tensors[f"{public}.lora_down.weight"] = own[f"{name}.{DOWN}"].detach().cpu()
        tensors[f"{public}.lora_up.weight"] = own[f"{name}.{UP}"].detach().cpu() * layer.scale
        tensors[f"{public}.alpha"] = torch.tensor(float(layer.rank))
        if layer.dora_scale is not None:
            tensors[f"{public}.dora_scale"] = own[f"{name}.{MAGNITUDE}"].detach().cpu()
    return tensors


def read_lora(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a LoRA file for a UNet in kohya's layout; those for text encoders are left out.

    Raises FileProblem for other files, other kinds of additions (LoHa, LoKr, ...) and numbers that are not finite.
    """
    file = ModelFile(path)
    kind = recognise_names(file.keys, file.metadata)
    if kind.group != "lora":
        raise FileProblem(f"{path}: expected a LoRA, found {kind.what}; use a LoRA in kohya's layout.")
    tensors = {key: tensor for key, tensor in file.tensors().items() if not key.startswith(TEXT_PREFIXES)}
    for key in tensors:
        if not key.startswith(PREFIX) or key.partition(".")[2] not in _PARTS:
            raise FileProblem(
                f"{path}: expected a LoRA of a UNet in kohya's layout (NAME.lora_down.weight, NAME.lora_up.weight, "
                f"NAME.alpha), found {shown(key)}; convert it, or load it in ComfyUI."
            )
    check_finite(tensors, path)
    return tensors, file.metadata


@torch.no_grad()
def add_lora(
    weights: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    config: UNetConfig,
    strength: float = 1.0,
    source: str | os.PathLike = "LoRA",
) -> dict[str, Tensor]:
    """A UNet's weights (LDM keys) with a LoRA in them: W + strength (W' - W), as ComfyUI's loader computes it.

    lora: the tensors of `read_lora`. strength 0 is neutral. Computed in fp64; weights keep their number format. Raises
    FileProblem, naming `source`, for a LoRA with layers that this UNet has not, or of other sizes.
    """
    merged, names = dict(weights), {name.partition(".")[0] for name in lora}
    for key, weight in weights.items():
        layer = key.removesuffix(".weight")
        if layer == key or weight.ndim < 2:
            continue
        found = {lora_name(layer, config), PREFIX + layer.replace(".", "_")} & names
        names -= found
        for name in found:
            merged[key] = _with_addition(merged[key], lora, name, strength, source)
    if names:
        raise FileProblem(
            f"{source}: expected additions to layers of this UNet, found {len(names)} for others, such as "
            f"{shown(min(names))}; use a LoRA of the model's own family."
        )
    return merged


def _with_addition(
    weight: Tensor, lora: Mapping[str, Tensor], name: str, strength: float, source: str | os.PathLike
) -> Tensor:
    up, down = lora.get(f"{name}.lora_up.weight"), lora.get(f"{name}.lora_down.weight")
    if up is None or down is None:
        raise FileProblem(f"{source}: expected {shown(name)} with lora_up and lora_down, found one of them alone.")
    magnitude, alpha = lora.get(f"{name}.dora_scale"), lora.get(f"{name}.alpha")
    fits = up.ndim >= 2 and down.ndim >= 2 and up.shape[1] == len(down) and len(up) == len(weight)
    fits = fits and down[0].numel() == weight[0].numel() and up[0].numel() == len(down)
    fits = fits and (alpha is None or alpha.numel() == 1)
    fits = fits and (magnitude is None or magnitude.numel() == weight.shape[1])
    if not fits:
        raise FileProblem(
            f"{source}: expected an addition to a layer of the shape {list(weight.shape)}, found "
            f"{list(up.shape)} times {list(down.shape)} for {shown(name)}; use a LoRA of the model's own family."
        )
    scale = 1.0 if alpha is None else float(alpha) / len(down)
    wide = weight.double()
    changed = with_addition(
        wide, up.flatten(1).double(), down.flatten(1).double(), scale, None if magnitude is None else magnitude.double()
    )
    return (wide + strength * (changed - wide)).to(weight.dtype)


def lora_name(layer: str, config: UNetConfig) -> str:
    """The name of a layer (LDM, without .weight) in LoRA files of its family."""
    named = diffusers_name(layer, config) if config.context_dim in DIFFUSERS_NAMED_CONTEXTS else layer
    return PREFIX + named.replace(".", "_")


def diffusers_name(layer: str, config: UNetConfig) -> str:
    """The name of a UNet's layer in diffusers: input_blocks.1.0.in_layers.2 is down_blocks.0.resnets.0.conv1.

    diffusers numbers the blocks of each level, LDM all blocks of a half in one row, where every level but the last ends
    with a block that halves or doubles the size.
    """
    if layer in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[layer]
    half, _, rest = layer.partition(".")
    number, _, rest = rest.partition(".")
    if half == "middle_block":
        place = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}[number]
        return f"{place}.{_RESNET.get(rest, rest)}"
    part, _, rest = rest.partition(".")
    counts = config.num_res_blocks
    index, level = int(number), 0
    if half == "input_blocks":
        index, per_level = index - 1, [count + 1 for count in counts]
    else:
        per_level = [count + 1 for count in reversed(counts)]
    while index >= per_level[level]:
        index, level = index - per_level[level], level + 1
    blocks = f"{'down' if half == 'input_blocks' else 'up'}_blocks.{level}"
    if rest == "op":
        return f"{blocks}.downsamplers.0.conv"
    if rest == "conv":
        return f"{blocks}.upsamplers.0.conv"
    return f"{blocks}.{'resnets' if part == '0' else 'attentions'}.{index}.{_RESNET.get(rest, rest)}"
