"""A training run from images to a domain model: what the command line and the node call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...guidance.files import DTYPES, FileProblem
from ..data.latent_dataset import LatentDataset
from ..data.patterns import expanded
from ..data.preparing import Callbacks, open_dataset
from ..data.problems import CachingStopped, Cancelled, DataProblem
from ..data.sources import find_images
from ..data.walking import Watch
from ..engine.events import Event, Listener, Preparing, Validated
from ..engine.memory import is_memory_problem
from ..engine.optimizers import check_optimizer
from ..engine.processes import check_batch
from ..engine.reports import Report
from ..engine.run import Result, Run
from ..engine.settings import ConfigProblem
from ..engine.tracing import size_text
from ..prior.opening import open_prior
from ..prior.prior import ImageSize, Prior
from ..prior.same_prior import prior_traits
from .config import TrainConfig
from .estimate import HOPELESS, Estimate, estimate
from .finished import write_domain_model, write_low_rank
from .held_out import held_out_loss
from .learner import DomainLearner
from .previews import Preview
from .trainee import Trainee, start_model

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Result", "train"]

SMALL = 0.75  # of the side in pixels that the prior was made for
Images = Sequence[Tensor] | Tensor | None


def train(
    config: TrainConfig,
    *,
    resume: bool | str = "auto",
    base: Prior | None = None,
    images: Images = None,
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
    return _Training(config, listener, should_stop, base, images)(resume, dry_run)


def _begun(state: Mapping[str, Any] | None, source: str = "") -> dict[str, dict[str, Any]]:
    """What was settled when a run began (`_Training.begun`), out of its checkpoint, `source`. Raises FileProblem."""
    start = (state or {}).get("start", {})
    begun = {"constants": {}, "null_text_error": {}} | (start if isinstance(start, dict) else {"constants": start})
    for name, kind in (("constants", Tensor), ("null_text_error", (int, float))):
        if type(begun[name]) is not dict or not all(isinstance(value, kind) for value in begun[name].values()):
            raise FileProblem(f"{source}: expected a checkpoint of this trainer, found other {name}; delete it.")
    return begun


class _MeasuringStopped(Exception):
    """Somebody asked to stop while the prior was measured."""


class _Training(Run[TrainConfig]):
    """One call of `train`."""

    advice = "lower the learning rate or look at these images"
    prior: Prior
    learner: DomainLearner
    trainee: Trainee
    held_out: LatentDataset

    def __init__(
        self,
        config: TrainConfig,
        listener: Listener,
        should_stop: Callable[[], bool],
        prior: Prior | None,
        images: Images,
    ) -> None:
        super().__init__(config, listener, should_stop)
        self.given, self.images = prior, images
        self.needs: Estimate | None = None  # known in the first process

    # ---- beginning

    def check(self) -> None:
        config = self.config
        check_optimizer(config.optimizer)
        check_batch(config.batch_size, self.processes.world)
        for folder in config.data:
            # Nothing there, or somebody asked to stop: told when images are looked for.
            with suppress(DataProblem, Cancelled):
                if os.path.realpath(self.folder) in map(os.path.realpath, expanded(folder, self._watch())):
                    raise ConfigProblem(
                        f"output: expected a folder of the run's own, found {self.folder}, the folder of images, which "
                        "would learn its own sample grids; choose another output."
                    )

    def _watch(self) -> Watch:
        return Watch(self.should_stop, self.config.within or None)

    def settle(self, state: Mapping[str, Any] | None) -> None:
        super().settle(state)
        if not self.config.validate_every:
            # Nobody looks at their loss: a new run learns from all images, one that goes on from those of before.
            share = 0.0 if state is None else TrainConfig.from_mapping(state["config"]).held_out_share
            self.config = self.config.with_changes(held_out_share=share)

    def open(self) -> Sequence[str]:
        config = self.config
        self.prior = self.given or open_prior(
            config.base, vae=config.vae, tokenizer=config.tokenizer, prediction=config.prediction
        )
        return self.prior.notes

    def announce(self, start: int) -> tuple[int, str]:
        config, prior = self.config, self.prior
        # In every process: one that failed alone would let the others wait.
        prior.check_prompts((config.caption, *(config.sample_prompts if config.sample_every else ())))
        if not self.processes.is_main:
            return 0, ""
        count = 0
        with suppress(Cancelled):
            count = len(find_images(config.data, self._watch())) if config.data else 0
        given = [self.images] if isinstance(self.images, Tensor) else self.images or ()
        count += sum(len(batch) if batch.ndim == 4 else 1 for batch in given)
        self.needs = estimate(prior, config, count, device=self.processes.device, processes=self.processes.world)
        return count, self.needs.to_text()

    def remark(self, start: int) -> None:
        config, needs = self.config, self.needs
        if start >= config.steps or needs is None:
            return
        for remark in _remarks(config, self.prior):
            self.warn(remark)
        too_much = needs.available is not None and needs.peak > HOPELESS * needs.available
        if too_much and self.processes.device.type == "cpu":
            # Other devices say that memory ran out; here the system would kill the process, and whatever else it holds
            # (ComfyUI), without a word.
            raise ConfigProblem(
                f"Expected a run that fits into memory, found that it needs about {size_text(needs.peak)} with "
                f"batch_size {config.batch_size} at resolution {config.resolution}. {needs.advice}"
            )

    def make_learner(self, stack: ExitStack, state: Mapping[str, Any] | None) -> DomainLearner | None:
        dataset = self._dataset()
        if dataset is None:
            return None
        learning, self.held_out = dataset.split(self.config.held_out_share)
        trainee = self._trainee(_begun(state, self.source))
        if trainee is None:
            return None
        self.trainee, prior = trainee, self.prior
        learner = DomainLearner(
            self.config,
            trainee.unet,
            learning,
            prior.schedule,
            prior.prediction_type,
            lambda sizes: prior.conditioning(sizes, trainee.text),
            prior=prior.prior_hash,
            traits=prior_traits(prior, trainee.text),
            processes=self.processes,
        )
        stack.callback(learner.close)
        self.learner = learner
        return learner

    def begun(self) -> dict[str, Any]:
        return {"constants": dict(self.trainee.constants), "null_text_error": dict(self.trainee.null_text_error)}

    def _dataset(self) -> LatentDataset | None:
        """The images as latents; None when somebody asked to stop meanwhile."""
        dataset, stopped = None, False
        try:
            with self.prior.autoencoder_on(self.processes.device):
                dataset = open_dataset(
                    self.config,
                    self.prior,
                    self.images,
                    Callbacks(
                        progress=lambda done, total: self.tell(Preparing("encoding images", done, total)),
                        should_stop=self.should_stop,
                        warn=self.warn,
                    ),
                    turn=self.processes.rank,
                    turns=self.processes.world,
                )
        except CachingStopped:
            stopped = True
        except (RuntimeError, MemoryError) as problem:
            if not is_memory_problem(problem):
                raise
            # The traceback holds the pictures that did not fit.
            raise DataProblem(
                f"Encoding the images ran out of memory at {self.config.resolution} px; set caching_batch to 1 (it "
                "counts on GPUs alone), close other programs that use the device, or train at a lower resolution."
            ) from problem.with_traceback(None)
        if self.processes.anywhere(stopped) or dataset is None:
            return None
        for note in dataset.notes:
            self.warn(note)
        return dataset

    def _trainee(self, begun: Mapping[str, Any]) -> Trainee | None:
        """The UNet that learns; None when somebody asked to stop meanwhile.

        begun: what was settled when a run began that goes on now: the prior is measured (form constant) only then.
        """

        def measured(done: int, total: int) -> None:
            self.tell(Preparing("measuring the prior", done, total))
            if self.should_stop():
                raise _MeasuringStopped

        config, trainee = self.config, None
        with suppress(_MeasuringStopped):
            trainee = start_model(
                self.prior,
                config.form,
                config.train,
                caption=config.caption,
                additions=config.additions,
                gradient_checkpointing=config.gradient_checkpointing,
                resolution=config.resolution,
                seed=config.seed,
                device=self.processes.device,
                # Copies: the checkpoint's file must not stay open, nor be read again.
                constants={name: tensor.clone() for name, tensor in begun["constants"].items()} or None,
                null_text_error=begun["null_text_error"],
                on_probe=measured,
            )
        return None if self.processes.anywhere(trainee is None) else trainee

    # ---- what becomes of it

    def make_reports(self) -> list[Report]:
        return [self._held_out_report(), self._grid_report()]

    @property
    def _batch(self) -> int:
        """What this process has memory for."""
        return max(1, self.config.batch_size // self.processes.world)

    def _held_out_report(self) -> Report:
        """The loss on held-out images, with the averaged weights."""
        config, prior, held_out = self.config, self.prior, self.held_out
        every = config.validate_every if len(held_out) else 0
        indices = range(len(held_out) if every and self.processes.is_main else 0)
        latents = [held_out.mean(index) for index in indices]
        sizes = [
            ImageSize(*held_out.size_of(index), (latent.shape[-2] * prior.factor, latent.shape[-1] * prior.factor))
            for index, latent in enumerate(latents)
        ]
        keys = [held_out.content_of(index) for index in indices]

        def validate(step: int) -> Event | None:
            with self.trainee.using(self.learner.values()) as unet:
                loss, levels = held_out_loss(
                    unet,
                    prior.schedule,
                    prior.prediction_type,
                    latents,
                    lambda sizes: prior.conditioning(sizes, self.trainee.text),
                    sizes,
                    keys=keys,
                    seed=config.seed,
                    batch=self._batch,
                    device=self.processes.device,
                    dtype=DTYPES[config.precision],
                    should_stop=self.should_stop,
                )
            return Validated(step, loss, {str(level): value for level, value in levels.items()}) if levels else None

        return Report(every, validate, lambda step: step in self.curve.held_out)

    def _grid_report(self) -> Report:
        """Sample grids, with the averaged weights."""
        config, device = self.config, self.processes.device
        wanted = config.sample_every and self.processes.is_main
        preview = Preview(self.prior, config, device, self._batch) if wanted else None

        def draw(step: int) -> Image | None:
            assert preview is not None
            with self.trainee.using(self.learner.values()) as unet:
                title = f"{config.name}, step {step}"
                return preview.draw(unet, self.trainee.text, title=title, should_stop=self.should_stop)

        return self.sample_report(draw)

    def write(self, places: Sequence[Path]) -> None:
        config, trainee, learner = self.config, self.trainee, self.learner
        values = learner.values()
        facts: dict[str, Any] = {"config": config, "steps": learner.step, "dataset_size": len(learner.dataset)}
        for place in places:
            if trainee.form == "full" and trainee.train == "low_rank":
                write_low_rank(place, trainee, self.prior, values=values, **facts)
            else:
                write_domain_model(
                    place,
                    trainee.weights(values),
                    trainee.config,
                    self.prior,
                    dataset_hash=learner.dataset.content_hash,
                    ema=config.ema or None,
                    resolution=config.resolution,
                    null_text_error=trainee.null_text_error,
                    **facts,
                )


def _remarks(config: TrainConfig, prior: Prior) -> list[str]:
    """What is odd about learning from a prior with these settings."""
    remarks, native = [], prior.native_resolution
    if prior.zero_snr and config.min_snr_gamma:
        remarks.append(
            "min_snr_gamma gives the last, image-free noise level of a zero-SNR model next to no weight: the overall "
            "brightness is learned from the levels before it; 0 weighs all levels alike."
        )
    if native is not None and config.resolution < SMALL * native:
        remarks.append(
            f"{prior.name} was made for images of {native} px, and this run learns them at {config.resolution} px, "
            f"where its pictures are poor; set resolution to {native} unless that is meant."
        )
    return remarks
