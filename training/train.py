"""A training run from images to a domain model: what command line, node and separate process call."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import clear_unfinished, clear_unfinished_file
from .base import Base, ImageSize, open_base
from .checkpoints import (
    FOLDER,
    checkpoint_path,
    find_checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from .config import ConfigProblem, TrainConfig
from .data import CachingStopped, LatentDataset, find_images, open_dataset
from .estimate import estimate
from .events import (
    Caching,
    Event,
    Failed,
    Finished,
    Listener,
    LogFile,
    LossCurve,
    Sampled,
    Saved,
    Started,
    Step,
    Stopped,
    TensorBoard,
    Validated,
    Warned,
    read_log,
)
from .export import write_domain_model, write_low_rank
from .held_out import held_out_loss
from .learner import DTYPES, Learner, NonFiniteLoss, Outcome, check_same_run
from .origin import origin_of
from .parts import Trainee, start_model
from .previews import Preview, save_png
from .processes import OneProcess, open_processes, pick_precision
from .run_lock import locked

SAMPLES = "samples"
HOPELESS = 2.0  # times the memory there is; estimates are within a factor of 1.5
RECENT = 50  # steps that the reported loss and speed are means of


@dataclass(frozen=True)
class Result:
    """How a run ended.

    status: "finished"; "stopped" (asked to: the step was finished and saved, nothing is lost); "dry_run". path: the
    domain model (in `export_to` where that is set), None unless finished. run: the run's folder. loss: mean of the last
    steps, None without any. samples: the last sample grid; plot: the loss curve; None where there is none.
    """

    status: str
    step: int
    path: Path | None
    run: Path
    loss: float | None = None
    samples: Path | None = None
    plot: Path | None = None


def train(
    config: TrainConfig,
    *,
    resume: bool | str = "auto",
    base: Base | None = None,
    images: Sequence[Tensor] | Tensor | None = None,
    listener: Listener = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
) -> Result:
    """Train a domain model (arXiv 2312.08195, section 3.2) as the configuration says; returns when it is finished.

    resume: "auto" goes on where the run's folder has a checkpoint, else starts; True: there must be one; False: there
    must be none. base: an opened prior instead of `config.base`. images: IMAGE tensors [H, W, 3] in 0..1 to train on
    beside or instead of `config.data`. listener gets every event, in this thread; what it raises ends the run, like any
    other exception, after the last finished step was saved. should_stop is asked after every step (and while images are
    encoded): True finishes the step, saves and returns. dry_run: resolve and estimate, write nothing.

    A run that was killed and goes on ends with the same bits as one that was not (fp32, CPU, same torch, threads,
    machine and cached latents; another VAE is refused, other differences are warnings). In a process started by
    `accelerate launch` it takes part in a run of several; the first process alone writes and reports.

    Raises ConfigProblem for a configuration that does not fit the run, FileProblem for files, DataProblem when no image
    can be used, NonFiniteLoss.
    """
    if resume not in (True, False, "auto"):
        raise ConfigProblem(f"resume: expected True, False or 'auto', found {resume!r}.")
    # ComfyUI runs its nodes in inference mode, in which nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        run = _Run(config, open_processes(config.device), listener, should_stop)
        return run.dry(resume, base, images) if dry_run else run.train(resume, base, images)


class _Run:
    """One call of `train`: who listens, where things are, what is due."""

    def __init__(
        self, config: TrainConfig, processes: OneProcess, listener: Listener, should_stop: Callable[[], bool]
    ) -> None:
        self.config, self.processes, self.should_stop = config, processes, should_stop
        self.folder = config.run_folder.absolute()
        self.plot = self.folder / "loss.png"
        self.listeners: list[Listener] = [listener]
        self.learner: Learner | None = None
        self.trainee: Trainee | None = None
        self.start = self.saved_step = 0
        self.saved_at = time.monotonic()
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # loss, seconds

    # ---- beginning

    def dry(self, resume: bool | str, base: Base | None, images: Sequence[Tensor] | Tensor | None) -> Result:
        """Everything that can be known before the first image is read, also of the run that it would go on with."""
        start, _ = self._begin(resume)
        base = base or open_base(self.config)
        for note in base.notes:
            self.tell(Warned(note))
        self._announce(start, base, images)
        return Result("dry_run", 0, None, self.folder)

    def train(self, resume: bool | str, base: Base | None, images: Sequence[Tensor] | Tensor | None) -> Result:
        with ExitStack() as stack:
            if self.processes.is_main:
                stack.enter_context(locked(self.folder))
                clear_unfinished(self.folder, self.folder / FOLDER, self.folder / SAMPLES)
                for place in self._places()[1:]:
                    clear_unfinished_file(place)
            self.processes.wait()
            start, found = self._begin(resume)
            state = None if found is None else found[1]
            base = base or open_base(self.config)
            self._open_reports(stack, start)
            stack.push(self._failed)
            for note in base.notes:
                self.tell(Warned(note))
            self._announce(start, base, images)
            for place in self._places()[1:]:
                if start == 0 and place.exists():
                    self.tell(Warned(f"{place} is there already and will be replaced when this run is finished."))
            dataset = self._dataset(base, images)
            if dataset is None:
                self.tell(Stopped(start, "" if found is None else str(found[0])))
                return self._result("stopped", start)
            learning, held_out = dataset.split(self.config.held_out)
            self.trainee = trainee = self._trainee(base, state)
            self.learner = stack.enter_context(Learner(
                self.config, trainee.unet, learning, base.schedule, base.prediction_type,
                lambda sizes: base.conditioning(sizes, trainee.text), prior=base.prior_hash,
                origin=origin_of(base, trainee.text), processes=self.processes,
            ))
            self.start = self.saved_step = start
            self.saved_at = time.monotonic()
            if found is not None:
                for warning in self.learner.load(found[1], str(found[0])):
                    self.tell(Warned(warning))
            del state, found  # what lies in the checkpoint's file has been copied out of it
            return self._loop(base, learning, held_out)

    def _begin(self, resume: bool | str) -> tuple[int, tuple[Path, dict[str, Any]] | None]:
        """The step to go on from and its checkpoint as (file, state), None to begin anew; settles the configuration."""
        found = self._checkpoint(resume)
        self._resolve(None if found is None else found[1])
        if found is None:
            return 0, None
        check_same_run(self.config, found[1], str(found[0]))
        return int(found[1]["step"]), found

    def _failed(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """At the end of a run: when that is an error, save what was learned before it, and say so in the log."""
        if error is None or not self.processes.is_main:
            return
        learner = self.learner
        if learner is not None and learner.intact and self.processes.world == 1 and learner.step != self.saved_step:
            with suppress(Exception):  # the error that ends the run is the one to tell
                self._save(quietly=True)
        with suppress(Exception):
            text = " ".join(str(error).split()) or type(error).__name__
            self.listeners[0](Failed(0 if learner is None else learner.step, text))  # the log

    def _resolve(self, state: Mapping[str, Any] | None) -> None:
        """Fill in what the configuration leaves to the machine; a run that goes on keeps what it began with."""
        precision = pick_precision(self.config.precision, self.processes.device)
        if state is not None and self.config.precision == "auto":
            precision = TrainConfig.from_mapping(state["config"]).precision
        self.config = self.config.with_changes(precision=precision)

    def _checkpoint(self, resume: bool | str) -> tuple[Path, dict[str, Any]] | None:
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
                f"{self.folder}: expected a run to resume, found none; start it without resume, or name the run's "
                "folder as output."
            )
        if found is not None and int(found[1]["step"]) > self.config.steps:
            raise ConfigProblem(
                f"{found[0]}: expected a run of at most {self.config.steps} steps, found one that has done "
                f"{found[1]['step']}; raise steps, or choose another name for a shorter run."
            )
        return found

    def _open_reports(self, stack: ExitStack, start: int) -> None:
        """The configuration, log, loss curve and TensorBoard of the run's folder, in the first process."""
        if not self.processes.is_main:
            return
        every, log = self.config.log_every, self.folder / "log.jsonl"
        board = TensorBoard(self.folder / "tensorboard", every) if self.config.tensorboard else None
        self.config.write_json(self.folder / "config.json")
        self.curve = LossCurve(self.plot, read_log(log), start)
        # Files come before the caller: what it shows lies on the disk already.
        files: list[Any] = [LogFile(log, every), *([board] if board else [])]
        for one in files:
            stack.callback(one.close)
        self.listeners[:0] = [*files, self.curve]

    def _dataset(self, base: Base, images: Sequence[Tensor] | Tensor | None) -> LatentDataset | None:
        """The images as latents; None when somebody asked to stop meanwhile."""
        dataset, stopped = None, 0.0
        try:
            with base.on(self.processes.device):
                dataset = open_dataset(
                    self.config, base, images, progress=lambda done, total: self.tell(Caching(done, total)),
                    should_stop=self.should_stop, warn=lambda text: self.tell(Warned(text)),
                    turn=self.processes.rank, turns=self.processes.world,
                )
        except CachingStopped:
            stopped = 1.0
        if self.anywhere(stopped):
            return None
        if dataset.skipped:
            named = "; ".join(f"{name} {reason}" for name, reason in dataset.skipped[:3])
            more = f"; and {len(dataset.skipped) - 3} more" if len(dataset.skipped) > 3 else ""
            self.tell(Warned(f"{len(dataset.skipped)} images cannot be used and are left out: {named}{more}."))
        if dataset.upscaled:
            self.tell(Warned(
                f"{dataset.upscaled} of {len(dataset)} images are smaller than the resolution and were enlarged."
            ))
        return dataset

    def _trainee(self, base: Base, state: Mapping[str, Any] | None) -> Trainee:
        """The UNet that learns; the prior is measured for form constant only when a run begins."""
        config, begun = self.config, (state or {}).get("start") or {}
        # Copies: the checkpoint's file must not stay open, nor be read again.
        constants = {name: one.clone() for name, one in (begun.get("constants") or {}).items()}
        return start_model(
            base, config.form, config.train, caption=config.caption, rank=config.rank, alpha=config.low_rank_alpha,
            gradient_checkpointing=config.gradient_checkpointing, resolution=config.resolution, seed=config.seed,
            device=self.processes.device, constants=constants or None,
            null_text_error=begun.get("null_text_error"),
        )

    def _announce(self, step: int, base: Base, images: Sequence[Tensor] | Tensor | None) -> None:
        """Say what begins and what it will need, before anything takes long."""
        if self.processes.is_main:
            config, left = self.config, max(1, self.config.steps - step)
            count = len(find_images(self.config.data)) if self.config.data else 0
            given = [images] if isinstance(images, Tensor) else images or ()
            count += sum(len(one) if one.ndim == 4 else 1 for one in given)
            needs = estimate(
                base, config.with_changes(steps=left), count, device=self.processes.device,
                processes=self.processes.world,
            )
            self.tell(Started(str(self.folder), self.config.to_dict(), step, self.config.steps, count, needs.to_text()))
            if step < config.steps and config.warmup >= config.steps:
                self.tell(Warned(
                    f"the learning rate rises over {config.warmup} steps, and this run has {config.steps}: it ends at "
                    f"{config.steps / config.warmup:.0%} of the rate; lower warmup or raise steps."
                ))
            if step < config.steps and base.zero_snr and config.min_snr_gamma:
                self.tell(Warned(
                    "min_snr_gamma gives the last, image-free noise level of a zero-SNR model next to no weight: the "
                    "overall brightness is learned from the levels before it; 0 weighs all levels alike."
                ))
            too_much = needs.available is not None and needs.peak > HOPELESS * needs.available
            if too_much and self.processes.device.type == "cpu" and step < self.config.steps:
                # Other devices say that memory ran out; here the system would kill the process, and whatever else it
                # holds (ComfyUI), without a word.
                raise ConfigProblem(
                    f"batch_size: expected a batch that fits into memory, found {self.config.batch_size} images of "
                    f"{self.config.resolution} px, which need about {needs.peak / 2**30:.0f} GiB of the "
                    f"{needs.available / 2**30:.0f} GiB available; take fewer, with more accumulation."
                )

    # ---- the steps

    def _loop(self, base: Base, learning: LatentDataset, held_out: LatentDataset) -> Result:
        config, learner = self.config, self.learner
        report = _Reports(self, base, held_out)
        if self.anywhere(float(self.should_stop())):
            return self._stop()
        if report(learner.step) and learner.step < config.steps:
            return self._stop()
        while learner.step < config.steps:
            outcome = self._step()
            last = learner.step == config.steps
            if last or (config.checkpoint_every and learner.step % config.checkpoint_every == 0) or self._overdue():
                self._save()
            # Who wants to stop gets what is due now when the run goes on, of the last step too.
            if (outcome.stop or report(learner.step)) and not last:
                return self._stop()
        return self._finish(base, learning)

    def _step(self) -> Outcome:
        learner, began = self.learner, time.perf_counter()
        try:
            outcome = learner.take_step(self.should_stop)
        except NonFiniteLoss as problem:
            raise NonFiniteLoss(problem.what, problem.step, problem.names, self._keep_last_good()) from None
        self.recent.append((outcome.loss, time.perf_counter() - began))
        seconds = sum(duration for _, duration in self.recent) / len(self.recent)
        left = seconds * (self.config.steps - outcome.step)
        self.tell(Step(
            outcome.step, self.config.steps, outcome.loss, outcome.rate,
            outcome.gradient_norm if math.isfinite(outcome.gradient_norm) else None, seconds,
            left if len(self.recent) > 1 else None,
        ))
        return outcome

    def _overdue(self) -> bool:
        """Whether the last checkpoint is so old that another is due, in all processes alike."""
        if not self.config.checkpoint_minutes:
            return False
        late = time.monotonic() - self.saved_at >= 60.0 * self.config.checkpoint_minutes
        return late if self.processes.world == 1 else self.anywhere(float(late))

    def _keep_last_good(self) -> str:
        """Save the weights before a step that failed, if they are sound; the advice to give."""
        advice = "lower the learning rate or look at these images, and start a run of another name"
        if self.learner.has_finite_weights():
            path = checkpoint_path(self.folder, self.learner.step)
            if self.learner.step != self.saved_step:
                self._save()
            return f"the last good weights, of step {self.learner.step}, are in {path}; {advice}."
        before = [path for step, path in find_checkpoints(self.folder) if step <= self.learner.step]
        return f"the last good weights are in {before[-1]}; {advice}." if before else f"{advice}."

    def _save(self, quietly: bool = False) -> Path:
        """Write a checkpoint of the last finished step; damaged weights never replace good ones."""
        learner = self.learner
        path = checkpoint_path(self.folder, learner.step)
        if not learner.has_finite_weights():
            batch = learner.plan.batch_for(max(0, learner.step - 1))
            raise NonFiniteLoss("the weights", learner.step, learner.names(batch), self._keep_last_good())
        if self.processes.is_main:
            begun = {"constants": dict(self.trainee.constants), "null_text_error": dict(self.trainee.null_text_error)}
            save_checkpoint(path, {**learner.state(), "start": begun})
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
            self._save()
        self.tell(Stopped(step, str(checkpoint_path(self.folder, step)) if step > 0 else ""))
        return self._result("stopped", step)

    def _finish(self, base: Base, learning: LatentDataset) -> Result:
        """Write the domain model into the run's folder, and where else it is wanted."""
        config, trainee = self.config, self.trainee
        places = self._places()
        if self.processes.is_main:
            values = self.learner.values()
            facts: dict[str, Any] = {"config": config, "steps": self.learner.step, "dataset_size": len(learning)}
            for place in places:
                if trainee.form == "full" and trainee.train == "low_rank":
                    write_low_rank(place, trainee, base, values=values, **facts)
                else:
                    write_domain_model(
                        place, trainee.weights(values), trainee.config, base, dataset_hash=learning.content_hash,
                        ema=config.ema or None, null_text_error=trainee.null_text_error, **facts,
                    )
        self.processes.wait()
        self.tell(Finished(self.learner.step, str(places[-1])))
        return self._result("finished", self.learner.step, places[-1])

    def _result(self, status: str, step: int, path: Path | None = None) -> Result:
        loss = sum(loss for loss, _ in self.recent) / len(self.recent) if self.recent else None
        # An earlier run with grids may have left some; who wants none now gets none.
        grids = sorted((self.folder / SAMPLES).glob("step-*.png")) if self.config.sample_every else []
        return Result(
            status, step, path, self.folder, loss, grids[-1] if grids else None,
            self.plot if self.plot.exists() else None,
        )

    # ---- small things

    def _places(self) -> list[Path]:
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


