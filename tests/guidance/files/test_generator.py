"""Generator files: rosinality's checkpoints, this project's safetensors, conversion, and what each refusal says."""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from indomain_guidance.guidance.files import (
    FileProblem,
    GeneratorMetadata,
    convert_generator,
    holds_generator,
    read_generator,
    read_metadata,
    rosinality,
    write_generator,
)
from indomain_guidance.guidance.files import generator as module
from indomain_guidance.guidance.networks.stylegan2 import random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig

GOLDEN = Path(__file__).parent / "golden"
CONFIG = GeneratorConfig(resolution=16, channels=(6, 5, 4), z_dim=7, w_dim=7, mapping_layers=3)


@pytest.fixture(scope="module")
def golden():
    tensors = safetensors.torch.load_file(GOLDEN / "rosinality.safetensors")
    weights = {key.removeprefix("g_ema."): value for key, value in tensors.items() if key.startswith("g_ema.")}
    return weights, {key: value for key, value in tensors.items() if not key.startswith("g_ema.")}


@pytest.fixture
def generator(streams):
    return streams.filled(CONFIG)


def same(first, second) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def problem(path, **more) -> str:
    with pytest.raises(FileProblem) as caught:
        read_generator(path, **more)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.endswith(".") and "\n" not in text and len(text) < 600, text
    return text


# ------------------------------------------------------------------------------------------------ rosinality's layout


def test_rosinalitys_weights_give_rosinalitys_images(golden, tmp_path, relative_error):
    weights, expected = golden
    options = argparse.Namespace(size=16, latent=6, path="images", lr=0.002)
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.002, "params": [0]}]}
    forms = {
        "nada.pt": {"g_ema": weights, "latent_avg": expected["latent_avg"]},
        "nada_row.pt": {"g_ema": weights, "latent_avg": expected["latent_avg"][None]},
        "trained.pt": {
            "g": {**weights, "conv1.activate.bias": torch.zeros(5)},
            "d": {},
            "g_ema": weights,
            "g_optim": optimizer,
            "args": options,
            "ada_aug_p": 0.25,
        },
        "alone.pt": weights,
    }
    for name, content in forms.items():
        for new in (True, False):
            path = tmp_path / name
            torch.save(content, path, _use_new_zipfile_serialization=new)
            assert holds_generator(path)
            loaded = read_generator(path)
            ws = loaded.generator.map(expected["z"])
            ws = torch.lerp(expected["latent_avg"].expand_as(ws), ws, 0.7)
            assert relative_error(loaded.generator.synthesize(ws), expected["images"]) < 1e-5, name
            assert loaded.generator.config.channels == (5, 5, 5) and loaded.generator.config.mapping_layers == 3
            centre = loaded.generator.mapping.w_avg
            assert relative_error(centre, expected["latent_avg"]) < (1e-6 if "nada" in name else 0.2)
            assert bool(loaded.notes) == ("nada" not in name)
            assert loaded.metadata.source_format == "rosinality checkpoint" and len(loaded.metadata.source_sha256) == 64
    torch.save({"g": weights, "latent_avg": expected["latent_avg"]}, tmp_path / "rough.pt")
    assert "no averaged generator" in read_generator(tmp_path / "rough.pt").notes[0]
    safetensors.torch.save_file({**weights, "latent_avg": expected["latent_avg"]}, tmp_path / "plain.safetensors")
    plain = read_generator(tmp_path / "plain.safetensors")
    assert same(plain.generator, read_generator(tmp_path / "nada.pt").generator)


