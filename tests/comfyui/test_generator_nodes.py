"""Load Generator, Generator Sample, Blend Generators and Save Generator, under inference mode as ComfyUI runs nodes."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image


def module(name: str):
    return importlib.import_module(f"indomain_guidance.{name}")


def tiny_generator(seed: int = 0, resolution: int = 16, **more):
    """A random StyleGAN2 whose images differ visibly from latent to latent."""
    network = module("guidance.networks.stylegan2")
    channels = (8,) * (resolution.bit_length() - 2)
    config = network.GeneratorConfig(resolution, channels, z_dim=8, w_dim=8, mapping_layers=2, **more)
    return network.random_generator(config, seed).eval().requires_grad_(False)


@pytest.fixture
def world(comfyui, tmp_path, monkeypatch):
    """models/generators in a folder of this test's own, with one generator in it, and the modules under test."""
    folder_paths = importlib.import_module("folder_paths")
    internals, files = module("nodes.comfy_internals.models.generators"), module("guidance.files")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    generator_files = module("nodes.comfy_internals.models.folders").GENERATORS
    monkeypatch.setattr(generator_files, "shipped", tmp_path / "shipped")
    folder_paths.folder_names_and_paths.pop("generators", None)
    generator_files.register()
    folder, shipped = tmp_path / "models" / "generators", tmp_path / "shipped"
    assert folder.is_dir()  # a user finds it where the help says it is
    shipped.mkdir()
    generator = tiny_generator()
    files.write_generator(shipped / "shipped.safetensors", generator, files.GeneratorMetadata(name="digits"))
    return SimpleNamespace(
        tmp=tmp_path,
        folder=folder,
        shipped=shipped,
        generator=generator,
        files=files,
        internals=internals,
        generator_files=generator_files,
        folder_paths=folder_paths,
        nodes=module("nodes.generators"),
    )


@pytest.fixture
def call(world):
    """Runs a node of the module by its name as ComfyUI does; its outputs and what it shows."""

    def run(node: str, **inputs):
        with torch.inference_mode():
            out = getattr(world.nodes, node).execute(**inputs)
        return (*out.result, out.ui)

    return run


def test_the_folder_lists_generators_only_and_what_is_shipped(world):
    for name in ("a.pkl", "b.pt", "c.safetensors", "e.pth", "readme.txt", "d.ckpt"):
        (world.folder / name).write_bytes(b"x")
    assert set(world.generator_files.listed()) == {"a.pkl", "b.pt", "c.safetensors", "e.pth", "shipped.safetensors"}
    assert world.generator_files.own() == world.folder
    # An extra_model_paths.yaml that named the folder already keeps its place.
    world.folder_paths.folder_names_and_paths["generators"] = ([str(world.tmp / "mine")], set())
    world.generator_files.register()
    assert world.generator_files.own() == world.tmp / "mine"
    paths, extensions = world.folder_paths.folder_names_and_paths["generators"]
    assert len(paths) == 3 and extensions == {".safetensors", ".pkl", ".pt", ".pth"}


def test_a_loaded_generator_can_be_adapted_and_says_what_it_is(world, call):
    one, ui = call("LoadGenerator", generator_name="shipped.safetensors")
    assert not any(tensor.is_inference() for tensor in one.generator.parameters())
    assert ui["text"][0].startswith("digits: StyleGAN2 (skip), 16 px, 0.0 M weights, z 8, w 8 x 6")
    fingerprint = world.nodes.LoadGenerator.fingerprint_inputs
    before = fingerprint("shipped.safetensors")
    world.files.write_generator(world.shipped / "shipped.safetensors", tiny_generator(1, 32))
    assert fingerprint("shipped.safetensors") != before and fingerprint("absent.pkl") == "missing"


@pytest.mark.parametrize("name", ["absent.pkl", "", "../shipped/shipped.safetensors"])
def test_names_that_are_not_listed_are_refused(call, name):
    with pytest.raises(
        ValueError, match="Load Generator: expected a file named .*(pick a listed file|is listed, pick it)"
    ):
        call("LoadGenerator", generator_name=name)


def test_other_files_are_refused_with_what_they_are(world, call):
    (world.folder / "words.pkl").write_text("this is no network")
    with pytest.raises(ValueError, match="words.pkl: expected") as caught:
        call("LoadGenerator", generator_name="words.pkl")
    assert "\n" not in str(caught.value)


