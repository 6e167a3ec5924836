"""Stage one of run.py: its command line, and how it ends when no environment is to be had."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load():
    spec = importlib.util.spec_from_file_location("indomain_run", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = _load()


def test_unknown_arguments_are_handed_on_in_order():
    options = run.parse(["test", "-k", "a and b", "tests/x.py", "--comfyui", "/c", "-q"])
    assert options.rest == ["-k", "a and b", "tests/x.py", "-q"] and options.comfyui == "/c"
    assert run.parse(["bench", "sampling", "--quick"]).rest == ["sampling", "--quick"]
    assert run.parse(["demo", "--output", "o", "--", "--lowvram"]).flags == ["--lowvram"]
    # These answer for themselves, --help included.
    wanted = ["train", "--help", "--domain-weight", "-1.5", "-d", "a", "b", "--no-flip", "--name=x"]
    options = run.parse(["indomain", "--comfyui", "/c", *wanted])
    assert options.comfyui == "/c" and options.rest == wanted
    assert run.parse(["claims", "idg", "-h"]).rest == ["idg", "-h"]


@pytest.mark.skipif(os.name == "nt", reason="quoted as a POSIX shell wants it")
def test_what_was_typed_before_the_command_can_be_pasted():
    """With what finds the environment again."""
    for typed, expected in (
        ("indomain train -d x --steps 3", "python run.py indomain"),
        (
            "indomain --comfyui /my/ui train --python '/my py/bin/python' -d x",
            "python run.py indomain --comfyui=/my/ui '--python=/my py/bin/python'",
        ),
    ):
        arguments = shlex.split(typed)
        assert run.typed_command(run.parse(arguments), ["python", "run.py", *arguments], arguments) == expected


def test_diffusers_is_fetched_only_for_the_benchmark_that_needs_it():
    needed = {
        " ".join(words): run.benches_training(run.parse(["bench", *words]))
        for words in ([], ["--quick"], ["training", "--quick"], ["sampling"], ["distillation"], ["--list"])
    }
    assert needed == {
        "": True,
        "--quick": True,
        "training --quick": True,
        "sampling": False,
        "distillation": False,
        "--list": False,
    }


def test_demo_refuses_an_option_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        run.parse(["demo", "--outptu", "x"])
    assert "--outptu" in capsys.readouterr().err


def test_stage_one_needs_only_the_standard_library(tmp_path):
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "run.py"), "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0 and "mini-world" in result.stdout, result.stderr
    assert time.monotonic() - started < 20


def test_a_cache_that_cannot_be_written_ends_with_one_sentence(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    # A copy, because this checkout may lie in a ComfyUI, which needs no cache.
    for name in ("run.py", "nodes/host/environment.py", ".ci/constraints.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    environ = {key: value for key, value in os.environ.items() if key != "COMFYUI_PATH"}
    result = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), "bench", "--list"],
        capture_output=True,
        text=True,
        env={**environ, "INDOMAIN_CACHE": str(tmp_path / "file" / "cache")},
    )
    assert result.returncode == 2 and result.stdout == ""
    assert "INDOMAIN_CACHE" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_wrong_comfyui_path_ends_with_one_sentence(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "demo", "--comfyui", str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("run.py: Expected a ComfyUI") and len(result.stderr.splitlines()) == 1


def test_tools_that_look_at_the_code_are_fetched_by_lint_alone():
    assert run.parse(["lint"]).command == "lint"
    assert all("==" in tool for tool in run.environment.LINT_TOOLS)
