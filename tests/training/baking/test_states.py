"""What a step matches is a function of (seed, step) alone, in equal parts, of pictures and of what the prior draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.diffusion import Denoiser
from indomain_guidance.guidance.multi_guidance import MultiGuidance
from indomain_guidance.guidance.null_text import NullContext
from indomain_guidance.guidance.presets import cfg, in_domain
from indomain_guidance.guidance.sampling import sample, sigmas_uniform
from indomain_guidance.guidance.schedules import Constant
from indomain_guidance.training.baking.prompts import EncodedTexts
from indomain_guidance.training.baking.states import OWN_SCALE, Batch, OwnSamples, States, draw_own, keep_own, kept_own
from indomain_guidance.training.baking.teacher import Teacher
from indomain_guidance.training.baking.terms import BakedTerm
from indomain_guidance.training.data.problems import Cancelled
from indomain_guidance.training.engine.randomness import sample_generator
from indomain_guidance.training.prior.encoded_prompts import EncodedPrompts
from indomain_guidance.training.prior.prior import ImageSize

from .conftest import PROMPTS, unet_of


@pytest.fixture
def texts(base):
    return EncodedTexts.of(base, PROMPTS)


@pytest.fixture
def teacher(base, domain):
    return Teacher(base, unet_of(base), [BakedTerm("domain", Constant(1.5), domain)])


def of(config, base, texts, dataset=None, own=None, **more):
    return States(config, base, texts, dataset, own or {}, PROMPTS, **more)


def test_a_step_is_the_same_whenever_it_is_asked(settings, base, texts, latents):
    config = settings(states=("pictures",), batch_size=6, empty_share=0.3)
    first, second = (of(config, base, texts, latents) for _ in range(2))
    for step in (7, 0, 3):
        for one, other in zip(first.batches(step), second.batches(step), strict=True):
            assert torch.equal(one.noisy, other.noisy) and torch.equal(one.timesteps, other.timesteps)
            assert torch.equal(one.places, other.places) and one.sizes == other.sizes
    drawn = torch.cat([batch.places for step in range(60) for batch in first.batches(step)])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert float(shares[0]) == pytest.approx(0.3, abs=0.07) and float(shares[1:].min()) > 0.15
    times = torch.cat([batch.timesteps for step in range(60) for batch in first.batches(step)])
    assert times.min() < 60 and times.max() > 940


def test_every_kind_has_an_equal_part_and_shapes_are_kept_apart(settings, base, texts, latents, teacher):
    config = settings(states=("pictures", "own", "trajectories"), batch_size=8, own_count=4, own_steps=3)
    own = {kind: draw_own(config, texts, teacher, kind) for kind in ("own", "trajectories")}
    assert own["own"].latents.shape == (4, 4, 8, 8) and own["trajectories"].latents.shape == (12, 4, 8, 8)
    states = of(config, base, texts, latents, own)
    for step in range(12):
        batches = states.batches(step)
        assert sum(len(batch.noisy) for batch in batches) == 8
        assert len({batch.noisy.shape[1:] for batch in batches}) == len(batches) <= 2
        squares = sum(len(batch.noisy) for batch in batches if batch.noisy.shape[-2:] == (8, 8))
        assert squares in (5, 8)  # 3 pictures of one shape, 3 samples, 2 states


def test_sdxl_is_told_the_size_of_each_picture_and_its_own_prompt(settings, base, latents):
    """Vector conditioning of both prompts, with the sizes that the dataset drew."""
    pooled = {prompt: torch.randn(1, 16) for prompt in ("", *PROMPTS)}
    null = NullContext(base.null_context.tensor, {}, pooled[""])
    texts = {prompt: (base.encode_text([prompt]).context, vector) for prompt, vector in pooled.items()}
    large = replace(
        base,
        config=replace(base.config, adm_in_channels=16 + 6 * 256),
        null_context=null,
        text_encoder=EncodedPrompts(texts),
    )
    encoded = EncodedTexts.of(large, PROMPTS)
    for batch in of(settings(states=("pictures",), batch_size=6), large, encoded, latents).batches(3):
        assert len(batch.sizes) == len(batch.noisy)
        assert all(size.original[0] - size.target[0] in range(31) for size in batch.sizes)  # as MemoryLatents says
        empty, prompted = encoded.pair(batch.sizes, batch.places, "cpu")
        for row, (size, place) in enumerate(zip(batch.sizes, batch.places.tolist())):
            for found, prompt in ((empty, ""), (prompted, ("", *PROMPTS)[place])):
                alone = large.conditioning([size], large.encode_text([prompt]))
                assert torch.equal(found["y"][row], alone["y"][0])
                assert torch.equal(found["context"][row], alone["context"][0])


def test_a_step_names_its_pictures(settings, base, texts, latents):
    config = settings(states=("pictures",), batch_size=6)
    names = of(config, base, texts, latents).names_at(2)
    assert len(names) == 6 and all(name.startswith("image-") for name in names)
    own = {"own": OwnSamples(torch.zeros(2, 4, 8, 8), torch.zeros(2).long(), torch.zeros(2).long(), None)}
    assert of(settings(states=("own",)), base, texts, None, own).names_at(2) == []


def test_processes_share_a_step(settings, base, texts, latents):
    config = settings(states=("pictures",), batch_size=6)
    (whole,) = of(config, base, texts, latents).batches(2)
    parts = [of(config, base, texts, latents, rank=rank, world=2).batches(2)[0] for rank in range(2)]
    assert [len(part.noisy) for part in parts] == [3, 3]
    for rank, part in enumerate(parts):
        assert torch.equal(part.noisy, whole.noisy[rank::2]) and torch.equal(part.places, whole.places[rank::2])


def test_own_samples_are_plain_cfg_of_the_prior(settings, base, texts, teacher):
    config = settings(own_count=3, own_steps=4, batch_size=2)
    own = draw_own(config, texts, teacher, "own")
    assert own.places.tolist() == [1, 2, 3] and own.timesteps.tolist() == [-1] * 3
    prior = Denoiser(unet_of(base), base.schedule)
    for number, prompt in enumerate(PROMPTS):
        noise = torch.randn(4, 8, 8, generator=sample_generator(config.seed, 0, number, "own/own"))[None]
        conds = [{"context": base.encode_text([text]).context} for text in ("", prompt)]
        guidance = MultiGuidance(cfg(prior, *conds, OWN_SCALE))
        with torch.no_grad():
            drawn = sample(guidance, noise, sigmas_uniform(base.schedule, 4).float(), "dpmpp_2m")
        torch.testing.assert_close(own.latents[number], drawn[0], rtol=1e-3, atol=1e-3)


def test_trajectories_are_the_states_of_guided_sampling(settings, base, texts, teacher):
    config = settings(states=("trajectories",), own_count=2, own_steps=5, batch_size=2, empty_share=0.0)
    own = draw_own(config, texts, teacher, "trajectories")
    levels = own.timesteps.view(5, 2)
    assert (levels[0] == 999).all() and (levels.diff(dim=0) < 0).all() and torch.equal(levels[:, 0], levels[:, 1])
    assert float(own.latents[:2].std()) == pytest.approx(1.0, abs=0.15)  # of unit variance, as the network sees them
    drawn = of(config, base, texts, None, {"trajectories": own}).batches(0)[0]
    for noisy, timestep, place in zip(drawn.noisy, drawn.timesteps, drawn.places):
        (index,) = [n for n, latent in enumerate(own.latents) if torch.equal(latent, noisy)]
        assert (own.timesteps[index], own.places[index]) == (timestep, place)


def test_trajectories_are_those_of_sampling_with_the_baked_model(settings, texts, teacher):
    """In-domain guidance at the prompt's weight, though the target is the domain's guidance alone."""
    config = settings(own_count=1, own_steps=4, control_weight=5.0)
    own = draw_own(config, texts, teacher, "trajectories")
    noise = torch.randn(4, 8, 8, generator=sample_generator(config.seed, 0, 0, "own/trajectories"))[None]
    empty, prompted = texts.pair([own.size], own.places[:1], "cpu")
    steps = []
    with torch.no_grad():
        domain = teacher._models["domain"]
        guidance = MultiGuidance(in_domain(teacher.before, domain, empty, prompted, 1.5, 5.0))
        sample(guidance, noise, sigmas_uniform(texts.prior.schedule, 4).float(), "dpmpp_2m", steps.append)
    for found, step in zip(own.latents, steps, strict=True):
        expected = step["x"][0] / (1 + step["sigma"] ** 2) ** 0.5
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_drawing_can_be_stopped(settings, texts, teacher):
    with pytest.raises(Cancelled):
        draw_own(settings(), texts, teacher, "own", should_stop=lambda: True)


def test_kept_samples_are_those_of_this_run_alone(settings, texts, teacher, tmp_path):
    own, size, path = draw_own(settings(), texts, teacher, "own"), ImageSize((64, 64)), tmp_path / "own.safetensors"
    keep_own(path, own, "these")
    kept = kept_own(path, "these", size)
    assert torch.equal(kept.latents, own.latents) and torch.equal(kept.places, own.places)
    assert kept_own(path, "others", size) is None
    path.write_bytes(path.read_bytes()[:50])
    assert kept_own(path, "these", size) is None


def test_batches_are_joined_by_shape_and_split_again():
    def part(side, number):
        sizes = (ImageSize((8 * side, 8 * side)),)
        return Batch(torch.full((1, 4, side, side), number), torch.tensor([number]), torch.tensor([0]), sizes)

    square, wide = Batch.joined([part(8, 1), part(4, 2), part(8, 3)])
    assert square.timesteps.tolist() == [1, 3] and wide.timesteps.tolist() == [2] and len(square.sizes) == 2
    assert [some.timesteps.tolist() for some in square.split(1)] == [[1], [3]]
