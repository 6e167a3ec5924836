"""Sample grids: the arithmetic of multi-guidance in them, fixed seeds, labels, and files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from indomain_guidance.guidance.diffusion import Denoiser
from indomain_guidance.guidance.sampling import sample, sigmas_uniform
from indomain_guidance.training.domain import previews
from indomain_guidance.training.domain import trainee as parts
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.grids import LABEL_WIDTH, MARGIN
from indomain_guidance.training.mini_world.assets import load_domain
from indomain_guidance.training.prior.opening import open_checkpoint, open_mini_world

PROMPT = "a red seven on a blue background"


@pytest.fixture(scope="module")
def base():
    return open_mini_world()


@pytest.fixture(scope="module")
def domain():
    return load_domain()


def config(**changes):
    values = {"base": "mini_world", "data": ("x",), "resolution": 64, "sample_count": 2, "sample_steps": 3, "seed": 5}
    return TrainConfig(**values | changes)


def tiles(sheet, rows, columns):
    """The pictures of a grid at 64 px, [rows][columns] of [64, 64, 3] uint8."""
    pixels, step = torch.from_numpy(np.array(sheet)), 128 + MARGIN
    pixels = pixels[sheet.height - rows * step :, LABEL_WIDTH:]
    return [
        [pixels[r * step : r * step + 128 : 2, c * step : c * step + 128 : 2] for c in range(columns)]
        for r in range(rows)
    ]


@torch.no_grad()
def expected(base, denoise, seed):
    """What one seed should look like, from the formula and the samplers alone."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    latents = sample(denoise, noise, sigmas_uniform(base.schedule, 3).float(), "dpmpp_2m")
    return ((base.decode(latents)[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)


def close(found, wanted):
    return float((found.float() - wanted.float()).abs().mean()) < 0.5


def test_rows_are_multi_guidance_against_the_prior(base, domain):
    """Every tile equals D_u + w_d (D_domain - D_u) + w_c (D_control - D_u), written out here."""
    prior, trained = Denoiser(base.load_unet(), base.schedule), Denoiser(domain, base.schedule)
    null, control = base.null_text.context, base.encode_text([PROMPT]).context

    def guided(x, sigma):
        u = prior(x, sigma, context=null)
        return u + 1.5 * (trained(x, sigma) - u) + 2.0 * (prior(x, sigma, context=control) - u)

    setting = config(sample_prompts=(PROMPT, ""), domain_weight=1.5, control_weight=2.0)
    preview = previews.Preview(base, setting)
    found = tiles(preview.draw(domain), 2, 2)
    for column, seed in enumerate((5, 6)):
        assert close(found[0][column], expected(base, guided, seed))
    assert not close(found[0][0], found[0][1]) and not close(found[0][0], found[1][0])
    again = preview.draw(domain)
    assert tiles(again, 2, 2)[1][1].equal(found[1][1])


def test_without_prompts_the_model_alone_and_against_the_prior(base, domain):
    prior, trained = Denoiser(base.load_unet(), base.schedule), Denoiser(domain, base.schedule)

    def against(x, sigma):
        u = prior(x, sigma, context=base.null_text.context)
        return u + 2.5 * (trained(x, sigma) - u)

    found = tiles(previews.Preview(base, config()).draw(domain), 2, 2)
    assert close(found[0][0], expected(base, trained, 5)) and close(found[1][0], expected(base, against, 5))


def test_a_model_with_text_is_sampled_with_its_own_guidance(base):
    trainee = parts.start_model(base, "full", "self_attention")
    null, control = base.null_text.context, base.encode_text([PROMPT]).context
    own = Denoiser(trainee.unet, base.schedule)

    def guided(x, sigma):
        u = own(x, sigma, context=null)
        return u + 3.0 * (own(x, sigma, context=control) - u)

    preview = previews.Preview(base, config(sample_prompts=(PROMPT,), control_weight=3.0, sample_count=1))
    assert close(tiles(preview.draw(trainee.unet, trainee.text), 1, 1)[0][0], expected(base, guided, 5))
    alone = previews.Preview(base, config(sample_count=1)).draw(trainee.unet, trainee.text)
    assert close(tiles(alone, 1, 1)[0][0], expected(base, lambda x, s: own(x, s, context=null), 5))


def test_drawing_disturbs_nothing(base, domain):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    sheet = previews.Preview(base, config()).draw(domain, title="step 10")
    assert torch.equal(state, torch.random.get_rng_state())
    assert sheet.width == LABEL_WIDTH + 2 * (128 + MARGIN)


def test_can_be_stopped_between_rows(base, domain):
    calls = iter([False, True])
    assert previews.Preview(base, config()).draw(domain, should_stop=lambda: next(calls)) is None


def test_prompts_that_cannot_be_encoded_are_refused_before_training(tiny_checkpoint):
    base = open_checkpoint(tiny_checkpoint("sd1").path)
    with pytest.raises(ValueError, match="expected a tokenizer"):
        previews.Preview(base, config(sample_prompts=("a cat",)))


def test_a_grid_of_sdxl(tiny_checkpoint):
    """Sizes and pooled text reach both models; an untrained domain model leaves the prior where it was."""
    base = open_checkpoint(tiny_checkpoint("sdxl").path)
    trainee = parts.start_model(base, "cached")
    sheet = previews.Preview(base, config(sample_count=1, sample_steps=2, domain_weight=3.0)).draw(trainee.unet)
    alone, against = (row[0] for row in tiles(sheet, 2, 1))
    assert float((alone.float() - against.float()).abs().mean()) < 2.0
