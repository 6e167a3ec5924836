"""What files of other kinds are, by the tensors' names of the networks that ComfyUI itself builds and maps."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

FLUX = dict(
    in_channels=16,
    out_channels=16,
    context_in_dim=8,
    hidden_size=32,
    mlp_ratio=2.0,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=[4, 6, 6],
    theta=100,
    patch_size=2,
    qkv_bias=True,
    vec_in_dim=8,
    guidance_embed=True,
    txt_ids_dims=[],
)
UNET = dict(
    image_size=8,
    in_channels=4,
    model_channels=32,
    num_res_blocks=[1, 1],
    channel_mult=(1, 2),
    num_heads=4,
    use_spatial_transformer=True,
    context_dim=768,
    transformer_depth=[1, 1],
    legacy=False,
)
# (module of ComfyUI, class, arguments, what it is, group)
NETWORKS = [
    ("ldm.flux.model", "Flux", FLUX, "a Flux model", "flow"),
    (
        "ldm.chroma.model",
        "Chroma",
        {**FLUX, "in_dim": 8, "out_dim": 32, "hidden_dim": 8, "n_layers": 1},
        "a Flux model or one like it",
        "flow",
    ),
    (
        "ldm.modules.diffusionmodules.mmdit",
        "MMDiT",
        dict(
            input_size=None,
            depth=1,
            adm_in_channels=8,
            num_patches=16,
            pos_embed_max_size=4,
            context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 8, "out_features": 64}},
        ),
        "a Stable Diffusion 3 model",
        "flow",
    ),
    (
        "ldm.aura.mmdit",
        "MMDiT",
        dict(dim=32, n_layers=2, n_double_layers=1, n_heads=2, cond_seq_dim=8, max_seq=16),
        "a diffusion transformer",
        "flow",
    ),
    (
        "ldm.wan.model",
        "WanModel",
        dict(dim=32, ffn_dim=32, num_heads=2, num_layers=1),
        "a diffusion transformer",
        "flow",
    ),
    (
        "ldm.qwen_image.model",
        "QwenImageTransformer2DModel",
        dict(num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, in_channels=16),
        "a diffusion transformer",
        "flow",
    ),
    (
        "ldm.lumina.model",
        "NextDiT",
        dict(dim=32, n_layers=1, n_heads=2, axes_dims=[4, 6, 6], axes_lens=[8, 8, 8], cap_feat_dim=8),
        "a diffusion transformer",
        "flow",
    ),
    (
        "ldm.lightricks.model",
        "LTXVModel",
        dict(
            in_channels=8,
            cross_attention_dim=32,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=8,
            num_layers=1,
        ),
        "a diffusion transformer",
        "flow",
    ),
    (
        "ldm.hidream.model",
        "HiDreamImageTransformer2DModel",
        dict(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[8, 8],
            text_emb_dim=8,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(8, 8),
            llama_layers=[0],
        ),
        "a Flux model or one like it",
        "flow",
    ),
    (
        "ldm.modules.diffusionmodules.openaimodel",
        "UNetModel",
        {**UNET, "out_channels": 4, "transformer_depth_middle": 1, "transformer_depth_output": [1] * 4},
        "a Stable Diffusion UNet alone",
        "unet",
    ),
    ("cldm.cldm", "ControlNet", {**UNET, "hint_channels": 3, "transformer_depth_middle": 1}, "a ControlNet", "control"),
]


@pytest.fixture
def recognised(comfyui):
    return importlib.import_module("indomain_guidance.guidance.files.recognise").recognise_names


@pytest.mark.parametrize("module, name, arguments, what, group", NETWORKS, ids=[row[1] for row in NETWORKS])
def test_networks_of_other_families(recognised, module, name, arguments, what, group):
    module = importlib.import_module(f"comfy.{module}")
    network, parameters = getattr(module, name), getattr(module, f"{name}Params", None)
    if parameters is not None:  # which differ from version to version
        known = {field.name for field in dataclasses.fields(parameters)}
        arguments = {key: value for key, value in arguments.items() if key in known}
    ops = importlib.import_module("comfy.ops").disable_weight_init
    keys = list(network(**arguments, dtype=torch.float32, device="meta", operations=ops).state_dict())
    for prefix in ("", "model.diffusion_model."):
        found = recognised([prefix + key for key in keys])
        assert what in found.what and found.group == group, (found, keys[:5])


def test_parts_of_checkpoints(recognised, comfyui):
    ops = importlib.import_module("comfy.ops").disable_weight_init
    on_meta = {"dtype": torch.float32, "device": "meta", "operations": ops}
    with torch.device("meta"):
        plain = dict(
            double_z=True,
            z_channels=4,
            resolution=8,
            in_channels=3,
            out_ch=3,
            ch=32,
            ch_mult=[1, 2],
            num_res_blocks=1,
            attn_resolutions=[],
            dropout=0.0,
        )
        vae = importlib.import_module("comfy.ldm.models.autoencoder").AutoencoderKL(embed_dim=4, ddconfig=plain)
        wan = importlib.import_module("comfy.ldm.wan.vae").WanVAE(dim=8)
        taesd = importlib.import_module("comfy.taesd.taesd").TAESD()
        adapter = importlib.import_module("comfy.t2i_adapter.adapter").Adapter(channels=[32, 64], cin=64)
        clip = dict(
            num_hidden_layers=1,
            hidden_size=16,
            num_attention_heads=2,
            intermediate_size=16,
            hidden_act="gelu",
            max_position_embeddings=8,
            eos_token_id=1,
        )
        text = importlib.import_module("comfy.clip_model").CLIPTextModel(clip, **dict(on_meta.items()))
        t5 = dict(
            num_layers=1,
            d_model=16,
            num_heads=2,
            d_ff=16,
            d_kv=8,
            vocab_size=8,
            model_type="t5",
            dense_act_fn="gelu_pytorch_tanh",
            is_gated_act=True,
        )
        t5 = importlib.import_module("comfy.text_encoders.t5").T5(t5, **on_meta)
    for network, what, group in (
        (vae, "an autoencoder (VAE)", "vae"),
        (wan, "a video or image autoencoder (VAE)", "vae"),
        (taesd, "a small autoencoder (TAESD)", "vae"),
        (adapter, "a T2I-Adapter", "control"),
        (text, "a text encoder (CLIP)", "text"),
        (t5, "a text encoder (T5)", "text"),
    ):
        found = recognised(list(network.state_dict()))
        assert found.what.startswith(what) and found.group == group, (found, list(network.state_dict())[:5])


def test_loras_of_every_naming(recognised, tiny):
    """Core's own table of what LoRAs call the layers of a model."""
    lora = importlib.import_module("comfy.lora")
    model = tiny.prior().model
    names = list(lora.model_lora_keys_unet(model, {}))
    assert len(names) > 100
    for name in names:
        for ends in (
            ("lora_up.weight", "lora_down.weight", "alpha"),
            ("lora_A.weight", "lora_B.weight"),
            ("lora.up.weight", "lora.down.weight"),
            ("hada_w1_a", "hada_w1_b"),
            ("lokr_w1", "lokr_w2"),
            ("lora_A.default.weight",),
        ):
            for prefix in ("", "base_model.model."):
                found = recognised([f"{prefix}{name}.{end}" for end in ends])
                assert found.group == "lora", (name, ends, found)
    keys = list(model.diffusion_model.state_dict())
    assert recognised([f"model.diffusion_model.{key}" for key in keys]).what == "a Stable Diffusion UNet alone"


def test_upscalers(recognised):
    architectures = importlib.import_module("spandrel.architectures")
    for name, arguments in (
        ("ESRGAN", dict(num_filters=8, num_blocks=1)),
        ("Compact", dict(num_conv=2)),
        ("SPAN", dict(num_in_ch=3, num_out_ch=3, feature_channels=8)),
        ("SwinIR", dict(img_size=8, embed_dim=12, depths=(1,), num_heads=(2,), window_size=4)),
        ("DAT", dict(img_size=8, embed_dim=12, depth=[1], num_heads=[2], split_size=[2, 4])),
        ("HAT", dict(img_size=8, embed_dim=12, depths=(1,), num_heads=(2,), window_size=4)),
    ):
        package = importlib.import_module(f"{architectures.__name__}.{name}")
        keys = list(getattr(package, name)(**arguments).state_dict())
        for outer in ("", "params_ema."):
            found = recognised([f"{outer}{key}" for key in keys])
            assert found.group == "upscaler", (name, found, keys[:5])
