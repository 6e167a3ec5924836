"""Pictures of `sample`: files that say how they were made, and options that make none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.mini_world.assets import domain_unets_dir
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
