"""The command line as a user starts it: processes of their own that train the mini world, are stopped, and go on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
INDOMAIN = [sys.executable, str(ROOT / "training" / "bootstrap.py"), "indomain_guidance"]
pytestmark = pytest.mark.slow
posix = pytest.mark.skipif(os.name == "nt", reason="Windows cannot send a child these signals")


def environ(**more: str) -> dict[str, str]:
    # One thread: bit-identical and fair to neighbours. No run of several processes around this one.
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "INDOMAIN_COMMAND")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", **more}


def start(*arguments: object, cwd: Path, command: list[str] = INDOMAIN) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def indomain(*arguments: object, cwd: Path, command: list[str] = INDOMAIN) -> tuple[int, str, str]:
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=cwd, env=environ(), capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with 24 images in it."""
    folder = tmp_path_factory.mktemp("runs")
    status, out, err = indomain("mini-data", "digits", "--count", 24, cwd=folder)
    assert (status, out) == (0, "digits\n"), err
    return folder


def training(name: str, steps: int = 12, *more: object) -> list[object]:
    return [
        "train",
        "-b",
        "mini_world",
        "-d",
        "digits",
        "-n",
        name,
        "--resolution",
        64,
        "-s",
        steps,
        "--batch-size",
        2,
        "--learning-rate",
        "1e-3",
        "--warmup",
        0,
        "--sample-every",
        0,
        "--validate-every",
        0,
        "--held-out-share",
        0,
        "--checkpoint-every",
        5,
        "--cache",
        "cache",
        "--device",
        "cpu",
        *more,
    ]


@pytest.fixture(scope="module")
def uninterrupted(place) -> bytes:
    status, out, err = indomain(*training("whole"), cwd=place)
    path = place / "runs" / "whole" / "whole.safetensors"
    assert (status, out) == (0, f"{path}\n"), err
    assert "everything" not in err and "step [" in err  # progress went to standard error
    return path.read_bytes()


def weights(content: bytes) -> bytes:
    """The tensors of a safetensors file without its header, which holds the run's name."""
    return content[8 + int.from_bytes(content[:8], "little") :]


def stop_at(
    step: int, number: int, *arguments: object, cwd: Path, command: list[str] = INDOMAIN
) -> tuple[int, list[dict], str]:
    """Start a command with --json, send a signal when `step` is reported; status, events, standard error."""
    process = start(*arguments, "--json", cwd=cwd, command=command)
    events = []
    try:
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1]["event"] == "step" and events[-1]["step"] == step:
                process.send_signal(number)
        err = process.stderr.read()
        return process.wait(timeout=120), events, err
    finally:
        process.kill()


def test_a_reader_that_goes_away_ends_no_run(place):
    process = start(*training("unread", 6), "--json", cwd=place)
    try:
        assert json.loads(process.stdout.readline())["event"]
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=120) == 0, err
    finally:
        process.kill()
    assert "Traceback" not in err and (place / "runs" / "unread" / "unread.safetensors").is_file()


@posix
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_stopped_run_goes_on_to_the_same_bits(place, uninterrupted, name, status):
    found, events, err = stop_at(7, getattr(signal, name), *training(f"stopped-{name}"), cwd=place)
    run = place / "runs" / f"stopped-{name}"
    assert found == status, err
    kinds = [event["event"] for event in events]
    assert kinds[0] == "started" and "preparing" in kinds and kinds[-2:] == ["stopped", "result"]
    result = events[-1]
    assert result["status"] == "stopped" and 7 <= result["step"] < 12 and result["path"] is None
    assert Path(events[-2]["path"]).is_file() and f"{shlex.join(INDOMAIN)} resume {run}" in err
    assert not (run / f"stopped-{name}.safetensors").exists()
    status, out, err = indomain("resume", run, cwd=place.parent)  # from any folder
    assert status == 0, err
    assert weights(Path(out.strip()).read_bytes()) == weights(uninterrupted)


@posix
def test_second_ctrl_c_does_not_wait_and_what_was_saved_stays(place, uninterrupted):
    """Sent together, the second arrives within the step that the first one asks to finish."""
    process = start(*training("impatient", 4000), "--json", cwd=place)
    try:
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step" and event["step"] == 6:
                process.send_signal(signal.SIGINT)
                assert process.stderr.readline() is not None
                process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    assert "Traceback" not in err
    run = place / "runs" / "impatient"
    assert (run / "checkpoints" / "step-000005.ckpt").is_file()
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps({**config, "steps": 12}), encoding="utf-8")
    status, out, err = indomain("resume", run, cwd=place)
    assert status == 0, err
    assert weights(Path(out.strip()).read_bytes()) == weights(uninterrupted)


@posix
@pytest.mark.comfy
def test_run_py_passes_signals_and_statuses_on(place, comfyui_path):
    own = ["--comfyui", comfyui_path, "--python", sys.executable]
    command = [sys.executable, str(ROOT / "run.py"), "indomain", *map(str, own)]
    found, events, err = stop_at(2, signal.SIGTERM, *training("through-run-py", 400), cwd=place, command=command)
    assert found == 143 and events[-1]["status"] == "stopped", err
    assert indomain("inspect", "missing", cwd=place, command=command)[0] == 1


def test_dry_run_prints_everything_and_writes_nothing(place):
    status, out, err = indomain(*training("dry", 12, "--dry-run"), cwd=place)
    assert status == 0, err
    assert "learning_rate" in out and "0.001" in out and "memory" in out
    status, out, _ = indomain(*training("dry", 12, "--dry-run", "--json"), cwd=place)
    started, result = map(json.loads, out.splitlines())
    assert started["config"]["steps"] == 12 and result["status"] == "dry_run"
    assert not (place / "runs" / "dry").exists()


def test_problems_are_status_1_and_one_line(place):
    (place / "empty").mkdir(exist_ok=True)
    arguments = ["train", "-b", "mini_world", "-n", "none", "--resolution", 64]
    for data, word in (("empty", "empty"), ("missing", "missing")):
        status, out, err = indomain(*arguments, "-d", data, cwd=place)
        assert status == 1 and out == "", err
        assert word in err.splitlines()[-1] and "Traceback" not in err


def test_module_and_checkout_of_any_name_are_the_same_command(place, tmp_path):
    _, wanted, _ = indomain("--help", cwd=place)
    assert wanted.startswith("usage: indomain")
    for name in ("a-name with spaces", "nodes"):
        checkout = tmp_path / name
        shutil.copytree(
            ROOT,
            checkout,
            ignore=shutil.ignore_patterns(".git", "tests", "*.safetensors", "*.npz", "__pycache__", "workflows"),
        )
        assert indomain("--help", cwd=place, command=[sys.executable, str(checkout)])[:2] == (0, wanted)
        if " " not in name:
            assert indomain("--help", cwd=tmp_path, command=[sys.executable, "-m", name])[:2] == (0, wanted)


def test_one_of_several_processes_is_silent(place):
    code = (
        f"import runpy; b = runpy.run_path({str(ROOT / 'training' / 'bootstrap.py')!r}); b['register']()\n"
        "import os; os.environ['RANK'] = '1'\n"
        "from indomain_guidance.training.command_line.console import Console\n"
        "from indomain_guidance.training.engine.events import Step, Warned\n"
        "c = Console(as_json=True); c(Step(1, 2, 0.5, 1e-4, 1.0, 0.1)); c(Warned('x'))\n"
    )
    assert indomain(cwd=place, command=[sys.executable, "-c", code]) == (0, "", "")
