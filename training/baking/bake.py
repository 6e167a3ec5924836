"""A baking from a prior and its guidance to a LoRA: what the command line and the node call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...guidance.files import DTYPES
from ..data.latent_dataset import LatentDataset
from ..data.preparing import Callbacks, open_dataset
from ..data.problems import Cancelled
from ..data.sources import find_images
from ..data.walking import Watch
from ..domain.finished import write_domain_model, write_low_rank
from ..domain.picture_run import HOPELESS
from ..domain.trainee import Trainee, start_model
from ..engine.events import Event, Listener, Preparing, Validated
from ..engine.processes import check_batch
from ..engine.reports import Report
from ..engine.run import Result, Run
from ..engine.settings import ConfigProblem
from ..engine.tracing import size_text
from ..prior.opening import open_prior
from ..prior.prior import ImageSize, Prior
from .config import BakeConfig
from .estimate import estimate_baking
from .learner import BakeLearner
from .match import unmatched
from .previews import BakePreview
from .prompts import EncodedTexts, prompts_of
from .states import FOLDER, OwnSamples, States, draw_own, keep_own, kept_own
from .teacher import Teacher
from .terms import MODEL, BakedTerm, open_terms

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Result", "bake"]

MOST_HELD_OUT = 64


def bake(
    config: BakeConfig,
    *,
    resume: bool | str = "auto",
    base: Prior | None = None,
    domain: MODEL | None = None,
    terms: Sequence[BakedTerm] = (),
    images: Sequence[Tensor] | Tensor | None = None,
    listener: Listener = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
) -> Result:
    """Bake in-domain guidance (arXiv 2312.08195) into a LoRA as the configuration says; returns when it is finished.

    The finished model adds sum_i w_i (D_i - R_i) to every prediction of the prior, so that plain CFG of any scale is
    in-domain guidance; with target "guided" its prediction is the guided one (arXiv 2210.03142).

    base, domain: an opened prior and domain model (weights and metadata) instead of `config.base` and `config.domain`.
    terms: further ones beside those of `config.terms`. images: IMAGE tensors [H, W, 3] in 0..1 beside or instead of
    `config.data`. resume, listener, should_stop, dry_run and the run's folder are those of `domain.train.train`; a
    baking that is killed and resumed ends with the same bits.

    Raises ConfigProblem for a configuration that does not fit, FileProblem for files, DataProblem when no image can be
    used, NonFiniteLoss.
    """
    return _Baking(config, listener, should_stop, base, domain, terms, images)(resume, dry_run)


class _Baking(Run[BakeConfig]):
    """One call of `bake`."""

    advice = "lower the learning rate"
    prior: Prior
    terms: list[BakedTerm]
    prompts: list[str]
    trainee: Trainee
    learner: BakeLearner
    held_out: LatentDataset | None

    def __init__(
        self,
        config: BakeConfig,
        listener: Listener,
        should_stop: Callable[[], bool],
        prior: Prior | None,
        domain: MODEL | None,
        terms: Sequence[BakedTerm],
        images: Sequence[Tensor] | Tensor | None,
    ) -> None:
        super().__init__(config, listener, should_stop)
        self.given, self.domain, self.more, self.images = prior, domain, list(terms), images

    # ---- beginning

    def check(self) -> None:
        check_batch(self.config.batch_size, self.processes.world)

    def open(self) -> Sequence[str]:
        config = self.config
        self.prior = self.given or open_prior(config.base, vae=config.vae, tokenizer=config.tokenizer)
        self.terms = open_terms(config, self.prior, self.domain, self.more)
        self.prompts = prompts_of(config, self.prior.latent_format)
        self.prior.check_prompts((*self.prompts, *(config.sample_prompts if config.sample_every else ())))
        return self.prior.notes

    def announce(self, start: int) -> tuple[int, str]:
        config = self.config
        count = 0
        if "pictures" in config.states:
            given = [self.images] if isinstance(self.images, Tensor) else self.images or ()
            count = sum(len(batch) if batch.ndim == 4 else 1 for batch in given)
            if not config.data and not count:
                raise ConfigProblem(
                    "data: expected folders of pictures to noise, found none; name some, or choose states own alone."
                )
            with suppress(Cancelled):
                watch = Watch(self.should_stop, config.within or None)
                count += len(find_images(config.data, watch)) if config.data else 0
        if not self.processes.is_main:
            return count, ""
        # Layers that take no addition are refused here, before anything is encoded.
        text, needed, available = estimate_baking(
            self.prior, config, self.terms, self.processes.device, self.processes.world
        )
        if self.processes.device.type == "cpu" and available is not None and needed > HOPELESS * available:
            raise ConfigProblem(
                f"Expected a run that fits into memory, found that it needs about {size_text(needed)} with batch_size "
                f"{config.batch_size} at resolution {config.resolution}; lower them."
            )
        return count, f"matched at {len(self.prompts) or 'no'} prompts beside the empty one\n{text}"

    def make_learner(self, stack: ExitStack, state: Mapping[str, Any] | None) -> BakeLearner | None:
        config, prior, device = self.config, self.prior, self.processes.device
        dtype = DTYPES[config.precision]
        trainee = self.trainee = start_model(
            prior,
            "full",
            config.train,
            additions=config.additions,
            gradient_checkpointing=config.gradient_checkpointing,
            seed=config.seed,
        )
        trainee.unet.to(device)
        before = trainee.unet if config.train == "low_rank" else prior.load_unet(dtype).to(device)
        weight = config.control_weight if config.target == "guided" else 1.0
        teacher = Teacher(prior, before, self.terms, weight, device=device, dtype=dtype)
        texts = EncodedTexts.of(prior, self.prompts)
        try:
            dataset = self._dataset() if "pictures" in config.states else None
            own = {kind: self._own(kind, texts, teacher) for kind in config.states if kind != "pictures"}
            stopped = False
        except Cancelled:
            dataset, own, stopped = None, {}, True
        if self.processes.anywhere(stopped):
            return None
        self.held_out = None
        if dataset is not None:
            share = config.held_out_share if config.validate_every else 0.0
            dataset, self.held_out = dataset.split(share, MOST_HELD_OUT)
        processes = self.processes
        states = States(config, prior, texts, dataset, own, self.prompts, processes.rank, processes.world)
        self.learner = BakeLearner(config, trainee, teacher, states, processes)
        return self.learner

    def _dataset(self) -> LatentDataset:
        """The pictures as latents. Raises Cancelled when somebody asked to stop meanwhile."""
        callbacks = Callbacks(
            progress=lambda done, total: self.tell(Preparing("encoding images", done, total)),
            should_stop=self.should_stop,
            warn=self.warn,
        )
        with self.prior.autoencoder_on(self.processes.device):
            dataset = open_dataset(
                self.config, self.prior, self.images, callbacks, turn=self.processes.rank, turns=self.processes.world
            )
        for note in dataset.notes:
            self.warn(note)
        return dataset

    def _own(self, kind: str, texts: EncodedTexts, teacher: Teacher) -> OwnSamples:
        """What the prior draws itself: kept in the run's folder, drawn when it is not there."""
        config, path = self.config, self.folder / FOLDER / f"{kind}.safetensors"
        facts = [self.prior.prior_hash, self.prompts, config.seed, config.own_count, config.own_steps]
        facts += [config.resolution, config.batch_size]
        if kind == "trajectories":
            facts += [config.target, config.control_weight, *(term.facts for term in self.terms)]
        made_of = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        size = ImageSize((config.resolution, config.resolution))
        found = kept_own(path, made_of, size) if path.is_file() else None
        if found is not None:
            return found
        own = draw_own(
            config,
            texts,
            teacher,
            kind,
            lambda done, total: self.tell(Preparing(f"drawing {kind}", done, total)),
            self.should_stop,
        )
        if self.processes.is_main:
            keep_own(path, own, made_of)
        return own

    # ---- what becomes of it

    def make_reports(self) -> list[Report]:
        return [self._match_report(), self._grid_report()]

    @property
    def _batch(self) -> int:
        """What this process has memory for."""
        return max(1, self.config.batch_size // self.processes.world)

    def _match_report(self) -> Report:
        """The share of the guidance that the averaged weights still lack on held-out pictures."""
        config, held_out = self.config, self.held_out
        every = config.validate_every if held_out is not None and len(held_out) else 0
        indices = range(len(held_out) if held_out is not None and every and self.processes.is_main else 0)
        latents = [held_out.mean(index) for index in indices] if held_out is not None else []
        keys = [held_out.content_of(index) for index in indices] if held_out is not None else []

        def validate(step: int) -> Event | None:
            with self.trainee.using(self.learner.values()) as unet:
                share, levels = unmatched(
                    unet,
                    self.learner.teacher,
                    self.learner.states.texts,
                    latents,
                    keys,
                    seed=config.seed,
                    batch=self._batch,
                    dtype=self.learner.dtype,
                    should_stop=self.should_stop,
                )
            per_level = {str(level): value for level, value in levels.items()}
            return Validated(step, share, per_level, "mismatch") if levels else None

        return Report(every, validate, lambda step: step in self.curve.held_out)

    def _grid_report(self) -> Report:
        """Sample grids, with the averaged weights."""
        config = self.config
        wanted = config.sample_every and self.processes.is_main
        preview = BakePreview(config, self.learner.teacher, self.learner.dtype, self._batch) if wanted else None

        def draw(step: int) -> Image | None:
            assert preview is not None
            with self.trainee.using(self.learner.values()) as unet:
                return preview.draw(unet, f"{config.name}, step {step}", self.should_stop)

        return self.sample_report(draw)

    def write(self, places: Sequence[Path]) -> None:
        config, trainee, learner = self.config, self.trainee, self.learner
        values, dataset = learner.values(), learner.states.dataset
        facts: dict[str, Any] = {"config": config, "steps": learner.step}
        if dataset is not None:
            facts["dataset_size"] = len(dataset)
        for place in places:
            if config.train == "low_rank":
                write_low_rank(place, trainee, self.prior, values=values, **facts)
            else:
                weights = trainee.weights(values)
                facts |= {"ema": config.ema or None, "resolution": config.resolution}
                write_domain_model(place, weights, trainee.config, self.prior, **facts)
