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


def test_the_steps_of_a_run_are_shown_after_its_images_were_encoded(comfyui, monkeypatch):
    shown_by, events = (
        importlib.import_module(f"indomain_guidance.{name}")
        for name in ("nodes.comfy_internals.progress", "training.engine.events")
    )
    shown = []
    monkeypatch.setattr(
        comfyui.utils, "PROGRESS_BAR_HOOK", lambda value, total, *args, **kwargs: shown.append((value, total))
    )
    progress = shown_by.RunProgress()
    for done in range(1, 25):
        progress(events.Preparing("encoding images", done=done, total=24))
    progress(events.Step(step=1, steps=12, loss=0.5, rate=1e-5, gradient_norm=1.0, seconds_per_step=0.1))
    assert (24, 24) in shown and shown[-1] == (1, 12)
