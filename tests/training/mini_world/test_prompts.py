"""Prompts and the exact pictures that answer them."""

import torch
from indomain_guidance.training.mini_world import render
from indomain_guidance.training.mini_world.prompts import draw_prompts, target_pictures


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