def test_images_are_the_generators_own_for_nvidias_seeds(world, call):
    one, _ = call("LoadGenerator", generator_name="shipped.safetensors")
    images, _ = call("GeneratorSample", generator=one, seed=7, truncation=0.7, batch_size=3)
    assert images.shape == (3, 16, 16, 3) and float(images.min()) >= 0 and float(images.max()) <= 1
    z = torch.from_numpy(np.concatenate([np.random.RandomState(seed).randn(1, 8) for seed in (7, 8, 9)])).float()
    expected = world.generator(z, truncation=0.7).mul(0.5).add(0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert torch.allclose(images.clone(), expected, atol=1e-5)
    assert float((images[0] - images[1]).abs().mean()) > 1e-3
    mean, _ = call("GeneratorSample", generator=one, seed=1, truncation=0.0, batch_size=2)
    assert torch.equal(mean[0], mean[1])


def test_pictures_that_are_not_square(world, call):
    from indomain_guidance.guidance.files import write_generator
    from indomain_guidance.guidance.networks.stylegan2 import random_generator
    from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig

    config = GeneratorConfig(16, (6, 5, 4), z_dim=5, w_dim=7, mapping_layers=2, first_size=(4, 2))
    write_generator(world.folder / "tall.safetensors", random_generator(config, 0))
    one, shown = call("LoadGenerator", generator_name="tall.safetensors")
    assert "8 x 16 px" in shown["text"][0]
    images, _ = call("GeneratorSample", generator=one, seed=3, batch_size=2, truncation=1.0)
    z = world.internals.latents_of_seeds([3, 4], 5)
    assert images.shape == (2, 16, 8, 3)
    assert torch.allclose(images, world.internals.as_image(one.generator(z)), atol=1e-6)
    blend, _ = call("BlendGenerators", source=one, adapted=one, amount=0.5)
    assert torch.allclose(blend.generator(z), one.generator(z), atol=1e-5)


def test_a_seed_is_one_picture_in_the_node_the_grid_and_the_command(world, call):
    """With everybody's own defaults."""
    from indomain_guidance.training.adaptation.config import AdaptConfig
    from indomain_guidance.training.adaptation.previews import BeforeAfter
    from indomain_guidance.training.command_line.main import main

    one, _ = call("LoadGenerator", generator_name="shipped.safetensors")
    entries = {entry.id: entry for entry in world.nodes.GeneratorSample.define_schema().inputs}
    images, _ = call("GeneratorSample", generator=one, seed=3, batch_size=2, truncation=entries["truncation"].default)
    drawn = [image.mul(255).round().numpy() for image in images]
    before = BeforeAfter(AdaptConfig(generator="x", base="y", seed=3, sample_count=2), one.generator).before
    file, pictures = world.shipped / "shipped.safetensors", world.tmp / "pictures"
    assert main(["sample", str(file), "-o", str(pictures), "--seed", "3", "-c", "2", "--device", "cpu", "--quiet"]) == 0
    for index, own in enumerate(drawn):
        with Image.open(pictures / f"shipped-{3 + index}.png") as image:
            by_command = np.asarray(image).astype(float)
        in_grid = ((before[index].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
        assert np.abs(own - by_command).max() <= 1 and np.abs(own - in_grid).max() <= 1  # batches round otherwise
    assert np.abs(drawn[0] - drawn[1]).mean() > 1


def test_batches_that_are_drawn_in_parts_are_the_same(world, call, monkeypatch):
    one, _ = call("LoadGenerator", generator_name="shipped.safetensors")
    values = {"generator": one, "seed": world.internals.LARGEST_SEED, "truncation": 1.0, "batch_size": 5}
    whole, _ = call("GeneratorSample", **values)
    monkeypatch.setattr(world.internals, "PIXELS_AT_ONCE", 2 * 16 * 16)
    parts, _ = call("GeneratorSample", **values)
    assert torch.allclose(whole, parts, atol=1e-5)


def test_images_that_do_not_fit_into_memory_together_are_refused_before_any_is_drawn(world, call, monkeypatch):
    one, _ = call("LoadGenerator", generator_name="shipped.safetensors")
    config = one.generator.config
    needed = 4 * 64 * (3 * config.height * config.width + config.z_dim)
    memory = module("training.engine.memory")
    monkeypatch.setattr(memory, "available_memory", lambda: int(needed / 0.8) + 1)
    call("GeneratorSample", generator=one, seed=0, truncation=1.0, batch_size=64)
    monkeypatch.setattr(memory, "available_memory", lambda: int(needed / 0.8) - 1)
    with pytest.raises(ValueError, match="that 64 of .* px each take .* that are free; lower batch_size"):
        call("GeneratorSample", generator=one, seed=0, truncation=1.0, batch_size=64)


def test_a_device_that_is_full_gets_fewer_images_at_once(world, call, comfyui, monkeypatch):
    one, _ = call("LoadGenerator", generator_name="shipped.safetensors")
    synthesize, sizes = type(one.generator).synthesize, []

    def full(self, ws, **more):
        sizes.append(len(ws))
        if len(ws) > limit:
            raise comfyui.model_management.OOM_EXCEPTION("out of memory")
        return synthesize(self, ws, **more)

    limit = 2
    monkeypatch.setattr(type(one.generator), "synthesize", full)
    images, _ = call("GeneratorSample", generator=one, seed=0, truncation=1.0, batch_size=5)
    assert len(images) == 5 and sizes == [5, 3, 2, 2, 1]
    limit = 0
    with pytest.raises(ValueError, match="ran out at image 1 of 5, of 16 px each; lower batch_size"):
        call("GeneratorSample", generator=one, seed=0, truncation=1.0, batch_size=5)


@pytest.mark.parametrize("where", ["synthesize", "map", "to"])
def test_memory_that_runs_out_anywhere_is_one_sentence(world, call, monkeypatch, where):
    """As the CPU's allocator says it, too, which has no exception of its own."""
    one, _ = call("LoadGenerator", generator_name="shipped.safetensors")
    kept, calls = getattr(type(one.generator), where), []

    def full(self, *args, **more):
        calls.append(1)
        if where != "to" or len(calls) == 1:  # back to the CPU it always fits
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory\nTrace")
        return kept(self, *args, **more)

    monkeypatch.setattr(type(one.generator), where, full)
    with pytest.raises(ValueError, match="Generator Sample: memory ran out.*lower batch_size") as caught:
        call("GeneratorSample", generator=one, seed=0, truncation=1.0, batch_size=5)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(type(one.generator), where, lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("GeneratorSample", generator=one, seed=0, truncation=1.0, batch_size=5)


def test_random_noise_is_each_images_own(world, call, monkeypatch):
    generator = tiny_generator()
    for name, parameter in generator.named_parameters():
        if name.endswith("noise_strength"):
            parameter.data.fill_(0.5)
    one = world.internals.GraphGenerator(generator, world.files.GeneratorMetadata(), "x")
    values = {"generator": one, "truncation": 1.0, "noise": "random"}
    whole, _ = call("GeneratorSample", seed=5, batch_size=3, **values)
    monkeypatch.setattr(world.internals, "PIXELS_AT_ONCE", 2 * 16 * 16)
    parts, _ = call("GeneratorSample", seed=5, batch_size=3, **values)
    assert torch.allclose(whole, parts, atol=1e-5)
    for index in range(3):
        alone, _ = call("GeneratorSample", seed=5 + index, batch_size=1, **values)
        assert torch.allclose(alone[0], whole[index], atol=1e-5)
    without, _ = call("GeneratorSample", seed=5, batch_size=3, **{**values, "noise": "none"})
    assert float((without - whole).abs().mean()) > 1e-3


def test_classes_and_noise(world, call):
    conditional = world.internals.GraphGenerator(tiny_generator(c_dim=3), world.files.GeneratorMetadata(), "x")
    values = {"generator": conditional, "seed": 0, "truncation": 1.0, "batch_size": 1}
    first, second = (call("GeneratorSample", class_index=index, **values)[0] for index in (0, 2))
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="expected a class from 0 to 2, as the generator has, found 3"):
        call("GeneratorSample", class_index=3, **values)
    with pytest.raises(ValueError, match="noise to be one of const, random, none"):
        call("GeneratorSample", noise="loud", **values)
    one, _ = call("LoadGenerator", generator_name="shipped.safetensors")
    assert call("GeneratorSample", **{**values, "generator": one}, class_index=9)[0].shape == (1, 16, 16, 3)


def test_grey_generators_give_rgb(world, call):
    grey = world.internals.GraphGenerator(tiny_generator(img_channels=1), world.files.GeneratorMetadata(), "x")
    images, _ = call("GeneratorSample", generator=grey, seed=0, truncation=1.0, batch_size=1)
    assert images.shape[-1] == 3 and torch.equal(images[..., 0], images[..., 2])


def test_the_dial_ends_at_both_generators(world, call):
    source, _ = call("LoadGenerator", generator_name="shipped.safetensors")
    world.files.write_generator(world.folder / "other.safetensors", tiny_generator(5))
    adapted, _ = call("LoadGenerator", generator_name="other.safetensors")

    def weights(one):
        return one.generator.state_dict()

    def same(a, b):
        return all(torch.equal(a[key], b[key]) for key in a)

    for amount, end in ((0.0, source), (1.0, adapted)):
        blended, _ = call("BlendGenerators", source=source, adapted=adapted, amount=amount)
        assert same(weights(blended), weights(end))
        assert not any(tensor.is_inference() for tensor in blended.generator.parameters())
    split, _ = call(
        "BlendGenerators", source=source, adapted=adapted, amount=1.0, split_resolution=8, amount_below_split=0.0
    )
    key = "synthesis.b{}.conv1.weight"
    assert torch.equal(weights(split)[key.format(8)], weights(source)[key.format(8)])
    assert torch.equal(weights(split)[key.format(16)], weights(adapted)[key.format(16)])
    with pytest.raises(ValueError, match="the split must be one of .4, 8, 16., got 5"):
        call("BlendGenerators", source=source, adapted=adapted, amount=1.0, split_resolution=5)
    larger = world.internals.GraphGenerator(tiny_generator(resolution=32), world.files.GeneratorMetadata(), "x")
    with pytest.raises(ValueError, match="resolution is 16 and 32"):
        call("BlendGenerators", source=source, adapted=larger, amount=0.5)


def test_a_saved_generator_is_the_same_and_replaces_nothing_unasked(world, call):
    one, _ = call("LoadGenerator", generator_name="shipped.safetensors")
    path, ui = call("SaveGenerator", generator=one, filename="mine/blend.safetensors", file_dtype="fp32")
    assert path == str(world.folder / "mine" / "blend.safetensors") == ui["text"][0]
    again, _ = call("LoadGenerator", generator_name="mine/blend.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.generator.parameters(), one.generator.parameters()))
    assert again.metadata.name == "digits"
    with pytest.raises(ValueError, match="expected no file under this name.*switch replace on"):
        call("SaveGenerator", generator=one, filename="mine/blend", file_dtype="fp16")
    call("SaveGenerator", generator=one, filename="mine/blend", file_dtype="fp16", replace=True)
    for name in ("../outside", "", "folder/"):
        with pytest.raises(ValueError, match="expected a file name inside"):
            call("SaveGenerator", generator=one, filename=name, file_dtype="fp32")
    long = "x" * 190
    for name, words in (
        ("x" * 201, "at most 200 bytes"),
        ("a/" + "y" * 300, "at most 200 bytes"),
        ("nul", "device on Windows"),
        ("nothing\0", "plain file name"),
        ("two\nlines", "plain file name"),
        ("a:b", "plain file name"),
        ("\ud800", "plain file name"),
        ("True", "a value of another kind"),
        ("/".join([long] * 30), "could not be written .*too long"),
        ("mine/blend.safetensors/x", "could not be written"),
    ):
        with pytest.raises(world.files.FileProblem, match=words) as caught:
            call("SaveGenerator", generator=one, filename=name, file_dtype="fp32")
        assert "\n" not in str(caught.value)
    assert {path.name for path in world.folder.rglob("*")} == {"mine", "blend.safetensors"}
    with pytest.raises(ValueError, match="one of fp32, fp16, bf16, found 'int8'"):
        call("SaveGenerator", generator=one, filename="x", file_dtype="int8")
    assert not list(world.tmp.rglob("outside*"))


def as_rosinality(generator) -> dict:
    """The generator under the names of rosinality's checkpoints."""
    names = {
        "weight": "conv.weight",
        "affine.weight": "conv.modulation.weight",
        "affine.bias": "conv.modulation.bias",
        "noise_strength": "noise.weight",
        "bias": "activate.bias",
    }
    made = {}
    for key, value in generator.state_dict().items():
        root, *rest = key.split(".")
        if key == "mapping.w_avg":
            continue
        if root == "mapping":
            made[f"style.{int(rest[0][2:]) + 1}.{rest[1]}"] = value
        elif rest[1] == "const":
            made["input.input"] = value[None]
        else:
            level, layer, last = int(rest[0][1:]).bit_length() - 3, rest[1], ".".join(rest[2:])
            number = 2 * (level - 1) + int(layer[-1]) if layer != "torgb" else level - 1
            if last == "noise_const":
                made[f"noises.noise_{number + 1}"] = value[None, None]
            elif layer == "torgb":
                where = "to_rgb1" if level == 0 else f"to_rgbs.{number}"
                made[f"{where}.{'bias' if last == 'bias' else names[last]}"] = (
                    value[None, :, None, None] if last == "bias" else value
                )
            else:
                made[f"{'conv1' if level == 0 else f'convs.{number}'}.{names[last]}"] = value
    return {"g_ema": made, "latent_avg": generator.mapping.w_avg}


def test_a_pickle_is_loaded_and_nothing_is_written_beside_it(world, call):
    torch.save(as_rosinality(world.generator), world.folder / "old.pt")
    one, ui = call("LoadGenerator", generator_name="old.pt")
    assert len(ui["text"]) == 1 and not (world.folder / "old.safetensors").exists()
    assert torch.equal(one.generator.synthesis.b8.conv0.weight, world.generator.synthesis.b8.conv0.weight)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_what_is_saved_beside_a_pickle_is_not_taken_for_it(world, call, dtype):
    torch.save(as_rosinality(world.generator), world.folder / "old.pt")
    source, _ = call("LoadGenerator", generator_name="old.pt")
    for one, amount in ((source, 0.5), (source, 1.0)):
        blended, _ = call("BlendGenerators", source=source, adapted=one, amount=amount)
        kept = source if dtype == "fp16" else blended
        call("SaveGenerator", generator=kept, filename="old", file_dtype=dtype, replace=True)
        again, ui = call("LoadGenerator", generator_name="old.pt")
        assert len(ui["text"]) == 1 and again.source.endswith("old.pt")
        assert all(torch.equal(a, b) for a, b in zip(again.generator.parameters(), source.generator.parameters()))


def test_a_blend_says_what_it_is_made_of(world, call):
    described, made = world.files.GeneratorMetadata, world.internals.GraphGenerator
    stage = {"prompt": "a red seven", "steps": 3, "parent": "digits"}
    source = made(world.generator, described(name="digits", licence="CC0-1.0", source_sha256="ab" * 32), "x")
    adapted = made(tiny_generator(5), described(name="red", licence="Apache-2.0", history=(stage,)), "y")
    values = {"source": source, "adapted": adapted, "amount": 0.25}
    blended, _ = call("BlendGenerators", **values)
    call("SaveGenerator", generator=blended, filename="blend", file_dtype="fp32")
    again, _ = call("LoadGenerator", generator_name="blend.safetensors")
    assert again.metadata == blended.metadata and again.name == "digits to red at 0.25"
    assert again.metadata.history == (stage, {"blend": 0.25, "source": "digits", "adapted": "red"})
    assert again.metadata.licence == "CC0-1.0; Apache-2.0"
    more, _ = call("BlendGenerators", source=again, adapted=adapted, amount=1.0, split_resolution=8)
    assert more.metadata.licence == "CC0-1.0; Apache-2.0" and more.metadata.history[:-1] == (stage,)
    assert more.metadata.history[-1] == {
        "blend": 1.0,
        "source": again.name,
        "adapted": "red",
        "split_resolution": 8,
        "amount_below_split": 0.0,
    }
    unknown = made(world.generator, described(name="any"), "x")
    assert call("BlendGenerators", **values | {"source": unknown})[0].metadata.licence == "Apache-2.0"
