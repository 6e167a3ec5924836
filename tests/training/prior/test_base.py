"""Bases: what is read from a checkpoint, what is refused, and the mini world."""

from __future__ import annotations

import gc
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.guidance.files import (
    FileProblem,
    prior_content_hash,
    read_domain_file,
    read_generator,
    write_safetensors,
)
from indomain_guidance.guidance.networks.unet import timestep_embedding
from indomain_guidance.training.mini_world.assets import load_mini_world
from indomain_guidance.training.prior import base as bases


def without(tensors, *prefixes):
    return {key: value for key, value in tensors.items() if not key.startswith(prefixes)}


@pytest.fixture(scope="module")
def mini():
    return bases.open_mini_world()


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
    prior, x, t = mini.load_prior(), torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0])
    context = mini.null_text.context.expand(2, -1, -1)
    with torch.no_grad():
        assert torch.equal(prior(x, t, context=context), world.prior.unet(x, t, context=context))
    assert (mini.latent_format, mini.factor, mini.latent_channels) == ("mini_world", 8, 4)
    assert mini.vector(64, 64) is None and mini.conditioning([bases.ImageSize((64, 64))]) == {}


@pytest.mark.parametrize(
    "family, latent_format, scale", [("sd1", "sd15", 0.18215), ("sd2", "sd15", 0.18215), ("sdxl", "sdxl", 0.13025)]
)
def test_opens_every_family(family, latent_format, scale, tiny_checkpoint):
    made = tiny_checkpoint(family)
    base = bases.open_checkpoint(made.path, prediction="epsilon")
    assert (base.latent_format, base.latent_scale, base.zero_snr) == (latent_format, scale, False)
    assert base.config == made.unet.config and base.prior_hash == prior_content_hash(made.tensors)
    assert all(torch.equal(base.unet[key].float(), value) for key, value in made.unet.state_dict().items())
    size = bases.ImageSize((600, 400), (3, 5), (64, 32))
    arguments = base.conditioning([size] * 3, base.null_text)
    prior, free = base.load_prior(), base.conditioning([size])
    assert prior(torch.randn(3, 4, 8, 4), torch.tensor([1.0, 5.0, 9.0]), **arguments).isfinite().all()
    assert ("y" in arguments) == ("y" in free) == (family == "sdxl")
    if family == "sdxl":
        numbers = torch.tensor([600.0, 400, 3, 5, 64, 32])
        assert torch.equal(arguments["y"][1, 1280:], timestep_embedding(numbers, 256).flatten())
        assert torch.equal(arguments["y"][2, :1280], base.null_context.pooled[0])
        assert not free["y"][0, :1280].any()


def test_sizes_of_any_number_of_images_take_no_memory(tiny_checkpoint):
    """Random crops make hundreds of thousands of different ones."""
    base = bases.open_checkpoint(tiny_checkpoint("sdxl").path)

    def held():
        gc.collect()
        return sum(type(one) is torch.Tensor for one in gc.get_objects())

    before = held()
    for top in range(100):
        base.conditioning([bases.ImageSize((600, 400), (top, 5), (64, 32))] * 2)
    assert held() == before


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
    own, replaced = bases.open_checkpoint(made.path), bases.open_checkpoint(made.path, vae=str(path))
    assert own.vae_id != replaced.vae_id and own.prior_hash == replaced.prior_hash
    assert own.vae_id == bases.open_checkpoint(made.path).vae_id
    assert replaced.encode(torch.zeros(1, 3, 16, 16))[0].shape == (1, 4, 2, 2)


def test_the_vae_id_depends_on_weights_formats_and_scale(mini):
    same = replace(mini)
    assert same.vae_id == mini.vae_id
    assert replace(mini, latent_scale=mini.latent_scale * 2).vae_id != mini.vae_id
    changed = bases.open_mini_world()
    with torch.no_grad():
        next(changed.autoencoder.parameters())[0, 0, 0, 0] += 1e-3
    assert changed.vae_id != mini.vae_id


