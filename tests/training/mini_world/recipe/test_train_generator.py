"""The generator of handwriting: its data, how it grows, and the form in which it ships."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from indomain_guidance.training.mini_world import render
from indomain_guidance.training.mini_world.recipe import quality, train_generator


@pytest.fixture
def tiny(monkeypatch):
    """The same recipe with narrow networks and two steps at each size."""
    config = replace(train_generator.CONFIG, channels=(16, 16, 8, 8, 8), z_dim=8, w_dim=8)
    monkeypatch.setattr(train_generator, "CONFIG", config)
    monkeypatch.setattr(train_generator, "CRITIC_CHANNELS", config.channels)
    for name in ("SMALL_LOOP", "LOOP"):
        monkeypatch.setattr(train_generator, name, replace(getattr(train_generator, name), steps=2, batch=4))
    return config


def test_real_pictures_are_training_handwriting_white_on_black_at_either_size():
    draw = lambda side: train_generator.real_pictures(6, torch.Generator().manual_seed(3), side)  # noqa: E731
    full = draw(64)
    chosen = torch.randint(8000, (6,), generator=torch.Generator().manual_seed(3))
    images, _ = render.load_handwriting(render.TRAIN_ROWS)
    painted = render.paint(render.handwriting_masks(images[chosen]), render.domain_pairs("narrow").expand(6, 2))
    assert torch.allclose(full.expand(-1, 3, -1, -1), painted, atol=1e-6)
    assert torch.allclose(draw(32), F.avg_pool2d(full, 2), atol=1e-6)


def test_a_grown_generator_draws_the_small_ones_pictures_at_first(tiny):
    small, large = (train_generator.fresh_pair(side, seed).generator for side, seed in ((32, 0), (64, 1)))
    latents = train_generator.latents(3, torch.Generator().manual_seed(0))
    train_generator.grown(large, small)
    with torch.no_grad():
        expected, found = small(latents), large(latents)
    assert found.shape == (3, 1, 64, 64) and float(expected.std()) > 0.01
    # The upsampling filter keeps the mean of the picture and smooths it.
    assert torch.allclose(F.avg_pool2d(found, 2)[:, :, 2:-2, 2:-2].mean(), expected[:, :, 2:-2, 2:-2].mean(), atol=0.01)
    enlarged = F.interpolate(expected, scale_factor=2, mode="bilinear")
    assert float((found - enlarged).abs()[:, :, 2:-2, 2:-2].max()) < 1e-5


def test_both_sizes_are_trained_and_what_ships_is_grey_and_continues_without_training(tiny, tmp_path, monkeypatch):
    model = train_generator.train(tmp_path, seed=0)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"generator-32.ckpt", "generator-64.ckpt"}
    pictures = quality.generated(model, 5)
    assert pictures.shape == (5, 3, 64, 64) and torch.equal(pictures[:, :1].expand(-1, 3, -1, -1), pictures)
    latents = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    mean = model.map(latents)[:, 0].mean(0)
    assert float((model.mapping.w_avg - mean).norm() / mean.norm().clamp(min=1.0)) < 0.1

    monkeypatch.setattr(torch.optim.Adam, "step", None)
    again = train_generator.train(tmp_path, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
