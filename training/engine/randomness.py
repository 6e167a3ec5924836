"""Randomness that depends on nothing but (seed, turn, sample), so that a step can be repeated anywhere at any time.

A resumed run, another number of processes, a sample grid drawn in between: none of them changes what a step draws,
because no generator is carried from one step to the next.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator

from ...guidance.errors import Problem


def sample_generator(seed: int, epoch: int, index: int | str, stream: str = "noise") -> Generator:
    """A CPU generator for one sample of one epoch; `stream` names what is drawn ("noise", "data").

    The key is hashed, not added up: seeds 0 and 1 share nothing, whatever the epoch and index.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{index}/{stream}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Draw:
    """One sample of a batch. turn: how often its image was drawn before in the run."""

    index: int
    turn: int

    def generator(self, seed: int, stream: str) -> Generator:
        """This draw's own randomness; an image draws anew at every turn."""
        return sample_generator(seed, self.turn, self.index, stream)


class BatchPlan:
    """Which images every step of a run sees: a pure function of (seed, groups, batch, accumulation, step).

    groups: indices of the images of one shape each. batch: images per forward pass over all processes, of one shape.
    accumulation: passes per step, of any shapes.

    A group is an endless row of shufflings of its images, cut into passes. In an epoch it has as many whole passes as
    its images, together with those left over from the epochs before, fill; what is left is carried over to the next
    epoch. So after E epochs no image was drawn more than E times, and of a group of n images fewer than `batch` draws
    are outstanding: a shape rarer than a batch waits for batch / n epochs, then comes with each image several times in
    one pass, with other noise. The passes of an epoch are shuffled, and a step takes the next `accumulation` of them,
    over the end of the epoch where they do not divide. Epochs differ in their number of passes and may have none.
    Raises ValueError without any image.
    """

    def __init__(self, seed: int, groups: Sequence[Sequence[int]], batch: int, accumulation: int = 1) -> None:
        self.seed, self.groups, self.batch = seed, [list(group) for group in groups], batch
        self.accumulation, self.images = accumulation, sum(map(len, self.groups))
        if min(batch, accumulation) < 1 or self.images == 0:
            raise Problem(
                f"Expected images to train on, and batch and accumulation of at least 1, got {self.images} images, "
                f"batch {batch} and accumulation {accumulation}."
            )
        # The order of an epoch is kept, it takes a while for many images; a step may span two.
        self._epoch = lru_cache(maxsize=2)(self.passes)

    def batch_for(self, step: int) -> tuple[Draw, ...]:
        """The global batch of optimizer step `step`, counted from 0: passes of one shape each, one after the other."""
        draws: list[Draw] = []
        for number in range(step * self.accumulation, (step + 1) * self.accumulation):
            epoch, position = self.place(number)
            draws += self._epoch(epoch)[position]
        return tuple(draws)

    def passes(self, epoch: int) -> list[tuple[Draw, ...]]:
        """The passes of one epoch, each of `batch` draws from one group, in the order they are taken in."""
        passes = []
        for number, group in enumerate(self.groups):
            if not group:
                continue
            turn, row = -1, []
            for number_of_pass in range(self._whole(epoch, group), self._whole(epoch + 1, group)):
                draws = []
                for at in range(number_of_pass * self.batch, (number_of_pass + 1) * self.batch):
                    if at // len(group) != turn:
                        turn = at // len(group)
                        order = sample_generator(self.seed, turn, number, "order")
                        row = torch.randperm(len(group), generator=order).tolist()
                    draws.append(Draw(group[row[at % len(group)]], turn))
                passes.append(tuple(draws))
        mixed = torch.randperm(len(passes), generator=sample_generator(self.seed, epoch, 0, "batches")).tolist()
        return [passes[at] for at in mixed]

    def _whole(self, epochs: int, group: Sequence[int]) -> int:
        """Passes of a group in the first `epochs` epochs."""
        return epochs * len(group) // self.batch

    def _before(self, epoch: int) -> int:
        """Passes of all groups in the epochs before `epoch`."""
        return sum(self._whole(epoch, group) for group in self.groups)

    def place(self, number: int) -> tuple[int, int]:
        """(epoch, position in it) of the run's pass `number`."""
        # Each group lacks less than one pass of its share, so the epoch after `most` begins behind the pass.
        most = (number + 1 + len(self.groups)) * self.batch // self.images + 1
        epoch = bisect_right(range(most + 1), number, key=self._before) - 1
        return epoch, number - self._before(epoch)
