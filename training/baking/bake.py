"""A baking from a prior and its guidance to a LoRA: what the command line and the node call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...guidance.files import DTYPES
from ..data.latent_dataset import LatentDataset
from ..data.problems import Cancelled
from ..domain.finished import write_domain_model, write_low_rank
from ..domain.picture_run import Images, PictureRun
from ..domain.trainee import start_model
from ..engine.events import Listener, Preparing
from ..engine.reports import Report
from ..engine.run import Result
from ..engine.settings import ConfigProblem
from ..prior.opening import open_prior
from ..prior.prior import ImageSize, Prior
from .config import BakeConfig
from .estimate import estimate_baking
from .learner import BakeLearner
from .match import unmatched
from .previews import BakePreview
from .prompts import EncodedTexts, prompts_of
from .states import OwnSamples, States, draw_own, keep_own, kept_own
from .teacher import Teacher
from .terms import MODEL, BakedTerm, check_not_nothing, open_terms

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...guidance.networks.unet import UNet

__all__ = ["Result", "bake"]

MOST_HELD_OUT = 64
OWN_FOLDER = "states"  # of a run: what the prior drew for it
WORDS = {"own": "samples of the prior", "trajectories": "guided samples"}  # while they are drawn


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


class _Baking(PictureRun[BakeConfig]):
    """One call of `bake`."""

    advice = "lower the learning rate"
    terms: list[BakedTerm]
    prompts: list[str]
    learner: BakeLearner
    held_out: LatentDataset | None = None

    def __init__(
        self,
        config: BakeConfig,
        listener: Listener,
        should_stop: Callable[[], bool],
        prior: Prior | None,
        domain: MODEL | None,
        terms: Sequence[BakedTerm],
        images: Images,
    ) -> None:
        super().__init__(config, listener, should_stop, prior, images)
        self.domain, self.more = domain, terms

    # ---- beginning

    def open(self) -> Sequence[str]:
        config = self.config
        self.prior = self.given or open_prior(config.base, vae=config.vae, tokenizer=config.tokenizer)
        notes = [*self.prior.notes]
        self.terms = open_terms(config, self.prior, self.domain, self.more)
        self.prompts = prompts_of(config, self.prior.latent_format, notes.append)
        check_not_nothing(config, self.terms, self.prompts)
        self.prior.check_prompts((*self.prompts, *(config.sample_prompts if config.sample_every else ())))
        return notes

    def announce(self, start: int) -> tuple[int, str]:
        config, processes = self.config, self.processes
        count = self.count_images() if "pictures" in config.states else 0
        if "pictures" in config.states and not count and not config.data:
            raise ConfigProblem(
                "data: expected folders of pictures to noise, found none; name some, or choose states own alone."
            )
        if not processes.is_main:
            return count, ""
        # Layers that take no addition are refused here, before anything is encoded.
        self.needs = estimate_baking(self.prior, config, self.terms, count, processes.device, processes.world)
        prompts = f"{len(self.prompts)} prompts and the empty one" if self.prompts else "the empty prompt alone"
        return count, f"matched at {prompts}\n{self.needs.to_text()}"

    def make_learner(self, stack: ExitStack, state: Mapping[str, Any] | None) -> BakeLearner | None:
        config, prior, processes = self.config, self.prior, self.processes
        device, dtype = processes.device, DTYPES[config.precision]
        dataset = None
        if "pictures" in config.states:
            dataset = self.open_pictures()
            if dataset is None:
                return None
            dataset, self.held_out = dataset.split(config.held_out_share, MOST_HELD_OUT)
        self.trainee = start_model(
            prior,
            "full",
            config.train,
            additions=config.additions,
            gradient_checkpointing=config.gradient_checkpointing,
            seed=config.seed,
        )
        unet = self.trainee.unet.to(device)
        before = unet if config.train == "low_rank" else prior.load_unet(dtype).to(device)
        weight = config.control_weight if config.target == "guided" else 1.0
        teacher = Teacher(prior, before, self.terms, weight, device=device, dtype=dtype)
        texts = EncodedTexts.of(prior, self.prompts)
        own = self._own(texts, teacher)
        if own is None:
            return None
        states = States(config, prior, texts, dataset, own, self.prompts, processes.rank, processes.world)
        self.learner = BakeLearner(config, self.trainee, teacher, states, processes)
        return self.learner

    def _own(self, texts: EncodedTexts, teacher: Teacher) -> dict[str, OwnSamples] | None:
        """What the prior draws itself, by kind: kept in the run's folder, drawn where it is not there.

        None when somebody asked to stop meanwhile.
        """
        config, found = self.config, {}
        size = ImageSize((config.resolution, config.resolution))
        try:
            for kind in config.states:
                if kind == "pictures":
                    continue
                path, made_of = self.folder / OWN_FOLDER / f"{kind}.safetensors", self._made_of(kind)
                own = kept_own(path, made_of, size) if path.is_file() else None
                if own is None:
                    what = f"drawing {WORDS[kind]}"
                    own = draw_own(
                        config,
                        texts,
                        teacher,
                        kind,
                        lambda done, total, what=what: self.tell(Preparing(what, done, total)),
                        self.should_stop,
                    )
                    if self.processes.is_main:
                        keep_own(path, own, made_of)
                found[kind] = own
        except Cancelled:
            found = None
        return None if self.processes.anywhere(found is None) else found

    def _made_of(self, kind: str) -> str:
        """A digest of what decides the samples of a kind."""
        config = self.config
        facts = [self.prior.prior_hash, self.prompts, config.seed, config.own_count, config.own_steps]
        facts += [config.resolution, config.batch_size, config.precision]
        if kind == "trajectories":
            facts += [config.target, config.control_weight, *(term.facts for term in self.terms)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    # ---- what becomes of it

    def make_reports(self) -> list[Report]:
        config, learner = self.config, self.learner
        wanted = config.sample_every and self.processes.is_main
        preview = BakePreview(config, learner.teacher, learner.dtype, self.batch) if wanted else None

        def missing(unet: UNet, latents: list[Tensor], sizes: list[ImageSize], keys: list[str]):
            return unmatched(
                unet,
                learner.teacher,
                learner.states.texts,
                latents,
                keys,
                sizes,
                seed=config.seed,
                batch=self.batch,
                dtype=learner.dtype,
                should_stop=self.should_stop,
            )

        def draw(unet: UNet, title: str) -> Image | None:
            assert preview is not None
            return preview.draw(unet, title, self.should_stop)

        return [self.held_out_report(self.held_out, missing, "mismatch"), self.grid_report(draw)]

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
