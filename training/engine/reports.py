"""What a run reports: its steps, and every so many of them sample grids and what held-out images say."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .events import Event, Step
from .learner import Outcome
from .processes import OneProcess

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


@dataclass(frozen=True)
class Report:
    """Something that a run reports at step 0, every `every` steps (0: never) and after the last.

    make(step): the event, None where it was broken off because somebody asked to stop; called in the first process.
    made(step): whether an earlier process of a run that goes on has made it.
    """

    every: int
    make: Callable[[int], Event | None]
    made: Callable[[int], bool]


class Reports:
    """All reports of a run that goes on from `start`."""

    def __init__(
        self, reports: Sequence[Report], start: int, steps: int, processes: OneProcess, tell: Callable[[Event], None]
    ) -> None:
        self.reports, self.start, self.steps, self.processes, self._tell = reports, start, steps, processes, tell

    def __call__(self, step: int, should_stop: Callable[[], bool]) -> bool:
        """Make what is due, also what a run that was killed lacks; True when somebody asked to stop meanwhile."""
        due = [report for report in self.reports if is_due(step, report.every, self.steps)]
        for report in due if self.processes.is_main else ():
            if not (step == self.start > 0 and report.made(step)):
                event = report.make(step)
                if event is not None:
                    self._tell(event)
        return bool(due) and self.processes.anywhere(should_stop())


def is_due(step: int, every: int, steps: int) -> bool:
    """Step 0, every `every` steps, and the last; never with every 0."""
    return every > 0 and (step % every == 0 or step == steps)
