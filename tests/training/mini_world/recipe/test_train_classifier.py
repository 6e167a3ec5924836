"""What the two judges are trained on."""

import torch
from indomain_guidance.training.mini_world import render
from indomain_guidance.training.mini_world.recipe import train_classifier


def test_the_two_judges_never_see_each_others_pictures(monkeypatch):
    seen = []
    rendered, handwritten = render.rendered, render.handwritten
    monkeypatch.setattr(render, "rendered", lambda *a, **k: seen.append(k["held_out"]) or rendered(*a, **k))
    monkeypatch.setattr(render, "handwritten", lambda rows, *a, **k: seen.append(rows) or handwritten(rows, *a, **k))
    for held_out in (False, True):
        assert len(train_classifier.draw_batch(4, torch.Generator().manual_seed(0), held_out)) == 4
    assert seen == [False, render.TRAIN_ROWS, True, render.HELD_OUT_ROWS]
