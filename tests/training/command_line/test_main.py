"""The command line in this process: options, help, files, exit statuses. Whole runs: test_runs.py."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.files import read_domain_file
from indomain_guidance.training.command_line import console
from indomain_guidance.training.command_line import main as command_line
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.checkpoints import checkpoint_path, save_checkpoint
from indomain_guidance.training.engine.run import Result
from indomain_guidance.training.engine.settings import kinds_of
from indomain_guidance.training.mini_world.assets import domain_unets_dir
from PIL import Image

SHIPPED = domain_unets_dir() / "mini-handwriting.safetensors"


def run(*arguments: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of one command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = command_line.main([str(part) for part in arguments])
        except SystemExit as ending:
            status = ending.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def started(monkeypatch):
    """What `train` is asked for, without training: the last call's configuration and keywords."""
    calls = []

    def train(config, **keywords):
        from indomain_guidance.training.domain.train import Result

        calls.append((config, keywords))
        return Result("dry_run", 0, None, config.run_folder)

    monkeypatch.setattr("indomain_guidance.training.domain.train.train", train)
    return calls


# ------------------------------------------------------------------------------------------------------------- options


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


def test_every_field_of_the_configuration_is_an_option(started):
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


def test_options_that_are_not_given_keep_the_defaults(started):
    assert run("train", "-b", "mini_world", "-d", "x")[0] == 0
    config, keywords = started[0]
    assert config.base == "mini_world" and keywords["resume"] == "auto" and keywords["dry_run"] is False
    changed = [
        one.name
        for one in dataclasses.fields(config)
        if not one.metadata["path"] and getattr(config, one.name) != one.default
    ]
    assert changed == [] and config.output == str(Path("runs/domain").absolute())


def test_file_and_options_together_and_options_come_first(started, tmp_path):
    settings = tmp_path / "run.json"
    settings.write_text(json.dumps({"base": "mini_world", "data": ["a"], "steps": 7, "flip": True}), encoding="utf-8")
    assert run("train", "--config", settings, "--steps", "9", "--no-flip", "--dry-run", "--resume")[0] == 0
    config, keywords = started[0]
    assert (config.steps, config.flip, config.data) == (9, False, (str(Path("a").absolute()),))
    assert keywords["dry_run"] is True and keywords["resume"] is True


def test_another_name_is_another_run_also_with_the_settings_of_one(started, tmp_path):
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


def test_an_empty_path_is_no_folder(started):
    """What an unset variable of a script leaves; it would be the folder that one is in."""
    for command in (["train", "-b", "mini_world", "-d", ""], ["check-data", ""], ["check-data", "x", ""]):
        status, _, err = run(*command)
        assert status == 2 and "data: expected paths, found an empty one" in err, command
    assert started == []


def test_home_is_found_in_every_path_and_only_a_base_can_be_the_mini_world(started, tmp_path, monkeypatch):
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
def test_prompts_and_captions_find_comfyuis_tokenizer(started, monkeypatch, options):
    monkeypatch.setattr(
        "indomain_guidance.training.command_line.sample.comfyui_tokenizer", lambda: "/comfyui/tokenizer"
    )
    for more in ([], options):
        assert run("train", "-b", "mini_world", "-d", "x", *more)[0] == 0
    assert [config.tokenizer for config, _ in started] == ["", "/comfyui/tokenizer"]


def test_resume_reads_the_runs_settings_and_takes_its_own_folder(started, tmp_path):
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


def test_resume_says_which_file_of_a_run_was_moved(started, tmp_path):
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
def test_resume_never_begins_a_run_anew_that_had_saved_something(started, tmp_path, left):
    TrainConfig(base="mini_world", data=("/images",), name="porcelain").write_json(tmp_path / "config.json")
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text(json.dumps({"event": "saved", "step": 250, "path": "x"}) + "\n", encoding="utf-8")
    assert run("resume", tmp_path)[0] == 0 and started[0][1]["resume"] is True


