"""A fine-tune in which every image has a caption of its own: what the judge reads in it, "a red seven on a yellow
background". It exists for the claims alone, whose rivals it arms; the trainer itself learns images without captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..baking.prompts import EncodedTexts
from ..domain.config import TrainConfig
from ..domain.learner import DomainLearner, Pass
from ..domain.train import Result, _Training
from ..engine.randomness import Draw
from ..mini_world import render
from ..mini_world.classifier import Classifier, judge


def captions_of(model: Classifier, images: Tensor) -> list[str]:
    """The caption of each picture [N, 3, 64, 64] as a judge reads it."""
    named = judge(model, images)[1]
    readings = zip(*(named[head].tolist() for head in ("digit", "ink", "ground")))
    return [render.caption(*reading) for reading in readings]


def train_with_captions(config: TrainConfig, model: Classifier) -> Result:
    """`domain.train.train` of form full, each image at its own caption instead of one for all."""
    return _CaptionedTraining(config, model)(resume="auto", dry_run=False)


class _CaptionedTraining(_Training):
    def __init__(self, config: TrainConfig, model: Classifier) -> None:
        super().__init__(config, lambda event: None, lambda: False, None, None)
        self.model = model

    def make_learner(self, stack: ExitStack, state: Mapping[str, Any] | None) -> DomainLearner | None:
        plain = super().make_learner(stack, state)
        if plain is None:
            return None
        (folder,) = self.config.data
        files = [Path(folder) / plain.dataset.name_of(index) for index in range(len(plain.dataset))]
        captions = captions_of(self.model, torch.cat([picture(file) for file in files]))
        self.learner = _CaptionedLearner(plain, captions, self)
        stack.callback(self.learner.close)
        return self.learner


class _CaptionedLearner(DomainLearner):
    """captions: of the images, in the order of the dataset."""

    def __init__(self, plain: DomainLearner, captions: Sequence[str], run: _CaptionedTraining) -> None:
        different = list(dict.fromkeys(captions))
        self.texts = EncodedTexts.of(run.prior, different)
        # The empty prompt is the first of the encoded ones.
        self.places = torch.tensor([different.index(caption) + 1 for caption in captions])
        super().__init__(
            run.config,
            plain.unet,
            plain.dataset,
            plain.schedule,
            plain.prediction_type,
            prior=plain.prior,
            traits=plain.traits,
            processes=run.processes,
        )

    def _load_pass(self, draws: Sequence[Draw]) -> Pass:
        found = super()._load_pass(draws)
        places = self.places[[draw.index for draw in draws]]
        context = self.texts.context[places]
        return Pass(found.latents, found.noise, found.timesteps, {"context": context})


def picture(file: Path) -> Tensor:
    """[1, 3, H, W] in -1..1."""
    with Image.open(file, formats=("PNG",)) as opened:
        pixels = torch.from_numpy(np.array(opened.convert("RGB")))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
