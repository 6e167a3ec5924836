"""A run of any kind: lock, settle, announce, step, report, save, stop, fail, resume, finish.

What is trained, and with which loss, is a `Learner`'s business. A kind of run is a subclass of `Run` that opens its
models, makes its learner, draws its samples and writes its finished file; all leave the same folder behind and go on in
the same way.
"""

from __future__ import annotations

import os
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import torch

from ...guidance.errors import Problem
from ...guidance.files.atomic import clear_unfinished
from .checkpoints import FOLDER
from .events import Event, Failed, Finished, Listener, Sampled, Started, Stopped, Warned
from .folder import BOARD, CONFIG, LOG, PLOT, SAMPLES, clear_refused, last_samples, samples_path
from .grids import save_png
from .learner import Config, Learner, NonFiniteLoss, Outcome, check_same_settings
from .lock import NAME as LOCK
from .lock import locked
from .log import LogFile, read_log
from .loss_curve import LossCurve
from .optimizers import rate_at
from .processes import open_processes, pick_precision
from .reports import Progress, Report, Reports
from .resuming import Found, checkpoint_to_resume, forewarnings
from .saving import Saver
from .settings import ConfigProblem
from .tensorboard import TensorBoard

if TYPE_CHECKING:
    from PIL.Image import Image


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