@pytest.mark.parametrize(
    "markers, prediction, expected",
    [
        ({}, "auto", ("epsilon", False)),
        ({"v_pred": torch.zeros(1)}, "auto", ("v_prediction", False)),
        ({"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, "auto", ("v_prediction", True)),
        ({"v_pred": torch.zeros(1)}, "epsilon", ("epsilon", False)),
        ({"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, "v_prediction", ("v_prediction", False)),
        ({"ztsnr": torch.zeros(1)}, "auto", ("epsilon", False)),
        ({}, "v_prediction_zero_snr", ("v_prediction", True)),
        ({}, "sample", ("sample", False)),
    ],
)
def test_prediction_type_comes_from_markers_or_the_user(markers, prediction, expected, tiny_checkpoint, tmp_path):
    path = write_safetensors(tmp_path / "prior.safetensors", tiny_checkpoint("sd1").tensors | markers)
    base = bases.open_checkpoint(path, prediction=prediction)
    assert (base.prediction_type, base.zero_snr) == expected
    assert torch.equal(base.schedule.sigmas, NoiseSchedule.scaled_linear(zero_snr=expected[1]).sigmas)
    assert any("ztsnr" in note for note in base.notes) == ("ztsnr" in markers and not expected[1])


def test_measures_the_prediction_type_of_silent_2x_files(mini, tiny_checkpoint, monkeypatch):
    """The mini world predicts noise e; rewritten as a v-model it gives (e - sqrt(1 - abar) x) / sqrt(abar)."""
    context = mini.null_context.tensor
    kind, agreement = bases.measured_prediction(mini.unet, mini.config, context, 8)
    assert kind == "epsilon" and agreement > 0.95
    prior = mini.load_prior()
    abar = float(mini.schedule.alphas_cumprod[-1])

    def as_v(x, timesteps, **cond):
        return (prior(x, timesteps, **cond) - (1 - abar) ** 0.5 * x) / abar**0.5

    monkeypatch.setattr(bases, "load_unet", lambda *_: as_v)
    kind, agreement = bases.measured_prediction(mini.unet, mini.config, context, 8)
    assert kind == "v_prediction" and abs(agreement) < 0.4
    monkeypatch.undo()
    silent = bases.open_checkpoint(tiny_checkpoint("sd2").path)  # random weights know nothing of the noise
    assert silent.prediction_type == "v_prediction" and "measured v_prediction" in silent.notes[0]


def test_a_silent_1x_file_counts_as_epsilon_and_says_when_it_looks_otherwise(tiny_checkpoint, monkeypatch):
    path = tiny_checkpoint("sd1").path
    base = bases.open_checkpoint(path)  # random weights know nothing of the noise
    (note,) = base.notes
    assert base.prediction_type == "epsilon" and "looks like v_prediction" in note and "Set prediction to" in note
    for prediction in ("epsilon", "v_prediction"):
        base = bases.open_checkpoint(path, prediction=prediction)
        assert (base.prediction_type, base.notes) == (prediction, ())
    monkeypatch.setattr(bases, "measured_prediction", lambda *_: ("epsilon", 0.99))
    assert bases.open_checkpoint(path).notes == ()


def test_from_parts_equals_the_file(tiny_checkpoint):
    made = tiny_checkpoint("sdxl")
    opened = bases.open_checkpoint(made.path)
    with torch.inference_mode():  # as a ComfyUI node runs
        unet = {key: value.clone() for key, value in opened.unet.items()}
        vae = {key: value.clone() for key, value in opened.autoencoder.state_dict().items()}
        built = bases.Prior.from_parts(
            unet,
            opened.config,
            latent_format="sdxl",
            prediction_type="epsilon",
            zero_snr=False,
            null_context=opened.null_context,
            autoencoder=vae,
        )
    assert built.latent_scale == opened.latent_scale
    assert (built.prior_hash, built.vae_id) == (opened.prior_hash, opened.vae_id)
    assert not any(tensor.is_inference() for tensor in [*built.unet.values(), *built.autoencoder.parameters()])
    with pytest.raises(ValueError, match="scale of the latent space 'mini_world'"):
        bases.Prior.from_parts(
            unet,
            opened.config,
            latent_format="mini_world",
            prediction_type="epsilon",
            zero_snr=False,
            null_context=opened.null_context,
            autoencoder=vae,
        )


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
            "found a Flux model; flow models cannot be trained here, give one .safetensors",
        ),
        (lambda t: {"lora_unet_x.lora_up.weight": torch.ones(2)}, "found a LoRA .kohya's names.; merge it into"),
        (
            lambda t: {"base_model.model.unet.x.lora_A.weight": torch.ones(2)},
            "found a LoRA .PEFT's names.; merge it into",
        ),
        (
            lambda t: {"unet.down_blocks.0.attentions.0.x.lora.up.weight": torch.ones(2)},
            "found a LoRA .diffusers' names.",
        ),
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
        bases.open_checkpoint(path)
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
    for read in (bases.open_checkpoint, read_domain_file, read_generator):
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
            bases.open_checkpoint(folder)
    with pytest.raises(FileProblem, match="one network in diffusers' layout"):
        bases.open_checkpoint(folder / "unet")
    path = tmp_path / "sd1.safetensors"
    path.write_bytes(tiny_checkpoint("sd1").path.read_bytes())
    (tmp_path / "sd1.safetensors.aria2").write_bytes(b"\0")
    with pytest.raises(FileProblem, match="found an unfinished download"):
        bases.open_checkpoint(path)


def test_refuses_prompts_without_a_tokenizer(tiny_checkpoint, tmp_path):
    made = tiny_checkpoint("sd1")
    base = bases.open_checkpoint(made.path)
    assert base.encode_text(["", ""]).context.shape == (2, 77, 768)
    with pytest.raises(ValueError, match="expected a tokenizer to encode the prompt 'a cat'"):
        base.encode_text(["", "a cat"])
    with pytest.raises(FileProblem, match="vocab.json: expected CLIP's tokenizer file"):
        bases.open_checkpoint(made.path, tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="Expected prediction to be one of"):
        bases.open_checkpoint(made.path, prediction="flow")


def test_a_configuration_names_the_base(tiny_checkpoint):
    config = SimpleNamespace(base="mini_world", vae="", tokenizer="", prediction="auto")
    assert bases.open_base(config).latent_format == "mini_world"
    config.vae = "other.safetensors"
    with pytest.raises(bases.ConfigProblem, match="vae: expected none for the mini world.* found other.safetensors"):
        bases.open_base(config)
    config.vae = ""
    config.base = str(tiny_checkpoint("sd1").path)
    assert bases.open_base(config).path.name == "sd1.safetensors"
    config.base = "nowhere.safetensors"
    with pytest.raises(FileProblem, match="nowhere.safetensors: expected a model file"):
        bases.open_base(config)


def test_it_says_what_images_it_was_made_for(mini, tiny_run):
    wide = replace(mini.config, context_dim=1024)
    second = replace(mini, latent_format="sd15", config=wide)
    sizes = [
        one.native_resolution
        for one in (
            mini,
            replace(mini, latent_format="sd15"),
            second,
            replace(second, prediction_type="v_prediction"),
            replace(mini, latent_format="sdxl"),
            tiny_run.tiny_base(),
        )
    ]
    assert sizes == [64, 512, 512, 768, 1024, None]


def test_the_autoencoder_moves_and_comes_back(mini):
    with mini.on("cpu") as same:
        assert same is mini
    assert next(mini.autoencoder.parameters()).device.type == "cpu"