def test_strengths_of_noise_without_its_constants(golden, tmp_path):
    """As rosinality's published 550000.pt has them: noise was drawn anew for every image."""
    weights, expected = golden
    path, bare = tmp_path / "a.pt", {key: value for key, value in weights.items() if not key.startswith("noises.")}
    torch.save({"g_ema": weights, "latent_avg": expected["latent_avg"]}, path)
    whole = read_generator(path).generator
    torch.save({"g_ema": bare, "latent_avg": expected["latent_avg"]}, path)
    loaded, again = read_generator(path), read_generator(path)
    assert same(loaded.generator, again.generator) and "no constant noise; it was drawn" in loaded.notes[0]
    state, wanted = loaded.generator.state_dict(), whole.state_dict()
    drawn = {key for key in wanted if not torch.equal(state[key], wanted[key])}
    assert state.keys() == wanted.keys() and drawn == {key for key in wanted if key.endswith(".noise_const")}
    values = torch.cat([state[key].flatten() for key in sorted(drawn)])
    assert abs(float(values.mean())) < 0.2 and abs(float(values.std()) - 1) < 0.2
    ws = whole.map(expected["z"])
    images = [one.synthesize(ws, "random", torch.Generator().manual_seed(1)) for one in (whole, loaded.generator)]
    assert torch.equal(*images)
    torch.save({"g_ema": {**bare, "convs.40.noise.weight": torch.ones(1)}}, path)
    assert "expected noise of at most the file's size" in problem(path)
    torch.save({"g_ema": {**bare, "noises.noise_0": weights["noises.noise_0"]}}, path)
    assert "missing synthesis.b16.conv0.noise_const" in problem(path)


def test_every_name_of_rosinality_has_its_place(golden):
    weights, _ = golden
    made = rosinality.to_nvidia(weights)
    with torch.device("meta"):
        wanted = set(random_generator(replace(CONFIG, channels=(5, 5, 5)), 0).state_dict()) - {"mapping.w_avg"}
    assert {key for key in made if not key.endswith(".resample_filter")} == wanted
    assert torch.equal(made["synthesis.b16.conv0.weight"], weights["convs.2.conv.weight"][0])
    assert torch.equal(made["synthesis.b16.conv0.noise_const"], weights["noises.noise_3"][0, 0])
    assert torch.equal(made["synthesis.b8.torgb.bias"], weights["to_rgbs.0.bias"].reshape(3))
    assert torch.equal(made["mapping.fc2.bias"], weights["style.3.bias"])


@pytest.mark.parametrize(
    "key",
    [
        "noises.3",
        "noises.noise_03",
        "noises.noise_3.weight",
        "convs.noise_3.noise.weight",
        "convs.03.noise.weight",
        "to_rgbs.00.bias",
        "style.noise_1.bias",
        "style.0.bias",
    ],
)
def test_every_place_has_one_name(golden, key, monkeypatch):
    weights, _ = golden
    with pytest.raises(ValueError, match="has no place"):
        rosinality.to_nvidia({**weights, key: torch.ones(1)})
    monkeypatch.setattr(rosinality, "_name", lambda key: "mapping.fc0.bias")
    with pytest.raises(ValueError, match="'style.2.bias' has the place of another, mapping.fc0.bias"):
        rosinality.to_nvidia({"style.1.bias": torch.ones(1), "style.2.bias": torch.ones(1)})


FULL = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ...\nTrace"


@pytest.mark.parametrize("fault", [MemoryError("no room"), OSError(5, "Input/output error"), RuntimeError(FULL)])
def test_a_computers_faults_are_file_problems(generator, tmp_path, monkeypatch, fault):
    def failing(*values, **more):
        raise fault

    path = write_generator(tmp_path / "a.safetensors", generator)
    monkeypatch.setattr(module.ModelFile, "tensors", failing)
    assert "could not be read" in problem(path)
    fault = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="of ours"):
        read_generator(path)


def test_a_mean_style_is_measured_on_plausible_networks_alone(streams, tmp_path):
    """A file of 132 kB could have one draw 330 million numbers, and take a square of its classes."""
    path = tmp_path / "a.safetensors"
    for more in ({"z_dim": 33_000, "mapping_layers": 1}, {"c_dim": 33_000, "embed_dim": 1}):
        generator = streams.filled(replace(CONFIG, **{"w_dim": 1, **more}))
        weights = generator.state_dict()
        safetensors.torch.save_file(weights, path)
        assert same(read_generator(path).generator, generator)
        safetensors.torch.save_file({key: one for key, one in weights.items() if key != "mapping.w_avg"}, path)
        assert re.search(r"at most 32768 features in all layers .* found 330\d\d", problem(path))


