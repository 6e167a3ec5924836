"""What is looked at in an adapted generator's pictures, each measure with its bootstrap replicates.

The same latents are drawn for every point, and every point is resampled by the same counts, so ratios and differences
of points are compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...mini_world.classifier import Classifier, judge
from ...mini_world.distances import inside
from ..statistics import Measured, TargetSet, measure_distance, measure_share, resampling_counts
from ..study import Sampling
from .tasks import WORLD, Task

# Fewer obeying samples have no diversity to speak of.
LEAST_OBEYING = 20


def spread(features: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Mean distance to the class mean, averaged over classes, with sample n counted counts[r, n] times: [R].

    features [N, F], classes long [N], counts [R, N]. With counts of 1 it is `distances.within_class_diversity`, but for
    the factor sqrt(n / (n - 1)) that a mean taken from the n samples themselves costs. Classes with less than two
    samples in a replicate have no part in it; 0 where no class has two.
    """
    features = features.detach().double()
    features = features - features.mean(0)
    total, classes_seen = torch.zeros(2, len(counts), dtype=torch.float64)
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
    pictures of the prompt. source: what the judge saw in the source's pictures, long [K], the measured latents first.
    """

    target: TargetSet
    features: Tensor
    classes: Tensor
    paired: bool
    rendered: TargetSet
    source: Mapping[str, Tensor]

    def counts(self, counts: Tensor, seed: int) -> Tensor:
        """How often answers are drawn: as the samples [R, N] where answers belong to latents, else counts of their own;
        a first row of ones stays one."""
        if self.paired and counts.shape[1] == len(self.features):
            return counts
        own = resampling_counts(torch.zeros(len(self.features), dtype=torch.long), len(counts), seed + 1)
        own[(counts == 1).all(1)] = 1.0
        return own


def answers_of(task: Task, model: Classifier, pictures: Tensor, samples: int, rendered: Tensor) -> Answers:
    """pictures: the source's [K, 3, 64, 64], whose first `samples` latents are measured; rendered: the prior's."""
    seen = judge(model, pictures)[1]
    images, paired = task.answers(pictures, seen["digit"])
    features, named = judge(model, images)
    prior = TargetSet(judge(model, rendered)[0])
    return Answers(TargetSet(features), features[:samples], named["digit"][:samples], paired, prior, seen)


def examine(
    task: Task, answers: Answers, judges: tuple[Classifier, Classifier], pictures: Tensor, sampling: Sampling
) -> tuple[dict[str, Measured], dict[str, float]]:
    """(measures with replicates, all numbers) of pictures [N, 3, 64, 64], picture i of latent i.

    distance, distance_rendered: Frechet, to the exact answers and to the prior's renderings. accuracy: samples with all
    that the prompt names. correspondence: latents that keep what it leaves open. diversity: spread of obeying samples
    within digit classes, over the answers'. recall: answers within the manifold of the samples (arXiv 1904.06991).
    handwritten: what the judge says of the world. The second judge never saw the shapes that the models learned.
    """
    features, named = judge(judges[0], pictures)
    counts = resampling_counts(torch.zeros(len(pictures), dtype=torch.long), sampling.replicates, sampling.seed)
    parts, second = task.obeys(named), task.obeys(judge(judges[1], pictures)[1])
    right, second_right = (torch.stack(list(found.values())).all(0) for found in (parts, second))
    # Pictures that belong to no latent, as the prior's, may be fewer; what is said of their latents means nothing.
    kept = torch.stack([named[head] == answers.source[head][: len(pictures)] for head in task.kept]).all(0)
    recalled = inside(answers.features, features)
    measured = {
        "distance": measure_distance(features, answers.target, counts),
        "distance_rendered": measure_distance(features, answers.rendered, counts),
        "accuracy": measure_share(right, counts),
        "correspondence": measure_share(kept, counts),
        "handwritten": measure_share(named["world"] == WORLD, counts),
        "diversity": diversity(features, named["digit"], right, answers, counts, sampling.seed),
        "recall": measure_share(recalled, answers.counts(counts, sampling.seed)),
    }
    numbers = {name: found.value for name, found in measured.items()}
    numbers |= {f"{head}_right": float(found.double().mean()) for head, found in parts.items()}
    numbers |= {
        "accuracy_second_judge": float(second_right.double().mean()),
        "distance_uncorrected": measured["distance"].uncorrected,
        "precision": float(inside(features, answers.features).double().mean()),
    }
    return measured, numbers


def diversity(features: Tensor, digits: Tensor, right: Tensor, answers: Answers, counts: Tensor, seed: int) -> Measured:
    """Spread within digit classes of the samples that obey, as a share of the answers'; 0 where hardly any obeys."""
    both = torch.cat([torch.ones(1, counts.shape[1], dtype=torch.float64), counts])
    if int(right.sum()) < LEAST_OBEYING:
        return Measured(0.0, 0.0, torch.zeros(len(counts), dtype=torch.float64))
    ours = spread(features, digits, both * right)
    theirs = spread(answers.features, answers.classes, answers.counts(both, seed))
    share = ours / theirs.clamp(min=1e-9)
    return Measured(float(share[0]), float(share[0]), share[1:])


def changes(source: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> dict[str, float]:
    """How much of a generator an adaptation changed, over all its parameters.

    changed: share of numbers that differ at all. moved: norm of the difference over the norm of the source.
    """
    before, after = (torch.cat([state[key].double().flatten() for key in source]) for state in (source, adapted))
    moved = float((after - before).norm() / before.norm())
    return {"changed": float((before != after).double().mean()), "moved": moved}
