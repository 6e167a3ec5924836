"""How a run gets on: the mean loss and speed of its last steps."""

from __future__ import annotations

import math
from collections import deque

from .events import Step
from .learner import Outcome

RECENT = 50  # steps that the reported loss and speed are means of


class Progress:
    """Makes the events of a run of `steps` steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # loss, seconds

    @property
    def loss(self) -> float | None:
        """The mean of the last steps, None without any."""
        return sum(loss for loss, _ in self._recent) / len(self._recent) if self._recent else None

    def took(self, outcome: Outcome, seconds: float) -> Step:
        """The event of a step that took so many seconds."""
        self._recent.append((outcome.loss, seconds))
        pace = sum(duration for _, duration in self._recent) / len(self._recent)
        return Step(
            step=outcome.step,
            steps=self.steps,
            loss=outcome.loss,
            rate=outcome.rate,
            gradient_norm=outcome.gradient_norm if math.isfinite(outcome.gradient_norm) else None,
            seconds_per_step=pace,
            eta_s=pace * (self.steps - outcome.step) if len(self._recent) > 1 else None,
            parts=dict(outcome.parts),
        )
