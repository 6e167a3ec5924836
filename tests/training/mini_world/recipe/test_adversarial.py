"""The recipe's loop for two networks: losses against closed forms, the same bits after a stop, and that it learns."""

import math
from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.errors import Problem
from indomain_guidance.guidance.files import FileProblem
from indomain_guidance.training.mini_world.recipe import adversarial
from indomain_guidance.training.mini_world.recipe.adversarial import (
    AdversarialConfig,
    discriminator_loss,
    gradient_penalty,
    pair_of,
    rate_share,
    run_adversarial,
)
from torch import nn

CONFIG = AdversarialConfig(name="toy", steps=10, rate=0.01, ema=0.9, save_every=3, bf16=False, batch=16, lazy=4)


class Shift(nn.Module):
    """Moves latents [B, 1, 1, 1]."""

    def __init__(self):
        super().__init__()
        self.amount = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.amount


class Line(nn.Module):
    """Logits [B] of a straight line through two layers, so that the penalty has something to differentiate twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 1), nn.SiLU(), nn.Conv2d(8, 1, 1))

    def forward(self, x):
        return self.layers(x).flatten()


def toy_pair():
    torch.manual_seed(0)
    return pair_of(Shift(), Line())


def real(count, generator):
    return 3 + 0.2 * torch.randn(count, 1, 1, 1, generator=generator)


def latents(count, generator):
    return 0.2 * torch.randn(count, 1, 1, 1, generator=generator)


def weights(pair):
    return {
        f"{part}.{key}": value
        for part in ("generator", "discriminator", "average")
        for key, value in getattr(pair, part).state_dict().items()
    }


def test_the_losses_are_cross_entropies_of_the_paired_logits():
    real, fake = torch.tensor([1.0, 0.2]), torch.tensor([0.3, 1.2])
    told_apart = [1 / (1 + math.exp(-0.7)), 1 / (1 + math.exp(1.0))]
    assert float(discriminator_loss(real, fake)) == pytest.approx(-sum(map(math.log, told_apart)) / 2)


def test_the_penalty_is_the_mean_squared_gradient_and_can_be_differentiated():
    slope = torch.tensor([2.0, -1.0], requires_grad=True)
    pictures = torch.randn(5, 2, requires_grad=True)
    penalty = gradient_penalty(pictures @ slope, pictures)
    assert float(penalty.detach()) == pytest.approx(5.0)
    penalty.backward()
    assert torch.allclose(slope.grad, 2 * slope.detach())


def test_a_run_killed_and_continued_ends_with_identical_bits(tmp_path, monkeypatch):
    whole = weights(run_adversarial(CONFIG, toy_pair(), real, latents, tmp_path / "whole"))
    one_step = adversarial._step

    def dies_at_eight(*arguments):
        if arguments[-1] == 8:
            raise KeyboardInterrupt
        return one_step(*arguments)

    monkeypatch.setattr(adversarial, "_step", dies_at_eight)
    with pytest.raises(KeyboardInterrupt):
        run_adversarial(CONFIG, toy_pair(), real, latents, tmp_path / "cut")
    monkeypatch.setattr(adversarial, "_step", one_step)
    continued = weights(run_adversarial(CONFIG, toy_pair(), real, latents, tmp_path / "cut"))
    assert all(torch.equal(whole[key], continued[key]) for key in whole)
    with pytest.raises(FileProblem, match="expected a run with gamma 0.5, found 1.0"):
        run_adversarial(replace(CONFIG, gamma=0.5), toy_pair(), real, latents, tmp_path / "cut")


def test_the_generator_moves_to_where_the_real_ones_are(tmp_path):
    pair = run_adversarial(replace(CONFIG, steps=800, save_every=800, fall=0.5), toy_pair(), real, latents, tmp_path)
    average, last = (network.amount.item() for network in (pair.average, pair.generator))
    assert average == pytest.approx(3.0, abs=0.5) and average != last


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    broken = lambda count, generator: real(count, generator) * float("nan")  # noqa: E731
    with pytest.raises(Problem, match="discriminator of toy became nan at step 0"):
        run_adversarial(CONFIG, toy_pair(), broken, latents, tmp_path)


def test_the_rate_rises_stays_and_falls():
    assert rate_share(0.0, 0.0, 0.0) == rate_share(0.999, 0.0, 0.0) == 1.0
    assert rate_share(0.05, 0.1, 0.5) == pytest.approx(0.51) and rate_share(0.3, 0.1, 0.5) == 1.0
    assert rate_share(0.75, 0.1, 0.5) == pytest.approx(0.5) and rate_share(1.0, 0.1, 0.5) == 0.0
