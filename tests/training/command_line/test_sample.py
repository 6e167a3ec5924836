"""Pictures of `sample`: files that say how they were made, and options that make none."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.files import read_lora, write_safetensors
from indomain_guidance.training.command_line.drawing import Artist, DrawingSettings
from indomain_guidance.training.domain import trainee as parts
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.domain.finished import write_low_rank
from indomain_guidance.training.mini_world.assets import domain_unets_dir
from indomain_guidance.training.prior.opening import open_mini_world
from PIL import Image

SHIPPED = domain_unets_dir() / "mini-handwriting.safetensors"


def test_sample_saves_pictures_that_say_how_they_were_made(run, tmp_path):
    options = ["--steps", 4, "--count", 2, "--prompt", "a red seven", "--prompt", "", "--output", tmp_path / "out"]
    status, out, err = run("sample", "mini-handwriting", *options, "--seed", 3, "--json")
    assert status == 0, err
    described = [json.loads(line) for line in out.splitlines()]
    assert [(one["prompt"], one["seed"]) for one in described] == [
        ("a red seven", 3),
        ("a red seven", 4),
        ("", 3),
        ("", 4),
    ]
    assert [Path(one["path"]).name for one in described][0] == "01-a-red-seven-3.png"
    assert described[0]["samples_per_step"] == 3 and described[2]["samples_per_step"] == 2
    for one in described:
        with Image.open(one["path"]) as image:
            assert image.size == (64, 64)
            assert json.loads(image.text["indomain"]) == {key: value for key, value in one.items() if key != "path"}
    # The second picture alone is the same one.
    status, out, _ = run(
        "sample",
        SHIPPED,
        *options[:2],
        "--count",
        1,
        "--seed",
        4,
        "--prompt",
        "a red seven",
        "--output",
        tmp_path / "alone",
    )
    assert status == 0
    with Image.open(out.strip()) as one, Image.open(described[1]["path"]) as other:
        difference = [abs(a - b) for a, b in zip(one.tobytes(), other.tobytes())]
    assert max(difference) <= 2  # rounding of another batch size


@pytest.mark.parametrize(
    "option, value",
    [
        ("--seed", "9" * 30),
        ("--seed", "-1"),
        ("--steps", "0"),
        ("--width", "8"),
        ("--width", "100000000000"),
        ("--height", "0"),
        ("--batch-size", "0"),
        ("--count", "0"),
        ("--count", "9" * 5000),
        ("--device", "gpu"),
        ("--width", "x"),
    ],
)
def test_numbers_and_devices_that_make_no_picture_are_wrong_usage(run, tmp_path, monkeypatch, option, value):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("sample", "mini-handwriting", option, value, "--quiet")
    assert status == 2 and out == "" and option.strip("-") in err and "expected" in err and len(err) < 500
    assert os.listdir(tmp_path) == []


def test_sample_never_replaces_a_picture(run, tmp_path):
    """The same prompt and seed with other weights, as one looks for them: numbered as ComfyUI's SaveImage does."""
    (tmp_path / "01-a-red-seven-0_00004.png").write_bytes(b"of long ago")
    names = []
    for weight in (1, 2, 3):
        status, out, err = run(
            "sample",
            "mini-handwriting",
            "-p",
            "a red seven",
            "--domain-weight",
            weight,
            "--steps",
            1,
            "--count",
            1,
            "-o",
            tmp_path,
            "--json",
        )
        about = json.loads(out)
        names.append(Path(about["path"]).name)
        with Image.open(about["path"]) as image:
            assert json.loads(image.text["indomain"])["domain_weight"] == weight
    assert names == [f"01-a-red-seven-0_0000{number}.png" for number in (5, 6, 7)]
    assert len(list(tmp_path.iterdir())) == 4


def test_sample_needs_the_right_base(run, tmp_path):
    status, _, err = run("sample", tmp_path / "missing.safetensors")
    assert status == 1 and "missing.safetensors" in err
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    status, _, err = run("sample", run_folder)
    assert status == 1 and "config.json" in err
    TrainConfig(base="mini_world", name="mine").write_json(run_folder / "config.json")
    status, _, err = run("sample", run_folder)
    assert status == 1 and "indomain resume" in err
    shutil.copy(SHIPPED, run_folder / "mine.safetensors")
    status, out, err = run("sample", run_folder, "--steps", 1, "--count", 1, "--output", tmp_path / "pictures")
    assert status == 0 and Path(out.strip()).is_file(), err


@pytest.fixture(scope="module")
def mini_world():
    return open_mini_world()


