"""Generators inside other tools' files: wherever they lie, the same weights come out or the file says what it holds."""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from indomain_guidance.guidance.files import FileProblem, holds_generator, read_generator, read_state_dict
from indomain_guidance.guidance.networks.stylegan2 import random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig

GOLDEN = Path(__file__).parent / "golden"
CONFIG = GeneratorConfig(resolution=16, channels=(6, 5, 4), z_dim=7, w_dim=7, mapping_layers=3)


@pytest.fixture(scope="module")
def weights():
    tensors = safetensors.torch.load_file(GOLDEN / "rosinality.safetensors")
    return {key.removeprefix("g_ema."): value for key, value in tensors.items() if key.startswith("g_ema.")}


@pytest.fixture(scope="module")
def mean():
    return safetensors.torch.load_file(GOLDEN / "rosinality.safetensors")["latent_avg"]


def under(prefix, tensors):
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def same(generator, wanted) -> bool:
    one, two = generator.state_dict(), wanted.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def refusal(path, content) -> str:
    torch.save(content, path)
    with pytest.raises(FileProblem) as caught:
        read_generator(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.endswith(".") and "\n" not in text and len(text) <= 500, text
    return text


def test_the_same_weights_come_out_of_every_wrapping(weights, mean, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"g_ema": weights, "latent_avg": mean}, path)
    wanted = read_generator(path).generator
    other = under("encoder.", {"input_layer.0.weight": torch.ones(3), "body.0.res_layer.1.weight": torch.ones(2)})
    rough = {key: value + 1 for key, value in weights.items()}
    rows = mean.repeat(6, 1)  # as an encoder of W+ keeps it
    options = argparse.Namespace(size=16)
    forms = {
        "prefixed": {**under("module.", weights), "latent_avg": mean},
        "compiled": {"g_ema": under("_orig_mod.module.", weights), "latent_avg": mean},
        "generator": {**under("generator.", weights), "latent_avg": mean},
        "state_dict": {"state_dict": weights, "latent_avg": mean, "epoch": 3},
        "params_ema": {"params": rough, "params_ema": weights, "latent_avg": mean},
        "model": {"model": {"g_ema": under("module.", weights)}, "latent_avg": mean, "args": options},
        "encoder": {"state_dict": {**other, **under("decoder.", weights)}, "latent_avg": rows, "opts": {"size": 16}},
        "own mean": {"state_dict": {**other, **under("decoder.", weights), "latent_avg": rows}},
        "DualStyleGAN": {
            "g_ema": {
                **under("generator.", weights),
                "style.1.weight": torch.ones(6, 6),
                "res.0.conv.0.weight": torch.ones(3),
            },
            "latent_avg": mean,
        },
        "two averages of one": {"g": rough, "g_ema": weights, "latent_avg": mean, "d": {"conv.weight": torch.ones(1)}},
        "flat": {**under("generator_ema.", weights), **under("generator.", rough), "latent_avg": mean},
    }
    for name, content in forms.items():
        torch.save(content, path)
        loaded = read_generator(path)
        assert holds_generator(path) and same(loaded.generator, wanted), name
        assert bool(loaded.notes) == (name in ("encoder", "own mean", "DualStyleGAN", "flat")), (name, loaded.notes)
        if name == "encoder":
            assert loaded.notes == ("Read from state_dict.decoder of the file; what else it holds is left out.",)
    flat = {**under("generator.module.", weights), "latent_avg": mean}
    safetensors.torch.save_file(flat, tmp_path / "a.safetensors")
    assert holds_generator(tmp_path / "a.safetensors")
    assert same(read_generator(tmp_path / "a.safetensors").generator, wanted)


def test_nvidias_names_in_torchs_files(tmp_path):
    wanted, rough, path = random_generator(CONFIG, 1), random_generator(CONFIG, 2), tmp_path / "a.pt"
    for content in (
        wanted.state_dict(),
        {"G_ema": wanted.state_dict(), "G": rough.state_dict(), "D": None},
        {"state_dict": under("module.", wanted.state_dict())},
    ):
        torch.save(content, path)
        loaded = read_generator(path)
        assert same(loaded.generator, wanted) and loaded.metadata.source_format == "NVIDIA checkpoint"
        assert "says nothing of its architecture" in loaded.notes[-1]


def test_styles_of_their_own_for_every_layer_are_no_mean(weights, mean, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"g_ema": weights, "latent_avg": torch.stack([mean, mean + 1])}, path)
    loaded = read_generator(path)
    assert "no mean style for all layers; it was measured" in loaded.notes[0]


def test_several_generators_are_not_chosen_from(weights, tmp_path):
    message = refusal(tmp_path / "a.pt", {"first": weights, "second": under("module.", weights)})
    assert "found 2 generators, under first, second.module; give one alone" in message
    message = refusal(tmp_path / "a.pt", {"state_dict": {**under("a.", weights), **under("b.", weights)}})
    assert "under state_dict.a, state_dict.b" in message


