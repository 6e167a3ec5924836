"""Training in a process of its own, seen from the program that wants it: job as files, events back, a stop that saves.

The child (`worker`) gets a folder with ``job.json`` and, when the prior exists only in memory here,
``base.safetensors``. It writes one JSON object a line to its standard output: the events of the run as they happen, at
the end a result or a failure. A line "stop" on its standard input, or the end of that stream because this program died,
makes it finish the step, save and leave; signals are not needed, which Windows could not send.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..guidance.errors import Problem
from ..guidance.files import FileProblem
from ..guidance.files.atomic import write_text
from ..guidance.plain_json import parse_json
from .adaptation.config import AdaptConfig
from .domain.config import TrainConfig
from .engine.events import Event, event_from_dict
from .engine.small_files import read_small

if TYPE_CHECKING:
    from .engine.engine import Result
    from .prior.exported_base import ExportedBase

JOB, BASE, GENERATOR, LOG = "job.json", "base.safetensors", "generator.safetensors", "worker.log"
KINDS: dict[str, type[TrainConfig] | type[AdaptConfig]] = {"train": TrainConfig, "adapt": AdaptConfig}
RESULT, FAILURE = "result", "failure"
STOP = "stop"
POLL_S = 0.1
# One step of a large model on a CPU, a sample grid or an image being cached may take minutes before it can stop.
PATIENCE_S = 900.0
EXIT_S = 60.0


class IsolatedProblem(Problem):
    """The training process failed or died; the message is one sentence for the user."""


@dataclass(frozen=True)
class Job:
    """What a training process is to do: train or adapt, as its configuration is.

    base: file with the exported prior, None to open `config.base`. generator: file with the generator to adapt, None to
    open `config.generator`.
    """

    config: TrainConfig | AdaptConfig
    resume: bool | str = "auto"
    base: Path | None = None
    generator: Path | None = None

    def write(self, folder: Path) -> None:
        files = {"base": self.base, "generator": self.generator}
        values = {
            "kind": next(kind for kind, settings in KINDS.items() if type(self.config) is settings),
            "config": self.config.to_dict(),
            "resume": self.resume,
            **{name: None if path is None else str(path) for name, path in files.items()},
        }
        write_text(folder / JOB, json.dumps(values, indent=2))

    @classmethod
    def read(cls, folder: Path) -> Job:
        path = folder / JOB
        try:
            values = parse_json(read_small(path, "a training job"))
            files = (None if values[name] is None else Path(values[name]) for name in ("base", "generator"))
            return cls(KINDS[values["kind"]].from_mapping(values["config"], str(path)), values["resume"], *files)
        except (KeyError, TypeError, ValueError) as problem:
            what = f"{path}: expected the description of a training job, found none ({problem})."
            raise FileProblem(what) from problem


def run_isolated(
    config: TrainConfig | AdaptConfig,
    *,
    folder: Path,
    resume: bool | str = "auto",
    base: ExportedBase | Path | None = None,
    generator: Path | None = None,
    listener: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    python: str = sys.executable,
    patience_s: float = PATIENCE_S,
) -> Result:
    """`train.train` or `adapt.adapt` in a process of its own; `folder` is an existing folder for the job's files.

    base: an exported prior, or the file of one (`ExportedBase.write`), which frees this process of it. generator: the
    file of the generator to adapt, where it is not `config.generator`.
    listener and should_stop are called in this thread. After should_stop the process has `patience_s` seconds to finish
    its step and save. Raises IsolatedProblem with the process's own error, or with how it died.
    """
    where = base if base is None or isinstance(base, Path) else base.write(folder / BASE)
    Job(config, resume, where, generator).write(folder)
    outcome: dict[str, Any] | None = None
    with _process(folder, python, patience_s) as process:
        deadline = None
        for message in _messages(process):
            if message is not None:
                kind = message.get("event")
                if kind in (RESULT, FAILURE):
                    outcome = message
                else:
                    listener(event_from_dict(message))
            if deadline is None and should_stop():
                deadline = time.monotonic() + patience_s
                _ask_to_stop(process)
            if deadline is not None and time.monotonic() > deadline:
                process.kill()  # it has been asked and waited for; nobody has to do so again
                raise IsolatedProblem(
                    f"Expected the training process to stop within {patience_s:.0f} s, it did not and was ended; run "
                    "again to continue from its last checkpoint."
                )
        code = _left(process)
    if outcome is None:
        raise IsolatedProblem(_obituary(code, folder, config))
    if outcome["event"] == FAILURE:
        raise IsolatedProblem(outcome["message"])
    return _result(outcome)


@contextmanager
def _process(folder: Path, python: str, patience_s: float) -> Iterator[subprocess.Popen]:
    """The running child; whatever happens in the block, it has ended afterwards."""
    options: dict[str, Any] = {"start_new_session": True}  # Ctrl+C in the server's terminal is the server's to handle
    if os.name == "nt":
        options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    flags = ["-s"] if sys.flags.no_user_site else []  # portable ComfyUI keeps the user's packages out
    command = [
        python,
        *flags,
        str(Path(__file__).with_name("bootstrap.py")),
        "indomain_guidance.training.worker",
        str(folder),
    ]
    with open(folder / LOG, "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"},
            **options,
        )
    try:
        yield process
    except BaseException:
        _ask_to_stop(process)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        raise
    finally:
        if process.poll() is None:
            process.kill()
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                stream.close()
        process.wait()


def _messages(process: subprocess.Popen) -> Iterator[dict[str, Any] | None]:
    """The child's messages until it closes its output; None every now and then while there is none."""
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def read() -> None:
        with suppress(OSError, ValueError):
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="indomain-training-reader", daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=POLL_S)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        with suppress(ValueError):  # a torn last line of a process that died
            yield json.loads(line)


def _left(process: subprocess.Popen) -> int:
    """The status of a child that has said all; one that hangs on the way out, as drivers can make it, is ended."""
    try:
        return process.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _ask_to_stop(process: subprocess.Popen) -> None:
    with suppress(OSError, ValueError):
        process.stdin.write(f"{STOP}\n".encode())
        process.stdin.flush()


def _result(message: dict[str, Any]) -> Result:
    from .engine.engine import Result

    names = ("path", "run", "samples", "plot")
    paths = {name: None if message[name] is None else Path(message[name]) for name in names}
    return Result(status=message["status"], step=message["step"], loss=message["loss"], **paths)


def _obituary(code: int, folder: Path, config: TrainConfig | AdaptConfig) -> str:
    """One sentence on a process that left no word."""
    try:
        lines = [line for line in (folder / LOG).read_text("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    if code in (-9, 137):
        cause = "it was killed, usually because the system ran out of memory"
    elif code < 0:
        cause = f"signal {-code}"
    else:
        cause = f"exit code {code}"
    said = f", its last words: {lines[-1].strip()[:200]}" if lines and code != -9 else ""
    kept = sorted((config.run_folder / "checkpoints").glob("*.ckpt"))
    step = re.search(r"(\d+)", kept[-1].stem) if kept else None
    remedy = f"run again to continue from step {int(step[1])}" if step else "it had not saved anything yet"
    what = f"The training process ended unexpectedly ({cause}{said})"
    return f"{what}; {remedy}, with gradient checkpointing if memory ran out."
