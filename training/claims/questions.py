"""What every method is asked: digits in colours that a domain has or never had, and the exact set of right answers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Generator, Tensor

from ...guidance.networks.autoencoder import Autoencoder
from ..mini_world import render
from ..mini_world.assets import reconstruct
from ..mini_world.classifier import Classifier, judge
from ..mini_world.distances import kernel_distance, within_class_diversity
from ..mini_world.prompts import Prompts, draw_prompts, target_pictures
from .statistics import Measured, TargetSet, measure_distance, measure_share, resampling_counts
from .study import Sampling

AUTOENCODED = 500


class Question(NamedTuple):
    """A domain, and whether it is asked for its own colours or for colours it never had."""

    name: str
    domain: str
    own_colours: bool
    title: str

    @property
    def share(self) -> str:
        """The measure that says how far a prompt is obeyed; a domain's own colours are right nearly always."""
        return "digit" if self.own_colours else "both_colours"

    @property
    def pairs(self) -> Tensor:
        """The colour pairs (ink, ground) of the prompts, long [options, 2]."""
        own = render.domain_pairs(self.domain)
        if self.own_colours:
            return own
        if self.domain == "handwriting":
            return render.foreign_pairs()
        every = render.colour_pairs()
        return every[(every != own).all(1)]

    def prompts(self, count: int, seed: int) -> Prompts:
        return draw_prompts(count, self.pairs, seed)

    def answers(self, sampling: Sampling, rows: slice = render.HELD_OUT_ROWS) -> Tensor:
        """Right answers [M, 3, 64, 64]: held-out handwriting, recoloured, with the prompts' mix of digits.

        Always as many, however few samples are drawn: the error of a small target set could not be removed afterwards.
        """
        asked = self.prompts(sampling.targets, sampling.seed)
        return target_pictures(asked.digits, asked.pairs, rows, sampling.seed).images


NARROW = "narrow handwriting (white on black)"
_ROWS = (
    Question("handwriting", "handwriting", True, "handwriting, its own colours"),
    Question("handwriting_foreign", "handwriting", False, "handwriting, colours it never had"),
    Question("narrow", "narrow", True, f"{NARROW}, its own colours"),
    Question("narrow_foreign", "narrow", False, f"{NARROW}, colours it never had"),
)
QUESTIONS = {question.name: question for question in _ROWS}


def floors(question: Question, model: Classifier, autoencoder: Autoencoder, sampling: Sampling) -> dict[str, float]:
    """Distances that frame every other one, each also `NAME_uncorrected`.

    floor and ceiling: of training handwriting and of held-out fonts in the same colours to the right answers;
    autoencoder_floor: of the first `AUTOENCODED` answers through the autoencoder to those answers themselves.
    """
    answers, asked = question.answers(sampling), question.prompts(sampling.targets, sampling.seed)
    generator = Generator().manual_seed(sampling.seed)
    printed = render.rendered(sampling.targets, generator, held_out=True, digits=asked.digits, pairs=asked.pairs)
    some = answers[:AUTOENCODED]
    pairs = {
        "floor": (question.answers(sampling, render.TRAIN_ROWS), answers),
        "ceiling": (printed.images, answers),
        "autoencoder_floor": (reconstruct(autoencoder, some), some),
    }
    found = {}
    for name, (images, targets) in pairs.items():
        counts = resampling_counts(asked.digits[: len(images)], seed=sampling.seed)
        target = TargetSet(judge(model, targets)[0])
        distance = measure_distance(judge(model, images)[0], target, counts)
        found[name], found[f"{name}_uncorrected"] = distance.value, distance.uncorrected
    return found


def examine(
    judges: tuple[Classifier, Classifier], target: Tensor, pictures: Tensor, prompts: Prompts, sampling: Sampling
) -> tuple[dict[str, Measured], dict[str, float]]:
    """(measures with bootstrap replicates, all numbers) of pictures [N, 3, 64, 64] that answer the prompts.

    target: the judge's features [M, 64] of the right answers. The second judge gives shares only: it never saw the
    shapes that the generative models learned, and its features are others.
    """
    features, named = judge(judges[0], pictures)
    counts = resampling_counts(prompts.digits, sampling.replicates, sampling.seed)
    right, second = _right(named, prompts), _right(judge(judges[1], pictures)[1], prompts)
    shares = ("digit", "both_colours", "in_domain")
    measured = {"distance": measure_distance(features, TargetSet(target), counts)}
    measured |= {name: measure_share(right[name], counts) for name in shares}
    numbers = {name: found.value for name, found in measured.items()}
    numbers |= {
        "distance_uncorrected": measured["distance"].uncorrected,
        "kernel": kernel_distance(features, target),
        "ink": float(right["ink"].double().mean()),
        "ground": float(right["ground"].double().mean()),
        "diversity": within_class_diversity(features, named["digit"]),
    }
    return measured, numbers | {f"{name}_second_judge": float(second[name].double().mean()) for name in shares}


def _right(named: dict[str, Tensor], prompts: Prompts) -> dict[str, Tensor]:
    """Whether each sample is right, bool [N], in each respect."""
    ink, ground = named["ink"] == prompts.pairs[:, 0], named["ground"] == prompts.pairs[:, 1]
    parts = {"ink": ink, "ground": ground, "both_colours": ink & ground}
    return {"digit": named["digit"] == prompts.digits, "in_domain": named["world"] == 1, **parts}
