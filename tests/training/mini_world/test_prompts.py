"""Prompts and the exact pictures that answer them."""

import pytest
import torch
from indomain_guidance.training.mini_world import assets, render
from indomain_guidance.training.mini_world.prompts import cfg_of, draw_prompts, sample_prompts, target_pictures


def test_targets_are_held_out_handwriting_of_the_same_digits_in_the_same_colours():
    prompts = draw_prompts(40, render.foreign_pairs(), seed=3)
    target = target_pictures(prompts.digits, prompts.pairs)
    images, labels = render.load_handwriting(render.HELD_OUT_ROWS)
    masks = render.handwriting_masks(images)
    for picture, digit, pair in zip(target.images, prompts.digits, prompts.pairs):
        candidates = render.paint(masks[labels == digit], pair.expand(int((labels == digit).sum()), 2))
        assert float((candidates - picture).abs().amax(dim=(1, 2, 3)).min()) < 1e-6


def test_no_target_is_used_twice_before_every_one_was_used_once():
    digits = torch.zeros(150, dtype=torch.long)
    target = target_pictures(digits, render.domain_pairs("narrow").expand(150, 2))
    assert len(target.images.flatten(1).unique(dim=0)) == 150


@pytest.mark.slow
def test_sampling_from_pictures_changes_them_the_more_the_more_of_it_is_done():
    world, prompts = assets.load_mini_world(), draw_prompts(4, render.foreign_pairs(), seed=3)
    generator = torch.Generator().manual_seed(0)
    pictures = render.rendered(4, generator, digits=prompts.digits, pairs=prompts.pairs).images
    latents = world.autoencoder.encode(pictures)[0] * world.scale
    reference = assets.reconstruct(world.autoencoder, pictures)

    def changed(denoise):
        drawn, cost = sample_prompts(world, cfg_of(world, 2.0), prompts, steps=4, start=latents, denoise=denoise)
        assert cost == 2.0
        return float((drawn - reference).abs().mean())

    little, half, whole = map(changed, (0.1, 0.5, 1.0))
    assert little < 0.05 < half < whole