def test_a_run_from_connected_models_says_what_it_needs(tmp_path):
    TrainConfig(base="connected: SD15", data=(str(tmp_path),), name="porcelain").write_json(tmp_path / "config.json")
    settings = ["--config", tmp_path / "config.json", "-o", tmp_path / "run", "--dry-run"]
    status, _, err = run("train", *settings)
    assert status == 2 and "--base FILE" in err and "'connected: SD15'" in err


@pytest.mark.parametrize(
    "folder, windows, expected",
    [
        ("/runs/first", False, "indomain resume /runs/first"),
        ("/my runs/first", False, "indomain resume '/my runs/first'"),
        (r"C:\Users\me\runs\first", True, r"indomain resume C:\Users\me\runs\first"),
        (r"C:\my runs\first", True, r'indomain resume "C:\my runs\first"'),
    ],
)
def test_the_command_to_go_on_with_can_be_pasted(folder, windows, expected):
    assert console.pasted(["indomain", "resume", folder], windows) == expected


@pytest.mark.parametrize(
    "around, expected",
    [
        ({}, "go on with: indomain resume "),
        ({"INDOMAIN_COMMAND": "python run.py indomain"}, "go on with: python run.py indomain resume "),
        ({"WORLD_SIZE": "2"}, "go on with the same command"),
    ],
)
def test_advice_is_a_command_as_the_user_calls_it(monkeypatch, tmp_path, around, expected):
    for name in ("INDOMAIN_COMMAND", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    errors = io.StringIO()
    console.Console(errors=errors).result(Result("stopped", 3, None, tmp_path))
    assert errors.getvalue().startswith(expected)
    TrainConfig(base="mini_world", name="mine").write_json(tmp_path / "config.json")
    called = around.get("INDOMAIN_COMMAND", "indomain")
    assert f"{called} resume {tmp_path}" in run("sample", tmp_path)[2]
    assert f"help: {called} train --help" in run("train", "--nonsense")[2]


@pytest.mark.parametrize("start", [[""], ["training/bootstrap.py", "indomain_guidance"]])
def test_a_checkout_knows_what_it_is_called(start):
    """What its advice says is what was typed before the command."""
    place, *more = start
    command = [sys.executable, str(Path(command_line.__file__).parents[2] / place), *more]
    environ = {key: value for key, value in os.environ.items() if key != "INDOMAIN_COMMAND"}
    done = subprocess.run([*command, "sample", "--nonsense"], capture_output=True, text=True, env=environ)
    assert f"help: {console.pasted(command)} sample --help" in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "-d", "x"], ["--base"]),
        (["train", "-b", "mini_world"], ["--data"]),
        (["train", "-b", "mini_world", "-d", "x", "--lerning-rate", "1"], ["--lerning-rate", "--learning-rate"]),
        (["train", "-b", "mini_world", "-d", "x", "--batch_size", "1"], ["--batch-size"]),
        (["train", "-b", "mini_world", "-d", "x", "--batch-size", "0"], ["batch_size", "0"]),
        (["train", "-b", "mini_world", "-d", "x", "--steps", "many"], ["--steps", "many"]),
        (["train", "-b", "mini_world", "-d", "x", "--form", "cashed"], ["cashed", "cached"]),
        (["train", "--config", "missing.toml"], ["missing.toml"]),
        (["train", "-b", "mini_world", "-d", "x", "--device", "toaster"], ["toaster"]),
        (["sample", str(SHIPPED), "--count", "0"], ["count"]),
        (["trian"], ["trian"]),
        ([], ["COMMAND"]),
    ],
)
def test_wrong_usage_is_status_2_and_one_sentence(arguments, words):
    status, out, err = run(*arguments)
    assert status == 2 and out == ""
    assert all(word in err for word in words), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", SHIPPED, "-o", "{}"],
        ["sample", SHIPPED, "-p", "{}"],
        ["sample", SHIPPED, "--negative", "{}"],
        ["convert", SHIPPED, "{}"],
        ["convert", SHIPPED, "x", "--name", "{}"],
        ["mini-data", "{}"],
        ["inspect", "{}"],
        ["resume", "{}"],
        ["check-data", "{}"],
        ["train", "--config", "{}"],
    ],
)
def test_halves_of_characters_are_wrong_usage_in_every_option(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*(str(one).replace("{}", "a\ud800") for one in arguments))
    assert (status, out) == (2, "") and "found 'a\\ud800', wh" in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="elsewhere such paths lead somewhere")
