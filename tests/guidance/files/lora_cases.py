"""Small UNets with trained additions, for the tests of LoRA files and for diffusers, which reads the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from indomain_guidance.guidance.files import lora_tensors, write_safetensors
from indomain_guidance.guidance.networks.low_rank import add_low_rank, low_rank_layers
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.guidance.networks.unet_layers import timestep_embedding
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent / "golden" / "lora_in_diffusers.safetensors"
SIZES, EMBEDDED, POOLED = 6, 8, 16  # of SDXL's vector: six numbers, channels of each, pooled text
CONFIGS = {
    "sd1": UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=(1, 1),
        transformer_depth=(1, 1),
        transformer_depth_middle=1,
        transformer_depth_output=(1, 1, 1, 1),
        context_dim=768,
        num_heads=4,
    ),
    "sdxl": UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=(1, 1),
        transformer_depth=(0, 2),
        transformer_depth_middle=2,
        transformer_depth_output=(0, 0, 2, 2),
        context_dim=2048,
        num_head_channels=32,
        use_linear_in_transformer=True,
        adm_in_channels=SIZES * EMBEDDED + POOLED,
    ),
}


def base(config: UNetConfig) -> UNet:
    """A UNet whose layers all do something."""
    generator, unet = torch.Generator().manual_seed(0), UNet(config).requires_grad_(False)
    for name, parameter in unet.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(values * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.1 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return unet.eval()


def trained(config: UNetConfig, layers: str = "all", **options: Any) -> tuple[UNet, dict[str, Tensor]]:
    """(a UNet with additions that are no longer zero, its weights without them)."""
    unet, generator = base(config), torch.Generator().manual_seed(1)
    weights = {key: value.clone() for key, value in unet.state_dict().items()}
    add_low_rank(unet, layers=layers, **{"rank": 4, "scale": 0.5, **options})
    with torch.no_grad():
        for layer in low_rank_layers(unet).values():
            layer.lora_up.copy_(0.2 * torch.randn(layer.lora_up.shape, generator=generator))
            if layer.dora_scale is not None:
                layer.dora_scale.mul_(1 + 0.3 * torch.rand(layer.dora_scale.shape, generator=generator))
    return unet.requires_grad_(False), weights


def write_lora(path: Path, family: str, layers: str = "all", **options: Any) -> Path:
    """The file of `trained` additions."""
    config = CONFIGS[family]
    return write_safetensors(path, lora_tensors(trained(config, layers, **options)[0], config))


def inputs(config: UNetConfig) -> dict[str, Tensor]:
    """What the UNet takes: x, timesteps, context, and for SDXL y of the numbers and text in `added`."""
    generator = torch.Generator().manual_seed(2)
    made = {
        "x": torch.randn(2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([3, 700]),
        "context": torch.randn(2, 7, config.context_dim or 1, generator=generator),
    }
    if config.adm_in_channels:
        sizes = timestep_embedding(added()["time_ids"].flatten(), EMBEDDED).reshape(2, -1)
        made["y"] = torch.cat([added()["text_embeds"], sizes], 1)
    return made


def added() -> dict[str, Tensor]:
    """SDXL's pooled text and sizes, as diffusers calls them."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(0, 64, (2, SIZES), generator=generator).float()
    return {"text_embeds": torch.randn(2, POOLED, generator=generator), "time_ids": sizes}
