"""Runs in processes of their own: killed and resumed, and several at once through accelerate."""

from __future__ import annotations

import random
import subprocess

import pytest
from indomain_guidance.training.engine.checkpoints import find_checkpoints, latest_checkpoint
from indomain_guidance.training.engine.events import Step
from indomain_guidance.training.engine.log import read_log


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def losses(run):
    """(step, loss) of every line of a log."""
    return [(event.step, event.loss) for event in read_log(run / "log.jsonl") if isinstance(event, Step)]


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_bits(tiny_run, tmp_path):
    """Two kills in a run of 16 steps; `tiny_run.py kill --kills 10` does more."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        tiny_run.draw_images(folder / "images")
    subprocess.run(tiny_run.command(whole), check=True, stdout=subprocess.DEVNULL)
    died = tiny_run.run_killed(killed, 2, random.Random(seed := random.SystemRandom().getrandbits(32)))
    assert len(died) == 2
    assert tiny_run.fingerprint(killed / "run") == tiny_run.fingerprint(whole / "run"), (seed, died)
    assert [step for step, _ in find_checkpoints(killed / "run")] == [14, 16]
    assert not list((killed / "run").rglob("*.tmp"))
    before, after = (dict(losses(folder / "run")) for folder in (whole, killed))
    assert before == after and sorted(after) == list(range(1, 17))
    assert (whole / "run/samples/step-000016.png").read_bytes() == (killed / "run/samples/step-000016.png").read_bytes()


def processes(run) -> str:
    """How many processes wrote a run's last checkpoint."""
    return latest_checkpoint(run)[1]["facts"]["processes"]


@pytest.mark.slow
def test_two_processes_train_like_one(tiny_run, two_processes, tmp_path):
    """The same global batch of one fixed size, 50 steps, fp32: the losses agree within 1e-4."""
    tiny_run.draw_images(tmp_path / "images", sizes=((64, 64),))
    fields = {"steps": 50, "batch_size": 4, "accumulation": 2, "buckets": False, "checkpoint_every": 25}
    one = tiny_run.command(tmp_path, output=str(tmp_path / "one"), **fields)
    two = tiny_run.command(tmp_path, output=str(tmp_path / "two"), **fields)
    subprocess.run(one, check=True, stdout=subprocess.DEVNULL)
    ran = subprocess.run([*two_processes, *two[1:]], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    left, right = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(left) == len(right) == 50
    assert [processes(tmp_path / name) for name in ("one", "two")] == ["1", "2"]
    assert max(abs(a - b) / a for (_, a), (_, b) in zip(left, right)) < 1e-4
    assert ran.stdout.count('"event": "finished"') == 1  # the first process alone reports
