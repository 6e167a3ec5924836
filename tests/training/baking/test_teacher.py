"""The target against its formula, by hand; and plain CFG of a model that has learned it against in-domain guidance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance import presets
from indomain_guidance.guidance.diffusion import Denoiser, NoiseSchedule, denoised_from_output, output_from_denoised
from indomain_guidance.guidance.frequency import Bands
from indomain_guidance.guidance.multi_guidance import MultiGuidance
from indomain_guidance.guidance.networks.low_rank import add_low_rank, low_rank_layers
from indomain_guidance.guidance.null_text import load_unet
from indomain_guidance.guidance.sampling import sample, sigmas_uniform
from indomain_guidance.guidance.schedules import Constant, Interval, Keyframes
from indomain_guidance.training.baking.teacher import Teacher
from indomain_guidance.training.baking.terms import BakedTerm
from indomain_guidance.training.prior.prior import ImageSize

from .conftest import PROMPTS, base_of, domain_of, unet_of

KINDS = ("epsilon", "v_prediction", "sample")


def latents(count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.tensor([20, 500, 950][:count])


def texts_of(prior, count=3):
    generator = torch.Generator().manual_seed(2)
    cond = torch.randn(count, 7, prior.config.context_dim, generator=generator)
    return {"context": prior.null_context.tensor.expand(count, -1, -1)}, {"context": cond}


def term(domain, weight=1.5, name="domain", **more):
    return BakedTerm(name, weight if not isinstance(weight, float) else Constant(weight), domain, **more)


@torch.no_grad()
def denoised(prior, unet, kind, noisy, timesteps, **cond):
    """x0 of a network at noisy latents of unit variance, by hand."""
    abar = prior.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    sigma = ((1 - abar) / abar).sqrt()
    return denoised_from_output(unet(noisy, timesteps, **cond), noisy / abar.sqrt(), sigma, kind)


@torch.no_grad()
def by_hand(prior, domain, noisy, timesteps, weight, control=1.0):
    """D_u + w_d (D_domain - D_u) + w_c (D_c - D_u) as an output of the network; weight: a number or one per latent."""
    empty, prompted = texts_of(prior, len(noisy))
    own = unet_of(prior)
    u, c = (denoised(prior, own, prior.prediction_type, noisy, timesteps, **cond) for cond in (empty, prompted))
    kind = domain[1].prediction_type or prior.prediction_type
    d = denoised(prior, load_unet(domain[0], domain[1].config), kind, noisy, timesteps)
    abar = prior.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    sigma = ((1 - abar) / abar).sqrt()
    weight = torch.as_tensor(weight).view(-1, 1, 1, 1)
    whole = u + weight * (d - u) + control * (c - u)
    return output_from_denoised(whole, noisy / abar.sqrt(), sigma, prior.prediction_type)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("domain_kind", [None, "v_prediction"])
def test_it_is_the_formula_in_every_parameterisation(kind, domain_kind):
    prior = base_of(kind)
    domain, (noisy, timesteps) = domain_of(prior, domain_kind), latents()
    teacher = Teacher(prior, unet_of(prior), [term(domain)])
    found = teacher.target(noisy, timesteps, *texts_of(prior), [])
    torch.testing.assert_close(found, by_hand(prior, domain, noisy, timesteps, 1.5), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_domain_model_of_another_noise_schedule_is_asked_at_its_own_timesteps():
    """A zero-SNR v-model beside a prior of the usual schedule: the same sigma is another timestep."""
    prior = base_of()
    weights, metadata = domain_of(prior, "v_prediction")
    domain, (noisy, timesteps) = (weights, replace(metadata, zero_snr=True)), latents()
    found = Teacher(prior, unet_of(prior), [term(domain)]).target(noisy, timesteps, *texts_of(prior), [])
    sigma, empty = prior.schedule.sigmas[timesteps], texts_of(prior)[0]
    x = noisy * (sigma**2 + 1).sqrt().view(-1, 1, 1, 1)
    other = NoiseSchedule.scaled_linear(zero_snr=True)
    assert not torch.equal(other.timestep(sigma, nearest=True).long(), timesteps)
    d = Denoiser(load_unet(weights, metadata.config), other, "v_prediction")(x, sigma)
    plain = Denoiser(unet_of(prior), prior.schedule)
    u, c = (plain(x, sigma, **cond) for cond in (empty, texts_of(prior)[1]))
    expected = output_from_denoised(c + 1.5 * (d - u), x, sigma.view(-1, 1, 1, 1), "epsilon")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    # A file that says nothing of its noise has the prior's.
    nothing = replace(metadata, zero_snr=False, prediction_type=None)
    assert Teacher(prior, unet_of(prior), [term((weights, nothing))])._models["domain"].schedule is prior.schedule


@torch.no_grad()
def test_a_term_has_its_own_fixed_prompt(base, domain):
    """Minus half of what a prompt says, whatever the prompt of the latent."""
    noisy, timesteps = latents()
    text, sizes = base.encode_text([PROMPTS[0]]), [ImageSize((64, 64))] * 3
    less = BakedTerm("less", Constant(-0.5), None, text)
    found = Teacher(base, unet_of(base), [less]).target(noisy, timesteps, *texts_of(base), sizes)
    own, (empty, prompted) = unet_of(base), texts_of(base)
    fixed = {"context": text.context.expand(3, -1, -1)}
    u, c, f = (own(noisy, timesteps, **cond) for cond in (empty, prompted, fixed))
    torch.testing.assert_close(found, c - 0.5 * (f - u), rtol=1e-3, atol=1e-3)


def test_output_and_denoised_are_each_others_inverse():
    x, output = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    sigma = torch.tensor([0.5, 8.0]).view(-1, 1, 1, 1)
    for kind in KINDS:
        there = denoised_from_output(output, x, sigma, kind)
        torch.testing.assert_close(output_from_denoised(there, x, sigma, kind), output, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Prediction type"):
        output_from_denoised(output, x, sigma, "other")


def test_a_late_start_leaves_the_prior_alone_before_it(base, domain):
    noisy, timesteps = latents()
    late = Interval(1.5, 0.4, 1.0)
    teacher = Teacher(base, unet_of(base), [term(domain, late)])
    found = teacher.target(noisy, timesteps, *texts_of(base), [])
    # Sampling begins at the largest timestep: 950 lies before 40 percent, 500 and 20 behind it.
    torch.testing.assert_close(found, by_hand(base, domain, noisy, timesteps, [1.5, 1.5, 0.0]), rtol=1e-3, atol=1e-4)
    ramp = Keyframes(((0.0, 0.0), (1.0, 2.0)))
    own = [ramp.at(base.schedule.sigma(float(t)), base.schedule.percent_to_sigma) for t in timesteps]
    found = Teacher(base, unet_of(base), [term(domain, ramp)]).target(noisy, timesteps, *texts_of(base), [])
    torch.testing.assert_close(found, by_hand(base, domain, noisy, timesteps, own), rtol=1e-3, atol=1e-4)


def test_the_whole_guided_prediction(base, domain):
    noisy, timesteps = latents()
    found = Teacher(base, unet_of(base), [term(domain)], 4.0).target(noisy, timesteps, *texts_of(base), [])
    torch.testing.assert_close(found, by_hand(base, domain, noisy, timesteps, 1.5, 4.0), rtol=1e-3, atol=1e-3)
    plain = Teacher(base, unet_of(base), [], 4.0).target(noisy, timesteps, *texts_of(base), [])
    torch.testing.assert_close(plain, by_hand(base, domain, noisy, timesteps, 0.0, 4.0), rtol=1e-3, atol=1e-3)


def test_shapings_and_references_are_those_of_the_library(base, domain):
    noisy, timesteps = latents()
    other = domain_of(base, seed=4)
    terms = [term(domain), term(other, 0.7, "other", reference="domain", shaping=Bands(1.0, 0.3, 1.0))]
    found = Teacher(base, unet_of(base), terms).target(noisy, timesteps, *texts_of(base), [])
    plain = Teacher(base, unet_of(base), terms[:1]).target(noisy, timesteps, *texts_of(base), [])
    first, second = (
        denoised(base, load_unet(model, metadata.config), "epsilon", noisy, timesteps)
        for model, metadata in (domain, other)
    )
    abar = base.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    sigma = ((1 - abar) / abar).sqrt()
    added = -0.7 * Bands(1.0, 0.3, 1.0)(second - first, ()) / sigma  # of eps, which is (x - D) / sigma
    torch.testing.assert_close(found - plain, added, rtol=1e-3, atol=1e-3)


def test_additions_of_the_learner_are_left_out(base, domain):
    noisy, timesteps = latents()
    unet = unet_of(base)
    add_low_rank(unet, 2, layers="all")
    with torch.no_grad():
        for layer in low_rank_layers(unet).values():
            layer.lora_up.normal_()
    found = Teacher(base, unet, [term(domain)]).target(noisy, timesteps, *texts_of(base), [])
    torch.testing.assert_close(found, by_hand(base, domain, noisy, timesteps, 1.5), rtol=1e-3, atol=1e-3)
    assert all(layer.active for layer in low_rank_layers(unet).values())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_plain_cfg_of_a_perfect_student_is_in_domain_guidance(kind):
    """(u + w g) + s ((c + w g) - (u + w g)) = u + w g + s (c - u), along a whole sampling."""
    prior = base_of(kind)
    domain = domain_of(prior)
    empty, prompted = texts_of(prior, 1)
    own, learned = unet_of(prior), load_unet(domain[0], domain[1].config)
    plain, other = (Denoiser(unet, prior.schedule, kind) for unet in (own, learned))
    teacher = Teacher(prior, own, [term(domain)])

    def student(x, sigma, context):
        cond = {"context": context}
        each = [teacher.guided(teacher.guidance(empty, cond, []))]
        return each[0](x, sigma)

    noise, sigmas = torch.randn(2, 4, 8, 8), sigmas_uniform(prior.schedule, 6).float()
    baked = sample(MultiGuidance(presets.cfg(student, empty, prompted, 3.0)), noise, sigmas)
    guided = sample(MultiGuidance(presets.in_domain(plain, other, empty, prompted, 1.5, 3.0)), noise, sigmas)
    torch.testing.assert_close(baked, guided, rtol=1e-3, atol=1e-3)
