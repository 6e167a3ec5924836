"""What a model file is, by the names of its tensors, and what to do with it: the sentences that refuse a file.

A user who picked a LoRA, a VAE or a video model by mistake is told so, and what to give. The names are those that
trainers, ComfyUI, diffusers and the GANs' own projects write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .inert_pickle import shown

MOST_NAMES, MOST_CHARACTERS = 50_000, 300  # that are looked at; a language model has 1,000 names of 60 characters
GENERATOR, UNET, BASE, AUTOENCODER = "generator", "unet", "base", "autoencoder"
_WANTED = {
    GENERATOR: "a StyleGAN2 generator",
    UNET: "a Stable Diffusion UNet (1.x, 2.x, SDXL) in LDM layout",
    BASE: "a checkpoint of Stable Diffusion 1.x, 2.x or XL in LDM layout",
    AUTOENCODER: "an autoencoder (VAE) in LDM layout",
}
_CHECKPOINT = "one .safetensors file of Stable Diffusion 1.x, 2.x or XL with UNet, VAE and text encoder"
# What to do, by what was wanted and the group of what was found; "" is for all other groups.
_ADVICE = {
    GENERATOR: {
        "": "choose a generator's file (.safetensors, .pkl or .pt)",
        "gan": "only StyleGAN2 is read",
        "domain": "Load Domain UNet loads it, and --domain takes it",
        "run": "go on with the run, or use the generator that it writes",
    },
    UNET: {
        "": "use a domain model, or a fine-tuned UNet of the prior's family",
        "flow": "ComfyUI's own Load Diffusion Model loads it, but a domain model has to be of the prior's family: "
        "Stable Diffusion 1.x, 2.x or XL",
        "lora": "load it with Load LoRA onto the prior, or use a domain model",
        "control": "load it with Load ControlNet Model, or use a domain model",
        "vae": "load it with Load VAE, or use a domain model",
        "text": "load it with Load CLIP, or use a domain model",
        "upscaler": "load it with Load Upscale Model, or use a domain model",
        "generator": "load it with Load Generator, or use a domain model",
        "diffusers": "convert it to one file in LDM layout (diffusers' convert_diffusers_to_original scripts do it)",
        "quantised": "use the same model in fp16, bf16 or fp32",
        "run": "go on with the run, or use the domain model that it writes",
    },
    BASE: {
        "": f"give {_CHECKPOINT}",
        "flow": f"flow models cannot be trained here, give {_CHECKPOINT}",
        "lora": f"merge it into the checkpoint that it was made for and give the result, {_CHECKPOINT}",
        "domain": "train from the checkpoint that it was made of",
        "generator": f"it is what --generator and Load Generator take, give {_CHECKPOINT}",
        "vae": f"a VAE alone lacks UNet and text encoder, give {_CHECKPOINT}",
        "diffusers": f"convert it to one file (diffusers' convert_diffusers_to_original scripts do it), or give "
        f"{_CHECKPOINT}",
        "unet": f"a UNet alone lacks VAE and text encoder, give {_CHECKPOINT}",
        "quantised": "give the same checkpoint in fp16, bf16 or fp32",
        "run": "go on with the run (resume)",
    },
    AUTOENCODER: {
        "": "name a .safetensors file that has one as vae",
        "diffusers": "name one in LDM layout, such as vae-ft-mse-840000-ema-pruned.safetensors, as vae",
    },
}


@dataclass(frozen=True)
class Kind:
    """What a file is: `what` with its article, `group` for the advice."""

    what: str
    group: str = ""


# ------------------------------------------------------------------------------------------------------- tensors' names

# (what, group, patterns that all have to occur in the names, one a line). The first that fits is taken: additions to a
# model before models, the special before the general. `^` and `$` are the ends of a name; _P is the start of one of its
# parts.
_P = r"(?:^|\.)"
_FAMILIES: tuple[tuple[str, ...], ...] = (
    # Additions to a model.
    ("a LoRA (kohya's names)", "lora", r"^(lora_(unet|te\d?|transformer|prior)|lycoris)_.*\.lora_(up|down|mid)"),
    ("a LoRA (LyCORIS)", "lora", r"\.(hada_w[12]|lokr_w[12]|oft_(blocks|diag)|on_input|dora_scale|glora_)"),
    ("a LoRA (PEFT's names)", "lora", r"\.lora_(A|B|embedding_[AB])(\.|$)"),
    ("a LoRA (diffusers' names)", "lora", r"(_lora\.(up|down)\.|\.lora\.(up|down)\.|lora_linear_layer\.)"),
    ("a LoRA", "lora", r"lora_(up|down|A|B)(\.|$)"),
    ("a LoRA (LyCORIS)", "lora", r"^(lora|lycoris)_.*\.(diff|diff_b|a1\.weight|w_norm)$"),
    ("an IP-Adapter", "addon", _P + r"(ip_adapter|image_proj|to_k_ip)\."),
    (
        "a T2I-Adapter",
        "control",
        r"^(adapter\.)?(body\.\d+\.(in_conv|resnets|block1)|conv_in\.weight$)",
        r"body\.\d",
        r"(block1|in_conv|resnets\.\d+\.block)",
    ),
    ("a ControlNet", "control", r"(input_hint_block\.|controlnet_|control_model\.|pose_net\.|^lllite_)"),
    ("a motion module (AnimateDiff)", "addon", r"motion_modules\."),
    ("a textual inversion embedding", "addon", r"^(string_to_param\.\S+|emb_params|<[^>\n]+>)$"),
    ("a textual inversion embedding", "addon", r"\A\s*clip_[glh]\s*(clip_[glh]\s*)*\Z"),
    ("a hypernetwork", "addon", r"^(320|640|768|1024|1280)\.\d+\.linear"),
    # Generative adversarial networks.
    ("an EG3D generator (three-dimensional, tri-plane)", "gan", _P + r"backbone\w*\.synthesis\.b4\."),
    ("a StyleGAN-T generator", "gan", r"(^|\.)mapping\.mlp\.", r"synthesis\.b\d+\.|synthesis\.input\."),
    (
        "a StyleGAN-XL generator",
        "gan",
        r"mapping\.embed_proj\.|super_res|feature_network|synthesis\.L\d+_\d+_\d+\..*head_layer",
    ),
    ("a StyleGAN3 generator (Fourier features)", "gan", r"synthesis\.input\.(freqs|phases)"),
    ("a SWAGAN generator", "gan", _P + r"(iwt|dwt)\.", r"to_rgbs?\d?\."),
    ("GFPGAN, whose generator is rewritten", "gan", _P + r"style_conv1\.bias$"),
    ("a StyleGAN2 generator", "generator", _P + r"synthesis\.b4\.const$"),
    ("a StyleGAN2 generator", "generator", _P + r"(conv1\.conv|style_conv1\.modulated_conv)\.modulation\.weight$"),
    ("GFPGAN, whose generator is rewritten", "gan", _P + r"stylegan_decoder"),
    ("a face restorer (CodeFormer)", "gan", r"fuse_convs_dict\."),
    (
        "a StarGAN v2, which turns images into images",
        "gan",
        _P + r"(module\.)?(from_rgb\.weight|encode\.\d+\.conv1)",
        _P + r"(module\.)?(decode\.\d+|shared\.\d+|to_rgb)\.",
    ),
    ("a StyleGAN or Progressive GAN of rosinality's first repositories", "gan", _P + r"progression\.\d+\."),
    ("a StyleGAN (1) generator", "gan", _P + r"(g_synthesis|g_mapping)\.|synthesis\.blocks\.\w*4x4"),
    ("a generator of GenForce", "gan", _P + r"synthesis\.(layer|early_layer)\d"),
    ("a generator of MMGeneration", "gan", _P + r"(style_mapping\.\d|constant_input\.const$)"),
    ("a generator of lucidrains' stylegan2-pytorch", "gan", _P + r"(G|GE)\.(initial_(conv|block)|blocks\.0)"),
    ("a BigGAN generator", "gan", _P + r"(gen_z|generator\.gen_z)\.", r"(layers|blocks)\.0\."),
    (
        "part of a GAN that is no generator (a discriminator or an encoder)",
        "gan",
        r"^(b\d+\.(conv0|fromrgb)\.weight|final_linear\.0\.weight|body\.0\.res_layer\.)",
    ),
    # Stable Diffusion in LDM layout, and other UNets.
    ("a video UNet", "", r"(time_stack\.|temporal_transformer)"),
    ("a Stable Cascade model", "flow", _P + r"(clip_txt_mapper|clip_txt_pooled_mapper|clf\.1)\."),
    (
        "a Stable Diffusion checkpoint",
        "checkpoint",
        _P + r"input_blocks\.0\.0\.weight$",
        _P + r"output_blocks\.",
        r"^(first_stage_model|cond_stage_model|conditioner)\.",
    ),
    ("a Stable Diffusion UNet alone", "unet", _P + r"input_blocks\.0\.0\.weight$", _P + r"output_blocks\."),
    ("a part of a Stable Diffusion UNet", "", _P + r"(input_blocks|output_blocks)\.\d+\.\d+\."),
    (
        "a UNet in diffusers' layout",
        "diffusers",
        _P + r"down_blocks\.\d+\.(attentions|resnets|downsamplers)\.",
        r"^(unet\.|module\.)?(down|up)_blocks\.",
    ),
    # Transformers: flow models and what came after Stable Diffusion XL.
    ("a Chroma model", "flow", r"distilled_guidance_layer\."),
    ("a HunyuanVideo model", "flow", r"individual_token_refiner\.", r"double_blocks\."),
    ("a Flux 2 model", "flow", r"(double_stream_modulation|single_stream_modulation)"),
    ("a HiDream model", "flow", r"double_stream_blocks\."),
    ("a Flux model", "flow", _P + r"(double_blocks|single_blocks)\.\d"),
    ("a Stable Diffusion 3 model", "flow", _P + r"joint_blocks\.\d"),
    ("an AuraFlow model", "flow", r"(double_layers\.\d|cond_seq_linear\.|joint_transformer_blocks\.)"),
    ("a Qwen-Image model", "flow", _P + r"transformer_blocks\.\d+\.(img_mod|txt_mod)\."),
    ("a Z-Image model", "flow", r"(cap_pad_token|x_pad_token)$"),
    ("a Lumina or Z-Image model", "flow", r"(noise_refiner|context_refiner|cap_embedder)\."),
    ("a PixArt or LTX model", "flow", r"adaln_single\."),
    ("a Hunyuan-DiT model", "flow", r"mlp_t5\."),
    ("a Mochi model", "flow", r"t5_y(proj|_embedder)\."),
    ("a Kandinsky model", "flow", r"(visual|text)_transformer_blocks\."),
    ("a Cosmos model", "flow", r"(blocks\.block\d+\.blocks\.|adaln_modulation_|adaLN_modulation_self_attn)"),
    ("a Wan model", "flow", _P + r"blocks\.\d+\.(cross_attn|self_attn)\."),
    ("a Flux model in diffusers' layout", "flow", r"single_transformer_blocks\.\d"),
    (
        "a Stable Diffusion 3 model in diffusers' layout",
        "flow",
        r"transformer_blocks\.\d+\.norm1_context\.",
        r"pos_embed\.",
    ),
    (
        "a transformer of a newer family",
        "flow",
        r"^((model\.)?diffusion_model\.|transformer\.|net\.|model\.)?(transformer_blocks|blocks|layers)\.\d+\.\S*"
        r"(adaln|adaLN|modulation|scale_shift|norm1\.linear|attn2?\.to_q|mod\.lin)",
    ),
    # Autoencoders.
    ("an autoencoder (VAE) in diffusers' layout", "vae", _P + r"(encoder|decoder)\.(down|up)_blocks\.\d"),
    (
        "a video or image autoencoder (VAE) of another family",
        "vae",
        _P + r"(encoder|decoder)\.(downsamples|upsamples|middle)\.\d",
    ),
    ("an autoencoder (VAE)", "vae", _P + r"(encoder|decoder)\.(down\.\d|up\.\d|mid\.|conv_in\.|conv_out\.)"),
    ("a small autoencoder (TAESD)", "vae", r"(taesd_|^(encoder|decoder)\.(layers\.)?\d+\.(conv|weight|bias))"),
    # Text and image encoders.
    (
        "a language model",
        "text",
        r"^(model\.|language_model\.)*"
        r"(layers\.\d+\.(self_attn|mlp|input_layernorm)|embed_tokens)\.",
    ),
    ("a CLIP model (text and image encoder)", "text", _P + r"(vision_model|visual)\.", _P + r"(text_model|ln_final)\."),
    ("an image encoder (CLIP vision)", "text", _P + r"(vision_model|visual)\."),
    ("a text encoder (T5)", "text", r"SelfAttention\.[qkv]\."),
    (
        "a text encoder (CLIP)",
        "text",
        _P + r"(text_model\.(encoder|embeddings|final)|transformer\.resblocks\.|token_embedding\.|text_projection)",
    ),
    # Upscalers.
    ("an upscaler (ESRGAN)", "upscaler", r"(RDB\d\.conv|\.rdb\d\.conv|RRDB_trunk\.)"),
    ("an upscaler", "upscaler", r"(residual_group\.|relative_position_bias_table|^(params(_ema)?\.)?body\.\d+\.w)"),
    ("an upscaler", "upscaler", _P + r"(conv_first\.weight|block_1\.c1_r\.|feats\.\d+\.(lk|mdc)\.)"),
    # Whatever else denoises.
    ("a diffusion model of another family", "flow", r"^(model\.)?diffusion_model\."),
    (
        "a diffusion transformer of another family",
        "flow",
        _P + r"(x_embedder|patch_embed\w*|img_in|t_embedder|time_\w+|final_layer|pos_embed)\.",
        r"(blocks|layers)\.\d",
    ),
    # What training leaves.
    ("an optimizer's or a trainer's state", "run", r"^(state\.|optimizer|g_optim|param_groups)"),
)
_QUANTISED = (
    ("scaled fp8", r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale)$"),
    ("quantised for ComfyUI", r"\.comfy_quant$"),
    ("quantised by bitsandbytes", r"\.(absmax|quant_map|nested_absmax|quant_state\.\S*)$"),
    ("quantised for Nunchaku (SVDQuant)", r"\.(qweight|wscales|smooth_factor)$"),
)
# The field "format" in the metadata of this project's own files.
_OWN = {
    "indomain_guidance.domain_unet": Kind("a domain model of this project", "domain"),
    "indomain_guidance.generator": Kind("a StyleGAN2 generator", "generator"),
    "indomain_guidance_checkpoint": Kind("the state of a run of this project", "run"),
}


def recognise_names(names: Iterable[str], metadata: Mapping[str, str] | None = None) -> Kind:
    """What a file is by the names of its tensors (nested ones as `outer.inner`) and its own string metadata."""
    stated = (metadata or {}).get("format")
    if isinstance(stated, str) and stated in _OWN:
        return _OWN[stated]
    names = list(names)
    if not names:
        return Kind("no tensors")
    text = "\n".join(name[:MOST_CHARACTERS] for name in names[:MOST_NAMES])

    def fits(*patterns: str) -> bool:
        return all(re.search(pattern, text, re.MULTILINE) for pattern in patterns)

    found = next((Kind(what, group) for what, group, *patterns in _FAMILIES if fits(*patterns)), None)
    if found is None:
        return Kind(f"a file with tensors such as {shown(names[0])}")
    how = next((how for how, pattern in _QUANTISED if fits(pattern)), None)
    if how and found.group in ("checkpoint", "unet", "flow"):
        return Kind(f"{found.what}, {how}", "quantised" if found.group != "flow" else "flow")
    return found


# -------------------------------------------------------------------------------------------------------- the sentences


def refusal(source: object, wanted: str, names: Iterable[str], metadata: Mapping[str, str] | None = None) -> str:
    """The sentence that refuses a file in place of `wanted` (GENERATOR, UNET, BASE, AUTOENCODER)."""
    return refusal_of(source, wanted, recognise_names(names, metadata))


def refusal_of(source: object, wanted: str, kind: Kind) -> str:
    """The same for what a file was recognised as."""
    advice = _ADVICE[wanted].get(kind.group, _ADVICE[wanted][""])
    return f"{source}: expected {_WANTED[wanted]}, found {kind.what}; {advice}."
