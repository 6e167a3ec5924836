"""Fine-tunes with a caption for each image: read by the judge, and learned as the trainer learns one for all."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.files import read_state_dict
from indomain_guidance.training.claims import captions
from indomain_guidance.training.claims.models import Models
from indomain_guidance.training.claims.points import AUTOMATIC, ModelSpec
from indomain_guidance.training.mini_world import assets, render

FIXED = "a red seven on a yellow background"


def test_the_judge_reads_what_pictures_show():
    pictures = render.handwritten(slice(0, 40), render.domain_pairs("handwriting"), torch.Generator().manual_seed(0))
    read = captions.captions_of(assets.load_classifier(), pictures.images)
    shown = zip(pictures.digit.tolist(), pictures.ink.tolist(), pictures.ground.tolist())
    assert sum(one == render.caption(*what) for one, what in zip(read, shown)) >= 38


@pytest.mark.slow
def test_one_caption_for_every_image_is_the_trainers_own(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "captions_of", lambda model, images: [FIXED] * len(images))
    models = Models(tmp_path, assets.load_mini_world(), images=6, batch=3)
    one, all_alike, empty = (
        read_state_dict(models.file(ModelSpec("low_rank", "narrow", 2, caption))) for caption in (FIXED, AUTOMATIC, "")
    )
    for key, weight in one.items():
        torch.testing.assert_close(all_alike[key], weight, atol=1e-5, rtol=1e-3)
    assert any(not torch.allclose(empty[key], weight, atol=1e-5, rtol=1e-3) for key, weight in one.items())


@pytest.mark.slow
def test_every_image_is_learned_with_its_own_caption(tmp_path, monkeypatch):
    """Contexts of a step are those of the captions of the images that it draws."""
    seen = []
    original = captions._CaptionedLearner._load_pass

    def load(self, draws):
        found = original(self, draws)
        seen.append((self, [draw.index for draw in draws], found.conditioning["context"]))
        return found

    read = [render.caption(number, 2, 5) for number in range(6)]
    monkeypatch.setattr(captions._CaptionedLearner, "_load_pass", load)
    monkeypatch.setattr(captions, "captions_of", lambda model, images: read)
    world = assets.load_mini_world()
    Models(tmp_path, world, images=6, batch=3).file(ModelSpec("low_rank", "narrow", 2, AUTOMATIC))
    assert sorted(index for _, indices, _ in seen[:2] for index in indices) == list(range(6))
    for _, indices, context in seen:
        torch.testing.assert_close(context, world.encode_text([read[index] for index in indices]))
