"""`indomain adapt`, `resume` of an adaptation and `sample` of a generator, in this process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.files import read_generator, write_generator
from indomain_guidance.training.adaptation.config import AdaptConfig
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.settings import kinds_of
from PIL import Image


@pytest.fixture
def started(monkeypatch):
    """What `adapt` is asked for, without adapting: each call's configuration and keywords."""
    calls = []

    def adapt(config, **keywords):
        from indomain_guidance.training.engine.run import Result

        calls.append((config, keywords))
        return Result("dry_run", 0, None, config.run_folder)

    monkeypatch.setattr("indomain_guidance.training.command_line.runs.adapt", adapt)
    return calls


def other_value(one: dataclasses.Field, kind: type):
    """A valid value of a field that is not its default."""
    about = one.metadata
    if "choices" in about:
        return next(choice for choice in about["choices"] if choice != one.default)
    if kind is bool:
        return not one.default
    if kind in (int, float):
        return about["min"] if one.default != about["min"] else kind(min(about["max"], about["min"] + 64))
    return {"device": "cpu"}.get(one.name, "other")


def test_every_field_of_the_configuration_is_an_option(run, started):
    kinds = kinds_of(AdaptConfig)
    values = {one.name: other_value(one, kinds[one.name]) for one in dataclasses.fields(AdaptConfig)} | {"t_max": 900}
    wanted, options = AdaptConfig(**values), []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        options += [flag if value else flag.replace("--", "--no-", 1)] if isinstance(value, bool) else [flag, value]
    status, _, err = run("adapt", *options)
    assert status == 0, err
    found = started[0][0]
    for one in dataclasses.fields(AdaptConfig):
        own = getattr(found, one.name)
        if one.metadata["path"]:
            assert Path(own).is_absolute(), one.name
        else:
            assert own == getattr(wanted, one.name) != one.default, one.name


def test_settings_of_the_miniature_and_of_files(run, started, tmp_path):
    assert run("adapt", "--config", "mini_world", "-p", "a blue digit", "--steps", "3", "--dry-run")[0] == 0
    config, keywords = started[0]
    assert (config.generator, config.base, config.prompt) == ("mini_world", "mini_world", "a blue digit")
    assert config.steps == 3
    assert keywords["dry_run"] is True and keywords["resume"] == "auto"
    config.write_json(tmp_path / "c.json")
    assert run("adapt", "--config", tmp_path / "c.json", "--scale", "9", "--no-resume")[0] == 0
    assert (started[1][0].scale, started[1][0].prompt, started[1][1]["resume"]) == (9.0, "a blue digit", False)


def test_another_name_is_another_run_also_with_the_settings_of_one(run, started, tmp_path):
    settings = tmp_path / "mine" / "config.json"
    AdaptConfig(
        generator="g.pkl", base="mini_world", prompt="a cat", name="cat", output=str(settings.parent)
    ).write_json(settings)
    for options, folder in ((["-n", "dog", "-p", "a dog"], tmp_path / "dog"), (["--steps", "9"], settings.parent)):
        status, _, err = run("adapt", "--config", settings, *options)
        assert status == 0 and started[-1][0].output == str(folder), (options, err)


def test_resume_finds_out_what_kind_of_run_it_is(run, started, tmp_path):
    generator = tmp_path / "g.pkl"
    AdaptConfig(generator=generator, base="mini_world", prompt="a cat", name="cat", output="/elsewhere").write_json(
        tmp_path / "config.json"
    )
    status, _, err = run("resume", tmp_path)
    assert status == 2 and "found nothing at" in err and "say where it is with --generator" in err
    generator.touch()
    assert run("resume", tmp_path, "--steps", "8", "--prompt", "a dog")[0] == 0
    config, keywords = started[0]
    assert (config.name, config.output, config.steps, config.prompt) == ("cat", str(tmp_path), 8, "a dog")
    assert keywords["resume"] == "auto"  # nothing was saved yet
    status, _, err = run("resume", tmp_path, "--data", "x")  # of the other kind
    assert status == 2 and "'data' is no field" in err
    TrainConfig(base="mini_world", data=("/images",)).write_json(tmp_path / "config.json")
    status, _, err = run("resume", tmp_path, "--prompt", "a dog")
    assert status == 2 and "'prompt' is no field" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["-b", "mini_world", "-p", "x"], ["--generator"]),
        (["-g", "g.pkl", "-p", "x"], ["--base"]),
        (["-g", "g.pkl", "-b", "mini_world"], ["prompt", "expected a description"]),
        (["-g", "g.pkl", "-b", "mini_world", "-p", "x", "--method", "bridge"], ["source_prompt"]),
        (["-g", "g.pkl", "-b", "mini_world", "-p", "x", "--methot", "sds"], ["--methot", "--method"]),
    ],
)
def test_what_makes_no_sense_is_told(run, arguments, words):
    status, _, err = run("adapt", *arguments)
    assert status == 2 and all(word in err for word in words), err


def test_memory_that_runs_out_says_what_to_lower(run, monkeypatch):
    def adapt(config, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("indomain_guidance.training.command_line.runs.adapt", adapt)
    status, _, err = run("adapt", "-g", "g.pkl", "-b", "mini_world", "-p", "x")
    assert status == 1 and "smaller batch size" in err and "accumulation" not in err


def test_adapted_resumed_and_sampled(run, tiny_adaptation, tmp_path):
    source = tmp_path / "source.safetensors"
    write_generator(source, tiny_adaptation.tiny_generator())
    out = tmp_path / "run"
    common = [
        "-g",
        source,
        "-b",
        "mini_world",
        "-p",
        "a red digit on a yellow background",
        "-o",
        out,
        "-n",
        "red",
        "--device",
        "cpu",
        "--scale",
        "7.5",
        "--batch-size",
        "1",
        "--sample-every",
        "0",
    ]
    status, text, err = run("adapt", *common, "--steps", "1", "--json")
    assert status == 0, err
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines][:2] == ["started", "step"] and lines[-1]["status"] == "finished"
    assert "trains 16 of 42 tensors" in lines[0]["estimate"]
    status, text, err = run("resume", out, "--steps", "2")
    assert status == 0 and text.strip() == str(out / "red.safetensors") and "2/2" in err
    assert read_generator(out / "red.safetensors").metadata.history[0]["steps"] == 2

    status, text, err = run("sample", out, "-o", tmp_path / "pictures", "-c", "2", "--truncation", "0.5", "--json")
    assert status == 0, err
    pictures = [json.loads(line) for line in text.splitlines()]
    assert [(one["seed"], one["generator"], one["truncation"]) for one in pictures] == [
        (0, "red.safetensors", 0.5),
        (1, "red.safetensors", 0.5),
    ]
    with Image.open(pictures[0]["path"]) as image:
        assert image.size == (16, 16) and json.loads(image.text["indomain"])["seed"] == 0
    run("sample", out, "-o", tmp_path / "pictures", "-c", "1", "--truncation", "1")
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["red-0.png", "red-0_00002.png", "red-1.png"]  # none is replaced
    status, _, err = run("sample", source, "-p", "x")
    assert status == 2 and "expected none for an image generator" in err