def test_filters_are_as_small_as_filters(generator, tmp_path):
    path, weights = tmp_path / "a.safetensors", generator.state_dict()
    config = CONFIG.to_dict() | {"resample_filter": [1.0] * 20_000}
    safetensors.torch.save_file(weights, path, GeneratorMetadata().to_strings(CONFIG) | {"config": json.dumps(config)})
    assert "at most 64 numbers with a sum" in problem(path)
    for shape in ((20_000,), (1, 20_000), (20_000, 1)):
        safetensors.torch.save_file({**weights, "synthesis.b8.conv0.resample_filter": torch.ones(shape)}, path)
        assert "conv0.resample_filter is no resampling filter of at most 64 taps" in problem(path)
        own = {"synthesis.b8.conv0.resample_filter": torch.ones(4), "synthesis.b8.resample_filter": torch.ones(shape)}
        safetensors.torch.save_file({**weights, **own}, path)
        assert re.search("b8.(conv0.)?resample_filter is (not the configuration's|no resampling filter)", problem(path))


def test_other_checkpoints_are_refused_by_what_they_are(golden, tmp_path):
    weights, _ = golden
    path = tmp_path / "a.pt"

    def with_(**changed):
        torch.save({"g_ema": {key: value for key, value in (weights | changed).items() if value is not None}}, path)
        return problem(path)

    key = {"convs.0.conv.weight": None}
    assert "missing synthesis.b8.conv0.weight" in with_(**key)
    assert "'convs.0.extra' has no place" in with_(**{"convs.0.extra": torch.ones(1)})
    assert "unexpected synthesis.b" in with_(**{"convs.77.conv.weight": weights["convs.0.conv.weight"]})
    odd = with_(**{"convs.0.conv.blur.kernel": torch.ones(4, 4) / 4})
    assert "is not the configuration's resample_filter [1.0, 1.0, 1.0, 1.0]" in odd
    assert "and the sum 16, where a square and 4 are" in with_(**{"convs.0.conv.blur.kernel": torch.ones(4, 4)})
    assert "no tensor" in with_(**{"conv1.activate.bias": "text"})
    assert "int64 in conv1.activate.bias" in with_(**{"conv1.activate.bias": torch.ones(5, dtype=torch.int64)})
    wrong = with_(**{"conv1.activate.bias": torch.ones(4)})
    assert "expected synthesis.b4.conv1.bias of the shape [5], found [4]" in wrong
    assert "dimensions are expected" in with_(**{"conv1.activate.bias": torch.ones(5, 2)})
    assert "NaN or infinity in 5" in with_(**{"conv1.activate.bias": torch.full((5,), float("nan"))})
    assert "tensors of 4000" in with_(**{"conv1.activate.bias": torch.ones(1).expand(10**9)})
    row = weights["conv1.activate.bias"]
    many = {f"convs.{n}.activate.bias": row.new_ones(50_000) for n in range(2)} | {"style.9.bias": row.new_ones(50_000)}
    shared = dict.fromkeys(many, many["style.9.bias"]) | {"style.8.bias": many["style.9.bias"].clone()[:1]}
    assert "claim" in with_(**shared)
    torch.save({"g_ema": weights, "latent_avg": torch.ones(2, 3, 6)}, path)
    assert "latent_avg has the shape [2, 3, 6]" in problem(path)
    torch.save({"state_dict": {"decoder.conv1.conv.weight": torch.ones(3)}, "opts": {}}, path)
    assert "found a file with tensors such as state_dict.decoder.conv1.conv.weight; choose" in problem(path)
    torch.save(torch.ones(3), path)
    assert "found a Tensor" in problem(path)


class Hostile:
    def __reduce__(self):
        return os.system, ("echo attacked",)


def test_checkpoints_run_nothing(golden, tmp_path, watched, capfd):
    weights, _ = golden
    path = tmp_path / "network.pkl"
    for new in (True, False):
        torch.save({"g_ema": weights}, path, _use_new_zipfile_serialization=new)
        read_generator(path)
        torch.save({"g_ema": weights, "args": Hostile()}, path, _use_new_zipfile_serialization=new)
        problem(path)
        with watched() as seen:
            text = problem(path)
        assert "cannot be read safely (the name posix.system, which" in text.replace("nt.system", "posix.system")
        assert [event for event, _ in seen if event in ("os.system", "exec", "pickle.find_class")] == []
    assert "attacked" not in capfd.readouterr().out


