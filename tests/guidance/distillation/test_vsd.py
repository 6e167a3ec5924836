"""Variational score distillation: the second critic learns the generator's distribution, and survives a restart."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.diffusion import Denoiser
from indomain_guidance.guidance.distillation.critic import Critic
from indomain_guidance.guidance.distillation.low_rank import LowRankAddition
from indomain_guidance.guidance.distillation.methods import make_method
from indomain_guidance.guidance.distillation.objective import Objective
from indomain_guidance.guidance.distillation.timesteps import Timesteps
from indomain_guidance.guidance.errors import GuidanceError
from torch import nn


class Small(nn.Module):
    """e linear in (x, 1) with coefficients that depend on the timestep: enough for a shifted Gaussian's score."""

    def __init__(self, schedule, spread: float = 0.5) -> None:
        super().__init__()
        self.abar, self.spread = schedule.alphas_cumprod, spread
        self.attn1 = nn.Module()
        self.attn1.to_q = nn.Linear(5, 4, bias=False)
        with torch.no_grad():
            self.attn1.to_q.weight.copy_(torch.eye(4, 5))
        self.requires_grad_(False)

    def forward(self, x, timesteps, mu):
        abar = self.abar[timesteps.long()].reshape(-1, 1, 1, 1).to(x.dtype)
        variance = abar * self.spread**2 + 1 - abar
        values = torch.cat(
            [
                (1 - abar).sqrt() / variance * (x - abar.sqrt() * mu),
                ((1 - abar) * abar).sqrt() / variance * torch.ones_like(x[:, :1]),
            ],
            1,
        )
        return self.attn1.to_q(values.to(x.dtype).movedim(1, -1)).movedim(-1, 1)


@pytest.fixture
def network(schedule):
    return Small(schedule)


@pytest.fixture
def critic(network, schedule, mean):
    return Critic.cfg(Denoiser(network, schedule), mean(0, 0, 0, 0), mean(1, 1, 1, 1), 1.0)


def run(objective: Objective, z: torch.Tensor, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        leaf = z.clone().requires_grad_()
        generator = torch.Generator().manual_seed(step)
        report = objective.backward(leaf * 1.0, None, lambda x: x * 1.0, step=step, steps=steps, generator=generator)
        losses.append(report.loss["vsd_critic"])
    return losses


def gradient(objective: Objective, z: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(99)
    return objective.image_gradient(z, None, lambda x: x * 1.0, step=0, steps=1, generator=generator)[0] * len(z)


def test_before_any_training_both_critics_agree(network, critic):
    objective = Objective(critic, make_method("vsd", critic))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    z = torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert float(gradient(objective, z).abs().max()) < 1e-5
    run(objective, z, 3)
    assert float(gradient(objective, z).abs().max()) > 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not network.attn1.to_q._forward_hooks


def test_the_gradient_becomes_the_difference_of_the_two_scores(critic, schedule):
    """A generator that makes N(-1, 0.5^2), a critic that wants N(1, 0.5^2): e - e_phi = factor ((x - 1) - (x + 1))."""
    method = make_method("vsd", critic, learning_rate=0.03, rank=4)
    objective = Objective(critic, method, weighting="uniform", timesteps=Timesteps(300, 300), bound=None)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(150):
        z = -1 + 0.5 * torch.randn(64, 4, 2, 2, generator=generator)
        losses += run(objective, z, 1, first=step)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    abar = float(schedule.alphas_cumprod[300])
    factor = ((1 - abar) * abar) ** 0.5 / (abar * 0.25 + 1 - abar)
    found = gradient(objective, -1 + 0.5 * torch.randn(256, 4, 2, 2, generator=generator))
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.full((4,), -2 * factor), rtol=0.15, atol=0)


def test_the_second_critic_can_wait_until_the_generators_gradients_are_looked_at(critic):
    z = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    straight = Objective(critic, make_method("vsd", critic, learning_rate=0.01))
    (loss,) = run(straight, z, 1)
    waits = Objective(critic, make_method("vsd", critic, learning_rate=0.01))
    before = waits.state_dict()["state"]
    leaf, generator = z.clone().requires_grad_(), torch.Generator().manual_seed(0)
    report = waits.backward(leaf * 1.0, None, lambda x: x * 1.0, step=0, steps=1, generator=generator, wait=True)
    state = waits.state_dict()["state"]
    assert leaf.grad is not None and "vsd_critic" not in report.loss
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)
    assert waits.train_method(report).loss["vsd_critic"] == loss
    state, expected = waits.state_dict()["state"], straight.state_dict()["state"]
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert waits.train_method(report) == report  # once for each step


def test_a_restart_goes_on_with_identical_numbers(critic):
    z = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    whole = Objective(critic, make_method("vsd", critic, learning_rate=0.01))
    straight = run(whole, z, 6)
    first = Objective(critic, make_method("vsd", critic, learning_rate=0.01))
    run(first, z, 3)
    state = {name: tensor.clone() for name, tensor in first.state_dict()["state"].items()}
    second = Objective(critic, make_method("vsd", critic, learning_rate=0.01, seed=5))
    second.load_state_dict({"method": "vsd", "state": state})
    assert run(second, z, 3, first=3) == straight[3:]
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    trained = second.method.addition.tensors().values()
    assert {id(one) for one in second.method.parameters()} == {id(one) for one in trained}
    with pytest.raises(GuidanceError, match="state of a low-rank critic"):
        make_method("vsd", critic, rank=2).load_state_dict(state)


def test_half_precision_critics_learn_too(schedule, mean):
    losses = []
    for dtype in (torch.float32, torch.float16):
        critic = Critic.cfg(Denoiser(Small(schedule).to(dtype), schedule), mean(0, 0, 0, 0), mean(1, 1, 1, 1), 1.0)
        objective = Objective(critic, make_method("vsd", critic, learning_rate=0.03))
        losses.append(run(objective, -torch.ones(16, 4, 2, 2), 20))
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.02) and losses[0][-1] < losses[0][0]


def test_the_low_rank_addition_is_what_its_formula_says(network):
    addition = LowRankAddition(network, rank=3, seed=1)
    (name,) = addition.down
    assert name == "attn1.to_q"
    with torch.no_grad():
        addition.up[name].normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    layer = network.attn1.to_q
    with addition.attached():
        worn = layer(x)
    merged = layer.weight + addition.up[name] @ addition.down[name]
    torch.testing.assert_close(worn, x @ merged.T)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    for wrong, message in ((dict(rank=0), "rank 1 or more"), (dict(layers="nothing"), "found none")):
        with pytest.raises(GuidanceError, match=message):
            LowRankAddition(network, **wrong)
