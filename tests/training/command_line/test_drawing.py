"""Pictures from base and domain model: the formula of arXiv 2312.08195, checked against a loop written out here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.files import read_domain_file
from indomain_guidance.training.command_line.drawing import SPACINGS, Artist, DrawingSettings
from indomain_guidance.training.command_line.main import build_parser
from indomain_guidance.training.mini_world.assets import domain_unets_dir, load_mini_world
from indomain_guidance.training.prior.opening import open_mini_world

SETTINGS = {"domain_weight": 1.2, "control_weight": 3.0, "method": "euler", "width": 64, "height": 64}
FILE = domain_unets_dir() / "mini-handwriting.safetensors"


@pytest.fixture(scope="module")
def artist() -> Artist:
    return Artist(open_mini_world(), *read_domain_file(FILE))


def by_hand(
    prompt: str, seed: int, domain_weight: float, control_weight: float, steps: int, interval=(0.0, 1.0), least=0
):
    """Euler in the sigma scale with D = D_u + w_d (D_domain - D_u) + w_c (D_c - D_u), on the shipped parts directly."""
    world = load_mini_world()
    domain, schedule = world.domain("mini-handwriting"), world.schedule
    uncond, cond = world.encode_text([""]), world.encode_text([prompt])
    sigmas = [*(schedule.sigma(t) for t in torch.linspace(999, least, steps).tolist()), 0.0]
    high, low = (schedule.percent_to_sigma(share) for share in interval)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * sigmas[0]
    with torch.no_grad():
        for sigma, following in zip(sigmas, sigmas[1:]):
            base = world.prior(x, sigma, context=uncond)
            active = low < sigma <= high
            denoised = base + control_weight * (world.prior(x, sigma, context=cond) - base)
            denoised = denoised + (domain_weight if active else 0.0) * (domain(x, sigma) - base)
            x = denoised + (x - denoised) * following / sigma
    return world.decode(x)[0]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
def test_pictures_follow_the_formula(artist, interval):
    prompt, settings = (
        "a red seven on a yellow background",
        DrawingSettings(domain_start=interval[0], domain_end=interval[1], steps=6, **SETTINGS),
    )
    (drawn,) = artist.draw([prompt], [5], settings)
    expected = by_hand(prompt, 5, 1.2, 3.0, 6, interval)
    assert (drawn.pixels - expected).abs().max() < 1e-3
    other = by_hand(prompt, 5, 1.2, 2.9, 6, interval)
    assert (drawn.pixels - other).abs().max() > 5e-3  # the comparison can fail


def test_the_papers_noise_levels_leave_the_least_one_out(artist):
    settings = DrawingSettings(steps=6, spacing="sgm_uniform", **SETTINGS)
    (drawn,) = artist.draw(["a red seven"], [5], settings)
    assert (drawn.pixels - by_hand("a red seven", 5, 1.2, 3.0, 6, least=999 / 6)).abs().max() < 1e-3
    assert (drawn.pixels - by_hand("a red seven", 5, 1.2, 3.0, 6)).abs().max() > 5e-3


def test_the_command_line_offers_every_spacing():
    for spacing in SPACINGS:
        options = build_parser().parse_args(["sample", "mini-handwriting", "--spacing", spacing])
        assert DrawingSettings(spacing=options.spacing).spacing == spacing


def test_order_and_count_of_pictures(artist):
    counted = []
    settings = DrawingSettings(steps=2, width=64, height=64, batch_size=2)
    drawn = list(
        artist.draw(["a", "b"], [0, 1, 2], settings, on_step=lambda done, total: counted.append((done, total)))
    )
    assert [(one.prompt, one.seed) for one in drawn] == [(p, s) for p in "ab" for s in (0, 1, 2)]
    assert counted == [(i, 8) for i in range(1, 9)]


def test_caption_of_a_full_model_is_what_it_was_trained_with(artist):
    full = replace(artist.metadata, config=replace(artist.metadata.config, null_text="none"))
    assert artist.metadata.caption is None and full.caption is None
    assert replace(full, extra={"training": '{"caption": "a digit"}'}).caption == "a digit"
    assert replace(full, extra={"training": "damaged"}).caption is None


@pytest.mark.parametrize(
    "wrong", [{"method": "magic"}, {"spacing": "odd"}, {"domain_start": 0.9, "domain_end": 0.1}, {"steps": 0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="expected"):
        DrawingSettings(**wrong)


def test_size_must_fit_the_latents(artist):
    with pytest.raises(ValueError, match="multiples of 8"):
        next(artist.draw([""], [0], DrawingSettings(width=64, height=60)))
