"""The engine of every run: lock, resolve, announce, step, report, save, stop, fail, resume, finish.

What is trained and with which loss is a learner's business (`Learns`), what a run is made of and what it leaves behind
its own module's (`train`, `adapt`). Both leave the same folder behind and go on in the same way.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ...guidance.errors import Problem
from ...guidance.files.atomic import clear_unfinished, clear_unfinished_file
from ..adaptation.config import configuration_kind
from .average import WeightAverage
from .checkpoints import (
    FOLDER,
    DamagedCheckpoint,
    checkpoint_path,
    different_facts,
    find_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from .events import (
    Distilled,
    Event,
    Failed,
    Finished,
    Listener,
    LogFile,
    LossCurve,
    Saved,
    Step,
    Stopped,
    TensorBoard,
    Warned,
    read_log,
)
from .lock import NAME as LOCK
from .lock import locked
from .optimizers import rate_at, restore
from .processes import OneProcess, pick_precision
from .settings import ConfigProblem, Settings

CONFIG, LOG, PLOT = WRITTEN = ("config.json", "log.jsonl", "loss.png")
SAMPLES, BOARD = "samples", "tensorboard"
GRID_NAME = re.compile(r"step-(\d{6,})\.png")
RECENT = 50  # steps that the reported loss and speed are means of
RESUME = (True, False, "auto")
Found = tuple[Path, dict[str, Any]]  # a checkpoint: its file and its state


@dataclass(frozen=True)
class Result:
    """How a run ended.

    status: "finished"; "stopped" (asked to: the step was finished and saved, nothing is lost); "dry_run". path: the
    finished file (in `export_to` where that is set), None unless finished. run: the run's folder. loss: mean of the
    last steps, None without any. samples: the last sample grid; plot: the loss curve; None where there is none.
    """

    status: str
    step: int
    path: Path | None
    run: Path
    loss: float | None = None
    samples: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """One finished step: the loss of its global batch, gradient norm before clipping, learning rate.

    parts: what else there is to log of it, by name; see `events.Distilled`.
    """

    step: int
    loss: float
    gradient_norm: float
    rate: float
    stop: bool
    parts: Mapping[str, float] = field(default_factory=dict)


class NonFiniteLoss(Problem):
    """The loss or its gradient became NaN or infinite; the weights are those before the step.

    step: the step that failed, counted from 1. names: the images of its batch, none where there are no images. advice:
    what was kept, what to do.
    """

    def __init__(self, what: str, step: int, names: Sequence[str], advice: str = "") -> None:
        self.what, self.step, self.names = what, step, tuple(names)
        shown = ", ".join(dict.fromkeys(names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        super().__init__(
            f"Training stopped: {what} became NaN or infinite at step {step}"
            + (f" on the batch {shown}" if shown else "")
            + (f"; {advice}" if advice else ".")
        )


class Learns(Protocol):
    """What the engine needs of whatever is trained; `Learner` and `Adapter` are such.

    step: finished steps. intact: False while weights, average and step do not belong together, for who wants to save
    after an exception. optimizer: of all that learns.
    """

    step: int
    intact: bool
    optimizer: torch.optim.Optimizer

    def take_step(self, should_stop: Callable[[], bool]) -> Outcome:
        """One optimizer step; raises NonFiniteLoss before anything is changed."""

    def has_finite_weights(self) -> bool: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any], source: str) -> list[str]:
        """Go on from a state; what makes the continuation other than bit-identical, as warnings."""

    def names_at(self, step: int) -> list[str]:
        """The images of a step's batch, for messages; none where there are none."""