class _Reports:
    """Held-out loss and sample grids where they are due, with the averaged weights; the first process makes them."""

    def __init__(self, run: _Run, base: Base, held_out: LatentDataset) -> None:
        config, main = run.config, run.processes.is_main
        self.run, self.base, self.trainee = run, base, run.trainee
        self.validates = config.validate_every if len(held_out) else 0
        self.held = [held_out.mean(index) for index in range(len(held_out))] if main and self.validates else []
        self.sizes = [
            ImageSize(*held_out.size_of(index), (latent.shape[-2] * base.factor, latent.shape[-1] * base.factor))
            for index, latent in enumerate(self.held)
        ]
        self.keys = [held_out.content_of(index) for index in range(len(self.held))]
        self.preview = Preview(base, config, run.processes.device) if config.sample_every and main else None

    def __call__(self, step: int) -> bool:
        """Report on a step, also what a killed run did not come to; True when somebody asked to stop meanwhile."""
        run, config = self.run, self.run.config
        validates, samples = _due(step, self.validates, config.steps), _due(step, config.sample_every, config.steps)
        if not validates and not samples:
            return False
        if run.processes.is_main:
            continued = step == run.start > 0  # then this may have been done before
            if validates and not (continued and step in run.curve.held_out):
                self._validate(step)
            if samples and not (continued and run.samples_path(step).exists()):
                self._sample(step)
        return run.anywhere(float(run.should_stop()))

    def _validate(self, step: int) -> None:
        run, base = self.run, self.base
        with self.trainee.using(run.learner.values()) as unet:
            loss, levels = held_out_loss(
                unet, base.schedule, base.prediction_type, self.held,
                lambda sizes: base.conditioning(sizes, self.trainee.text), self.sizes, keys=self.keys,
                seed=run.config.seed, batch=run.config.batch_size, device=run.processes.device,
                dtype=DTYPES[run.config.precision], should_stop=run.should_stop,
            )
        if levels:  # else it was asked to stop
            run.tell(Validated(step, loss, {str(level): value for level, value in levels.items()}))

    def _sample(self, step: int) -> None:
        run, path = self.run, self.run.samples_path(step)
        with self.trainee.using(run.learner.values()) as unet:
            picture = self.preview.draw(
                unet, self.trainee.text, title=f"{run.config.name}, step {step}", should_stop=run.should_stop
            )
        if not run.should_stop():  # a grid that was broken off is drawn again when the run goes on
            run.tell(Sampled(step, str(save_png(picture, path))))


def _due(step: int, every: int, steps: int) -> bool:
    """Step 0, every `every` steps, and the last; never with every 0."""
    return every > 0 and (step % every == 0 or step == steps)
