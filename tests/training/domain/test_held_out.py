"""The held-out loss: closed forms, fixed noise, and independence of the batch size."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.training.domain.held_out import TIMESTEPS, held_out_loss
from torch import nn

SCHEDULE = NoiseSchedule.scaled_linear()


class Knows(nn.Module):
    """Outputs what a perfect model would for latents of all `value`, plus an error."""

    def __init__(self, prediction: str, value: float, error: float) -> None:
        super().__init__()
        self.prediction, self.value, self.error = prediction, value, error

    def forward(self, x, timesteps, **cond):
        assert not self.training
        abar = SCHEDULE.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        noise = (x - abar.sqrt() * self.value) / (1 - abar).sqrt()
        v = abar.sqrt() * noise - (1 - abar).sqrt() * self.value
        outputs = {"epsilon": noise, "v_prediction": v, "sample": torch.full_like(x, self.value)}
        return outputs[self.prediction] + self.error


class Ignorant(nn.Module):
    """Always says zero."""

    def forward(self, x, timesteps):
        return torch.zeros_like(x)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_is_the_square_of_a_known_error(prediction):
    latents = [torch.full((4, 8, 8), 0.5)] * 3 + [torch.full((4, 8, 4), 0.5)]
    model = Knows(prediction, 0.5, 0.25).train()
    loss, per_level = held_out_loss(model, SCHEDULE, prediction, latents)
    assert list(per_level) == list(TIMESTEPS) and model.training
    assert all(abs(value - 0.0625) < 1e-4 for value in per_level.values()) and abs(loss - 0.0625) < 1e-4


def test_noise_is_fixed_and_batches_do_not_matter():
    latents = [torch.randn(4, 8, 8) for _ in range(5)]
    results = []
    for batch in (1, 2, 5):
        results.append(held_out_loss(Ignorant(), SCHEDULE, "epsilon", latents, batch=batch, seed=3)[0])
    assert results[0] == pytest.approx(results[1], rel=1e-6) == pytest.approx(results[2], rel=1e-6)
    other, per_level = held_out_loss(Ignorant(), SCHEDULE, "epsilon", latents, seed=4)
    assert abs(other - results[0]) > 1e-4 and len(set(per_level.values())) == len(TIMESTEPS)
    assert abs(other - 1) < 0.1  # the mean square of the noise itself


def test_noise_belongs_to_the_image_and_not_to_its_place():
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(4, 8, 8, generator=generator) for _ in range(3)]
    seen = {}

    class Records(Ignorant):
        def forward(self, x, timesteps):
            for one, t in zip(x, timesteps):
                seen.setdefault(int(t), []).append(one)
            return super().forward(x, timesteps)

    def noisy(order):
        seen.clear()
        keys = ["abc"[index] for index in order]
        held_out_loss(Records(), SCHEDULE, "epsilon", [latents[index] for index in order], keys=keys)
        return {index: [seen[t][at] for t in TIMESTEPS] for at, index in enumerate(order)}

    before, after = noisy([0, 1]), noisy([2, 0, 1])  # one more image, in front of the others
    assert all(torch.equal(a, b) for index in (0, 1) for a, b in zip(before[index], after[index]))
    noise = [(after[index][-1] - SCHEDULE.alphas_cumprod[TIMESTEPS[-1]].sqrt() * latents[index]) for index in range(3)]
    assert all(float((noise[i] - noise[j]).std()) > 1 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_conditioning_gets_the_sizes():
    told = []
    held_out_loss(
        Knows("epsilon", 0.0, 0.0),
        SCHEDULE,
        "epsilon",
        [torch.zeros(4, 8, 8)] * 3,
        lambda sizes: told.extend(sizes) or {"y": torch.zeros(len(sizes), 1)},
        ["a", "b", "c"],
        batch=2,
    )
    assert told == ["a", "b", "c"]


def test_needs_latents_and_can_be_stopped():
    with pytest.raises(ValueError, match="expected at least one latent"):
        held_out_loss(nn.Identity(), SCHEDULE, "epsilon", [])
    loss, levels = held_out_loss(
        Knows("epsilon", 0.0, 0.0), SCHEDULE, "epsilon", [torch.zeros(4, 8, 8)], should_stop=lambda: True
    )
    assert loss != loss and levels == {}
