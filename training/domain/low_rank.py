"""Low-rank adaptation, W + B A, of the attention projections (arXiv 2106.09685, section 4.1, with alpha = r).

Files use kohya's layout, which ComfyUI and most other tools load: per layer `NAME.lora_down.weight` [r, in] (A),
`NAME.lora_up.weight` [out, r] (B) and `NAME.alpha`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...guidance.errors import Problem
from ...guidance.networks.unet_config import UNetConfig

DOWN, UP = "lora_down", "lora_up"
ATTENTION_PROJECTION = re.compile(r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")
# Families whose LoRA files name layers as diffusers does; others (SDXL) keep the LDM names.
DIFFUSERS_NAMED_CONTEXTS = (768, 1024)


class LowRankLinear(nn.Linear):
    """A frozen linear layer with a trainable low-rank addition; `weight` and `bias` keep their names.

    lora_down [rank, in] starts uniform within 1 / sqrt(in), as a linear layer does; lora_up [out, rank] starts at zero,
    so that nothing changes before the first step.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank = rank
        bound = 1 / math.sqrt(self.in_features)
        down = torch.rand(rank, self.in_features, generator=generator) * (2 * bound) - bound
        self.lora_down = nn.Parameter(down.to(self.weight.device))
        self.lora_up = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        added = F.linear(F.linear(input, self.lora_down), self.lora_up)
        return F.linear(input, self.weight, self.bias) + added


def add_low_rank(unet: nn.Module, rank: int, seed: int = 0) -> list[str]:
    """Give every attention projection of a UNet a low-rank addition, in place; the names of those layers.

    rank: 1 and up, typically 4 to 64; larger than a layer is wide gains nothing. Raises ValueError for a UNet without
    attention.
    """
    if rank < 1:
        raise Problem(f"Low rank: expected a rank of at least 1, got {rank}.")
    generator = torch.Generator().manual_seed(seed)
    modules = dict(unet.named_modules())
    names = []
    for name, module in modules.items():
        if ATTENTION_PROJECTION.fullmatch(name) and isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(modules[parent], last, LowRankLinear(module, rank, generator))
            names.append(name)
    if not names:
        raise Problem("Low rank: expected a UNet with attention layers, found none; train all weights.")
    return names


def low_rank_layers(unet: nn.Module) -> dict[str, LowRankLinear]:
    """The layers with an addition, by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, LowRankLinear)}


@torch.no_grad()
def merged_weights(unet: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The complete weights under LDM keys, W + B A in place of the parts (in fp64, on the CPU).

    values: tensors to use instead of the module's own, by name, such as an average of the additions.
    """
    own = {**unet.state_dict(), **(values or {})}
    weights = {key: tensor for key, tensor in own.items() if not key.endswith((f".{DOWN}", f".{UP}"))}
    for name in low_rank_layers(unet):
        weight = weights[f"{name}.weight"]
        # Some devices (MPS) have no fp64.
        wide, up, down = (part.cpu().double() for part in (weight, own[f"{name}.{UP}"], own[f"{name}.{DOWN}"]))
        weights[f"{name}.weight"] = (wide + up @ down).to(weight.dtype)
    return weights


@torch.no_grad()
def kohya_tensors(unet: nn.Module, config: UNetConfig, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The additions alone under the names of kohya's LoRA files; `values` as in `merged_weights`."""
    own = {**unet.state_dict(), **(values or {})}
    naming = diffusers_names(config) if config.context_dim in DIFFUSERS_NAMED_CONTEXTS else {}
    tensors: dict[str, Tensor] = {}
    for name, layer in low_rank_layers(unet).items():
        place, _, rest = name.partition(".transformer_blocks.")
        public = f"lora_unet_{naming.get(place, place)}_transformer_blocks_{rest}".replace(".", "_")
        tensors[f"{public}.lora_down.weight"] = own[f"{name}.{DOWN}"].detach().cpu()
        tensors[f"{public}.lora_up.weight"] = own[f"{name}.{UP}"].detach().cpu()
        tensors[f"{public}.alpha"] = torch.tensor(float(layer.rank))
    return tensors


def diffusers_names(config: UNetConfig) -> dict[str, str]:
    """LDM name of each spatial transformer -> its name in diffusers (input_blocks.1.1 -> down_blocks.0.attentions.0).

    diffusers numbers the attentions of each level, LDM all blocks of a half in one row, where every level but the
    last ends with a block that halves the size.
    """
    names = {"middle_block.1": "mid_block.attentions.0"}
    index = 1
    for level, count in enumerate(config.num_res_blocks):
        names.update({f"input_blocks.{index + i}.1": f"down_blocks.{level}.attentions.{i}" for i in range(count)})
        index += count + 1
    index = 0
    for level, count in enumerate(reversed(config.num_res_blocks)):
        names.update({f"output_blocks.{index + i}.1": f"up_blocks.{level}.attentions.{i}" for i in range(count + 1)})
        index += count + 1
    return names
