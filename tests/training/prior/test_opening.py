"""Opening priors: what is read from a checkpoint, what is refused, the mini world, and tensors in memory."""

from __future__ import annotations

import zipfile

import pytest
import torch
from indomain_guidance.guidance.files import (
    FileProblem,
    prior_content_hash,
    read_domain_file,
    read_generator,
    write_safetensors,
)
from indomain_guidance.guidance.networks.unet_layers import timestep_embedding
from indomain_guidance.training.engine.settings import ConfigProblem
from indomain_guidance.training.mini_world.assets import load_mini_world
from indomain_guidance.training.prior.opening import open_checkpoint, open_mini_world, open_prior, prior_from_tensors
from indomain_guidance.training.prior.prior import ImageSize


def without(tensors, *prefixes):
    return {key: value for key, value in tensors.items() if not key.startswith(prefixes)}


@pytest.fixture(scope="module")
def mini():
    return open_mini_world()


def test_mini_world_is_the_shipped_one(mini):
    world = load_mini_world()
    prompts = ["a red seven on a blue background", ""]
    assert torch.equal(mini.encode_text(prompts).context, world.encode_text(prompts))
    assert torch.equal(mini.null_context.tensor, world.encode_text([""]))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = mini.encode(images)
    with torch.no_grad():
        expected, logvar = world.autoencoder.encode(images)
    assert torch.allclose(mean, expected * world.scale) and torch.allclose(std, (0.5 * logvar).exp() * world.scale)
    assert torch.allclose(mini.decode(mean), world.decode(mean), atol=1e-5)
    prior, x, t = mini.load_unet(), torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0])
    context = mini.null_text.context.expand(2, -1, -1)
    with torch.no_grad():
        assert torch.equal(prior(x, t, context=context), world.prior.unet(x, t, context=context))
    assert (mini.latent_format, mini.factor, mini.latent_channels) == ("mini_world", 8, 4)
    assert mini.vector([ImageSize((64, 64))]) is None and mini.conditioning([ImageSize((64, 64))]) == {}


@pytest.mark.parametrize(
    "family, latent_format, scale", [("sd1", "sd15", 0.18215), ("sd2", "sd15", 0.18215), ("sdxl", "sdxl", 0.13025)]
)
def test_opens_every_family(family, latent_format, scale, tiny_checkpoint):
    made = tiny_checkpoint(family)
    base = open_checkpoint(made.path, prediction="epsilon")
    assert (base.latent_format, base.latent_scale, base.zero_snr) == (latent_format, scale, False)
    assert base.config == made.unet.config and base.prior_hash == prior_content_hash(made.tensors)
    assert all(torch.equal(base.unet[key].float(), value) for key, value in made.unet.state_dict().items())
    size = ImageSize((600, 400), (3, 5), (64, 32))
    arguments = base.conditioning([size] * 3, base.null_text)
    prior, free = base.load_unet(), base.conditioning([size])
    assert prior(torch.randn(3, 4, 8, 4), torch.tensor([1.0, 5.0, 9.0]), **arguments).isfinite().all()
    assert ("y" in arguments) == ("y" in free) == (family == "sdxl")
    if family == "sdxl":
        numbers = torch.tensor([600.0, 400, 3, 5, 64, 32])
        assert torch.equal(arguments["y"][1, 1280:], timestep_embedding(numbers, 256).flatten())
        assert torch.equal(arguments["y"][2, :1280], base.null_context.pooled[0])
        assert not free["y"][0, :1280].any()


def test_every_part_is_read_from_the_file_it_lies_in(tiny_checkpoint, tmp_path):
    made = tiny_checkpoint("sd1")
    other = {
        key.removeprefix("first_stage_model."): value + 0.001 if key.endswith("bias") else value
        for key, value in made.tensors.items()
        if key.startswith("first_stage_model.")
    }
    # A file of its own, with the loss that old ones carry, and one attention layer written as a linear map.
    query = "encoder.mid.attn_1.q.weight"
    other |= {"loss.logvar": torch.zeros(1), query: other[query][:, :, 0, 0]}
    path = write_safetensors(tmp_path / "vae.safetensors", other)
    own, replaced = open_checkpoint(made.path), open_checkpoint(made.path, vae=str(path))
    assert own.vae_id != replaced.vae_id and own.prior_hash == replaced.prior_hash
    assert own.vae_id == open_checkpoint(made.path).vae_id
    assert replaced.encode(torch.zeros(1, 3, 16, 16))[0].shape == (1, 4, 2, 2)


