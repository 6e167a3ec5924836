"""The recipe's loop: interrupted and continued runs end with the same bits."""

import pytest
import torch
from indomain_guidance.guidance.errors import Problem
from indomain_guidance.training.mini_world.recipe.loop import LoopConfig, one_cycle, run_loop
from indomain_guidance.training.mini_world.render import step_generator
from torch import nn


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def _loss(model, generator, step):
    x = torch.randn(8, 4, generator=generator)
    return (model(x) - 2 * x).square().mean(), {"step_seen": step}


CONFIG = LoopConfig(name="toy", steps=12, rate=0.05, ema=0.9, save_every=3, bf16=False)


def test_a_run_killed_and_continued_ends_with_identical_bits(tmp_path):
    whole = run_loop(CONFIG, _model(), _loss, tmp_path / "whole").state_dict()

    def dies_at_seven(model, generator, step):
        if step == 7:
            raise KeyboardInterrupt
        return _loss(model, generator, step)

    with pytest.raises(KeyboardInterrupt):
        run_loop(CONFIG, _model(), dies_at_seven, tmp_path / "cut")
    continued = run_loop(CONFIG, _model(), _loss, tmp_path / "cut").state_dict()
    assert all(torch.equal(whole[key], continued[key]) for key in whole)


def test_the_loop_learns(tmp_path):
    losses = []

    def loss(model, generator, step):
        value, numbers = _loss(model, generator, step)
        losses.append(value.item())
        return value, numbers

    run_loop(LoopConfig(name="toy", steps=200, rate=0.05, bf16=False), _model(), loss, tmp_path)
    assert len(losses) == 200 and losses[-1] < 0.05 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    def breaks(model, generator, step):
        loss, numbers = _loss(model, generator, step)
        return loss * (float("nan") if step == 5 else 1.0), numbers

    with pytest.raises(Problem, match="step 5"):
        run_loop(CONFIG, _model(), breaks, tmp_path)


def test_randomness_is_a_function_of_seed_and_step():
    draw = lambda seed, step: torch.randn(3, generator=step_generator(seed, step))  # noqa: E731
    assert torch.equal(draw(1, 9), draw(1, 9))
    assert not torch.equal(draw(1, 9), draw(1, 10)) and not torch.equal(draw(1, 9), draw(2, 9))


def test_one_cycle_rises_to_one_and_falls_to_zero():
    rates = [one_cycle(i / 100, 0.1) for i in range(101)]
    assert max(rates) == rates[10] == 1.0 and rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
