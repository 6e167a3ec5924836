"""The listener for TensorBoard, and that its package may be missing."""

from __future__ import annotations

import sys

import pytest
from indomain_guidance.training.engine.events import Step
from indomain_guidance.training.engine.tensorboard import TensorBoard


def test_tensorboard_that_is_missing_is_named(monkeypatch, tmp_path):

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


def test_tensorboard_hides_the_steps_that_a_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(steps, **more):
        board = TensorBoard(tmp_path, 1, **more)
        for step in steps:
            board(Step(step, 9, 0.1, 1e-4, None, 0.1))
        board.close()
        return [one.step for one in EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")]

    assert write([1, 2, 3, 4]) == [1, 2, 3, 4]
    assert write([3, 4], start=2) == [1, 2, 3, 4]
    assert write([5]) == [1, 2, 3, 4, 5]  # nothing is repeated
