"""When a run's checkpoints are written, and that damaged weights never replace good ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .checkpoints import checkpoint_path, find_checkpoints, prune_checkpoints, save_checkpoint
from .events import Event, Saved
from .learner import Learner, NonFiniteLoss
from .run_settings import RunSettings


class Saver:
    """Writes the checkpoints of one run.

    begun: values that were settled when the run began, kept with every checkpoint under "start". advice: what to do
    about numbers that are not finite.
    """

    def __init__(
        self,
        config: RunSettings,
        learner: Learner,
        begun: Mapping[str, Any],
        tell: Callable[[Event], None],
        advice: str,
    ) -> None:
        self.config, self.learner, self.begun, self.advice = config, learner, begun, advice
        self.folder, self.processes = config.run_folder.absolute(), learner.processes
        self.saved_step, self._saved_at, self._tell = learner.step, time.monotonic(), tell

    @property
    def path(self) -> Path:
        """Where the checkpoint of the last finished step is, or would be."""
        return checkpoint_path(self.folder, self.learner.step)

    def save_if_due(self) -> None:
        """Save after the last step, every `checkpoint_every` steps, and every `checkpoint_minutes`."""
        step, every = self.learner.step, self.config.checkpoint_every
        if step == self.config.steps or (every and step % every == 0) or self._overdue():
            self.save()

    def save_if_new(self) -> None:
        """Save the last finished step where that is not done yet."""
        if self.learner.step != self.saved_step:
            self.save()

    def save_after_failure(self) -> None:
        """Save the last finished step without telling, where the failure left it whole and that is not done yet."""
        if self.learner.intact and self.learner.step != self.saved_step:
            self.learner.optimizer.zero_grad(set_to_none=True)
            self.save(quietly=True)

    def save(self, quietly: bool = False) -> None:
        """Write a checkpoint of the last finished step. Raises NonFiniteLoss for damaged weights."""
        learner = self.learner
        if not learner.has_finite_weights():
            names = learner.names_at(max(0, learner.step - 1))
            raise NonFiniteLoss("the weights", learner.step, names, self.keep_last_good())
        if self.processes.is_main:
            save_checkpoint(self.path, {**learner.state(), "start": dict(self.begun)})
            prune_checkpoints(self.folder, learner.step, self.config.keep_checkpoints)
        self.saved_step, self._saved_at = learner.step, time.monotonic()
        if not quietly:
            self._tell(Saved(learner.step, str(self.path)))
        self.processes.wait()

    def keep_last_good(self) -> str:
        """Save the weights before a step that failed, if they are sound; the advice to give."""
        learner = self.learner
        if not learner.step:  # nothing is saved, and no checkpoint binds the settings
            return f"nothing was learned yet; {self.advice}."
        advice = f"{self.advice}, and start a run of another name"
        if learner.has_finite_weights():
            self.save_if_new()
            return f"the last good weights, of step {learner.step}, are in {self.path}; {advice}."
        before = [path for step, path in find_checkpoints(self.folder) if step <= learner.step]
        return f"the last good weights are in {before[-1]}; {advice}." if before else f"{advice}."

    def _overdue(self) -> bool:
        """Whether the last checkpoint is so old that another is due, in all processes alike."""
        if not self.config.checkpoint_minutes:
            return False
        late = time.monotonic() - self._saved_at >= 60.0 * self.config.checkpoint_minutes
        return self.processes.anywhere(late)
