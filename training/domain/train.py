"""A training run from images to a domain model: what the command line and the node call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...guidance.files import DTYPES, FileProblem
from ..data.latent_dataset import LatentDataset
from ..engine.events import Listener, Preparing
from ..engine.optimizers import check_optimizer
from ..engine.reports import Report
from ..engine.run import Result
from ..prior.opening import open_prior
from ..prior.prior import ImageSize, Prior
from ..prior.same_prior import prior_traits
from .config import TrainConfig
from .estimate import estimate
from .finished import write_domain_model, write_low_rank
from .held_out import held_out_loss
from .learner import DomainLearner
from .picture_run import Images, PictureRun
from .previews import Preview
from .trainee import Trainee, start_model

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...guidance.networks.unet import UNet

__all__ = ["Result", "train"]


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


class _Training(PictureRun[TrainConfig]):
    """One call of `train`."""

    advice = "lower the learning rate or look at these images"
    learner: DomainLearner
    held_out: LatentDataset

    # ---- beginning

    def check(self) -> None:
        check_optimizer(self.config.optimizer)
        super().check()

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
        count = self.count_images()
        self.needs = estimate(prior, config, count, device=self.processes.device, processes=self.processes.world)
        return count, self.needs.to_text()

    def make_learner(self, stack: ExitStack, state: Mapping[str, Any] | None) -> DomainLearner | None:
        dataset = self.open_pictures()
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
        config, prior, trainee, device = self.config, self.prior, self.trainee, self.processes.device
        wanted = config.sample_every and self.processes.is_main
        preview = Preview(prior, config, device, self.batch) if wanted else None

        def loss(unet: UNet, latents: list[Tensor], sizes: list[ImageSize], keys: list[str]):
            return held_out_loss(
                unet,
                prior.schedule,
                prior.prediction_type,
                latents,
                lambda sizes: prior.conditioning(sizes, trainee.text),
                sizes,
                keys=keys,
                seed=config.seed,
                batch=self.batch,
                device=device,
                dtype=DTYPES[config.precision],
                should_stop=self.should_stop,
            )

        def draw(unet: UNet, title: str) -> Image | None:
            assert preview is not None
            return preview.draw(unet, trainee.text, title=title, should_stop=self.should_stop)

        return [self.held_out_report(self.held_out, loss), self.grid_report(draw)]

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
