"""Uncertainty and comparison of measured points: bootstrap over samples, fronts of distance and share, hypervolume.

A Frechet distance of N samples on F features is too large by about C / N, since sampling noise in mean and covariance
only ever adds distance. A bootstrap repeats that error: its replicates lie above the estimate by about as much as the
estimate lies above the truth, so plain percentile intervals miss the truth almost always. Both errors are removed here
(Efron and Tibshirani, An Introduction to the Bootstrap, chapter 10): with b = mean of the replicates - the estimate,
the value reported is estimate - b, and every replicate is moved down by 2 b, once for its own error and once for the
estimate's. The target set is fixed and is not resampled. Shares (accuracies) have no such error.

All points are resampled by the same counts, so replicates of two points are paired, and any function of several points
(a ratio, a front, a hypervolume) has its own replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

LEVEL = 0.95
# Shares count samples, of which there are far fewer than a million, and some replicates are kept in single precision.
ROUNDING = 1e-6


def resampling_counts(groups: Tensor, replicates: int = 400, seed: int = 0) -> Tensor:
    """How often each sample is drawn in each bootstrap replicate: [R, N] in float64, for groups long [N].

    Samples are drawn with replacement within their group (the digit), whose size was chosen and not sampled.
    """
    generator = Generator().manual_seed(seed)
    counts = torch.zeros(replicates, len(groups), dtype=torch.float64)
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        drawn = torch.randint(len(members), (replicates, len(members)), generator=generator)
        own = torch.zeros(replicates, len(members), dtype=torch.float64)
        counts[:, members] = own.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return counts


class TargetSet:
    """A fixed set of features [M, F], M above F, to measure Frechet distances to (arXiv 1706.08500, eq. 6)."""

    def __init__(self, features: Tensor) -> None:
        features = features.detach().double().cpu()
        self.mean, self.covariance = features.mean(0), features.T.cov()
        values, vectors = torch.linalg.eigh(self.covariance)
        self._root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def distances(self, features: Tensor, counts: Tensor) -> Tensor:
        """Distances [R] of the features [N, F] with sample n counted counts[r, n] times; counts [R, N]."""
        features = features.detach().double().cpu()
        center = features.mean(0)  # squares of centred numbers lose no digits
        centred, totals = features - center, counts.sum(1, keepdim=True)
        means = counts @ centred / totals
        sums = torch.stack([(centred * row[:, None]).T @ centred for row in counts])
        sums = sums - totals[:, :, None] * means[:, :, None] * means[:, None, :]
        covariances = sums / (totals - 1)[:, :, None]
        cross = torch.linalg.eigvalsh(self._root @ covariances @ self._root).clamp(min=0).sqrt().sum(-1)
        traces = covariances.diagonal(dim1=-2, dim2=-1).sum(-1) + self.covariance.trace()
        return ((means + center - self.mean).square().sum(-1) + traces - 2 * cross).clamp(min=0)


@dataclass(frozen=True)
class Measured:
    """A number with its bootstrap replicates [R]; `uncorrected` is the plain estimate before its bias was removed."""

    value: float
    uncorrected: float
    draws: Tensor


def interval(draws: Tensor, level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of bootstrap replicates [R]; infinities may take part and may be an end of the interval."""
    ordered = draws.double().sort().values
    last = len(ordered) - 1
    rank = (1 - level) / 2 * last
    return float(ordered[int(rank)]), float(ordered[min(last, int(last - rank + 0.999999))])


def measure_distance(features: Tensor, target: TargetSet, counts: Tensor) -> Measured:
    """The Frechet distance of features [N, F] to the target, freed of the bias that the bootstrap estimates."""
    plain = float(target.distances(features, torch.ones(1, len(features), dtype=torch.float64))[0])
    replicates = target.distances(features, counts)
    bias = float(replicates.mean()) - plain
    return Measured(max(0.0, plain - bias), plain, (replicates - 2 * bias).clamp(min=0))


