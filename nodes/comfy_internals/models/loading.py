"""Domain models and the mini world as ComfyUI MODELs that core and other packs can patch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ....guidance.files import FileProblem, ModelFile, check_finite, check_unet, read_domain_file, unet_layout
from ....guidance.networks.unet_config import UNetConfig
from ....training.mini_world import MINI_WORLD
from .folders import DOMAIN_UNETS
from .mini_world import MiniWorldLatentFormat, build_clip, build_vae
from .text_free import DomainInfo, TextFree, mixed, module_key, remove_text, without_text

WEIGHT_DTYPES = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
LATENT_FORMATS = {
    "sd15": comfy.latent_formats.SD15,
    "sdxl": comfy.latent_formats.SDXL,
    MINI_WORLD: MiniWorldLatentFormat,
}
MODEL_TYPES = {"epsilon": comfy.model_base.ModelType.EPS, "v_prediction": comfy.model_base.ModelType.V_PREDICTION}


def find_domain_unet(name: str) -> Path:
    """The path of a listed file. Raises FileProblem that says what became of it, and where files belong."""
    if not DOMAIN_UNETS.listed():
        raise FileProblem(
            f"Load Domain UNet: there is no domain model yet; put a .safetensors file into {DOMAIN_UNETS.own()} "
            "(or make one with the Text-Free UNet node) and refresh the editor."
        )
    return DOMAIN_UNETS.find(name)


def ordinary_tensors() -> contextlib.AbstractContextManager:
    """Leave ComfyUI's inference mode: tensors made in it can never take part in autograd."""
    return torch.inference_mode(False)


class PlainUNetConfig(comfy.supported_models_base.BASE):
    """A UNet of the LDM architecture in sizes that core has no family for."""

    unet_extra_config = {}
    memory_usage_factor = 1.0


# What an architecture has under the same name in `UNetConfig` and in core's configuration of a UNet.
SAME_NUMBERS = (
    "adm_in_channels in_channels out_channels model_channels transformer_depth_middle use_linear_in_transformer "
    "context_dim"
).split()
SAME_LISTS = ("num_res_blocks", "transformer_depth", "transformer_depth_output", "channel_mult")


def core_unet_config(config: UNetConfig) -> dict:
    """`UNetConfig` as the arguments of core's `UNetModel` that core's own detection would find."""
    core = {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
        **{name: getattr(config, name) for name in SAME_NUMBERS},
        **{name: list(getattr(config, name)) for name in SAME_LISTS},
    }
    if config.adm_in_channels is not None:
        core["num_classes"] = "sequential"
    return core