@pytest.mark.parametrize("path", ["C:\\pictures", '"D:/a b"', "\\\\server\\share", "\\\\?\\C:\\x", "file:///C:/x"])
def test_paths_of_windows_make_no_folders_of_such_names(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["sample", SHIPPED, "-o"], ["convert", SHIPPED], ["mini-data"], ["inspect"], ["check-data"]):
        status, out, err = run(*arguments, path)
        assert (status, out) == (2, "") and "expected a path of this system, found one of Windows" in err, err
    assert not list(tmp_path.iterdir())


def test_a_terminal_sees_no_commands_that_a_file_holds(tmp_path):
    status, _, err = run("convert", SHIPPED, tmp_path / "a.safetensors", "--name", "\x1b[31mred")
    assert status == 0, err
    status, out, _ = run("inspect", tmp_path / "a.safetensors")
    assert status == 0 and "\x1b" not in out and "\\x1b[31mred" in out and len(out.splitlines()) > 5
    run("convert", SHIPPED, tmp_path / "b.safetensors", "--name", "x" * 100_000)
    assert max(map(len, run("inspect", tmp_path / "b.safetensors")[1].splitlines())) < 11_000


def test_unknown_field_in_a_file_is_named_with_the_nearest(tmp_path):
    settings = tmp_path / "run.toml"
    settings.write_text('base = "mini_world"\ndata = ["x"]\nbatchsize = 3\n', encoding="utf-8")
    status, _, err = run("train", "--config", settings)
    assert status == 2 and "batchsize" in err and "batch_size" in err and "run.toml" in err


def test_help_tells_every_field_its_default_and_the_exit_statuses():
    status, text, _ = run("train", "--help")
    assert status == 0
    flat = re.sub(r"\s+", "", text)  # lines also end after hyphens
    for one in dataclasses.fields(TrainConfig):
        assert f"--{one.name.replace('_', '-')}" in text, one.name
        assert re.sub(r"\s+", "", one.metadata["help"]) in flat, one.name
    assert "default2000" in flat and "130" in flat and "143" in flat
    status, text, _ = run("--help")
    assert status == 0
    for command in ("train", "resume", "check-data", "convert", "inspect", "sample", "mini-data"):
        assert re.search(rf"\n +{command}\s", text)
        assert run(command, "--help")[0] == 0


def test_full_memory_is_one_sentence_with_advice_and_bugs_are_shown(monkeypatch):
    def train(*_, **__):
        raise problem

    monkeypatch.setattr("indomain_guidance.training.domain.train.train", train)
    problem = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    status, _, err = run("train", "-b", "mini_world", "-d", "x")
    assert status == 1 and "--gradient-checkpointing" in err and "Traceback" not in err
    try:
        torch.empty(2**60)  # the CPU's allocator has no exception of its own
    except RuntimeError as refused:
        problem = refused
    status, _, err = run("train", "-b", "mini_world", "-d", "x")
    assert status == 1 and "--gradient-checkpointing" in err and "Traceback" not in err
    problem = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        run("train", "-b", "mini_world", "-d", "x")


# --------------------------------------------------------------------------------------------------- data and files