def measure_share(right: Tensor, counts: Tensor) -> Measured:
    """The share of samples that are right, bool or 0..1 [N]; counts [R, N]."""
    right = right.double().cpu()
    value = float(right.mean())
    return Measured(value, value, counts @ right / counts.sum(1))


def reaches(share: Tensor | float, at_least: Tensor | float) -> Tensor | bool:
    """Whether a share is at least `at_least`; equal but for the rounding of single precision is equal."""
    return share > at_least - ROUNDING


def lowest(distances: Tensor, shares: Tensor, at_least: Tensor | float) -> Tensor:
    """The lowest distance among the points [P, R] whose share is at least `at_least`, [R] or a number: [R] or inf."""
    return distances.where(shares > at_least - ROUNDING, torch.inf).amin(0)


def ratio_of_lowest(
    distances: Tensor, shares: Tensor, other_distances: Tensor, other_shares: Tensor, at_least: Tensor | float
) -> Tensor:
    """The lowest distance of points [P, R] over that of others [Q, R] at a share: [R]; 0 where only the first set
    reaches it, infinite where only the other one does, 1 where neither."""
    ours, theirs = lowest(distances, shares, at_least), lowest(other_distances, other_shares, at_least).clamp(min=1e-9)
    return torch.where(theirs.isinf(), ours.isinf().to(ours), ours / theirs)


def worst_ratio(
    distances: Tensor, shares: Tensor, other_distances: Tensor, other_shares: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest ratio [R], over the shares that both sets reach, of the first's lowest distance to the second's, and
    the largest share [R] at which it is that large. Points [P, R] and [Q, R].

    Both lowest distances change only at shares that occur, so only those are looked at.
    """
    both = torch.minimum(shares.amax(0), other_shares.amax(0))
    largest, at = torch.zeros_like(both), torch.zeros_like(both)
    for level in [*shares, *other_shares]:
        ratio = ratio_of_lowest(distances, shares, other_distances, other_shares, level)
        worse = (level <= both) & ((ratio > largest) | ((ratio == largest) & (level > at)))
        largest, at = torch.where(worse, ratio, largest), torch.where(worse, level, at)
    return largest, at


def worst_ratio_between(
    distances: Tensor, shares: Tensor, other_distances: Tensor, other_shares: Tensor, least: float, most: float
) -> tuple[Tensor, Tensor]:
    """As `worst_ratio`, over the shares from `least` to `most` that the other set reaches; infinite where the first set
    does not. 0 where the other set reaches none of them."""
    largest, at = torch.zeros_like(shares[0]), torch.full_like(shares[0], least)
    for level in [*shares, *other_shares, torch.full_like(at, most)]:
        level = level.clamp(least, most)
        reached = ~lowest(other_distances, other_shares, level).isinf()
        ratio = ratio_of_lowest(distances, shares, other_distances, other_shares, level)
        worse = reached & ((ratio > largest) | ((ratio == largest) & (level > at)))
        largest, at = torch.where(worse, ratio, largest), torch.where(worse, level, at)
    return largest, at


def hypervolume(distances: Tensor, shares: Tensor, worst_distance: float) -> Tensor:
    """The share of the rectangle 0..worst_distance by 0..1 that points [P, R] dominate: [R] in 0..1, higher is better.

    A point dominates everything of larger distance and smaller share (Zitzler and Thiele 1998, two objectives).
    There is at least one.
    """
    order = distances.argsort(0)
    near = distances.gather(0, order).clamp(0, worst_distance)
    best_share = shares.gather(0, order).clamp(0, 1).cummax(0).values  # of all points at least as near
    following = torch.cat([near[1:], torch.full_like(near[:1], worst_distance)])
    return ((following - near) * best_share).sum(0) / worst_distance


def is_on_front(pairs: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (distance, share) pairs: whether no other is at least as near and at least as right, and better in one."""
    return [
        not any(d <= distance and s >= share and (d, s) != (distance, share) for d, s in pairs)
        for distance, share in pairs
    ]
