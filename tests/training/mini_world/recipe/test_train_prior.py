"""The pieces of the prior's recipe: kinds, captions, noising, weights and the word probe."""

import torch
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.training.mini_world import render
from indomain_guidance.training.mini_world.recipe import train_prior


def test_every_kind_appears_once():
    kinds = train_prior.kinds()
    assert kinds.shape == (560, 3) and len(kinds.unique(dim=0)) == 560
    assert bool((kinds[:, 1] != kinds[:, 2]).all())


def test_captions_say_the_truth_or_less_and_are_sometimes_empty():
    kind, seen = torch.tensor([7, 2, 5]), set()
    for seed in range(400):
        said = train_prior.draw_said(kind, torch.Generator().manual_seed(seed))
        text = train_prior.caption_of(said)
        assert text == "" if said is None else all(part in (-1, whole) for part, whole in zip(said, kind.tolist()))
        seen.add(text)
    assert {"", render.caption(7, 2, 5), render.caption(None, 2, 5), render.caption(7, None, None)} <= seen


def test_noising_is_the_forward_process_and_can_prefer_high_noise():
    schedule, generator = NoiseSchedule.scaled_linear(), torch.Generator().manual_seed(0)
    latents = torch.randn(4000, 1, 2, 2, generator=generator)
    noisy, timesteps, noise = train_prior.noised(latents, schedule, generator, noisy_share=0.5)
    abar = schedule.alphas_cumprod[timesteps][:, None, None, None]
    assert torch.allclose(noisy, abar.sqrt() * latents + (1 - abar).sqrt() * noise)
    assert bool((timesteps[:2000] >= 500).all())
    assert abs(float((timesteps[2000:] >= 500).float().mean()) - 0.5) < 0.05
    assert 740 < float(timesteps[:2000].float().mean()) < 760 and int(timesteps.max()) <= 999


def test_the_loss_weight_lies_between_eps_and_x0_loss():
    schedule = NoiseSchedule.scaled_linear()
    abar = schedule.alphas_cumprod
    weight = train_prior.loss_weight(schedule, torch.arange(1000))
    snr = abar / (1 - abar)
    assert torch.allclose(weight[snr > 0.2], snr[snr > 0.2].rsqrt(), rtol=1e-4)
    assert torch.allclose(weight[snr < 0.2], torch.full_like(weight[snr < 0.2], 5.0**0.5))


def test_the_word_probe_is_small_only_where_the_text_says_what_was_said():
    directions = torch.randn(29, 128, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=1, keepdim=True)
    said = torch.tensor([[7, 2, 5], [-1, 3, -1]])
    columns = torch.where(said < 0, torch.tensor([10, 8, 8]), said) + torch.tensor([0, 11, 20])
    # Hidden states with a logit of 20 for what was said and 0 for the rest, by least squares.
    wanted = torch.zeros(2, 29).scatter_(1, columns, 20.0)
    hidden = torch.linalg.lstsq(directions, wanted.T).solution.T[:, None].expand(2, 77, 128)
    probe = lambda text: float(train_prior.word_probe_loss(text, said, torch.Generator().manual_seed(0)))  # noqa: E731
    assert probe(hidden) < 1e-3 < 1.0 < probe(hidden.flip(0))