def test_long_names_and_many_generators_take_no_memory_and_time(tmp_path):
    """A long name goes before thousands of others, and each of thousands of generators would be looked for in all."""
    long, mark, one = "k" * 10**6, "synthesis.b4.const", torch.ones(1)
    path = tmp_path / "a.pt"
    inner = {str(number): {} for number in range(20_000)}
    assert "no tensors" in refusal(path, {long: inner})
    assert "no tensors" in refusal(path, {str(number): {long: one} for number in range(5_000)})
    assert "50 generators or more" in refusal(path, {f"{number}.{mark}": one for number in range(20_000)})
    torch.save({(long, number): one for number in range(900)}, path)
    with pytest.raises(FileProblem, match="expected weights, found none"):
        read_state_dict(path)


def test_what_is_inside_instead_is_said(weights, tmp_path):
    path = tmp_path / "a.pt"
    ones = torch.ones(2)
    for names, found in (
        (
            ["generator.module.from_rgb.weight", "generator.module.decode.0.conv1.weight", "mapping_network.module.a"],
            "found another GAN's networks",
        ),
        (["g_ema.synthesis.input.freqs", "g_ema.synthesis.L0_36_512.weight"], "found a StyleGAN3 generator"),
        (["G_ema.backbone.synthesis.b4.const", "G_ema.superresolution.block0.conv0.weight"], "found an EG3D generator"),
        (["generator.progression.0.conv1.conv.weight_orig"], "found a generator of another GAN"),
        (["stylegan_decoder.style_convs.0.modulated_conv.weight", "conv_body_first.weight"], "found GFPGAN"),
        (
            ["stylegan_decoder.style_conv1.modulated_conv.modulation.weight", "stylegan_decoder.style_conv1.bias"],
            "found GFPGAN, whose generator is rewritten",
        ),
        (["state_dict.generator_ema.style_mapping.1.weight"], "found a generator of another GAN"),
        (["GAN.G.initial_block", "GAN.G.blocks.0.to_style1.weight"], "found a generator of another GAN"),
        (["conv1.conv.modulation.bias.x", "iwt.ll", "to_rgb1.iwt.ll"], "found a generator of another GAN"),
        (["d.b16.conv0.weight", "d.b4.fc.weight"], "found a file with tensors such as d.b16"),
        (["b16.fromrgb.weight", "b4.fc.weight"], "found another GAN's networks"),
        (
            [
                "model.diffusion_model.input_blocks.0.0.weight",
                "model.diffusion_model.output_blocks.0.0.x",
                "first_stage_model.x",
            ],
            "found a Stable Diffusion checkpoint; choose a generator's file",
        ),
        (["lora_unet_down.lora_up.weight"], "found a LoRA"),
    ):
        content: dict = {}
        for name in names:
            level, *rest = (
                name.split(".", 1) if name.split(".")[0] in ("state_dict", "g_ema", "G_ema") else (None, name)
            )
            (content if level is None else content.setdefault(level, {}))[rest[0]] = ones
        assert found in refusal(path, content), names
        safetensors.torch.save_file({name: ones.clone() for name in names}, tmp_path / "a.safetensors")
        with pytest.raises(FileProblem, match=found):
            read_generator(tmp_path / "a.safetensors")
    assert "found a list" in refusal(path, [1, 2])
    assert "found no tensors" in refusal(path, {"epoch": 3})
    assert "found the state of a run of this project; go on with the run" in refusal(
        path, {"format": "indomain_guidance_checkpoint", "weights": {"a": ones}}
    )


class Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)


def test_whole_modules_are_called_so(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    for new in (True, False):
        torch.save({"g_ema": Whole()}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(FileProblem, match="found a whole module, which only the code .*save its state_dict"):
            read_generator(path)
    monkeypatch.setattr(Whole, "__module__", "networks.generator")
    monkeypatch.setitem(sys.modules, "networks", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "networks.generator", types.SimpleNamespace(Whole=Whole))
    torch.save({"G_ema": Whole()}, path)
    with pytest.raises(FileProblem, match="found a StyleGAN-T network; only StyleGAN2"):
        read_generator(path)


def test_basicsr_files_give_basicsrs_images(tmp_path, relative_error, monkeypatch):
    """Against the network that GFPGAN brings in spandrel, which ComfyUI ships, without its compiled activation."""
    original = pytest.importorskip("spandrel.architectures.GFPGAN.__arch.stylegan2_arch")

    def activated(x, bias, negative_slope=0.2, scale=2**0.5):
        return torch.nn.functional.leaky_relu(x + bias.view(1, -1, *[1] * (x.ndim - 2)), negative_slope) * scale

    for module in (original, importlib.import_module("spandrel.architectures.GFPGAN.__arch.fused_act")):
        monkeypatch.setattr(module, "fused_leaky_relu", activated)
    torch.manual_seed(3)
    network = original.StyleGAN2Generator(
        out_size=16, num_style_feat=8, num_mlp=2, channel_multiplier=1, narrow=1 / 64
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        z = torch.randn(2, 8)
        images, _ = network([z], randomize_noise=False)
    path = tmp_path / "a.pth.pt"
    for content in ({"params_ema": network.state_dict()}, under("stylegan_decoder.", network.state_dict())):
        torch.save(content, path)
        loaded = read_generator(path)
        assert relative_error(loaded.generator(z), images) < 1e-5
        assert loaded.metadata.source_format == "BasicSR checkpoint"
    rosinality = importlib.import_module("indomain_guidance.guidance.files.rosinality")
    with pytest.raises(ValueError, match="two of its tensors have one place"):
        rosinality.from_basicsr({"style_conv1.weight": z, "conv1.noise.weight": z})
