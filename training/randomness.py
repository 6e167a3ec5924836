"""Randomness that depends on nothing but (seed, epoch, sample), so that a step can be repeated anywhere at any time.

A resumed run, another number of processes, a sample grid drawn in between: none of them changes what a step draws,
because no generator is carried from one step to the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator


def sample_generator(seed: int, epoch: int, index: int, stream: str = "noise") -> Generator:
    """A CPU generator for one sample of one epoch; `stream` names what is drawn ("noise", "data").

    The key is hashed, not added up: seeds 0 and 1 share nothing, whatever the epoch and index.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{index}/{stream}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Draw:
    """One sample of a batch. repeat: how often its image came before in the same epoch, to fill up a batch."""

    index: int
    epoch: int
    repeat: int = 0

    def generator(self, seed: int, stream: str) -> Generator:
        """This draw's own randomness; repetitions of an image in an epoch draw anew."""
        return sample_generator(seed, self.epoch, self.index, f"{stream}/{self.repeat}" if self.repeat else stream)


@dataclass(frozen=True)
class Batch:
    """The global batch of one optimizer step: images of one shape, before it is split over passes and processes."""

    step: int
    draws: tuple[Draw, ...]

    @property
    def indices(self) -> list[int]:
        return [draw.index for draw in self.draws]


def epoch_order(seed: int, epoch: int, groups: Sequence[Sequence[int]], batch: int) -> list[list[int]]:
    """The global batches of one epoch, each of `batch` indices of one group (a bucket of images of one shape).

    Every group is shuffled and cut into batches; where its last one is short it is filled from the group's own start,
    again and again for groups smaller than a batch, so that no image is left out of any epoch. The batches of all
    groups are then shuffled. Every epoch has the same number of batches. Raises ValueError without any image.
    """
    return [[draw.index for draw in draws] for draws in _epoch_draws(seed, epoch, groups, batch)]


def _epoch_draws(seed: int, epoch: int, groups: Sequence[Sequence[int]], batch: int) -> list[tuple[Draw, ...]]:
    if batch < 1 or not any(len(group) for group in groups):
        raise ValueError(
            f"Expected images to train on and batches of at least 1, got {len(groups)} empty groups and {batch}."
        )
    batches = []
    for number, group in enumerate(groups):
        if not len(group):
            continue
        permutation = torch.randperm(len(group), generator=sample_generator(seed, epoch, number, "order")).tolist()
        total = -(-len(group) // batch) * batch
        draws = [Draw(group[permutation[at % len(group)]], epoch, at // len(group)) for at in range(total)]
        batches += [tuple(draws[at : at + batch]) for at in range(0, total, batch)]
    mixed = torch.randperm(len(batches), generator=sample_generator(seed, epoch, 0, "batches")).tolist()
    return [batches[at] for at in mixed]


class BatchPlan:
    """Which images every step of a run sees: a pure function of (seed, groups, batch size, step)."""

    def __init__(self, seed: int, groups: Sequence[Sequence[int]], batch: int) -> None:
        self.seed, self.groups, self.batch = seed, [list(group) for group in groups], batch
        self.per_epoch = sum(-(-len(group) // batch) for group in self.groups)
        self._epoch, self._draws = 0, _epoch_draws(seed, 0, self.groups, batch)

    def batch_for(self, step: int) -> Batch:
        """The global batch of optimizer step `step`, counted from 0."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:  # the order of one epoch is kept, it takes a while for many images
            self._epoch, self._draws = epoch, _epoch_draws(self.seed, epoch, self.groups, self.batch)
        return Batch(step, self._draws[position])