def test_checkpoints_cannot_ask_torch_for_memory(golden, tmp_path):
    """What torch's own list of names would make without a question: `weights_only` is no bound."""
    path, big = tmp_path / "a.pt", b"\x8a\x06" + (2**40).to_bytes(6, "little")
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + big + b"tQ"
    for code, reason in (
        (b"cbuiltins\nbytearray\n" + big + b"\x85R", "the name builtins.bytearray"),
        (b"c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0utf-8\x86R", "the codec 'utf-8'"),
        (b"ctorch\nTensor\n" + big + b"\x85R", "a call of torch.Tensor, which is not done"),
        (b"ccollections\nOrderedDict\n]\x85R", "OrderedDict with arguments"),
        (storage, "more than the"),
        (b"N" + b"0" * 9, "the pickle instruction POP"),
        (b"(" + b"N" * 1_000_001 + b"t", "more than 1000000 steps"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + code + b".")
            archive.writestr("a/version", "3")
        assert re.search(reason, problem(path))
        path.write_bytes(module._LEGACY_TORCH + b"\x80\x02M\xe9\x03.\x80\x02}.\x80\x02" + code + b".\x80\x02].")
        assert re.search(reason, problem(path))
    network = torch.nn.Linear(3, 3)
    content = {
        "g_ema": golden[0],
        "g": network.state_dict(),
        "ada_aug_p": torch.tensor(0.5),
        "args": argparse.Namespace(size=16, betas=[0.0, 0.99], path=None),
        "g_optim": torch.optim.Adam(network.parameters()).state_dict(),
        "more": (network.weight, torch.device("cpu"), torch.float16, network.weight[:, :1].half()),
    }
    for new in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        assert read_generator(path).generator.config.resolution == 16


def test_checkpoints_that_grow_or_break_are_refused(golden, tmp_path):
    weights, _ = golden
    whole, path = tmp_path / "whole.pt", tmp_path / "a.pt"
    torch.save({"g_ema": weights}, whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, bytes(10**6) if "/data/" in name else archive.read(name))
    assert "an archive of packed records" in problem(path)
    data = whole.read_bytes()
    for size in (5, 300, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:size])
        problem(path)
    path.write_bytes(data[: len(data) // 2].replace(b"conv1", b"conv9") + data[len(data) // 2 :])
    problem(path)


# ------------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"architecture": "resnet", "c_dim": 2, "conv_clamp": 256.0},
        {"use_noise": False, "mapping_lr_multiplier": 0.5},
    ],
    ids=str,
)
def test_round_trip_with_everything_the_file_knows(streams, tmp_path, more):
    generator = streams.filled(replace(CONFIG, **more))
    metadata = GeneratorMetadata(
        name="faces",
        licence="CC0-1.0",
        class_name="Generator",
        source_format="NVIDIA pickle",
        source_sha256="ab" * 32,
        source_code_sha256="cd" * 32,
        history=({"prompt": "a red d\u00eegit", "steps": 300, "parent": "caf\udce9"},),
        extra={"note": "mine"},
    )
    loaded = read_generator(write_generator(tmp_path / "g.safetensors", generator, metadata))
    assert same(loaded.generator, generator) and loaded.generator.config == generator.config
    assert loaded.metadata == metadata and loaded.notes == ()
    assert holds_generator(tmp_path / "g.safetensors")
    unnamed = write_generator(tmp_path / "other.safetensors", generator)
    assert read_generator(unnamed).metadata == GeneratorMetadata(name="other")
    assert read_metadata(unnamed)["modelspec.resolution"] == "16x16"


