"""What the manuals of training and adapting show is true: commands, options, settings, and the first run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from indomain_guidance.training.command_line import main as command_line
from indomain_guidance.training.domain.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
TRAINING, ADAPTING, COMMANDS = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("training", "adapting", "commands")
)
GUIDE = TRAINING + ADAPTING + COMMANDS
BLOCKS = [text for kind, text in re.findall(r"```(\w*)\n(.*?)```", GUIDE, re.DOTALL) if not kind]


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
    found = commands("\n".join(BLOCKS))
    assert {words[0] for words in found} == {"mini-data", "train", "sample", "check-data", "adapt"} and len(found) >= 7
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
    (settings,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    path = tmp_path / "porcelain.toml"
    path.write_text(settings, encoding="utf-8")
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    assert TrainConfig.read(path).flip is True


@pytest.mark.slow
def test_first_run_runs_as_printed(tmp_path):
    """With fewer images and steps; stopped early, its last step is what --steps writes."""
    (block,) = (block for block in BLOCKS if "mini-data" in block)
    shorter = {
        "mini-data": ["--count", "40"],
        "train": ["--steps", "2", "--batch-size", "4", "--sample-steps", "2"],
        "sample": ["--steps", "2", "--count", "1", "--json"],
    }
    outputs = []
    for words in commands(block):
        command = [sys.executable, str(ROOT), *words, *shorter[words[0]]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[1].strip() == str(tmp_path / "runs" / "first" / "first.safetensors")
    assert Path(tmp_path, json.loads(outputs[2])["path"]).is_file()
    run = tmp_path / "runs" / "first"
    listed = {re.sub(r"\d{6}", "000250", path.relative_to(run).as_posix()) for path in run.rglob("*") if path.is_file()}
    named = set(
        re.findall(r"^\| `([\w./-]+?/?)` \|", GUIDE.split("## What is in a run's folder")[1].split("##")[0], re.M)
    )
    expected = {"first.safetensors" if name == "NAME.safetensors" else name for name in named} - {"tensorboard/"}
    assert listed - {".lock"} == expected