def _mini_world_component(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    from ....training.mini_world import assets

    return assets.read_component(name)


def _model_config(config: UNetConfig, state_dict: Mapping[str, Tensor], latent_format: str | None, source: str):
    """Core's configuration for an architecture: of its family where there is one, else a plain UNet's."""
    if latent_format is not None and latent_format not in LATENT_FORMATS:
        raise FileProblem(
            f"{source}: expected a latent space out of {', '.join(LATENT_FORMATS)}, found '{latent_format}'; this file "
            "needs a newer version of this pack."
        )
    core = core_unet_config(config)
    for family in comfy.supported_models.models:
        if family.matches(core, state_dict):
            model_config = family(core)
            found = type(model_config.latent_format)
            if latent_format is not None and LATENT_FORMATS[latent_format] is not found:
                raise FileProblem(
                    f"{source}: its metadata says latent space '{latent_format}', but its architecture is "
                    f"{family.__name__}, which works in {found.__name__}; make the file again from its prior."
                )
            return model_config
    if latent_format is None:
        raise FileProblem(
            f"{source}: expected a Stable Diffusion UNet of a known family, or metadata that says which latent space "
            f"it works in, found {config.model_channels} channels with a text width of {config.context_dim} and no "
            "such metadata; make the file again with the Text-Free UNet node."
        )
    model_config = PlainUNetConfig(core)
    model_config.unet_config.update(num_heads=config.num_heads, num_head_channels=config.num_head_channels)
    if latent_format == MINI_WORLD:
        model_config.latent_format = MiniWorldLatentFormat(_mini_world_component("autoencoder")[1])
    else:
        model_config.latent_format = LATENT_FORMATS[latent_format]()
    return model_config


def _fit_output_layer(unet: Any, config: UNetConfig) -> None:
    """Give core's last convolution the width of the level before it; core assumes that its multiplier is 1."""
    last, channels = unet.out[-1], config.model_channels * config.channel_mult[0]
    if last.in_channels != channels:
        like = {"dtype": last.weight.dtype, "device": last.weight.device}
        unet.out[-1] = type(last)(channels, config.out_channels, 3, padding=1, **like)


def build_unet_model(
    state_dict: Mapping[str, Tensor],
    config: UNetConfig,
    *,
    info: DomainInfo | None,
    latent_format: str | None,
    source: str,
    prediction_type: str | None = None,
    zero_snr: bool = False,
    weight_dtype: str = "default",
    disable_dynamic: bool = False,
):
    """A ModelPatcher around core's UNet for LDM weights (keys without prefix), with text or text-free.

    prediction_type: None leaves it to core's detection. source: of the weights, for messages. Call it outside inference
    mode, else the weights can never take part in autograd.
    """
    if prediction_type is not None and prediction_type not in MODEL_TYPES:
        raise FileProblem(
            f"{source}: expected a model that predicts {' or '.join(MODEL_TYPES)}, found '{prediction_type}', which "
            "ComfyUI has no model type for."
        )
    weights = {module_key(key): tensor for key, tensor in state_dict.items()}
    model_config = _model_config(config, weights, latent_format, source)
    if prediction_type is not None:
        model_config.model_type = lambda state_dict, prefix="": MODEL_TYPES[prediction_type]
    if zero_snr:
        model_config.sampling_settings["zsnr"] = True

    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    dtype = WEIGHT_DTYPES[weight_dtype]
    if dtype is None:
        dtype = comfy.model_management.unet_dtype(
            model_params=sum(tensor.numel() for tensor in weights.values()),
            supported_dtypes=list(model_config.supported_inference_dtypes),
            weight_dtype=comfy.utils.weight_dtype(weights),
        )
    manual_cast = comfy.model_management.unet_manual_cast(dtype, load_device, model_config.supported_inference_dtypes)
    model_config.set_inference_dtype(dtype, manual_cast)
    model_config.optimizations["fp8"] = weight_dtype.endswith("_fast")

    model = model_config.get_model(weights, "")
    _fit_output_layer(model.diffusion_model, config)
    if config.null_text != "none":
        # Core allocates the cross-attention without touching its memory; it is gone before any weight is loaded.
        remove_text(model.diffusion_model, config.null_text, config.null_tokens)
        model.__class__ = mixed(TextFree, type(model))
    model.indomain_domain = info
    assert set(weights) == set(model.diffusion_model.state_dict()), "core's UNet and this project's differ in names"
    model = model.to(offload_device).requires_grad_(False)
    model.load_model_weights(weights, "")

    patcher_class = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:
        # Newer versions page weights in and out through a subclass of their own.
        patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", patcher_class)
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    return patcher if config.null_text == "none" else without_text(patcher)


def load_domain_unet(path: str, weight_dtype: str = "default", disable_dynamic: bool = False):
    """A domain model file as a ModelPatcher; also the factory from which newer ComfyUI versions make deep copies.

    Text-free files and this project's own full UNets are built here; other full UNets go through core's loader. Raises
    FileProblem.
    """
    file = ModelFile(path)
    layout = unet_layout(file.keys, path, metadata=file.metadata)
    with ordinary_tensors():
        if layout == "full" and file.metadata.get("format") is None:
            patcher = _load_core_unet(path, weight_dtype)
        else:
            state_dict, metadata = read_domain_file(path)
            form = "full" if metadata.null_text == "none" else metadata.null_text
            name = metadata.domain_name or Path(path).stem
            patcher = build_unet_model(
                state_dict,
                metadata.config,
                info=DomainInfo(name, str(path), form, metadata),
                latent_format=metadata.latent_format,
                source=path,
                prediction_type=metadata.prediction_type,
                zero_snr=metadata.zero_snr,
                weight_dtype=weight_dtype,
                disable_dynamic=disable_dynamic,
            )
    patcher.cached_patcher_init = (load_domain_unet, (str(path), weight_dtype))
    return patcher


def _load_core_unet(path: str, weight_dtype: str):
    """A full UNet through core's own loader, with its failures in one sentence."""
    options: dict = {"fp8_optimizations": weight_dtype.endswith("_fast")}
    if WEIGHT_DTYPES[weight_dtype] is not None:
        options["dtype"] = WEIGHT_DTYPES[weight_dtype]
    try:
        patcher = comfy.sd.load_diffusion_model(path, model_options=options)
    except RuntimeError as error:
        raise FileProblem(
            f"{path}: expected a UNet of a family that ComfyUI knows, found one that its loader refuses "
            f"({str(error).splitlines()[0]}); use a fine-tuned UNet of the prior's family."
        ) from error
    weights = patcher.model.diffusion_model.state_dict()
    # Quantised tensors are a subclass, and hold integers.
    check_finite({key: tensor for key, tensor in weights.items() if type(tensor) is Tensor}, path)
    patcher.model.indomain_domain = DomainInfo(Path(path).stem, str(path), "full", None)
    return patcher


def load_mini_world() -> tuple:
    """(MODEL, CLIP, VAE) of the shipped miniature."""
    with ordinary_tensors():
        clip = build_clip(*_mini_world_component("text_encoder"))
        vae = build_vae(*_mini_world_component("autoencoder"))
    return load_mini_world_prior(), clip, vae


def load_mini_world_prior(disable_dynamic: bool = False):
    """The mini world's prior as a ModelPatcher; the factory for its deep copies too."""
    with ordinary_tensors():
        state_dict, metadata = _mini_world_component("prior_unet")
        config = UNetConfig.from_json(metadata["config"])
        check_unet(state_dict, config, "prior_unet.safetensors")
        patcher = build_unet_model(
            state_dict,
            config,
            info=None,
            latent_format=MINI_WORLD,
            source="The mini world's prior",
            prediction_type="epsilon",
            disable_dynamic=disable_dynamic,
        )
    patcher.cached_patcher_init = (load_mini_world_prior, ())
    return patcher
