"""What every method is asked: digits in colours that a domain has or never had, and the exact set of right answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from ....guidance.networks.autoencoder import Autoencoder
from ...mini_world import render
from ...mini_world.assets import reconstruct
from ...mini_world.classifier import Classifier, judge
from ...mini_world.prompts import Prompts, draw_prompts, target_pictures
from ..statistics import TargetSet, measure_distance, resampling_counts

AUTOENCODED = 500


@dataclass(frozen=True)
class Question:
    """A domain, and whether it is asked for its own colours or for colours it never had."""

    name: str
    domain: str
    own_colours: bool

    @property
    def pairs(self) -> Tensor:
        """The colour pairs (ink, ground) of the prompts, long [options, 2]."""
        if self.own_colours:
            return render.domain_pairs(self.domain)
        if self.domain == "handwriting":
            return render.foreign_pairs()
        (own,) = render.domain_pairs(self.domain).tolist()
        return torch.tensor(
            [pair for pair in render.colour_pairs().tolist() if pair[0] != own[0] and pair[1] != own[1]]
        )

    @property
    def title(self) -> str:
        domain = {"handwriting": "handwriting", "narrow": "narrow handwriting (white on black)"}[self.domain]
        return f"{domain}, {'its own colours' if self.own_colours else 'colours it never had'}"

    def prompts(self, count: int, seed: int) -> Prompts:
        return draw_prompts(count, self.pairs, seed)


QUESTIONS = {
    question.name: question
    for question in (
        Question("handwriting", "handwriting", True),
        Question("handwriting_foreign", "handwriting", False),
        Question("narrow", "narrow", True),
        Question("narrow_foreign", "narrow", False),
    )
}


class Examiner:
    """Scores pictures against the exact targets of one question.

    The target set is always the whole of held-out handwriting, recoloured and with the prompts' mix of digits, however
    few samples are drawn: the error of a small target set could not be removed afterwards.
    """

    def __init__(self, question: Question, judge_model: Classifier, seed: int = 0, target_size: int = 2000) -> None:
        self.question, self.judge_model, self.seed, self.target_size = question, judge_model, seed, target_size

    @cached_property
    def _asked(self) -> Prompts:
        return self.question.prompts(self.target_size, self.seed)

    @cached_property
    def _answers(self) -> Tensor:
        return target_pictures(self._asked.digits, self._asked.pairs, seed=self.seed).images

    @cached_property
    def features(self) -> Tensor:
        """The judge's features of the target set [M, 64]."""
        return judge(self.judge_model, self._answers)[0]

    @cached_property
    def target(self) -> TargetSet:
        return TargetSet(self.features)

    def floors(self, autoencoder: Autoencoder) -> dict[str, float]:
        """Distances that frame every other one.

        floor and ceiling: of training handwriting and of held-out fonts in the same colours to the target set;
        autoencoder_floor: of the first `AUTOENCODED` targets through the autoencoder to those targets themselves.
        """
        asked = self._asked
        own = target_pictures(asked.digits, asked.pairs, render.TRAIN_ROWS, self.seed).images
        printed = render.rendered(
            self.target_size, Generator().manual_seed(self.seed), held_out=True, digits=asked.digits, pairs=asked.pairs
        ).images
        some = self._answers[:AUTOENCODED]
        pairs = {
            "floor": (own, self.target),
            "ceiling": (printed, self.target),
            "autoencoder_floor": (reconstruct(autoencoder, some), TargetSet(self.features[:AUTOENCODED])),
        }
        results = {}
        for name, (images, target) in pairs.items():
            counts = resampling_counts(asked.digits[: len(images)], seed=self.seed)
            found = measure_distance(judge(self.judge_model, images)[0], target, counts)
            results[name], results[f"{name}_uncorrected"] = found.value, found.uncorrected
        return results
