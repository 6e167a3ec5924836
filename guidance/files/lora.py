"""LoRA files of Stable Diffusion's UNet in kohya's layout, which ComfyUI, diffusers and most other programs read.

Per layer `NAME.lora_down.weight` [r, in, ...] (A), `NAME.lora_up.weight` [out, r, ...] (B), `NAME.alpha`, and with DoRA
`NAME.dora_scale` [1, in, ...] (m), or [out, 1, ...] in files of some trainers; diffusers overlooks it. alpha / r is the
scale of B A; files of this project have alpha = r and the scale in B, since some readers overlook alpha.
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


def holds_lora(path: str | os.PathLike) -> bool:
    """Whether a model file, of any layout, is a LoRA. Raises FileProblem as `ModelFile`."""
    return _is_lora(ModelFile(path))


def read_lora(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a LoRA file for a UNet in kohya's layout; those for text encoders are left out.

    Raises FileProblem for other files, other kinds of additions (LoHa, LoKr, ...), a LoRA for text encoders alone, and
    numbers that are not finite.
    """
    file = ModelFile(path)
    if not _is_lora(file):
        kind = recognise_names(file.keys, file.metadata)
        raise FileProblem(f"{path}: expected a LoRA, found {kind.what}; use a LoRA in kohya's layout.")
    keys = [key for key in file.keys if not key.startswith(TEXT_PREFIXES)]
    if not keys:
        raise FileProblem(f"{path}: expected a LoRA for a UNet, found one for text encoders alone; load it in ComfyUI.")
    for key in keys:
        if not key.startswith(PREFIX) or key.partition(".")[2] not in _PARTS:
            raise FileProblem(
                f"{path}: expected a LoRA for a UNet in kohya's layout (NAME.lora_down.weight, NAME.lora_up.weight, "
                f"NAME.alpha), found {shown(key)}; convert it, or load it in ComfyUI."
            )
    found = file.tensors()
    tensors = {key: found[key] for key in keys}
    for key, tensor in tensors.items():
        if tensor.is_complex() or not (tensor.is_floating_point() or key.endswith(".alpha")):
            raise FileProblem(
                f"{path}: expected floating-point numbers, found {str(tensor.dtype).removeprefix('torch.')} in "
                f"{shown(key)}; use the LoRA in fp16, bf16 or fp32."
            )
    check_finite(tensors, path)
    return tensors, file.metadata


def _is_lora(file: ModelFile) -> bool:
    return recognise_names(file.keys, file.metadata).group == "lora"


@torch.no_grad()
def add_lora(
    weights: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    config: UNetConfig,
    strength: float = 1.0,
    source: str | os.PathLike = "LoRA",
) -> dict[str, Tensor]:
    """A UNet's weights (LDM keys) with a LoRA in them: W + strength (W' - W), as ComfyUI's loader computes it.

    lora: the tensors of `read_lora`. strength 0 is neutral. Computed in fp64; weights keep their number format. A DoRA
    that rescales output channels is divided by their norm with the addition, as it was trained; ComfyUI 0.3.75 divides
    by their norm without. Raises FileProblem, naming `source`, for a LoRA with layers that this UNet has not, of other
    sizes, or twice, and where numbers leave the range of the weights' format.
    """
    merged, names = dict(weights), {name.partition(".")[0] for name in lora}
    for key, weight in weights.items():
        layer = key.removesuffix(".weight")
        if layer == key or weight.ndim < 2:
            continue
        found = sorted({lora_name(layer, config), PREFIX + layer.replace(".", "_")} & names)
        names.difference_update(found)
        if len(found) > 1:
            raise FileProblem(
                f"{source}: expected one addition a layer, found {shown(found[0])} and {shown(found[1])}, which are "
                "one; use a LoRA that was written by one program."
            )
        if found:
            merged[key] = _with_addition(weight, lora, found[0], strength, source)
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
    magnitude, alpha = lora.get(f"{name}.dora_scale"), lora.get(f"{name}.alpha")
    if up is None or down is None:
        raise FileProblem(
            f"{source}: expected lora_up.weight and lora_down.weight for {shown(name)}, found "
            f"{'neither' if up is None and down is None else 'one of them'}; download or convert it again."
        )
    if not _fits(weight, up, down):
        raise FileProblem(
            f"{source}: expected an addition to a layer of the shape {list(weight.shape)}, found "
            f"{list(up.shape)} times {list(down.shape)} for {shown(name)}; use a LoRA of the model's own family."
        )
    if alpha is not None and alpha.numel() != 1:
        raise FileProblem(
            f"{source}: expected one number for {shown(name)}.alpha, found {list(alpha.shape)}; convert it again."
        )
    # The norms of input channels, or of output channels.
    norms = ([1, weight.shape[1]], [weight.shape[0], 1])
    ones = [1] * (weight.ndim - 2)
    if magnitude is not None and list(magnitude.shape) not in (*norms, *(norm + ones for norm in norms)):
        raise FileProblem(
            f"{source}: expected the shape {norms[0] + ones} or {norms[1] + ones} for {shown(name)}.dora_scale, found "
            f"{list(magnitude.shape)}; use a LoRA of the model's own family."
        )
    scale = 1.0 if alpha is None else float(alpha) / len(down)
    wide, addition = weight.cpu().double(), scale * _product(up, down)
    changed = with_addition(wide, addition, None if magnitude is None else magnitude.cpu().double())
    result = (wide + strength * (changed - wide)).to(weight)
    if not bool(result.float().isfinite().all()):  # torch has no isfinite for fp8
        raise FileProblem(
            f"{source}: expected finite weights with {shown(name)} added at strength {strength:g}, found NaN or "
            "infinity; use a smaller strength or another LoRA."
        )
    return result


def _product(up: Tensor, down: Tensor, ranks: int = 4096) -> Tensor:
    """B A [out, in * ...] in fp64, which some devices lack (hence the CPU); `ranks` at a time, which saves memory."""
    result = torch.zeros(len(up), down[0].numel(), dtype=torch.float64)
    for at in range(0, len(down), ranks):
        rows = down[at : at + ranks].flatten(1).cpu().double()
        result.addmm_(up[:, at : at + ranks].flatten(1).cpu().double(), rows)
    return result


def _fits(weight: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether B [out, r, 1, ...] times A [r, in, ...] has as many rows and columns as the weight, and r > 0."""
    if up.ndim < 2 or down.ndim < 2 or len(down) == 0 or len(up) != len(weight):
        return False
    return up[0].numel() == up.shape[1] == len(down) and down[0].numel() == weight[0].numel()


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
