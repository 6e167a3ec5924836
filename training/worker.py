"""The training process: reads a job's files, trains, tells its events as JSON lines. Started by `isolated`."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adaptation.config import AdaptConfig
from .engine.memory import memory_problem
from .engine.signals import StopRequest
from .isolated import FAILURE, RESULT, STOP, Job

if TYPE_CHECKING:
    from .engine.engine import Result


class Channel:
    """The real standard output, as lines of JSON; whatever else prints goes to standard error."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Write one message. A reader that is gone is no error: the end of our input stops the run."""
        try:
            with self._lock:
                self._file.write(json.dumps(message) + "\n")
                self._file.flush()
        except (OSError, ValueError):
            pass


def watch_for_stop() -> threading.Event:
    """An event that is set by a line "stop" on standard input, or by its end."""
    asked = threading.Event()

    def watch() -> None:
        said = b""
        # Not sys.stdin: its lock, held by a waiting thread, makes the interpreter abort when it exits.
        while STOP.encode() not in said:
            chunk = os.read(0, 4096)
            if not chunk:
                break
            said = said[-16:] + chunk
        asked.set()

    threading.Thread(target=watch, name="indomain-training-stop", daemon=True).start()
    return asked


def run(job: Job, **reports: Any) -> Result:
    """What the job asks for, with the files it brings."""
    from .prior.exported_base import ExportedBase

    base = None if job.base is None else ExportedBase.read(job.base).open()
    if isinstance(job.config, AdaptConfig):
        from ..guidance.files import read_generator
        from .adaptation.adapt import adapt

        generator = None if job.generator is None else read_generator(job.generator)
        return adapt(job.config, resume=job.resume, generator=generator, base=base, **reports)
    from .domain.train import train

    return train(job.config, resume=job.resume, base=base, **reports)


def main(folder: Path) -> int:
    """Do the job in `folder`; 0 after a result, 1 after a failure was reported."""
    channel = Channel()
    stop = watch_for_stop()
    job = None
    try:
        job = Job.read(folder)
        with StopRequest() as signalled:
            result = run(
                job,
                listener=lambda event: channel.send(event.to_dict()),
                should_stop=lambda: stop.is_set() or signalled(),
            )
    except BaseException as problem:
        traceback.print_exc()
        message = None if job is None else memory_problem(problem, job.config)
        if message is None:
            # Errors meant for users are sentences; anything else is told with its type.
            told = isinstance(problem, (ValueError, OSError)) and str(problem)
            message = str(problem) if told else f"Training failed with {type(problem).__name__}: {problem}"
        channel.send({"event": FAILURE, "message": " ".join(message.split())})
        return 1
    paths = {name: getattr(result, name) for name in ("path", "run", "samples", "plot")}
    channel.send(
        {
            "event": RESULT,
            "status": result.status,
            "step": result.step,
            "loss": result.loss,
            **{name: None if path is None else str(path) for name, path in paths.items()},
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