def test_tensors_in_memory_equal_the_file(tiny_checkpoint):
    made = tiny_checkpoint("sdxl")
    opened = open_checkpoint(made.path)
    with torch.inference_mode():  # as a ComfyUI node runs
        unet = {key: value.clone() for key, value in opened.unet.items()}
        vae = {key: value.clone() for key, value in opened.autoencoder.state_dict().items()}
        built = prior_from_tensors(
            unet,
            opened.config,
            prediction_type="epsilon",
            zero_snr=False,
            latent_format="sdxl",
            latent_scale=opened.latent_scale,
            null_context=opened.null_context,
            autoencoder=vae,
        )
    assert (built.prior_hash, built.vae_id) == (opened.prior_hash, opened.vae_id)
    assert not any(tensor.is_inference() for tensor in [*built.unet.values(), *built.autoencoder.parameters()])


def only(tensors, prefix):
    return {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: without(t, "cond_stage_model."), "with its text encoder clip_l, found none"),
        (lambda t: without(t, "first_stage_model."), "expected an autoencoder"),
        (lambda t: without(t, "first_stage_model.decoder.up"), "its autoencoder cannot be read"),
        (lambda t: without(t, "model.diffusion_model.output_blocks"), "found a part of a Stable Diffusion UNet"),
        (lambda t: without(t, "model.diffusion_model.middle_block.0.out_layers"), "missing"),
        (lambda t: t | {"edm_mean": torch.zeros(1)}, "found an EDM model"),
        (lambda t: t | {"model.diffusion_model.out.2.bias": torch.full((4,), torch.nan).half()}, "finite weights"),
        (lambda t: t | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "9 input channels"),
        (lambda t: {k.replace("attn2.to_k.weight", "attn2.null_k"): v for k, v in t.items()}, "found a text-free UNet"),
        (lambda t: only(t, "model.diffusion_model."), "found a Stable Diffusion UNet alone; a UNet alone lacks VAE"),
        (
            lambda t: {k.removeprefix("model.diffusion_model."): v for k, v in only(t, "model.diff").items()},
            "UNet alone",
        ),
        (lambda t: only(t, "first_stage_model."), "found an autoencoder .VAE.; a VAE alone lacks UNet"),
        (lambda t: only(t, "cond_stage_model."), "found a text encoder .CLIP.; give one .safetensors"),
        (lambda t: t | {"scaled_fp8": torch.zeros(2)}, "checkpoint, scaled fp8; give the same checkpoint in fp16"),
        (lambda t: t | {"model.diffusion_model.out.2.weight_scale": torch.ones(())}, "scaled fp8; give the same"),
        (
            lambda t: t | {"model.diffusion_model.out.2.comfy_quant": torch.ones(3)},
            "quantised for ComfyUI; give the same",
        ),
        (
            lambda t: (
                {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.ones(2)} | only(t, "first_stage")
            ),
            "found a Flux model or one like it; flow models cannot be trained here, give one .safetensors",
        ),
        (lambda t: {"lora_unet_x.lora_up.weight": torch.ones(2)}, "found a LoRA; merge it into"),
        (lambda t: {"base_model.model.unet.x.lora_A.weight": torch.ones(2)}, "found a LoRA; merge it into"),
        (lambda t: {"unet.down_blocks.0.attentions.0.x.lora.up.weight": torch.ones(2)}, "found a LoRA; merge"),
        (
            lambda t: {"down_blocks.0.resnets.0.conv1.weight": torch.ones(2)},
            "found a UNet in diffusers' layout; convert",
        ),
        (lambda t: {"controlnet_cond_embedding.conv_in.weight": torch.ones(2)}, "found a ControlNet; give one"),
        (lambda t: {"synthesis.b4.const": torch.ones(2, 4, 4)}, "found a StyleGAN2 generator; it is what --generator"),
        (
            lambda t: {"model.0.weight": torch.ones(2), "model.1.sub.0.RDB1.conv1.0.weight": torch.ones(2)},
            "an upscaler",
        ),
        (lambda t: {"emb_params": torch.ones(2, 768)}, "found a textual inversion embedding; give one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_it_cannot_train(change, says, tiny_checkpoint, tmp_path):
    path = write_safetensors(tmp_path / "prior.safetensors", change(tiny_checkpoint("sd1").tensors))
    with pytest.raises(FileProblem, match=says) as problem:
        open_checkpoint(path)
    assert str(path) in str(problem.value)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        ("a.safetensors", b"\n<!DOCTYPE html><title>Log in</title>", "a web page"),
        ("a.safetensors", b'{"error": "Repository not found"}', "JSON text"),
        ("a.safetensors", b"Access to model is restricted.", "text"),
        ("a.safetensors", bytes(4096), "nothing but zeros"),
        ("a.gguf", b"GGUF\3\0\0\0" + bytes(40), "a GGUF file"),
        ("a.zip", None, "a zip archive"),
        ("a.ckpt", None, "a zip archive"),
        ("a.safetensors.part", b"\x40\0\0\0\0\0\0\0{", "an unfinished download"),
        ("a.safetensors.crdownload", bytes(9), "an unfinished download"),
        ("a.tar.gz", b"\x1f\x8b\x08\0", "a gzip archive"),
        ("a.pt", b"<html>", "a web page"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "a picture"),
        ("a.onnx", b"\x08\x03\x12\x07pytorch", "an ONNX network"),
    ],
)
def test_files_that_are_no_models_are_called_what_they_are(name, content, says, tmp_path):
    path = tmp_path / name
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.safetensors", b"x" * 50)
    else:
        path.write_bytes(content)
    for read in (open_checkpoint, read_domain_file, read_generator):
        with pytest.raises(FileProblem, match=f"expected a model file, found {says}.*; .*[.]$"):
            read(path)


