"""ComfyUI in this process, and models of Stable Diffusion's topologies with random weights to run in it."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.guidance.null_text import NullContext, build_cached, fold_constants
from torch import Tensor

TOKENS = 77
POOLED = 1280  # width of the pooled text in SDXL's vector conditioning

SD15 = UNetConfig(
    model_channels=320,
    channel_mult=(1, 2, 4, 4),
    num_res_blocks=(2, 2, 2, 2),
    transformer_depth=(1, 1, 1, 1, 1, 1, 0, 0),
    transformer_depth_middle=1,
    transformer_depth_output=(1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0),
    context_dim=768,
    num_heads=8,
)

# SDXL's widths, heads and levels with fewer blocks: one residual block a level instead of two, and transformers of
# depth 1 and 2 instead of 2 and 10. The whole one needs 10 GB in fp32.
SDXL_BLOCKS = UNetConfig(
    model_channels=320,
    channel_mult=(1, 2, 4),
    num_res_blocks=(1, 1, 1),
    transformer_depth=(0, 1, 2),
    transformer_depth_middle=2,
    transformer_depth_output=(0, 0, 1, 1, 2, 2),
    context_dim=2048,
    num_head_channels=64,
    use_linear_in_transformer=True,
    adm_in_channels=2816,
)

TINY = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    transformer_depth=(1, 1),
    transformer_depth_middle=1,
    transformer_depth_output=(1, 1, 1, 1),
    context_dim=24,
    num_heads=4,
)


def comfyui(cpu: bool = True) -> None:
    """Make ComfyUI importable, with its default settings; `cpu` keeps it off any GPU. Call it before any other use."""
    path = os.environ.get("INDOMAIN_COMFYUI_PATH")
    if not path:
        raise SystemExit("This benchmark needs a ComfyUI: start it with `python run.py bench sampling`.")
    root = Path(path).resolve()
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = cpu
    # Before `nodes`, which puts comfy/ on the path, where a utils.py would take its place; main.py does the same.
    importlib.import_module("utils.install_util")
    found = Path(importlib.import_module("nodes").__file__).resolve()
    if found != root / "nodes.py":
        raise SystemExit(f"Expected ComfyUI's nodes.py from {root}, found {found}.")


def internals(name: str) -> Any:
    """A module of this pack's ComfyUI adapters, under the name the library has here."""
    return importlib.import_module(f"indomain_guidance.nodes.comfy_internals.{name}")


def random_weights(config: UNetConfig, seed: int) -> dict[str, Tensor]:
    """Weights that keep activations near 1, the same for a seed; layers that training starts at zero included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in UNet(config).state_dict().items()}
    weights = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if key.endswith((".null_k", ".null_v")):
            weights[key] = value
        elif len(shape) > 1:
            weights[key] = value.div_(shape[1:].numel() ** 0.5)
        else:
            weights[key] = value.mul_(0.02).add_(1.0 if key.endswith("weight") else 0.0)
    return weights


def random_context(config: UNetConfig, seed: int) -> Tensor:
    """An encoded prompt [1, 77, D] of random numbers."""
    return torch.randn(1, TOKENS, config.context_dim, generator=torch.Generator().manual_seed(1000 + seed))


def constant_form(weights: dict[str, Tensor], config: UNetConfig, seed: int) -> tuple[dict[str, Tensor], UNetConfig]:
    """The `constant` text-free form with random constants: measuring them would change no shape and no time."""
    generator = torch.Generator().manual_seed(seed)
    suffix = ".attn1.to_out.0.bias"
    constants = {
        key.removesuffix(suffix): 0.1 * torch.randn(bias.shape, generator=generator)
        for key, bias in weights.items()
        if key.endswith(suffix)
    }
    return fold_constants(weights, config, _null_context(config, seed), constants)


def cached_form(weights: dict[str, Tensor], config: UNetConfig, seed: int) -> tuple[dict[str, Tensor], UNetConfig]:
    """The `cached` text-free form for a random prompt."""
    return build_cached(weights, config, _null_context(config, seed))


def _null_context(config: UNetConfig, seed: int) -> NullContext:
    pooled = torch.zeros(1, POOLED) if config.adm_in_channels == SDXL_BLOCKS.adm_in_channels else None
    return NullContext(random_context(config, seed), {}, pooled)


def prior_model(config: UNetConfig, seed: int, weight_dtype: str = "default") -> Any:
    """A MODEL with random weights in the latent space of SD 1.5, as a loader would make it."""
    weights = random_weights(config, seed)
    return internals("models.loading").build_unet_model(
        weights,
        config,
        info=None,
        latent_format="sd15",
        source="benchmark",
        prediction_type="epsilon",
        weight_dtype=weight_dtype,
    )


def domain_model(prior: Any, config: UNetConfig, seed: int, weight_dtype: str = "default") -> Any:
    """The `constant` domain model of `prior`, on weights of its own, as Load Domain UNet would make it."""
    loading = internals("models.loading")
    weights, text_free = constant_form(dict(prior.model.diffusion_model.state_dict()), config, seed)
    return loading.build_unet_model(
        weights,
        text_free,
        info=loading.DomainInfo("benchmark", "benchmark.safetensors", "constant", None),
        latent_format="sd15",
        source="benchmark",
        prediction_type="epsilon",
        weight_dtype=weight_dtype,
    )


def bare_unet(weights: dict[str, Tensor], config: UNetConfig) -> torch.nn.Module:
    """Core's UNet in the text-free form of `config`, on exactly these tensors: forms of one prior share its memory."""
    openaimodel = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel")
    operations = importlib.import_module("comfy.ops").disable_weight_init
    loading, text_free = internals("models.loading"), internals("models.text_free")
    full = replace(config, null_text="none")
    heads = {"num_heads": config.num_heads, "num_head_channels": config.num_head_channels}
    unet = openaimodel.UNetModel(
        **loading.core_unet_config(full), **heads, dtype=torch.float32, device="meta", operations=operations
    )
    if config.null_text != "none":
        text_free.remove_text(unet, config.null_text, config.null_tokens)
    named = {text_free.module_key(key): tensor for key, tensor in weights.items()}
    unet.load_state_dict(named, strict=True, assign=True)
    return unet.eval().requires_grad_(False)


def unet_inputs(config: UNetConfig, size: int, seed: int) -> dict[str, Any]:
    """Arguments of one UNet forward at batch 1: x [1, 4, size, size], timesteps [1], context [1, 77, D], y [1, A].

    The pooled text in y is zero, as in the null context that the text-free forms here are made for.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "x": torch.randn(1, config.in_channels, size, size, generator=generator),
        "timesteps": torch.tensor([500.0]),
        "context": random_context(config, seed),
        "y": None,
    }
    if config.adm_in_channels is not None:
        inputs["y"] = torch.randn(1, config.adm_in_channels, generator=generator)
        inputs["y"][:, :POOLED] = 0
    return inputs
