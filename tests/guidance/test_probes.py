"""Probes against the DDIM recursion in its own variables; what is measured on them is in test_null_text."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.diffusion import Denoiser, NoiseSchedule
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.guidance.probes import collect_probes

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    transformer_depth=(1, 2),
    transformer_depth_middle=1,
    transformer_depth_output=(1, 1, 1, 1),
    context_dim=48,
    num_heads=4,
)
SCHEDULE = NoiseSchedule.scaled_linear()
CONTEXT = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def prior(randomise):
    return randomise(UNet(SMALL))


def test_probes_are_the_priors_unconditional_trajectory(prior):
    denoiser = Denoiser(prior, SCHEDULE)
    probes = collect_probes(denoiser, CONTEXT, (2, 4, 8, 8))
    # the DDIM recursion in its own variables (arXiv 2010.02502, eq. 12), starting from the same noise
    timesteps = torch.linspace(999, 0, 20).round()
    abar = SCHEDULE.alphas_cumprod[timesteps.long()].double()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    x = x * (1 - abar[0]).sqrt()
    visited = []
    with torch.no_grad():
        for step in range(20):
            visited.append(x)
            at = timesteps[step].expand(2)
            eps = prior(x.float(), at, CONTEXT.expand(2, -1, -1)).double()
            following = abar[step + 1] if step < 19 else torch.ones(())
            x0 = (x - (1 - abar[step]).sqrt() * eps) / abar[step].sqrt()
            x = following.sqrt() * x0 + (1 - following).sqrt() * eps
    used = [0, 3, 5, 8, 11, 14, 16, 19]
    assert probes.timesteps.tolist() == timesteps[used].repeat_interleave(2).tolist()
    expected = torch.cat([visited[step] for step in used]).float()
    assert torch.allclose(probes.x, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_probes_depend_on_the_seed_only(prior):
    denoiser, steps = Denoiser(prior, SCHEDULE), []
    report = lambda done, total: steps.append((done, total))  # noqa: E731
    first = collect_probes(denoiser, CONTEXT, (1, 4, 8, 8), steps=5, use=2, on_step=report)
    again = collect_probes(denoiser, CONTEXT, (1, 4, 8, 8), steps=5, use=2)
    other = collect_probes(denoiser, CONTEXT, (1, 4, 8, 8), steps=5, use=2, seed=1)
    assert torch.equal(first.x, again.x) and not torch.allclose(first.x, other.x)
    assert len(first) == 2 and steps == [(done, 5) for done in (1, 2, 3, 4, 5)]
    with pytest.raises(ValueError, match="1 to 5 steps"):
        collect_probes(denoiser, CONTEXT, (1, 4, 8, 8), steps=5, use=6)
