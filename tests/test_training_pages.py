"""What the manuals of training, baking and adapting show is true: commands, options, settings, and the first run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from indomain_guidance.guidance.schedules import Interval
from indomain_guidance.training.baking.config import BakeConfig
from indomain_guidance.training.baking.terms import open_terms
from indomain_guidance.training.command_line import main as command_line
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.prior.opening import open_prior

ROOT = Path(__file__).resolve().parent.parent
TRAINING, ADAPTING, BAKING, COMMANDS = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("training", "adapting", "baking", "commands")
)
GUIDE = TRAINING + ADAPTING + BAKING + COMMANDS


def blocks(page: str, wanted: str = "") -> list[str]:
    return [text for kind, text in re.findall(r"```(\w*)\n(.*?)```", page, re.DOTALL) if kind == wanted]


def commands(text: str) -> list[list[str]]:
    """The arguments of every `indomain ...` line."""
    found = []
    for line in text.splitlines():
        words = shlex.split(line)
        for start in (["indomain"], ["-m", "indomain_guidance"]):
            at = next((i for i in range(len(words)) if words[i : i + len(start)] == start), None)
            if at is not None:
                found.append(words[at + len(start) :])
    return found


def test_every_command_is_understood():
    found = commands("\n".join(blocks(GUIDE)))
    names = {"mini-data", "train", "sample", "check-data", "adapt", "bake"}
    assert {words[0] for words in found} == names and len(found) >= 9
    for words in found:
        command_line.build_parser().parse(words)  # leaves the process when it does not understand


def test_every_option_and_command_named_in_the_text_exists():
    parser = command_line.build_parser()
    known = subparsers(parser)
    text = re.sub(r"`(accelerate|torchrun|python|pip)[^`]*`", "", re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL))
    flags = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", text)) - {
        "--quick",
        "--comfyui",
        "--shutdown-timeout",
        "--multi_gpu",
    }
    assert flags and flags <= {flag for parser in known.values() for flag in parser._option_string_actions} | {"--help"}
    assert set(re.findall(r"`indomain ([a-z][a-z-]*)", text)) <= known.keys()


def subparsers(parser) -> dict:
    (action,) = (action for action in parser._actions if isinstance(getattr(action, "choices", None), dict))
    return action.choices


def test_example_settings_are_valid(tmp_path):
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    files = {}
    for page in (TRAINING, BAKING):
        files[page] = tmp_path / f"{len(files)}.toml"
        files[page].write_text(*blocks(page, "toml"), encoding="utf-8")
    assert TrainConfig.read(files[TRAINING]).flip is True
    config = BakeConfig(base="mini_world", terms=str(files[BAKING]))
    assert [term.weight for term in open_terms(config, open_prior("mini_world"))] == [Interval(-0.5, 0.0, 0.5)]


def first_run(page: str, folder: Path) -> list[str]:
    """What each command of a manual's first run says, with fewer images and steps."""
    (block,) = (block for block in blocks(page) if "mini-data" in block)
    quick = ["--steps", "2", "--batch-size", "4", "--sample-steps", "2"]
    shorter = {
        "mini-data": ["--count", "40"],
        "train": quick,
        "bake": [*quick, "--own-count", "2", "--own-steps", "2", "--random-prompts", "2"],
        "sample": ["--steps", "2", "--count", "1", "--json"],
    }
    outputs = []
    for words in commands(block):
        command = [sys.executable, str(ROOT), *words, *shorter[words[0]]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    return outputs


@pytest.mark.slow
def test_first_baking_runs_as_printed(tmp_path):
    outputs, run = first_run(BAKING, tmp_path), tmp_path / "runs" / "first_lora"
    assert outputs[1].strip() == str(run / "first_lora.safetensors")
    assert Path(tmp_path, json.loads(outputs[2])["path"]).is_file()
    table = BAKING.split("The run's folder holds")[1].split("##")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`([\w./]+)`", row)}
    assert {path.name for path in run.iterdir()} - {".lock"} == {name.rstrip("/") for name in named}


@pytest.mark.slow
def test_first_run_runs_as_printed(tmp_path):
    """With fewer images and steps; stopped early, its last step is what --steps writes."""
    outputs = first_run(TRAINING, tmp_path)
    assert outputs[1].strip() == str(tmp_path / "runs" / "first" / "first.safetensors")
    assert Path(tmp_path, json.loads(outputs[2])["path"]).is_file()
    run = tmp_path / "runs" / "first"
    listed = {re.sub(r"\d{6}", "000250", path.relative_to(run).as_posix()) for path in run.rglob("*") if path.is_file()}
    named = set(
        re.findall(r"^\| `([\w./-]+?/?)` \|", GUIDE.split("## What is in a run's folder")[1].split("##")[0], re.M)
    )
    expected = {"first.safetensors" if name == "NAME.safetensors" else name for name in named} - {"tensorboard/"}
    assert listed - {".lock"} == expected
