"""The mini world as ComfyUI objects: latent format, CLIP and VAE from the shipped weights."""

from __future__ import annotations

import json
from collections.abc import Mapping

import comfy.latent_formats
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import folder_paths
import torch
from torch import Tensor

from ....guidance.errors import Problem
from ....guidance.networks.autoencoder import AutoencoderConfig
from ....guidance.networks.text_encoder import END_TOKEN, TextEncoderConfig
from ....training.mini_world.tokens import expand_embedding


class MiniWorldLatentFormat(comfy.latent_formats.LatentFormat):
    """Latents of the mini world's autoencoder. A class of its own, so that mixing them with SD 1.5's is noticed."""

    def __init__(self, autoencoder_metadata: Mapping[str, str]) -> None:
        self.scale_factor = float(autoencoder_metadata["scale_factor"])
        # The live preview is a linear map from latents to RGB, fitted when the autoencoder was trained.
        self.latent_rgb_factors = json.loads(autoencoder_metadata.get("latent_rgb_factors", "null"))
        self.latent_rgb_factors_bias = json.loads(autoencoder_metadata.get("latent_rgb_bias", "null"))


class MiniWorldTextEncoder(comfy.sd1_clip.SDClipModel):
    """Core's CLIP text model in the mini world's size."""

    def __init__(self, device="cpu", dtype=None, model_options={}, textmodel_json_config=None) -> None:  # noqa: B006
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options,
            textmodel_json_config=dict(textmodel_json_config or {}),
            return_projected_pooled=False,
        )


def build_clip(state_dict: dict[str, Tensor], metadata: Mapping[str, str]) -> comfy.sd.CLIP:
    """CLIP with core's SD1 tokenizer around the mini world's text encoder (Hugging Face keys, shrunken embedding)."""
    config = TextEncoderConfig.from_json(metadata["config"])
    state_dict = dict(state_dict)
    embedding = "text_model.embeddings.token_embedding.weight"
    state_dict[embedding] = expand_embedding(state_dict[embedding], json.loads(metadata["token_ids"]))
    # SD 1.x does not use the projection; core has the layer all the same and would leave it uninitialised.
    state_dict.setdefault("text_projection.weight", torch.eye(config.width))
    core_config = {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_length,
        "eos_token_id": END_TOKEN,
        "vocab_size": config.vocab_size,
        "model_type": "clip_text_model",
    }
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    target.params = {"clip_model": MiniWorldTextEncoder, "textmodel_json_config": core_config}
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(tensor.numel() for tensor in state_dict.values()),
    )
    missing, unexpected = clip.load_sd(state_dict)
    _refuse_key_problems("text encoder", [key for key in missing if not key.endswith("position_ids")], unexpected)
    return clip


def build_vae(state_dict: dict[str, Tensor], metadata: Mapping[str, str]) -> comfy.sd.VAE:
    """VAE from LDM keys and the configuration in the file's metadata."""
    config = AutoencoderConfig.from_json(metadata["config"])
    params = config.to_ldm_params()
    state_dict = dict(state_dict)
    if not config.attention:
        # Core always builds the middle attention; all-zero weights make it the identity.
        for side in ("encoder", "decoder"):
            width = state_dict[f"{side}.mid.block_1.conv1.weight"].shape[0]
            for layer in ("norm", "q", "k", "v", "proj_out"):
                shape = (width,) if layer == "norm" else (width, width, 1, 1)
                state_dict[f"{side}.mid.attn_1.{layer}.weight"] = torch.zeros(shape)
                state_dict[f"{side}.mid.attn_1.{layer}.bias"] = torch.zeros(width)
    vae = comfy.sd.VAE(sd=state_dict, config={"params": params})
    vae.downscale_ratio = vae.upscale_ratio = config.factor
    vae.latent_channels = config.embed_dim
    expected = set(vae.first_stage_model.state_dict())
    _refuse_key_problems("autoencoder", expected - set(state_dict), set(state_dict) - expected)
    return vae


def _refuse_key_problems(what: str, missing, unexpected) -> None:
    if missing or unexpected:
        raise Problem(
            f"Mini world {what}: {len(list(missing))} weights are missing and {len(list(unexpected))} unknown, first "
            f"{sorted([*missing, *unexpected])[0]}; restore the files in training/mini_world/weights."
        )