def test_folders_and_unfinished_files_beside_their_control_file(tiny_checkpoint, tmp_path):
    folder = tmp_path / "sd15"
    (folder / "unet").mkdir(parents=True)
    for names, says in (
        ((), "found a folder; name the .safetensors"),
        (("unet/diffusion_pytorch_model.safetensors",), "found a folder; name"),
        (("model_index.json",), "a folder in diffusers' layout; give the same model"),
    ):
        for name in names:
            (folder / name).write_bytes(b"{}")
        with pytest.raises(FileProblem, match=says):
            open_checkpoint(folder)
    with pytest.raises(FileProblem, match="a folder in diffusers' layout"):
        open_checkpoint(folder / "unet")
    path = tmp_path / "sd1.safetensors"
    path.write_bytes(tiny_checkpoint("sd1").path.read_bytes())
    (tmp_path / "sd1.safetensors.aria2").write_bytes(b"\0")
    with pytest.raises(FileProblem, match="found an unfinished download"):
        open_checkpoint(path)


def test_the_setting_base_names_a_prior(tiny_checkpoint):
    assert open_prior("mini_world").latent_format == "mini_world"
    with pytest.raises(ConfigProblem, match="vae: expected none for the mini world.* found other.safetensors"):
        open_prior("mini_world", vae="other.safetensors")
    assert open_prior(str(tiny_checkpoint("sd1").path)).name == "sd1.safetensors"
    with pytest.raises(FileProblem, match="nowhere.safetensors: expected a model file"):
        open_prior("nowhere.safetensors")
    with pytest.raises(ConfigProblem, match="base: expected a checkpoint file or mini_world, found 'connected: SD15'"):
        open_prior("connected: SD15")