class Engine(ABC):
    """One call of `train` or `adapt`: who listens, where things are, what is due.

    A run calls, in this order: `take_place`, `begin`, `open_reports`, then `go_on` with its learner and `loop`.
    """

    blame: ClassVar[str] = "lower the learning rate"  # what to do about numbers that are not finite

    def __init__(
        self, config: Settings, processes: OneProcess, listener: Listener, should_stop: Callable[[], bool]
    ) -> None:
        self.config, self.processes, self.should_stop = config, processes, should_stop
        self.folder = config.run_folder.absolute()
        self.plot = self.folder / PLOT
        self.listeners: list[Listener] = [listener]
        self.learner: Learns | None = None
        self.start = self.saved_step = 0
        self.under_way = False  # whether more was done than to prepare
        self.before: Settings | None = None  # the settings of the checkpoint to go on from
        self.saved_at = time.monotonic()
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # loss, seconds

    # ---- what a run must say

    @abstractmethod
    def report(self, step: int) -> bool:
        """Report on a step, also what a killed run did not come to; True when somebody asked to stop meanwhile."""

    @abstractmethod
    def write(self, places: Sequence[Path]) -> None:
        """Write the finished file to each place; called in the first process."""

    def begun(self) -> dict[str, Any]:
        """What is settled when a run begins and kept with its checkpoints, under "start"."""
        return {}

    # ---- beginning

    def take_place(self, stack: ExitStack) -> None:
        """Hold the run's folder while `stack` is open, and clear away what killed runs left half-written.

        A run that is refused before its first step leaves no folder behind that was not there before.
        """
        if self.processes.is_main:
            new = not self.folder.exists()
            stack.enter_context(locked(self.folder))
            if new and not any(one.name != LOCK for one in self.folder.iterdir()):
                stack.push(self._refused)
            clear_unfinished(self.folder, self.folder / FOLDER, self.folder / SAMPLES)
            for place in self.places()[1:]:
                clear_unfinished_file(place)
        self.processes.wait()

    def begin(self, resume: bool | str) -> tuple[int, Found | None]:
        """The step to go on from and its checkpoint as (file, state), None to begin anew; settles the configuration."""
        self._check_places()
        found = self._checkpoint(resume)
        if found is not None:
            check_same_kind(self.config, found[1], str(found[0]))
            self.before = type(self.config).from_mapping(found[1]["config"], str(found[0]))
        self._resolve(None if found is None else found[1])
        if found is None:
            return 0, None
        check_same_run(self.config, found[1], str(found[0]))
        return int(found[1]["step"]), found

    def _check_places(self) -> None:
        """Refuse a file in a folder's place, which would otherwise be found out when all is learned."""
        for place in self.places()[1:]:
            there = next((one for one in place.parents if os.path.lexists(one)), None)
            if there is not None and not os.path.isdir(there):
                raise ConfigProblem(f"export_to: expected a folder, found {there}, which is none; name another.")

    def _resolve(self, state: Mapping[str, Any] | None) -> None:
        """Fill in what the configuration leaves to the machine; a run that goes on keeps what it began with."""
        precision = pick_precision(self.config.precision, self.processes.device)
        if state is not None and self.config.precision == "auto":
            precision = type(self.config).from_mapping(state["config"]).precision
        self.config = self.config.with_changes(precision=precision)

    def _checkpoint(self, resume: bool | str) -> Found | None:
        """The checkpoint to go on from, as (file, state), or None to begin anew."""
        any_there = find_checkpoints(self.folder)
        if resume is False and any_there:
            raise ConfigProblem(
                f"{self.folder}: expected a folder without a run, found its checkpoints (the last of step "
                f"{any_there[-1][0]}); resume that run, or choose another name or output."
            )
        found = latest_checkpoint(self.folder, lambda text: self.tell(Warned(text)))
        if found is None and any_there:
            raise ConfigProblem(
                f"{self.folder}: expected a run to resume, found damaged checkpoints only; to start anew, move them "
                "away or choose another name or output."
            )
        if found is None and resume is True:
            raise ConfigProblem(
                f"{self.folder}: expected a checkpoint to go on from, found none; to begin anew set resume auto (in a "
                f"terminal: `{self.config.command}` without --resume), or give another run's name or output."
            )
        if found is not None and int(found[1]["step"]) > self.config.steps:
            return self._stage(found, dict(any_there))
        return found

    def _stage(self, last: Found, there: dict[int, Path]) -> Found:
        """The checkpoint of exactly `steps`, of a run that has done more: any stage that was kept can be finished."""
        steps, done = self.config.steps, int(last[1]["step"])
        kept = [step for step in there if step <= done]
        if steps in there:
            try:
                found = there[steps], load_checkpoint(there[steps])
            except DamagedCheckpoint as problem:
                kept.remove(steps)
                self.tell(Warned(str(problem)))
            else:
                self.tell(
                    Warned(
                        f"{self.folder}: this run has done {done} steps; the finished file is that of step {steps}, "
                        "and the later checkpoints stay."
                    )
                )
                return found
        raise ConfigProblem(
            f"{last[0]}: expected a run of at most {steps} steps, found one that has done {done}; set steps to a stage "
            f"that was kept ({', '.join(map(str, kept))}), raise it, or choose another name for a shorter run."
        )

    def open_reports(self, stack: ExitStack, start: int) -> None:
        """The log, loss curve and TensorBoard of the run's folder, in the first process.

        From here on a failure saves what was learned before it, and is told in the log.
        """
        if self.processes.is_main:
            every, log = self.config.log_every, self.folder / LOG
            # A run that takes no step repeats none.
            again = start if start < self.config.steps else None
            board = TensorBoard(self.folder / BOARD, every, again) if self.config.tensorboard else None
            self.curve = LossCurve(self.plot, read_log(log), start)
            # Files come before the caller: what it shows lies on the disk already.
            files: list[Any] = [LogFile(log, every), *([board] if board else [])]
            for one in files:
                stack.callback(one.close)
            self.listeners[:0] = [*files, self.curve]
        stack.push(self._failed)

    def pace(self, config: Settings, step: int) -> dict[str, float]:
        """What optimizer step `step` (0 is the first) takes from how many steps the run has, by what it is called."""
        return {"the learning rate": rate_at(config, step)}

    def warn_beforehand(self, start: int) -> None:
        """Say what is odd about the run to come: that it cannot go on, a rate that only rises or jumps to another."""
        config, before = self.config, self.before
        if start >= config.steps:
            return
        if config.warmup >= config.steps:
            self.tell(
                Warned(
                    f"the learning rate rises over {config.warmup} steps, and this run has {config.steps}: it ends at "
                    f"{config.steps / config.warmup:.0%} of the rate; lower warmup or raise steps."
                )
            )
        if before is None or start == 0 or before.steps == config.steps:
            return
        was, planned, now = self.pace(before, start - 1), self.pace(before, start), self.pace(config, start)
        moved = [f"{what} was {was[what]:.3g} and is {now[what]:.3g}" for what in now if now[what] != planned[what]]
        if moved:
            self.tell(
                Warned(
                    f"steps was {before.steps} and is {config.steps}: the run goes on as one of {config.steps} steps "
                    f"does there, so that from step {start} to step {start + 1} {' and '.join(moved)}."
                )
            )

    def settle(self, start: int) -> None:
        """A run that begins keeps its configuration for `resume`, and names what lies where its file will go."""
        if start == 0:
            self._write_config()
        for place in self.places():
            if start == 0 and place.exists():
                self.tell(Warned(f"{place} is there already and will be replaced when this run is finished."))

    def go_on(self, learner: Learns, start: int, found: Found | None) -> None:
        """Take the learner on, from a checkpoint where there is one."""
        self.learner = learner
        self.start = self.saved_step = start
        self.saved_at = time.monotonic()
        if found is not None:
            for warning in _taken_on(learner, found):
                self.tell(Warned(warning))
            self._write_config()

    def stopped_early(self, start: int, found: Found | None) -> Result:
        """The end of a run that was asked to stop before its learner was there."""
        self._write_config()
        self.tell(Stopped(start, "" if found is None else str(found[0])))
        return self.result("stopped", start)

    def _write_config(self) -> None:
        """Keep the configuration for `resume`; a run that goes on only once it may: those of a refused one stay out."""
        if self.processes.is_main:
            self.config.write_json(self.folder / CONFIG)

    def _refused(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """At the end of a run in a new folder: where it was refused, its files go; the folder goes with the lock."""
        if isinstance(error, Problem) and not self.under_way:
            clear_refused(self.folder)

    def _failed(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """At the end of a run: when that is an error, save what was learned before it, and say so in the log."""
        if error is None or not self.processes.is_main:
            return
        learner, told = self.learner, _words(error)
        sound = learner is not None and learner.intact and not isinstance(error, NonFiniteLoss)
        if sound and self.processes.world == 1 and learner.step != self.saved_step:
            # Memory may be what ran out: the step that failed lives on in its frames, as do its gradients.
            while error is not None:
                traceback.clear_frames(error.__traceback__)
                error = error.__cause__ or error.__context__
            learner.optimizer.zero_grad(set_to_none=True)
            try:
                self.save(quietly=True)
            except Exception as problem:  # the error that ends the run is the one to raise
                lost = f"the steps after {self.saved_step} could not be saved: {_words(problem)}"
                with suppress(Exception):
                    self.tell(Warned(lost))
        with suppress(Exception):
            self.listeners[0](Failed(0 if learner is None else learner.step, told))  # the log

    # ---- the steps

    def loop(self) -> Result:
        """All steps that are left, and the finished file."""
        config, learner = self.config, self.learner
        if self.anywhere(float(self.should_stop())):
            return self._stop()
        self.under_way = True
        if self.report(learner.step) and learner.step < config.steps:
            return self._stop()
        while learner.step < config.steps:
            outcome = self._step()
            last = learner.step == config.steps
            if last or (config.checkpoint_every and learner.step % config.checkpoint_every == 0) or self._overdue():
                self.save()
            # Who wants to stop gets what is due now when the run goes on, of the last step too.
            if (outcome.stop or self.report(learner.step)) and not last:
                return self._stop()
        return self._finish()

    def _step(self) -> Outcome:
        learner, began = self.learner, time.perf_counter()
        try:
            outcome = learner.take_step(self.should_stop)
        except NonFiniteLoss as problem:
            raise NonFiniteLoss(problem.what, problem.step, problem.names, self._keep_last_good()) from None
        self.recent.append((outcome.loss, time.perf_counter() - began))
        seconds = sum(duration for _, duration in self.recent) / len(self.recent)
        left = seconds * (self.config.steps - outcome.step)
        facts = {
            "step": outcome.step,
            "steps": self.config.steps,
            "loss": outcome.loss,
            "rate": outcome.rate,
            "gradient_norm": outcome.gradient_norm if math.isfinite(outcome.gradient_norm) else None,
            "seconds_per_step": seconds,
            "eta_s": left if len(self.recent) > 1 else None,
        }
        self.tell(Distilled(**facts, parts=dict(outcome.parts)) if outcome.parts else Step(**facts))
        return outcome

    def _overdue(self) -> bool:
        """Whether the last checkpoint is so old that another is due, in all processes alike."""
        if not self.config.checkpoint_minutes:
            return False
        late = time.monotonic() - self.saved_at >= 60.0 * self.config.checkpoint_minutes
        return late if self.processes.world == 1 else self.anywhere(float(late))

    def _keep_last_good(self) -> str:
        """Save the weights before a step that failed, if they are sound; the advice to give."""
        if not self.learner.step:  # nothing is saved, and no checkpoint binds the settings
            return f"nothing was learned yet; {self.blame}."
        advice = f"{self.blame}, and start a run of another name"
        if self.learner.has_finite_weights():
            path = checkpoint_path(self.folder, self.learner.step)
            if self.learner.step != self.saved_step:
                self.save()
            return f"the last good weights, of step {self.learner.step}, are in {path}; {advice}."
        before = [path for step, path in find_checkpoints(self.folder) if step <= self.learner.step]
        return f"the last good weights are in {before[-1]}; {advice}." if before else f"{advice}."

    def save(self, quietly: bool = False) -> Path:
        """Write a checkpoint of the last finished step; damaged weights never replace good ones."""
        learner = self.learner
        path = checkpoint_path(self.folder, learner.step)
        if not learner.has_finite_weights():
            names = learner.names_at(max(0, learner.step - 1))
            raise NonFiniteLoss("the weights", learner.step, names, self._keep_last_good())
        if self.processes.is_main:
            save_checkpoint(path, {**learner.state(), "start": self.begun()})
            prune_checkpoints(self.folder, learner.step, self.config.keep_checkpoints)
        self.saved_step, self.saved_at = learner.step, time.monotonic()
        if not quietly:
            self.tell(Saved(learner.step, str(path)))
        self.processes.wait()
        return path

    # ---- the end

    def _stop(self) -> Result:
        step = self.learner.step
        if step != self.saved_step:
            self.save()
        self.tell(Stopped(step, str(checkpoint_path(self.folder, step)) if step > 0 else ""))
        return self.result("stopped", step)

    def _finish(self) -> Result:
        """Write the finished file into the run's folder, and where else it is wanted."""
        places = self.places()
        if self.processes.is_main:
            self.write(places)
        self.processes.wait()
        self.tell(Finished(self.learner.step, str(places[-1])))
        return self.result("finished", self.learner.step, places[-1])

    def result(self, status: str, step: int, path: Path | None = None) -> Result:
        loss = sum(loss for loss, _ in self.recent) / len(self.recent) if self.recent else None
        # An earlier run with grids may have left some, also of later steps; who wants none now gets none.
        found = (GRID_NAME.fullmatch(path.name) for path in (self.folder / SAMPLES).glob("step-*.png"))
        steps = [int(match[1]) for match in found if match] if self.config.sample_every else []
        last = max((at for at in steps if at <= step), default=None)
        return Result(
            status,
            step,
            path,
            self.folder,
            loss,
            None if last is None else self.samples_path(last),
            self.plot if self.plot.exists() else None,
        )

    # ---- small things

    def places(self) -> list[Path]:
        """Where the finished file goes: the run's folder, and `export_to`."""
        folders = [self.folder, *([Path(self.config.export_to)] if self.config.export_to else [])]
        return [folder / f"{self.config.name}.safetensors" for folder in folders]

    def samples_path(self, step: int) -> Path:
        return self.folder / SAMPLES / f"step-{step:06d}.png"

    def anywhere(self, flag: float) -> bool:
        """Whether any process raised its flag."""
        return bool(self.processes.total(torch.tensor([flag], device=self.processes.device)).item())

    def tell(self, event: Event) -> None:
        """Report to all listeners, from the first process; only called between steps."""
        if self.processes.is_main:
            for listener in self.listeners:
                listener(event)


def has_learned(folder: Path) -> bool:
    """Whether the run in a folder ever finished a step, by its log and checkpoints."""
    told = read_log(folder / LOG)
    return bool(find_checkpoints(folder)) or any(
        isinstance(event, (Step, Saved, Failed)) and event.step > 0 for event in told
    )


def clear_refused(folder: Path) -> None:
    """Delete what a run wrote into its folder before it was refused; what others put there stays."""
    for name in WRITTEN:
        with suppress(OSError):
            (folder / name).unlink()
    for name in (SAMPLES, FOLDER, BOARD):
        shutil.rmtree(folder / name, ignore_errors=True)


def check_resume(resume: bool | str) -> None:
    """Raise ConfigProblem for anything but True, False and "auto"."""
    if resume not in RESUME:
        raise ConfigProblem(f"resume: expected True, False or 'auto', found {resume!r}.")


def check_same_kind(config: Settings, state: Mapping[str, Any], source: str) -> None:
    """Raise ConfigProblem for the checkpoint of another kind of run, which has other settings."""
    if configuration_kind(state["config"]) is not type(config):
        raise ConfigProblem(
            f"{source}: expected a run of `{config.command}`, found one of another command; choose another name or "
            "output."
        )


def check_same_run(config: Settings, state: Mapping[str, Any], source: str) -> None:
    """Raise ConfigProblem, naming the fields, when a state was trained with other settings that change the numbers."""
    different = config.differences(type(config).from_mapping(state["config"], source))
    if different:
        listed = ", ".join(f"{name} was {old!r} and is {new!r}" for name, (new, old) in different.items())
        raise ConfigProblem(
            f"{source}: expected a run of the same configuration, but {listed}; use the earlier values, or another "
            "name or output folder for a new run."
        )


def take_over(
    state: Mapping[str, Any],
    source: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
) -> None:
    """Weights, optimizer and average as a state holds them, copied out of its file. Raises ConfigProblem for others."""
    before = state["weights"]
    if {name: one.shape for name, one in parameters.items()} != {name: one.shape for name, one in before.items()}:
        raise ConfigProblem(f"{source}: expected weights of the same network, found others; start a new run.")
    with torch.no_grad():
        for name, one in parameters.items():
            one.copy_(state["weights"][name])
    restore(optimizer, state["optimizer"])
    if average is not None:
        average.load(state["average"])


def warn_of_other_facts(state: Mapping[str, Any], facts: Mapping[str, str], source: str) -> list[str]:
    """A warning where a state was written under circumstances that can change last bits; none otherwise."""
    changed = different_facts(state["facts"], facts)
    if not changed:
        return []
    return [
        f"{source} was written under other circumstances ({changed}); the run goes on, but its weights can differ from "
        "an uninterrupted run's in their last bits."
    ]


def _taken_on(learner: Learns, found: Found) -> list[str]:
    """`learner.load`, which may expect what a trainer writes; a state of other parts raises ConfigProblem."""
    try:
        return learner.load(found[1], str(found[0]))
    except Problem:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ConfigProblem(
            f"{found[0]}: expected a checkpoint that this trainer wrote, found one of other parts ({error!r}); move it "
            "away to go on from an earlier one."
        ) from error


def _words(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def due(step: int, every: int, steps: int) -> bool:
    """Step 0, every `every` steps, and the last; never with every 0."""
    return every > 0 and (step % every == 0 or step == steps)
