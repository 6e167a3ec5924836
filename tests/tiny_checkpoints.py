"""Checkpoints of every family in LDM layout, at widths of nothing: real keys, real layouts, random weights.

Text encoders keep the width that tells the families apart and lose depth; their embeddings repeat a few rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

TEXT_LAYERS, TEXT_MLP = 3, 64
VOCABULARY = 49408
EMBEDDING_ROWS = 509
OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


@dataclass
class TinyCheckpoint:
    """One file and the parts it was made of (fp32 values that fp16 holds exactly)."""

    path: Path
    unet: nn.Module
    autoencoder: nn.Module
    text_encoders: dict[str, nn.Module]
    tensors: dict[str, Tensor]


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights that keep activations near 1 and are exact in fp16; no layer stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and len(parameter) == VOCABULARY:
                rows = torch.randn(EMBEDDING_ROWS, parameter.shape[1], generator=generator)
                parameter.copy_(rows[torch.arange(VOCABULARY) % EMBEDDING_ROWS].half())
                continue
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                values *= parameter[0].numel() ** -0.5
            else:
                values = 0.1 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            parameter.copy_(values.half())
    return module.eval().requires_grad_(False)


def to_openclip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names of a text tower -> OpenCLIP's, as Stable Diffusion 2.x and XL files have them."""
    tower = {
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "text_projection": weights["text_projection.weight"].t().contiguous(),
        "ln_final.weight": weights["text_model.final_layer_norm.weight"],
        "ln_final.bias": weights["text_model.final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(TEXT_LAYERS):
        source, target = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            parts = [weights[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tower[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
            for name, own in OPENCLIP_LAYER.items():
                tower[f"{target}.{name}.{kind}"] = weights[f"{source}.{own}.{kind}"]
    return tower


def text_encoder(name: str, seed: int) -> nn.Module:
    """clip_l, clip_h or clip_g at its own width and three layers."""
    from indomain_guidance.guidance.networks.text_encoder import TextEncoder, TextEncoderConfig

    width = {"clip_l": 768, "clip_h": 1024, "clip_g": 1280}[name]
    with torch.device("meta"):  # drawing 60 M numbers twice takes seconds
        encoder = TextEncoder(
            TextEncoderConfig(
                width=width,
                layers=TEXT_LAYERS,
                heads=width // 64,
                mlp_width=TEXT_MLP,
                activation="quick_gelu" if name == "clip_l" else "gelu",
                projection_dim=None if name == "clip_l" else width,
            )
        )
    return randomise(encoder.to_empty(device="cpu"), seed)


def unet_config(family: str):
    """A UNet of two levels; "sd1", "sd2" or "sdxl"."""
    from indomain_guidance.guidance.networks.unet_config import UNetConfig

    shape = {
        "sd1": dict(model_channels=32, context_dim=768, num_heads=8),
        "sd2": dict(model_channels=64, context_dim=1024, num_head_channels=64, use_linear_in_transformer=True),
        "sdxl": dict(
            model_channels=64,
            context_dim=2048,
            num_head_channels=64,
            use_linear_in_transformer=True,
            adm_in_channels=2816,
        ),
    }[family]
    depth = dict(transformer_depth=(0, 2), transformer_depth_middle=2, transformer_depth_output=(2, 2, 0, 0))
    if family != "sdxl":
        depth = dict(transformer_depth=(1, 1), transformer_depth_middle=1, transformer_depth_output=(1, 1, 1, 1))
    return UNetConfig(channel_mult=(1, 2), num_res_blocks=(1, 1), **depth, **shape)


def make(folder: Path, family: str, seed: int = 0, markers: dict[str, Tensor] | None = None) -> TinyCheckpoint:
    """Write FAMILY.safetensors (fp16) into `folder`: "sd1", "sd2" or "sdxl", with `markers` beside the weights."""
    from indomain_guidance.guidance.networks.autoencoder import Autoencoder, AutoencoderConfig
    from indomain_guidance.guidance.networks.unet import UNet
    from safetensors.torch import save_file

    unet = randomise(UNet(unet_config(family)), seed)
    autoencoder = randomise(Autoencoder(AutoencoderConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)), seed + 1)
    names = {"sd1": ["clip_l"], "sd2": ["clip_h"], "sdxl": ["clip_l", "clip_g"]}[family]
    encoders = {name: text_encoder(name, seed + 2 + index) for index, name in enumerate(names)}
    tensors = {f"model.diffusion_model.{key}": value for key, value in unet.state_dict().items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in autoencoder.state_dict().items()}
    for index, (name, encoder) in enumerate(encoders.items()):
        place = "cond_stage_model." if family != "sdxl" else f"conditioner.embedders.{index}."
        weights = encoder.state_dict()
        if name == "clip_l":
            part = {f"{place}transformer.{key}": value for key, value in weights.items()}
            part[f"{place}transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        else:
            part = {f"{place}model.{key}": value for key, value in to_openclip(weights).items()}
        tensors |= part
    tensors = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in tensors.items()}
    tensors |= markers or {}
    path = folder / f"{family}.safetensors"
    save_file(tensors, str(path))
    return TinyCheckpoint(path, unet, autoencoder, encoders, tensors)
