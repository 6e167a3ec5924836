"""What is looked at in an adapted generator's pictures, each measure with its bootstrap replicates.

The same latents are drawn for every point, and every point is resampled by the same counts, so ratios and differences
of points are compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ....guidance.errors import Problem
from ...mini_world.classifier import Classifier, judge
from ...mini_world.distances import inside
from ..statistics import Measured, TargetSet, measure_distance, measure_share, resampling_counts
from .tasks import WORLD, Task

NEIGHBOURS = 3
# Fewer obeying samples have no diversity to speak of.
LEAST_OBEYING = 20


def spread(features: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Mean distance to the class mean, averaged over classes, with sample n counted counts[r, n] times: [R].

    features [N, F], classes long [N], counts [R, N]. With counts of 1 it is `metrics.within_class_diversity`, but for
    the factor sqrt(n / (n - 1)) that a mean taken from the n samples themselves costs. Classes with less than two
    samples in a replicate have no part in it; 0 where no class has two.
    """
    features = features.detach().double()
    features = features - features.mean(0)
    total, classes_seen = torch.zeros(len(counts), dtype=torch.float64), torch.zeros(len(counts), dtype=torch.float64)
    squares = features.square().sum(1)
    for value in classes.unique():
        mine = classes == value
        own, weights = features[mine], counts[:, mine].double()
        size = weights.sum(1)
        means = weights @ own / size.clamp(min=1)[:, None]
        distances = (squares[mine] - 2 * means @ own.T + means.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
        mean = (weights * distances).sum(1) / size.clamp(min=1) * (size / (size - 1).clamp(min=1)).sqrt()
        total += torch.where(size >= 2, mean, 0.0)
        classes_seen += size >= 2
    return total / classes_seen.clamp(min=1)


@dataclass(frozen=True)
class Answers:
    """What a task's pictures are held against.

    target: the whole set of right answers. features [M, 64] and classes [M]: the answers that diversity and recall are
    compared with, those of the measured latents where answers belong to latents (`paired`). rendered: the prior's own
    pictures of the prompt. source: what the judge saw in the source's pictures of the measured latents, long [N].
    """

    target: TargetSet
    features: Tensor
    classes: Tensor
    paired: bool
    rendered: TargetSet
    source: Mapping[str, Tensor]


def answers_of(task: Task, judge_model: Classifier, pictures: Tensor, samples: int, rendered: Tensor | None) -> Answers:
    """pictures: the source's [K, 3, 64, 64], whose first `samples` latents are measured; rendered: the prior's."""
    seen = judge(judge_model, pictures)[1]
    images, paired = task.answers(pictures, seen["digit"])
    if len(images) < 2:
        raise Problem(
            f"expected the source to draw some answers to {task.title!r}, found {len(images)} in "
            f"{len(pictures)} pictures; draw more"
        )
    features, named = judge(judge_model, images)
    target, some = TargetSet(features), slice(0, samples)
    other = target if rendered is None else TargetSet(judge(judge_model, rendered)[0])
    return Answers(
        target, features[some], named["digit"][some], paired, other, {head: one[some] for head, one in seen.items()}
    )


def examine(
    task: Task, answers: Answers, judge_model: Classifier, pictures: Tensor, replicates: int, seed: int
) -> tuple[dict[str, Measured], dict[str, float]]:
    """(measures with replicates, all numbers) of pictures [N, 3, 64, 64], picture i of latent i.

    distance, distance_rendered: Frechet, to the exact answers and to the prior's renderings. accuracy: samples with all
    that the prompt names. correspondence: latents that keep what it leaves open. diversity: spread of obeying samples
    within digit classes, over the answers'. recall: answers near a sample. handwritten: what the judge says of the
    world.
    """
    features, named = judge(judge_model, pictures)
    counts = resampling_counts(torch.zeros(len(pictures), dtype=torch.long), replicates, seed)
    parts = task.obeys(named)
    right = torch.stack(list(parts.values())).all(0)
    # Pictures that belong to no latent, as the prior's, may be fewer; what is said of their latents means nothing.
    kept = torch.stack([named[head] == answers.source[head][: len(pictures)] for head in task.kept]).all(0)
    measured = {
        "distance": measure_distance(features, answers.target, counts),
        "distance_rendered": measure_distance(features, answers.rendered, counts),
        "accuracy": measure_share(right, counts),
        "correspondence": measure_share(kept, counts),
        "handwritten": measure_share(named["world"] == WORLD, counts),
        "diversity": diversity(features, named["digit"], right, answers, counts, seed),
        "recall": recall(features, answers, counts, seed),
    }
    numbers = {name: one.value for name, one in measured.items()}
    numbers |= {f"{head}_right": float(one.double().mean()) for head, one in parts.items()}
    numbers |= {
        "distance_uncorrected": measured["distance"].uncorrected,
        "precision": float(inside(features, answers.features, NEIGHBOURS).double().mean()),
    }
    return measured, numbers


def diversity(features: Tensor, digits: Tensor, right: Tensor, answers: Answers, counts: Tensor, seed: int) -> Measured:
    """Spread within digit classes of the samples that obey, as a share of the answers'; 0 where hardly any obeys."""
    both = torch.cat([torch.ones(1, counts.shape[1], dtype=torch.float64), counts])
    if int(right.sum()) < LEAST_OBEYING:
        return Measured(0.0, 0.0, torch.zeros(len(counts), dtype=torch.float64))
    ours = spread(features, digits, both * right)
    theirs = spread(answers.features, answers.classes, _answer_counts(answers, both, seed))
    share = ours / theirs.clamp(min=1e-9)
    return Measured(float(share[0]), float(share[0]), share[1:])


def recall(features: Tensor, answers: Answers, counts: Tensor, seed: int) -> Measured:
    """Share of the answers that lie within the manifold of the samples (arXiv 1904.06991); answers are resampled."""
    found = inside(answers.features, features, NEIGHBOURS).double()
    weights = _answer_counts(answers, counts, seed)
    value = float(found.mean())
    return Measured(value, value, weights @ found / weights.sum(1))


def _answer_counts(answers: Answers, counts: Tensor, seed: int) -> Tensor:
    """The samples' counts where answers belong to latents, else counts of their own; a first row of ones stays one."""
    if answers.paired and counts.shape[1] == len(answers.features):
        return counts
    size = torch.zeros(len(answers.features), dtype=torch.long)
    own = resampling_counts(size, len(counts), seed + 1)
    own[(counts == 1).all(1)] = 1.0
    return own


def second_opinion(task: Task, judge_model: Classifier, pictures: Tensor) -> dict[str, float]:
    """Accuracy according to a judge that never saw the shapes the generative models learned."""
    parts = task.obeys(judge(judge_model, pictures)[1])
    return {"accuracy_second_judge": float(torch.stack(list(parts.values())).all(0).double().mean())}


def changes(source: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> dict[str, float]:
    """How much of a generator an adaptation changed, over all its parameters.

    changed: share of numbers that differ at all. moved: norm of the difference over the norm of the source.
    """
    different = total = 0
    distance = size = 0.0
    for key, before in source.items():
        before, after = before.double(), adapted[key].double()
        different += int((before != after).sum())
        total += before.numel()
        distance += float((after - before).square().sum())
        size += float(before.square().sum())
    return {"changed": different / total, "moved": (distance / size) ** 0.5, "parameters_changed": float(different)}
