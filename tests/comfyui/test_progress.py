"""The progress bar notices a cancel at every update, however seldom this version of core's bar moves."""

from __future__ import annotations

import importlib

import pytest


def test_a_cancel_is_noticed_at_the_next_update(comfyui):
    progress = importlib.import_module("indomain_guidance.nodes.comfy_internals.progress")
    bar = progress.ProgressBar(100_000)
    bar.update(1)
    bar.update_absolute(2, 100_000)
    comfyui.model_management.interrupt_current_processing()
    with pytest.raises(comfyui.model_management.InterruptProcessingException):
        bar.update(1)
    bar.update(1)
    assert (bar.current, bar.total) == (4, 100_000)
