"""diffusers' UNet and pipelines with the weights of `lora_cases.base`; needs the packages diffusers and peft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from indomain_guidance.tests.guidance.files.lora_cases import CONFIGS, EMBEDDED, added, base, inputs
from torch import Tensor

ADAPTER = "ours"


def pipeline(family: str, weights: Mapping[str, Tensor] | None = None):
    """A pipeline without text encoder and VAE around a UNet. weights: under LDM keys, None for those of `base`."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = CONFIGS[family]
    depths = config.transformer_depth
    widths = [config.model_channels * mult for mult in config.channel_mult]
    vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": EMBEDDED,
        "projection_class_embeddings_input_dim": config.adm_in_channels,
    }
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        transformer_layers_per_block=[max(depth, 1) for depth in depths],
        cross_attention_dim=config.context_dim,
        attention_head_dim=[config.heads_for(width) for width in widths],  # the number of heads, in spite of its name
        use_linear_projection=config.use_linear_in_transformer,
        **(vector if config.adm_in_channels else {}),
    )
    named = {f"model.diffusion_model.{key}": value for key, value in (weights or base(config).state_dict()).items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(named, config=dict(unet.config)), strict=True)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet.eval(), "scheduler": scheduler}
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def with_lora(family: str, path: Path):
    """A pipeline that has loaded a LoRA file itself."""
    pipe = pipeline(family)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=ADAPTER)
    return pipe


def names(pipe) -> list[str]:
    """The layers of its UNet that have an addition now."""
    ending = f".lora_A.{ADAPTER}.weight"
    return sorted(key.removesuffix(ending) for key in pipe.unet.state_dict() if key.endswith(ending))


@torch.no_grad()
def output(pipe, family: str) -> Tensor:
    """What its UNet makes of `inputs`."""
    given = inputs(CONFIGS[family])
    more = added() if family == "sdxl" else None
    return pipe.unet(given["x"], given["timesteps"], given["context"], added_cond_kwargs=more, return_dict=False)[0]
