"""Settings from options and files, and the run that they start or go on with; without training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.settings import kinds_of


def other_value(one: dataclasses.Field):
    """A valid value of a field that is not its default."""
    kind, about = kinds_of(TrainConfig)[one.name], one.metadata
    if "choices" in about:
        return next(choice for choice in about["choices"] if choice != one.default)
    if kind is bool:
        return not one.default
    if kind in (int, float):
        return (
            kind(about["min"] + 64)
            if one.default != about["min"] + 64 and about["min"] + 64 <= about["max"]
            else (about["min"] if one.default != about["min"] else about["max"])
        )
    return ("one", "two words") if kind is tuple else {"device": "cpu"}.get(one.name, "other")


def as_options(values: dict) -> list[str]:
    options = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            options.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            options += [flag, *value] if isinstance(value, tuple) else [flag, str(value)]
    return options


def test_every_field_of_the_configuration_is_an_option(run, started):
    values = {one.name: other_value(one) for one in dataclasses.fields(TrainConfig)}
    values |= {"form": "full", "resolution": 128, "bucket_step": 8}  # combinations that make sense
    wanted = TrainConfig(**values)
    assert all(getattr(wanted, one.name) != one.default for one in dataclasses.fields(TrainConfig))
    status, _, err = run("train", *as_options(values))
    assert status == 0, err
    found = started[0][0]
    for one in dataclasses.fields(TrainConfig):
        if one.metadata["path"]:
            value = getattr(found, one.name)
            paths = value if isinstance(value, tuple) else (value,)
            assert all(Path(path).is_absolute() for path in paths), one.name
        else:
            assert getattr(found, one.name) == getattr(wanted, one.name), one.name


def test_options_that_are_not_given_keep_the_defaults(run, started):
    assert run("train", "-b", "mini_world", "-d", "x")[0] == 0
    config, keywords = started[0]
    assert config.base == "mini_world" and keywords["resume"] == "auto" and keywords["dry_run"] is False
    changed = [
        one.name
        for one in dataclasses.fields(config)
        if not one.metadata["path"] and getattr(config, one.name) != one.default
    ]
    assert changed == [] and config.output == str(Path("runs/domain").absolute())


def test_file_and_options_together_and_options_come_first(run, started, tmp_path):
    settings = tmp_path / "run.json"
    settings.write_text(json.dumps({"base": "mini_world", "data": ["a"], "steps": 7, "flip": True}), encoding="utf-8")
    assert run("train", "--config", settings, "--steps", "9", "--no-flip", "--dry-run", "--resume")[0] == 0
    config, keywords = started[0]
    assert (config.steps, config.flip, config.data) == (9, False, (str(Path("a").absolute()),))
    assert keywords["dry_run"] is True and keywords["resume"] is True


def test_another_name_is_another_run_also_with_the_settings_of_one(run, started, tmp_path):
    settings = tmp_path / "runs" / "porcelain" / "config.json"
    TrainConfig(base="mini_world", data=("/images",), name="porcelain", output=str(settings.parent)).write_json(
        settings
    )
    for options, folder in (
        (["-n", "teapots", "-d", "/teapots"], tmp_path / "runs" / "teapots"),
        (["-n", "teapots", "-o", tmp_path / "here"], tmp_path / "here"),
        (["-n", "porcelain"], settings.parent),
        (["-d", "/teapots"], settings.parent),
    ):
        status, _, err = run("train", "--config", settings, *options, "--dry-run")
        assert status == 0 and started[-1][0].output == str(folder), (options, err)
    settings.write_text('{"base": "mini_world", "data": ["/images"]}', encoding="utf-8")
    assert run("train", "--config", settings, "-n", "teapots")[0] == 0
    assert started[-1][0].output == str(Path("runs/teapots").absolute())


def test_an_empty_path_is_no_folder(run, started):
    """What an unset variable of a script leaves; it would be the folder that one is in."""
    for command in (["train", "-b", "mini_world", "-d", ""], ["check-data", ""], ["check-data", "x", ""]):
        status, _, err = run(*command)
        assert status == 2 and "data: expected paths, found an empty one" in err, command
    assert started == []


def test_home_is_found_in_every_path_and_only_a_base_can_be_the_mini_world(run, started, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run("train", "-b", "mini_world", "-d", "mini_world", "~/more", "--cache=~/latents", "--output=~/run")[0] == 0
    config = started[0][0]
    assert config.base == "mini_world" and config.data == (str(tmp_path / "mini_world"), str(tmp_path / "more"))
    assert (config.cache, config.output) == (str(tmp_path / "latents"), str(tmp_path / "run"))
    assert run("mini-data", "~/digits", "--count", 2)[0] == 0
    assert run("sample", "mini-handwriting", "-p", "a red seven", "-c", 1, "--steps", 1, "--output=~/drawn")[0] == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == ["digits", "drawn"]


@pytest.mark.parametrize("options", [["--sample-prompts", "a cat"], ["--form", "full", "--caption", "a cat"]])
def test_prompts_and_captions_find_comfyuis_tokenizer(run, started, monkeypatch, options):
    monkeypatch.setattr("indomain_guidance.training.command_line.runs.comfyui_tokenizer", lambda: "/comfyui/tokenizer")
    for more in ([], options):
        assert run("train", "-b", "mini_world", "-d", "x", *more)[0] == 0
    assert [config.tokenizer for config, _ in started] == ["", "/comfyui/tokenizer"]


def test_resume_reads_the_runs_settings_and_takes_its_own_folder(run, started, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    TrainConfig(base="mini_world", data=("/images",), name="porcelain", output="/elsewhere", steps=5).write_json(
        moved / "config.json"
    )
    assert run("resume", moved, "--steps", "8")[0] == 0
    config, keywords = started[0]
    # Stopped before anything was saved, it begins.
    assert (config.name, config.output, config.steps) == ("porcelain", str(moved), 8) and keywords["resume"] == "auto"
    status, _, err = run("resume", moved, "--learning-rate", "1")  # would change what is learned
    assert status == 2 and "--learning-rate" in err
    status, _, err = run("resume", tmp_path)
    assert status == 2 and "config.json" in err


def test_resume_says_which_file_of_a_run_was_moved(run, started, tmp_path):
    base = tmp_path / "sd15.safetensors"
    TrainConfig(base=str(base), data=("/images",), name="porcelain").write_json(tmp_path / "config.json")
    status, _, err = run("resume", tmp_path)
    assert status == 2 and f"base: expected the file that the run began with, found nothing at {base}" in err
    assert "say where it is with --base" in err and not started
    (tmp_path / "moved.safetensors").touch()
    assert run("resume", tmp_path, "--base", tmp_path / "moved.safetensors")[0] == 0
    base.symlink_to(tmp_path / "gone")
    assert run("resume", tmp_path)[0] == 2


@pytest.mark.parametrize("left", ["checkpoints/step-000250.ckpt", "porcelain.safetensors", "log.jsonl"])
def test_resume_never_begins_a_run_anew_that_had_saved_something(run, started, tmp_path, left):
    TrainConfig(base="mini_world", data=("/images",), name="porcelain").write_json(tmp_path / "config.json")
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text(json.dumps({"event": "saved", "step": 250, "path": "x"}) + "\n", encoding="utf-8")
    assert run("resume", tmp_path)[0] == 0 and started[0][1]["resume"] is True


def test_a_run_from_connected_models_says_what_it_needs(run, tmp_path):
    TrainConfig(base="connected: SD15", data=(str(tmp_path),), name="porcelain").write_json(tmp_path / "config.json")
    settings = ["--config", tmp_path / "config.json", "-o", tmp_path / "run", "--dry-run"]
    status, _, err = run("train", *settings)
    assert status == 2 and "--base FILE" in err and "'connected: SD15'" in err


def test_unknown_field_in_a_file_is_named_with_the_nearest(run, tmp_path):
    settings = tmp_path / "run.toml"
    settings.write_text('base = "mini_world"\ndata = ["x"]\nbatchsize = 3\n', encoding="utf-8")
    status, _, err = run("train", "--config", settings)
    assert status == 2 and "batchsize" in err and "batch_size" in err and "run.toml" in err


def test_full_memory_is_one_sentence_with_advice_and_bugs_are_shown(run, monkeypatch):
    def train(*_, **__):
        raise problem

    monkeypatch.setattr("indomain_guidance.training.command_line.runs.train", train)
    problem = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    status, _, err = run("train", "-b", "mini_world", "-d", "x")
    assert status == 1 and "gradient checkpointing" in err and "Traceback" not in err
    try:
        torch.empty(2**60)  # the CPU's allocator has no exception of its own
    except RuntimeError as refused:
        problem = refused
    status, _, err = run("train", "-b", "mini_world", "-d", "x")
    assert status == 1 and "gradient checkpointing" in err and "Traceback" not in err
    problem = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        run("train", "-b", "mini_world", "-d", "x")
