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


# (what, group, patterns that all have to occur in the names, one a line). The first that fits is taken: additions to a
# model before models, the special before the general. `^` and `$` are the ends of a name; _P is the start of one of its
# parts.
_P = r"(?:^|\.)"
# What only the transformers after Stable Diffusion XL have: AuraFlow, Qwen-Image, Lumina, PixArt, Wan, Cosmos and more.
_OF_TRANSFORMERS = (
    r"(double_layers\.\d|cond_seq_linear\.|cap_embedder|(cap|x)_pad_token|adaln_single\.|mlp_t5\.|t5_y_embedder\.|"
    r"transformer_blocks\.\d+\.(img_mod|txt_mod)\.|(visual|text|joint)_transformer_blocks\.|adaln_modulation_|"
    r"adaLN_modulation_self_attn|blocks\.block\d+\.blocks\.|(^|\.)blocks\.\d+\.(cross_attn|self_attn)\.|"
    r"^((model\.)?diffusion_model\.|transformer\.|net\.|model\.)?(transformer_blocks|blocks|layers)\.\d+\.\S*"
    r"(adaln|adaLN|modulation|scale_shift|norm1\.linear|attn2?\.to_q|mod\.lin))"
)
_FAMILIES: tuple[tuple[str, ...], ...] = (
    # Additions to a model.
    ("a LoRA", "lora", r"lora_(up|down|mid|A|B|embedding_[AB]|linear_layer)(\.|$)|[_.]lora\.(up|down)\."),
    ("a LoRA", "lora", r"\.(hada_w[12]|lokr_w[12]|oft_(blocks|diag)|on_input|dora_scale|glora_)"),
    ("a LoRA", "lora", r"^(lora|lycoris)_.*\.(diff|diff_b|a1\.weight|w_norm)$"),
    ("an IP-Adapter", "addon", _P + r"(ip_adapter|image_proj|to_k_ip)\."),
    ("a T2I-Adapter", "control", r"^(adapter\.)?body\.\d+\.(in_conv|resnets\.\d+\.block|block1)"),
    ("a ControlNet", "control", r"(input_hint_block\.|controlnet_|control_model\.|pose_net\.|^lllite_)"),
    ("a motion module (AnimateDiff)", "addon", r"motion_modules\."),
    ("a textual inversion embedding", "addon", r"^(string_to_param\.\S+|emb_params|<[^>\n]+>|clip_[glh])$"),
    ("a hypernetwork", "addon", r"^(320|640|768|1024|1280)\.\d+\.linear"),
    # Generative adversarial networks.
    ("an EG3D generator (three-dimensional, tri-plane)", "gan", _P + r"backbone\w*\.synthesis\.b4\."),
    ("a StyleGAN-T generator", "gan", _P + r"mapping\.mlp\.", r"synthesis\.b\d+\.|synthesis\.input\."),
    ("a StyleGAN-XL generator", "gan", r"mapping\.embed_proj\.|feature_network|synthesis\.L\S*head_layer"),
    ("a StyleGAN3 generator (Fourier features)", "gan", r"synthesis\.input\.(freqs|phases)"),
    ("GFPGAN, whose generator is rewritten", "gan", _P + r"style_conv1\.bias$"),
    ("a StyleGAN2 generator", "generator", _P + r"synthesis\.b4\.const$"),
    ("a StyleGAN2 generator", "generator", _P + r"(conv1\.conv|style_conv1\.modulated_conv)\.modulation\.weight$"),
    ("GFPGAN, whose generator is rewritten", "gan", _P + r"stylegan_decoder"),
    ("a generator of another GAN", "gan", _P + r"(to_rgbs?\d?|progression\.\d+|g_synthesis|g_mapping|gen_z)\."),
    ("a generator of another GAN", "gan", _P + r"(style_mapping\.\d|initial_(conv|block)|synthesis\.\w*layer\d)"),
    ("another GAN's networks", "gan", _P + r"(module\.)?(from_?rgb\.weight|final_linear\.0\.weight)"),
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
    ("a UNet in diffusers' layout", "diffusers", r"^(unet\.|module\.)?(down|up)_blocks\.\d+\.[ards]"),
    # Transformers: flow models and what came after Stable Diffusion XL.
    ("a Flux model or one like it", "flow", _P + r"(double|single)_(stream_|transformer_)?(blocks|modulation)"),
    ("a Stable Diffusion 3 model", "flow", _P + r"joint_blocks\.\d|transformer_blocks\.\d+\.norm1_context\."),
    ("a diffusion transformer of another family", "flow", _OF_TRANSFORMERS),
    # Autoencoders.
    ("an autoencoder (VAE) in diffusers' layout", "vae", _P + r"(encoder|decoder)\.(down|up)_blocks\.\d"),
    ("a video or image autoencoder (VAE)", "vae", _P + r"(encoder|decoder)\.(downsamples|upsamples|middle)\.\d"),
    ("an autoencoder (VAE)", "vae", _P + r"(encoder|decoder)\.(down\.\d|up\.\d|mid\.|conv_in\.|conv_out\.)"),
    ("a small autoencoder (TAESD)", "vae", r"(taesd_|^(encoder|decoder)\.(layers\.)?\d+\.(conv|weight|bias))"),
    # Text and image encoders.
    ("a language model", "text", r"^(model\.|language_model\.)*(layers\.\d+\.(self_attn|mlp)|embed_tokens)\."),
    ("an image encoder (CLIP vision)", "text", _P + r"(vision_model|visual)\."),
    ("a text encoder (T5)", "text", r"SelfAttention\.[qkv]\."),
    ("a text encoder (CLIP)", "text", _P + r"(text_model|transformer\.resblocks|token_embedding|text_projection)"),
    # Upscalers.
    ("an upscaler", "upscaler", r"(RDB\d\.conv|\.rdb\d\.|RRDB_trunk\.|residual_group\.|relative_position_bias_table)"),
    ("an upscaler", "upscaler", _P + r"(conv_first\.weight|block_1\.c1_r\.|feats\.\d+\.(lk|mdc)\.)"),
    ("an upscaler", "upscaler", r"^(params(_ema)?\.)?body\.\d+\.w"),
    # Whatever else denoises.
    ("a diffusion model of another family", "flow", r"^(model\.)?diffusion_model\."),
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


def refusal(source: object, wanted: str, kind: Kind) -> str:
    """The sentence that refuses a file in place of `wanted` (GENERATOR, UNET, BASE, AUTOENCODER)."""
    advice = _ADVICE[wanted].get(kind.group, _ADVICE[wanted][""])
    return f"{source}: expected {_WANTED[wanted]}, found {kind.what}; {advice}."