@pytest.fixture
def lora(mini_world, tmp_path):
    """(the file of a LoRA for the mini world, the weights with it in them)."""
    trainee = parts.start_model(mini_world, "full", "low_rank", additions={"rank": 2, "layers": "blocks"})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainee.named_trainable().items():
            if name.endswith("lora_up"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    path = write_low_rank(tmp_path / "lora.safetensors", trainee, mini_world, file_dtype="fp32")
    return path, trainee.weights()


def pictures(run, *options) -> list[tuple[dict, bytes]]:
    """What `sample` made of these options: each picture's description and pixels."""
    status, out, err = run("sample", *options, "--count", 1, "--steps", 3, "--json")
    assert status == 0, err
    described = [json.loads(line) for line in out.splitlines()]
    made = []
    for one in described:
        with Image.open(one.pop("path")) as image:
            assert json.loads(image.text["indomain"]) == one
            made.append((one, image.tobytes()))
    return made


def as_bytes(drawn) -> bytes:
    return ((drawn.pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy().tobytes()


def apart(one: bytes, other: bytes) -> int:
    return max(abs(a - b) for a, b in zip(one, other))


def test_a_lora_is_drawn_with_as_the_prior_with_it_in_its_weights(run, mini_world, lora, tmp_path):
    file, merged = lora
    options = ("-p", "a red seven", "--control-weight", 4, "--output", tmp_path / "out")
    ((about, pixels),) = pictures(run, file, *options)
    assert (about["lora"], about["base"], about["strength"]) == ("lora.safetensors", "the mini world", 1.0)
    assert about["samples_per_step"] == 2 and "domain_weight" not in about and "domain" not in about
    artist = Artist(replace(mini_world, unet=merged))
    settings = DrawingSettings(control_weight=4, steps=3, width=64, height=64)
    (drawn,) = artist.draw(["a red seven"], [0], settings)
    assert apart(pixels, as_bytes(drawn)) <= 1
    ((_, none),) = pictures(run, file, *options, "--strength", 0)
    (drawn,) = Artist(mini_world).draw(["a red seven"], [0], settings)
    assert apart(none, as_bytes(drawn)) <= 1 and apart(none, pixels) > 20


@pytest.mark.parametrize(
    "model, option, sentence",
    [
        ("lora", "--domain-weight", "domain_weight: expected none with a LoRA, which has --strength; leave it out."),
        ("lora", "--domain-end", "domain_end: expected none with a LoRA"),
        ("lora", "--strength=nan", "strength: expected"),
        ("mini-handwriting", "--strength", "strength: expected none with a domain model, which has --domain-weight"),
    ],
)
def test_options_of_the_other_kind_are_wrong_usage(run, lora, tmp_path, model, option, sentence):
    options = [option] if "=" in option else [option, 1]
    status, out, err = run("sample", lora[0] if model == "lora" else model, *options, "-o", tmp_path / "out")
    assert status == 2 and out == "" and sentence in err and not (tmp_path / "out").exists()


def test_a_lora_needs_its_base_unless_it_says_the_mini_world(run, lora, mini_world, tmp_path, tiny_checkpoint):
    file, _ = lora
    tensors, metadata = read_lora(file)
    other = write_safetensors(tmp_path / "other.safetensors", tensors, {**metadata, "prior_hash": "ab" * 32})
    options = ("-o", tmp_path / "out", "--steps", 1, "--count", 1)
    status, _, err = run("sample", other, *options)
    assert status == 2 and "expected --base FILE, the checkpoint that other.safetensors was made from" in err
    text = {"lora_te_text_model_a.lora_down.weight": torch.ones(1, 4)}
    both = write_safetensors(tmp_path / "both.safetensors", {**tensors, **text}, {"prior_hash": "ab" * 32})
    status, _, err = run("sample", both, "--base", "mini_world", *options)
    assert status == 0 and "both.safetensors was made from another prior than the mini world" in err
    assert "both.safetensors changes text encoders too" in err
    plain = write_safetensors(tmp_path / "plain.safetensors", tensors)
    status, _, err = run("sample", plain, "--base", "mini_world", *options)
    assert status == 0 and "another prior" not in err and "text encoders" not in err
    status, out, err = run("sample", plain, "--base", tiny_checkpoint("sd1").path, *options)
    assert (
        status == 1 and out == "" and "plain.safetensors: expected " in err and "use a LoRA of the model's own" in err
    )


def test_the_folder_of_a_run_that_made_a_lora_names_its_base(run, lora, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    TrainConfig(base="mini_world", name="mine", form="full", train="low_rank").write_json(folder / "config.json")
    tensors, _ = read_lora(lora[0])
    write_safetensors(folder / "mine.safetensors", tensors)
    ((about, _),) = pictures(run, folder, "-o", tmp_path / "out")
    assert (about["lora"], about["base"]) == ("mine.safetensors", "the mini world")