class Run(ABC, Generic[Config]):
    """One run: its settings, its folder, its listeners, and the order in which everything happens."""

    advice: ClassVar[str] = "lower the learning rate"  # what to do about numbers that are not finite

    def __init__(self, config: Config, listener: Listener, should_stop: Callable[[], bool]) -> None:
        self.config, self.should_stop = config, should_stop
        self.processes = open_processes(config.device)
        self.folder = config.run_folder.absolute()
        self.listeners: list[Listener] = [listener]
        self.curve = LossCurve(self.folder / PLOT)
        self.progress = Progress(config.steps)
        self._saver: Saver | None = None  # once there is a learner
        self._took_part = False  # whether more was done than to prepare
        self.source = ""  # the checkpoint to go on from, once it is found
        self._before: Config | None = None  # the settings of the checkpoint to go on from

    # ---- what a kind of run must say, and may

    @abstractmethod
    def open(self) -> Sequence[str]:
        """Open the models that the settings name; what is to be said of them, as warnings."""

    @abstractmethod
    def announce(self, start: int) -> tuple[int, str]:
        """(number of images, what the run trains and needs) before anything takes long; may refuse the settings."""

    @abstractmethod
    def make_learner(self, stack: ExitStack, state: Mapping[str, Any] | None) -> Learner | None:
        """The learner, before it goes on from `state`; None when somebody asked to stop meanwhile.

        stack: closed at the end of the run.
        """

    @abstractmethod
    def write(self, places: Sequence[Path]) -> None:
        """Write the finished file to each place; called in the first process."""

    def check(self) -> None:
        """Refuse what would otherwise be found out late, before anything is written."""

    def settle(self, state: Mapping[str, Any] | None) -> None:
        """Fill in what the settings leave to the machine; a run that goes on from `state` keeps what it began with."""
        precision = pick_precision(self.config.precision, self.processes.device)
        if state is not None and self.config.precision == "auto":
            precision = type(self.config).from_mapping(state["config"]).precision
        self.config = self.config.with_changes(precision=precision)

    def remark(self, start: int) -> None:
        """Warn of what is odd about the settings, or refuse them, once the run is announced."""

    def pace(self, config: Config, step: int) -> dict[str, float]:
        """What optimizer step `step` (0 is the first) takes from how many steps the run has, by name."""
        return {"the learning rate": rate_at(config, step)}

    def begun(self) -> dict[str, Any]:
        """What is settled when a run begins and kept with its checkpoints, under "start"."""
        return {}

    def make_reports(self) -> list[Report]:
        """What is reported beside the steps (`sample_report` for grids), once the learner is there."""
        return []

    # ---- the whole

    def __call__(self, resume: bool | str = "auto", dry_run: bool = False) -> Result:
        """Train to the end, or until somebody asks to stop; `train` in domain/train.py says what the arguments mean.

        Raises ConfigProblem, FileProblem, NonFiniteLoss and what the kind of run raises.
        """
        # ComfyUI runs its nodes in inference mode, in which nothing can be trained.
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            self.check()
            if not dry_run:
                self._take_folder(stack)
            start, found = self._begin(resume)
            notes = self.open()
            if not dry_run:
                self._open_reports(stack, start)
            self._announce(start, notes)
            if dry_run:
                return Result("dry_run", 0, None, self.folder)
            if start == 0:
                self._write_config()
                for place in self.places():
                    if place.exists():
                        self.warn(f"{place} is there already and will be replaced when this run is finished.")
            learner = self.make_learner(stack, None if found is None else found[1])
            if learner is None:
                self._write_config()
                self.tell(Stopped(start, "" if found is None else str(found[0])))
                return self._result("stopped", start)
            if found is not None:
                for warning in learner.load(found[1], str(found[0])):
                    self.warn(warning)
                self._write_config()
            del found  # what lies in the checkpoint's file has been copied out of it
            self._saver = saver = Saver(self.config, learner, self.begun(), self.tell, self.advice)
            reports = Reports(self.make_reports(), start, self.config.steps, self.processes, self.tell)
            return self._loop(learner, saver, reports)

    # ---- beginning

    def _take_folder(self, stack: ExitStack) -> None:
        """Hold the run's folder while `stack` is open, and clear away what killed runs left half-written.

        A run that is refused before its first step leaves no folder behind that was not there before.
        """
        if self.processes.is_main:
            new = not self.folder.exists()
            stack.enter_context(locked(self.folder))
            if new and not any(path.name != LOCK for path in self.folder.iterdir()):
                stack.push(self._refused)
            for folder in (self.folder, self.folder / FOLDER, self.folder / SAMPLES):
                clear_unfinished(folder)
            for place in self.places()[1:]:
                clear_unfinished(place.parent, place.name)
        self.processes.wait()

    def _begin(self, resume: bool | str) -> tuple[int, Found | None]:
        """The step to go on from and its checkpoint as (file, state), None to begin anew; settles the settings."""
        for place in self.places()[1:]:  # else found out when all is learned
            there = next((parent for parent in place.parents if os.path.lexists(parent)), None)
            if there is not None and not os.path.isdir(there):
                raise ConfigProblem(f"export_to: expected a folder, found {there}, which is none; name another.")
        found = checkpoint_to_resume(self.config, self.folder, resume, self.warn)
        if found is None:
            self.settle(None)
            return 0, None
        path, state = found
        self.source = str(path)
        self._before = type(self.config).from_mapping(state["config"], str(path))
        self.settle(state)
        check_same_settings(self.config, state, str(path))
        return int(state["step"]), found

    def _open_reports(self, stack: ExitStack, start: int) -> None:
        """The log, loss curve and TensorBoard of the run's folder, in the first process.

        From here on a failure saves what was learned before it, and is told in the log.
        """
        if self.processes.is_main:
            every, log = self.config.log_every, self.folder / LOG
            # A run that takes no step repeats none.
            again = start if start < self.config.steps else None
            board = TensorBoard(self.folder / BOARD, every, again) if self.config.tensorboard else None
            self.curve = LossCurve(self.folder / PLOT, read_log(log), start)
            # Files come before the caller: what it shows lies on the disk already.
            files: list[Any] = [LogFile(log, every), *([board] if board else [])]
            for file in files:
                stack.callback(file.close)
            self.listeners[:0] = [*files, self.curve]
        stack.push(self._failed)

    def _announce(self, start: int, notes: Sequence[str]) -> None:
        for note in notes:
            self.warn(note)
        config = self.config
        images, text = self.announce(start)
        self.tell(Started(config.kind, str(self.folder), config.to_dict(), start, config.steps, images, text))
        for warning in forewarnings(config, self._before, start, self.pace):
            self.warn(warning)
        self.remark(start)

    def _write_config(self) -> None:
        """Keep the settings for `resume`; a run that goes on only once it may: those of a refused one stay out."""
        if self.processes.is_main:
            self.config.write_json(self.folder / CONFIG)

    # ---- the steps

    def _loop(self, learner: Learner, saver: Saver, reports: Reports) -> Result:
        """All steps that are left, and the finished file."""
        steps = self.config.steps
        if self.processes.anywhere(self.should_stop()):
            return self._stop(saver)
        self._took_part = True
        if reports(learner.step, self.should_stop) and learner.step < steps:
            return self._stop(saver)
        while learner.step < steps:
            outcome = self._step(learner, saver)
            saver.save_if_due()
            # Whoever asks to stop gets what is due now when the run goes on, of the last step too.
            if (outcome.stop or reports(learner.step, self.should_stop)) and learner.step < steps:
                return self._stop(saver)
        places = self.places()
        if self.processes.is_main:
            self.write(places)
        self.processes.wait()
        self.tell(Finished(learner.step, str(places[-1])))
        return self._result("finished", learner.step, places[-1])

    def _step(self, learner: Learner, saver: Saver) -> Outcome:
        began = time.perf_counter()
        try:
            outcome = learner.take_step(self.should_stop)
        except NonFiniteLoss as problem:
            raise NonFiniteLoss(problem.what, problem.step, problem.names, saver.keep_last_good()) from None
        self.tell(self.progress.took(outcome, time.perf_counter() - began))
        return outcome

    def sample_report(self, draw: Callable[[int], Image | None]) -> Report:
        """A report of sample grids; draw(step): the picture, None where it was broken off."""

        def make(step: int) -> Event | None:
            picture = draw(step)
            return None if picture is None else Sampled(step, str(save_png(picture, samples_path(self.folder, step))))

        return Report(self.config.sample_every, make, lambda step: samples_path(self.folder, step).exists())

    # ---- the end

    def _stop(self, saver: Saver) -> Result:
        saver.save_if_new()
        step = saver.saved_step
        self.tell(Stopped(step, str(saver.path) if step > 0 else ""))
        return self._result("stopped", step)

    def _result(self, status: str, step: int, path: Path | None = None) -> Result:
        # Grids that an earlier process drew are not shown to somebody who wants none now.
        samples = last_samples(self.folder, step) if self.config.sample_every else None
        plot = self.folder / PLOT
        return Result(status, step, path, self.folder, self.progress.loss, samples, plot if plot.exists() else None)

    def _refused(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """At the end of a run in a new folder: where it was refused, its files go; the folder goes with the lock."""
        if isinstance(error, Problem) and not self._took_part:
            clear_refused(self.folder)

    def _failed(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """At the end of a run: when that is an error, save what was learned before it, and say so in the log."""
        if error is None or not self.processes.is_main:
            return
        saver, told = self._saver, _words(error)
        if saver is not None and self.processes.world == 1 and not isinstance(error, NonFiniteLoss):
            # Memory may be what ran out: the step that failed lives on in its frames, as do its gradients.
            while error is not None:
                traceback.clear_frames(error.__traceback__)
                error = error.__cause__ or error.__context__
            try:
                saver.save_after_failure()
            except Exception as problem:  # the error that ends the run is the one to raise
                with suppress(Exception):
                    self.warn(f"the steps after {saver.saved_step} could not be saved: {_words(problem)}")
        with suppress(Exception):
            self.listeners[0](Failed(0 if saver is None else saver.learner.step, told))  # the log

    # ---- small things

    def places(self) -> list[Path]:
        """Where the finished file goes: the run's folder, and `export_to`."""
        folders = [self.folder, *([Path(self.config.export_to)] if self.config.export_to else [])]
        return [folder / f"{self.config.name}.safetensors" for folder in folders]

    def tell(self, event: Event) -> None:
        """Report to all listeners, from the first process; only called between steps."""
        if self.processes.is_main:
            for listener in self.listeners:
                listener(event)

    def warn(self, text: str) -> None:
        """Report a warning."""
        self.tell(Warned(text))


def _words(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