def test_number_formats(generator, tmp_path):
    for dtype, bound in (("fp16", 1e-3), ("bf16", 1e-2)):
        path = write_generator(tmp_path / f"{dtype}.safetensors", generator, dtype=dtype)
        loaded = read_generator(path).generator
        for key, value in loaded.state_dict().items():
            exact = generator.state_dict()[key]
            assert value.dtype == torch.float32
            assert float((value - exact).norm()) <= bound * float(exact.norm())
    with torch.no_grad():
        generator.mapping.fc0.weight[0, 0] = 1e5
    with pytest.raises(FileProblem, match="found 100000 in mapping.fc0.weight; write bf16 or fp32"):
        write_generator(tmp_path / "a.safetensors", generator, dtype="fp16")
    with torch.no_grad():
        generator.mapping.fc0.weight[0, 0] = float("nan")
    with pytest.raises(FileProblem, match="NaN or infinity"):
        write_generator(tmp_path / "a.safetensors", generator)
    with pytest.raises(FileProblem, match="ends in .safetensors"):
        write_generator(tmp_path / "a.pkl", generator)
    with pytest.raises(ValueError, match="fp32, fp16, bf16, found 'int8'"):
        write_generator(tmp_path / "a.safetensors", generator, dtype="int8")
    with pytest.raises(ValueError, match="'config' is a field of the format"):
        odd = GeneratorMetadata(extra={"config": "x"})
        write_generator(tmp_path / "a.safetensors", random_generator(CONFIG, 0), odd)
    assert sorted(os.listdir(tmp_path)) == ["bf16.safetensors", "fp16.safetensors"]


def test_safetensors_of_others_and_damaged_ones(generator, tmp_path):
    path, weights = tmp_path / "a.safetensors", generator.state_dict()
    safetensors.torch.save_file(weights, path)
    loaded = read_generator(path)
    assert same(loaded.generator, generator) and "says nothing of its architecture" in loaded.notes[0]
    own = GeneratorMetadata().to_strings(CONFIG)

    def write(tensors=weights, **changed):
        strings = {key: text for key, text in (own | changed).items() if text is not None}
        safetensors.torch.save_file(tensors, path, strings)
        return problem(path)

    assert "expected version 1 of the generator format, found '2'" in write(version="2")
    assert "in the metadata field config, found none" in write(config=None)
    assert "unknown fields size" in write(config=json.dumps(CONFIG.to_dict() | {"size": 3}))
    assert "cannot be read" in write(config="[" * 100_000)
    assert "expected a list of objects" in write(history='{"a": 1}')
    assert "found [6, 4, 4]" in write(config=json.dumps(CONFIG.to_dict() | {"channels": [9, 5, 4]}))
    assert "mapping layers" in write(config=json.dumps(CONFIG.to_dict() | {"mapping_layers": 10**9}))
    giant = {"resolution": 2**61, "channels": [4] * 60}
    assert "60 resolutions" in write(config=json.dumps(CONFIG.to_dict() | giant))
    assert "overflowed" in write(config=json.dumps(CONFIG.to_dict() | {"channels": [10**9, 5, 4]}))
    assert "missing synthesis.b4.const" in write({k: v for k, v in weights.items() if k != "synthesis.b4.const"})
    assert "unexpected other" in write({**weights, "other": torch.ones(1)})
    assert "int64 in mapping.w_avg" in write({**weights, "mapping.w_avg": torch.ones(7, dtype=torch.int64)})
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    assert "found a file with tensors such as a; choose" in problem(path) and not holds_generator(path)
    path.write_bytes(struct.pack("<Q", 10) + b"{")
    assert "truncated" in problem(path)


# -------------------------------------------------------------------------------------------------------- conversion


def test_conversion_is_one_way(tmp_path):
    source, target = tmp_path / "network.pkl", tmp_path / "network.safetensors"
    source.write_bytes((GOLDEN / "stylegan2_ada.pkl").read_bytes())
    direct = read_generator(source)
    assert convert_generator(source, target, name="cats") == target
    converted = read_generator(target)
    assert same(converted.generator, direct.generator) and converted.metadata.name == "cats"
    assert replace(converted.metadata, name=direct.metadata.name) == direct.metadata
    with pytest.raises(FileProblem, match="expected another file to write"):
        convert_generator(target, target)


def test_what_seems_to_be_a_generator(generator, golden, tmp_path):
    torch.save({"state_dict": {"model.diffusion_model.out.2.bias": torch.ones(3)}}, tmp_path / "sd.ckpt")
    torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "text").write_text("no model at all")
    assert not any(holds_generator(tmp_path / name) for name in ("sd.ckpt", "old.ckpt"))
    with pytest.raises(FileProblem, match="found text"):
        holds_generator(tmp_path / "text")
    with pytest.raises(FileProblem, match="found nothing"):
        holds_generator(tmp_path / "absent")
