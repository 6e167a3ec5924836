"""The command line as a whole: help, wrong usage, paths, exit statuses, and what a terminal is shown."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from indomain_guidance.training.command_line import console
from indomain_guidance.training.command_line import main as command_line
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.run import Result
from indomain_guidance.training.mini_world.assets import domain_unets_dir
from PIL import Image

SHIPPED = domain_unets_dir() / "mini-handwriting.safetensors"


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
def test_advice_is_a_command_as_the_user_calls_it(run, monkeypatch, tmp_path, around, expected):
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


@pytest.mark.slow
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
        (["train", "-b", "mini_world", "-d", "x", "--batch-size", "0"], ["--batch-size", "'0'"]),
        (["train", "-b", "mini_world", "-d", "x", "--steps", "many"], ["--steps", "many"]),
        (["train", "-b", "mini_world", "-d", "x", "--form", "cashed"], ["cashed", "cached"]),
        (["train", "--config", "missing.toml"], ["missing.toml"]),
        (["train", "-b", "mini_world", "-d", "x", "--device", "toaster"], ["toaster"]),
        (["sample", str(SHIPPED), "--count", "0"], ["count"]),
        (["trian"], ["trian"]),
        ([], ["COMMAND"]),
    ],
)
def test_wrong_usage_is_status_2_and_one_sentence(run, arguments, words):
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
def test_halves_of_characters_are_wrong_usage_in_every_option(run, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*(str(one).replace("{}", "a\ud800") for one in arguments))
    assert (status, out) == (2, "") and "found 'a\\ud800', wh" in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="elsewhere such paths lead somewhere")
@pytest.mark.parametrize("path", ["C:\\pictures", '"D:/a b"', "\\\\server\\share", "\\\\?\\C:\\x", "file:///C:/x"])
def test_paths_of_windows_make_no_folders_of_such_names(run, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["sample", SHIPPED, "-o"], ["convert", SHIPPED], ["mini-data"], ["inspect"], ["check-data"]):
        status, out, err = run(*arguments, path)
        assert (status, out) == (2, "") and "expected a path of this system, found one of Windows" in err, err
    assert not list(tmp_path.iterdir())


def test_a_terminal_sees_no_commands_that_a_file_holds(run, tmp_path):
    status, _, err = run("convert", SHIPPED, tmp_path / "a.safetensors", "--name", "\x1b[31mred")
    assert status == 0, err
    status, out, _ = run("inspect", tmp_path / "a.safetensors")
    assert status == 0 and "\x1b" not in out and "\\x1b[31mred" in out and len(out.splitlines()) > 5
    run("convert", SHIPPED, tmp_path / "b.safetensors", "--name", "x" * 100_000)
    assert max(map(len, run("inspect", tmp_path / "b.safetensors")[1].splitlines())) < 11_000


def test_help_tells_every_field_its_default_and_the_exit_statuses(run):
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
