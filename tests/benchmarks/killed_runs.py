"""Runs of the command line on the mini world that are killed (SIGKILL) at drawn moments and gone on with.

Moments spread over a run's whole life: while it starts, within steps, the moment a file is being written, at its end.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from indomain_guidance.tests.training.tiny_run import fingerprint
from indomain_guidance.training.engine.checkpoints import latest_checkpoint
from indomain_guidance.training.engine.events import Step, Validated
from indomain_guidance.training.engine.log import read_log

from .reporting import BOOTSTRAP

INDOMAIN = [sys.executable, str(BOOTSTRAP), "indomain_guidance"]
STEPS = 10
COMMANDS = {
    "train": [
        "train",
        "-b",
        "mini_world",
        "-d",
        "../digits",
        "--resolution",
        "64",
        "--batch-size",
        "2",
        "--flip",
        "--learning-rate",
        "1e-3",
        "--warmup",
        "2",
        "--sample-every",
        "5",
        "--sample-count",
        "1",
        "--sample-steps",
        "2",
        "--validate-every",
        "5",
        "--held-out-share",
        "0.2",
        "--cache",
        "../latents",
    ],
    "adapt": [
        "adapt",
        "--config",
        "mini_world",
        "--prompt",
        "a yellow digit on a green background",
        "--batch-size",
        "2",
        "--sample-every",
        "5",
        "--sample-count",
        "1",
    ],
}
# Of the state of a checkpoint, what may differ: paths.
OTHERWISE = ("config", "facts")
PATIENCE_S = 900.0


class Failed(Exception):
    """A process that was left to itself did not finish."""


@dataclass
class Outcome:
    """What became of one run: how often it was killed, when, and in what it differs from one that never was."""

    kills: int = 0
    moments: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def environ() -> dict[str, str]:
    """One thread: the same bits, and fair to neighbours. No run of several processes around this one."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "INDOMAIN_COMMAND")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


def draw_digits(folder: Path) -> None:
    """The images that trainings learn."""
    subprocess.run(
        [*INDOMAIN, "mini-data", "digits", "--count", "12"],
        cwd=folder,
        env=environ(),
        check=True,
        stdout=subprocess.DEVNULL,
    )


def command(kind: str) -> list[str]:
    return [
        *INDOMAIN,
        *COMMANDS[kind],
        "-n",
        kind,
        "--steps",
        str(STEPS),
        "--checkpoint-every",
        "1",
        "--log-every",
        "1",
        "--device",
        "cpu",
        "--json",
        "--quiet",
    ]


class Process:
    """One process of a run, whose events are followed."""

    def __init__(self, what: Sequence[str], folder: Path) -> None:
        self.began, self.step, self.done = time.monotonic(), -1, ""
        self.stepped = self.began
        self.process = subprocess.Popen(
            what, cwd=folder, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        )
        self.errors: list[str] = []
        follow = (self._listen, lambda: self.errors.extend(self.process.stderr))
        self.threads = [threading.Thread(target=one, daemon=True) for one in follow]
        for thread in self.threads:
            thread.start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            try:
                event = json.loads(line)
            except ValueError:  # the line that the kill tore
                continue
            if event["event"] in ("started", "step"):
                self.step, self.stepped = event["step"], time.monotonic()
            elif event["event"] == "result":
                self.done = event["status"]

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> bool:
        """Kill it; whether that came before its end."""
        self.process.kill()
        return self.wait() != 0

    def wait(self) -> int:
        status = self.process.wait(PATIENCE_S)
        for thread in self.threads:
            thread.join(60)
        return status

    def finish(self) -> None:
        """Leave it to itself. Raises Failed when it does not finish the run."""
        status = self.wait()
        if status or self.done != "finished":
            raise Failed(f"the process ended with {status} ({self.done or 'no result'}): {''.join(self.errors)[-500:]}")


def undisturbed(folder: Path, kind: str) -> tuple[float, float]:
    """Run to the end: seconds until the first event, and of a step."""
    process = Process(command(kind), folder)
    while process.alive() and process.step < 0:
        time.sleep(0.005)
    start = time.monotonic() - process.began
    process.finish()
    return start, max((process.stepped - process.began - start) / STEPS, 0.005)


def killed(folder: Path, kind: str, kills: int, dice: random.Random, start_s: float, step_s: float) -> Outcome:
    """Run in `folder`, killed up to `kills` times and gone on with each time; the last process is left to finish."""
    run, outcome, done = folder / "runs" / kind, Outcome(), 0
    for left in range(kills, 0, -1):
        process = Process(_next(run, kind, dice), folder)
        moment = _wait_for_moment(process, run, done, left, dice, start_s, step_s)
        if process.kill():
            outcome.kills += 1
            outcome.moments.append(f"{moment}, step {max(process.step, 0)}")
        done = max(process.step, done)
    Process(_next(run, kind, dice), folder).finish()
    return outcome


def _next(run: Path, kind: str, dice: random.Random) -> list[str]:
    """How the run goes on: by its own command again, or by `resume`."""
    if (run / "config.json").is_file() and dice.random() < 0.5:
        return [*INDOMAIN, "resume", str(run), "--json", "--quiet"]
    return command(kind)


def _wait_for_moment(
    process: Process, run: Path, done: int, left: int, dice: random.Random, start_s: float, step_s: float
) -> str:
    """Wait until a drawn moment of the process's life; what moment that is. It may end before."""
    what = dice.choices(("start", "step", "writing", "end"), (1, 4, 4, 1))[0]
    target = STEPS if what == "end" else dice.randint(done, done + max(1, (STEPS - done) // left))
    if what == "start":
        until = process.began + dice.random() * 1.1 * start_s
        while process.alive() and time.monotonic() < until:
            time.sleep(0.002)
        return what
    while process.alive() and process.step < target:
        time.sleep(0.002)
    if what == "step":
        time.sleep(dice.random() * 1.5 * step_s)
        return what
    until = time.monotonic() + 30
    while process.alive() and time.monotonic() < until and not _unfinished(run):
        time.sleep(0.0005)
    time.sleep(dice.random() * dice.choice((0.0, 0.002, 0.02)))
    return "writing" if _unfinished(run) else f"after {what}"


def _unfinished(run: Path) -> list[Path]:
    """Files that are being written, or were when their process died."""
    try:
        return list(run.rglob("*.tmp"))
    except OSError:  # a folder that came or went meanwhile
        return []


def bits(run: Path) -> dict[str, object]:
    """All that has to be the same: every part of the last checkpoint, the finished file, pictures, all losses."""
    _, state = latest_checkpoint(run)
    names = tuple(sorted(name for name in state if name not in OTHERWISE))
    events = read_log(run / "log.jsonl")
    return {
        **fingerprint(run, names),
        "losses": {event.step: event.loss for event in events if isinstance(event, Step)},
        "held out": {event.step: event.loss for event in events if isinstance(event, Validated)},
        "pictures": {path.name: path.read_bytes() for path in sorted((run / "samples").glob("*.png"))},
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "unfinished files": [path.name for path in _unfinished(run)],
    }


def compare(whole: dict[str, object], other: dict[str, object]) -> list[str]:
    """The names in which two differ."""
    return [name for name in {**whole, **other} if whole.get(name) != other.get(name)]
