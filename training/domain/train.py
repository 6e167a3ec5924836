"""A training run from images to a domain model: what command line, node and separate process call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...guidance.files import DTYPES
from ..data import (
    CachingStopped,
    Callbacks,
    Cancelled,
    DataProblem,
    DataSettings,
    LatentDataset,
    Watch,
    expanded,
    find_images,
    open_dataset,
)
from ..engine.engine import Engine, Result, check_resume, due
from ..engine.events import Caching, Listener, Measuring, Sampled, Started, Validated, Warned
from ..engine.memory import is_memory_problem
from ..engine.optimizers import check_optimizer
from ..engine.processes import OneProcess, check_batch, open_processes
from ..engine.settings import ConfigProblem
from ..engine.tracing import size_text
from ..prior.opening import open_prior
from ..prior.prior import ImageSize, Prior
from ..prior.same_prior import prior_traits
from .config import TrainConfig
from .estimate import estimate
from .export import write_domain_model, write_low_rank
from .held_out import held_out_loss
from .learner import Learner
from .previews import Preview, save_png
from .trainee import Trainee, start_model

__all__ = ["Result", "train"]

SMALL = 0.75  # of the side in pixels that the prior was made for
HOPELESS = 2.0  # times the memory there is; estimates are within a factor of 1.5


def train(
    config: TrainConfig,
    *,
    resume: bool | str = "auto",
    base: Prior | None = None,
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
    check_resume(resume)
    # ComfyUI runs its nodes in inference mode, in which nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        run = _Run(config, open_processes(config.device), listener, should_stop)
        return run.dry(resume, base, images) if dry_run else run.train(resume, base, images)


class _MeasuringStopped(Exception):
    """Somebody asked to stop while the prior was measured."""


class _Run(Engine):
    """One call of `train`."""

    blame = "lower the learning rate or look at these images"

    def __init__(
        self, config: TrainConfig, processes: OneProcess, listener: Listener, should_stop: Callable[[], bool]
    ) -> None:
        super().__init__(config, processes, listener, should_stop)
        self.trainee: Trainee | None = None

    # ---- beginning

    def dry(self, resume: bool | str, base: Prior | None, images: Sequence[Tensor] | Tensor | None) -> Result:
        """Everything that can be known before the first image is read, also of the run that it would go on with."""
        self._check_beforehand()
        start, _ = self.begin(resume)
        base = base or self._open_prior()
        for note in base.notes:
            self.tell(Warned(note))
        self._announce(start, base, images)
        return Result("dry_run", 0, None, self.folder)

    def train(self, resume: bool | str, base: Prior | None, images: Sequence[Tensor] | Tensor | None) -> Result:
        self._check_beforehand()
        with ExitStack() as stack:
            self.take_place(stack)
            start, found = self.begin(resume)
            state = None if found is None else found[1]
            base = base or self._open_prior()
            self.open_reports(stack, start)
            for note in base.notes:
                self.tell(Warned(note))
            self._announce(start, base, images)
            self.settle(start)
            dataset = self._dataset(base, images)
            if dataset is None:
                return self.stopped_early(start, found)
            learning, held_out = dataset.split(self.config.held_out_share)
            self.base, self.learning = base, learning
            self.trainee = trainee = self._trainee(base, state)
            if trainee is None:
                return self.stopped_early(start, found)
            learner = stack.enter_context(
                Learner(
                    self.config,
                    trainee.unet,
                    learning,
                    base.schedule,
                    base.prediction_type,
                    lambda sizes: base.conditioning(sizes, trainee.text),
                    prior=base.prior_hash,
                    traits=prior_traits(base, trainee.text),
                    processes=self.processes,
                )
            )
            self.go_on(learner, start, found)
            del state, found  # what lies in the checkpoint's file has been copied out of it
            self.reports = _Reports(self, base, held_out)
            return self.loop()

    def _open_prior(self) -> Prior:
        config = self.config
        return open_prior(config.base, vae=config.vae, tokenizer=config.tokenizer, prediction=config.prediction)

    def _check_beforehand(self) -> None:
        """Refuse what would otherwise be found out when all images are encoded, or never."""
        config = self.config
        check_optimizer(config)
        check_batch(config.batch_size, self.processes.world)
        for one in config.data:
            # Nothing there, or somebody asked to stop: told when images are looked for.
            with suppress(DataProblem, Cancelled):
                if os.path.realpath(self.folder) in map(os.path.realpath, expanded(one, self._watch())):
                    raise ConfigProblem(
                        f"output: expected a folder of the run's own, found {self.folder}, the folder of images, which "
                        "would learn its own sample grids; choose another output."
                    )

    def _watch(self) -> Watch:
        return Watch(self.should_stop, self.config.within or None)

    def _resolve(self, state: Mapping[str, Any] | None) -> None:
        super()._resolve(state)
        if not self.config.validate_every:
            # Nobody looks at their loss: a new run learns from all images, one that goes on from those of before.
            share = 0.0 if state is None else TrainConfig.from_mapping(state["config"]).held_out_share
            self.config = self.config.with_changes(held_out_share=share)

    def begun(self) -> dict[str, Any]:
        return {"constants": dict(self.trainee.constants), "null_text_error": dict(self.trainee.null_text_error)}

    def _dataset(self, base: Prior, images: Sequence[Tensor] | Tensor | None) -> LatentDataset | None:
        """The images as latents; None when somebody asked to stop meanwhile."""
        dataset, stopped = None, 0.0
        try:
            with base.autoencoder_on(self.processes.device):
                callbacks = Callbacks(
                    progress=lambda done, total: self.tell(Caching(done, total)),
                    should_stop=self.should_stop,
                    warn=lambda text: self.tell(Warned(text)),
                )
                settings = DataSettings(**{one.name: getattr(self.config, one.name) for one in fields(DataSettings)})
                dataset = open_dataset(
                    settings, base, images, callbacks, turn=self.processes.rank, turns=self.processes.world
                )
        except CachingStopped:
            stopped = 1.0
        except (RuntimeError, MemoryError) as problem:
            if not is_memory_problem(problem):
                raise
            # The traceback holds the pictures that did not fit.
            raise DataProblem(
                f"Encoding the images ran out of memory at {self.config.resolution} px; set caching_batch to 1 (it "
                "counts on GPUs alone), close other programs that use the device, or train at a lower resolution."
            ) from problem.with_traceback(None)
        if self.anywhere(stopped):
            return None
        for note in dataset.notes:
            self.tell(Warned(note))
        return dataset

    def _trainee(self, base: Prior, state: Mapping[str, Any] | None) -> Trainee | None:
        """The UNet that learns; None when somebody asked to stop meanwhile.

        The prior is measured for form constant only when a run begins.
        """

        def measured(done: int, total: int) -> None:
            self.tell(Measuring(done, total))
            if self.should_stop():
                raise _MeasuringStopped

        config, begun = self.config, (state or {}).get("start") or {}
        # Copies: the checkpoint's file must not stay open, nor be read again.
        constants = {name: one.clone() for name, one in (begun.get("constants") or {}).items()}
        trainee = None
        with suppress(_MeasuringStopped):
            trainee = start_model(
                base,
                config.form,
                config.train,
                caption=config.caption,
                rank=config.rank,
                alpha=config.low_rank_alpha,
                gradient_checkpointing=config.gradient_checkpointing,
                resolution=config.resolution,
                seed=config.seed,
                device=self.processes.device,
                constants=constants or None,
                null_text_error=begun.get("null_text_error"),
                on_probe=measured,
            )
        return None if self.anywhere(float(trainee is None)) else trainee

    def _announce(self, step: int, base: Prior, images: Sequence[Tensor] | Tensor | None) -> None:
        """Say what begins and what it will need, before anything takes long."""
        # In every process: one that failed alone would let the others wait.
        base.check_prompts((self.config.caption, *(self.config.sample_prompts if self.config.sample_every else ())))
        if self.processes.is_main:
            config, left = self.config, max(1, self.config.steps - step)
            count = 0
            with suppress(Cancelled):
                count = len(find_images(self.config.data, self._watch())) if self.config.data else 0
            given = [images] if isinstance(images, Tensor) else images or ()
            count += sum(len(one) if one.ndim == 4 else 1 for one in given)
            needs = estimate(
                base,
                config.with_changes(steps=left),
                count,
                device=self.processes.device,
                processes=self.processes.world,
            )
            self.tell(Started(str(self.folder), self.config.to_dict(), step, self.config.steps, count, needs.to_text()))
            self.warn_beforehand(step)
            if step < config.steps and base.zero_snr and config.min_snr_gamma:
                self.tell(
                    Warned(
                        "min_snr_gamma gives the last, image-free noise level of a zero-SNR model next to no weight: "
                        "the overall brightness is learned from the levels before it; 0 weighs all levels alike."
                    )
                )
            native = base.native_resolution
            if step < config.steps and native is not None and config.resolution < SMALL * native:
                self.tell(
                    Warned(
                        f"{base.name} was made for images of {native} px, and this run learns them at "
                        f"{config.resolution} px, where its pictures are poor; set resolution "
                        f"to {native} unless that is meant."
                    )
                )
            too_much = needs.available is not None and needs.peak > HOPELESS * needs.available
            if too_much and self.processes.device.type == "cpu" and step < self.config.steps:
                # Other devices say that memory ran out; here the system would kill the process, and whatever else it
                # holds (ComfyUI), without a word.
                raise ConfigProblem(
                    f"Expected a run that fits into memory, found that it needs about {size_text(needs.peak)} with "
                    f"batch_size {config.batch_size} at resolution {config.resolution}. {needs.advice}"
                )

    # ---- what becomes of it

    def report(self, step: int) -> bool:
        return self.reports(step)

    def write(self, places: Sequence[Path]) -> None:
        config, trainee, base = self.config, self.trainee, self.base
        values = self.learner.values()
        facts: dict[str, Any] = {"config": config, "steps": self.learner.step, "dataset_size": len(self.learning)}
        for place in places:
            if trainee.form == "full" and trainee.train == "low_rank":
                write_low_rank(place, trainee, base, values=values, **facts)
            else:
                write_domain_model(
                    place,
                    trainee.weights(values),
                    trainee.config,
                    base,
                    dataset_hash=self.learning.content_hash,
                    ema=config.ema or None,
                    null_text_error=trainee.null_text_error,
                    **facts,
                )


class _Reports:
    """Held-out loss and sample grids where they are due, with the averaged weights; the first process makes them."""

    def __init__(self, run: _Run, base: Prior, held_out: LatentDataset) -> None:
        config, main = run.config, run.processes.is_main
        self.run, self.base, self.trainee = run, base, run.trainee
        self.batch = max(1, config.batch_size // run.processes.world)  # what this process has memory for
        self.validates = config.validate_every if len(held_out) else 0
        self.held = [held_out.mean(index) for index in range(len(held_out))] if main and self.validates else []
        self.sizes = [
            ImageSize(*held_out.size_of(index), (latent.shape[-2] * base.factor, latent.shape[-1] * base.factor))
            for index, latent in enumerate(self.held)
        ]
        self.keys = [held_out.content_of(index) for index in range(len(self.held))]
        wanted = config.sample_every and main
        self.preview = Preview(base, config, run.processes.device, self.batch) if wanted else None

    def __call__(self, step: int) -> bool:
        """Report on a step, also what a killed run did not come to; True when somebody asked to stop meanwhile."""
        run, config = self.run, self.run.config
        validates, samples = due(step, self.validates, config.steps), due(step, config.sample_every, config.steps)
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
                unet,
                base.schedule,
                base.prediction_type,
                self.held,
                lambda sizes: base.conditioning(sizes, self.trainee.text),
                self.sizes,
                keys=self.keys,
                seed=run.config.seed,
                batch=self.batch,
                device=run.processes.device,
                dtype=DTYPES[run.config.precision],
                should_stop=run.should_stop,
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