def test_check_data_reports_and_its_status_says_whether_all_is_well(tmp_path):
    folder = tmp_path / "images"
    status, out, _ = run("mini-data", folder, "--count", 6, "--json")
    assert status == 0 and json.loads(out) == {"folder": str(folder), "count": 6}
    status, out, _ = run("check-data", folder, "--resolution", 64, "--json")
    report = json.loads(out)
    assert status == 0 and (report["total"], report["ok"], report["bad"]) == (6, 6, 0)
    (folder / "torn.png").write_bytes((folder / "handwriting-0000.png").read_bytes()[:-40])
    status, out, _ = run("check-data", folder, "--resolution", 64)
    assert status == 1 and "torn.png" in out and "6 can be used, 1 cannot" in out
    (folder / "torn.png").unlink()
    shard = tmp_path / "images.tar"
    with tarfile.open(shard, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    assert run("check-data", shard, "--resolution", 64)[0] == 0
    with tarfile.open(shard) as archive:
        second = archive.getmembers()[1].offset
    shard.write_bytes(shard.read_bytes()[:second])
    status, out, _ = run("check-data", shard, "--resolution", 64)
    assert status == 1 and "1 can be used, 0 cannot" in out and "may be missing" in out
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("check-data", empty)[0] == 1
    status, _, err = run("check-data", tmp_path / "missing")
    assert status == 1 and "missing" in err


@pytest.mark.parametrize(
    "encoding, name, shown",
    [
        ("cp1252", "\u78c1\u5668.png", "\\u78c1\\u5668.png"),
        ("utf-8", "caf\udce9.png", "caf\\udce9.png"),
        ("utf-8", "\u78c1\u5668.png", "\u78c1\u5668.png"),
    ],
)
def test_names_that_the_output_cannot_hold_end_no_command(monkeypatch, tmp_path, encoding, name, shown):
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    try:
        (tmp_path / name).write_bytes(b"torn")
    except OSError:
        pytest.skip("this file system takes no such name")
    redirected = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", redirected)
    assert command_line.main(["check-data", str(tmp_path), "--quiet"]) == 1
    redirected.seek(0)
    assert f"  {shown}: is " in redirected.read()


def test_inspect_tells_what_the_file_says(tmp_path):
    status, out, _ = run("inspect", SHIPPED, "--json")
    about = json.loads(out)
    assert status == 0 and about["kind"] == "domain model" and about["form"] == "cached" and about["steps"] == 700
    assert about["file"]["parameters"] == sum(tensor.numel() for tensor in read_domain_file(SHIPPED)[0].values())
    status, out, _ = run("inspect", SHIPPED)
    assert status == 0 and "mini-handwriting" in out and "700" in out
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(SHIPPED.read_bytes()[:1000])
    status, out, err = run("inspect", broken)
    assert status == 1 and out == "" and "broken.safetensors" in err and "Traceback" not in err


def test_inspect_takes_every_name_that_sample_convert_and_resume_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = {"mini-handwriting": "domain model", "mini_world": "generator", str(SHIPPED): "domain model"}
    for name, kind in kinds.items():
        status, out, err = run("inspect", name, "--json")
        assert status == 0 and json.loads(out)["kind"] == kind, err
    folder = tmp_path / "run"
    folder.mkdir()
    TrainConfig(base="mini_world", name="mine").write_json(folder / "config.json")
    status, _, err = run("inspect", folder)
    assert status == 1 and "mine.safetensors: expected the run's finished domain model, found none; go on with" in err
    state = {
        "step": 3,
        "config": {"name": "mine"},
        "prior": "p",
        "dataset": {},
        "facts": {},
        "optimizer": {},
        "scaler": None,
        "weights": {"a": torch.ones(2)},
        "average": None,
    }
    save_checkpoint(checkpoint_path(folder, 3), state)
    status, out, _ = run("inspect", folder, "--json")
    assert status == 0 and (json.loads(out)["kind"], json.loads(out)["step"]) == ("training checkpoint", 3)
    shutil.copyfile(SHIPPED, folder / "mine.safetensors")
    status, out, _ = run("inspect", folder, "--json")
    assert status == 0 and json.loads(out)["file"]["path"] == str(folder / "mine.safetensors")
    for source in ("mini-handwriting", folder, f"'{folder}'", folder.as_uri()):
        target = tmp_path / "wide.safetensors"
        status, out, err = run("convert", source, target, "--file-dtype", "fp32", "--overwrite")
        assert status == 0 and read_domain_file(target)[1].steps == 700, err
    (tmp_path / "empty").mkdir()
    status, _, err = run("inspect", tmp_path / "empty")
    assert status == 1 and "expected a model's file or a run's folder, found no config.json in it" in err
    (tmp_path / "link.safetensors").symlink_to("gone")
    status, _, err = run("inspect", tmp_path / "link.safetensors")
    assert status == 1 and "found a link to gone, where no file is" in err


def test_check_data_judges_by_what_will_be_trained_or_says_by_what(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("mini-data", "digits", "--count", 3)[0] == 0
    (tmp_path / "settings.json").write_text(json.dumps({"base": "mini_world", "min_side": 65, "steps": 9}))
    for options, resolution, upscaled, words in (
        ((), 512, 3, "the default of train; --base or --config says what will be trained"),
        (("--base", "mini_world"), 64, 0, "64 px, which mini_world was made for"),
        (
            ("--base", domain_unets_dir().parent / "prior_unet.safetensors"),
            64,
            0,
            "which prior_unet.safetensors was made",
        ),
        (("--config", "mini_world"), 64, 0, "judged at 64 px, as given"),
        (("--config", "settings.json", "--min-side", 0), 64, 0, "64 px, which mini_world was made for"),
        (("--base", "mini_world", "--resolution", 128), 128, 3, "judged at 128 px, as given"),
    ):
        status, out, err = run("check-data", "digits", *options)
        assert status == 0 and words in out.splitlines()[-1], (out, err)
        report = json.loads(run("check-data", "digits", *options, "--json")[1])
        assert (report["resolution"], len(report["upscaled"])) == (resolution, upscaled) and words in report[
            "resolution_from"
        ]
    assert run("check-data", "digits", "--config", "settings.json")[0] == 1  # min_side
    (tmp_path / "settings.json").write_text("{")
    assert run("check-data", "digits", "--config", "settings.json")[0] == 2


def test_convert_changes_numbers_and_never_overwrites_unasked(tmp_path):
    target = tmp_path / "wide.safetensors"
    status, out, err = run("convert", SHIPPED, target, "--file-dtype", "fp32")
    assert status == 0 and out.strip() == str(target), err
    wide, narrow = read_domain_file(target)[0], read_domain_file(SHIPPED)[0]
    assert all(wide[key].dtype is torch.float32 and torch.equal(wide[key], narrow[key].float()) for key in narrow)
    before = target.read_bytes()
    status, _, err = run("convert", SHIPPED, target)
    assert status == 1 and "--overwrite" in err and target.read_bytes() == before
    status, out, _ = run("convert", "mini_world", target, "--form", "cached", "--overwrite", "--json")
    about = json.loads(out)
    assert status == 0 and about["form"] == "cached" and about["trained"] is False
    status, _, err = run("convert", SHIPPED, target, "--form", "constant", "--overwrite")
    assert status == 1 and "constant" in err


# ----------------------------------------------------------------------------------------------------------- pictures


def test_sample_saves_pictures_that_say_how_they_were_made(tmp_path):
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
def test_numbers_and_devices_that_make_no_picture_are_wrong_usage(tmp_path, monkeypatch, option, value):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("sample", "mini-handwriting", option, value, "--quiet")
    assert status == 2 and out == "" and option.strip("-") in err and "expected" in err and len(err) < 500
    assert os.listdir(tmp_path) == []


def test_sample_never_replaces_a_picture(tmp_path):
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


def test_sample_needs_the_right_base(tmp_path):
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
