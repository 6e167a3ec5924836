"""Terms whose conditioning covers only part of the picture or of the steps: elsewhere they say nothing."""

from __future__ import annotations

import importlib

import pytest
import torch

SIGMA = 2.0


def noisy(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * 3.0


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def upper_half(tiny, conditioning):
    mask = torch.zeros(1, 128, 128)
    mask[:, :64] = 1.0
    return tiny.with_options(conditioning, mask=mask, mask_strength=0.7)


def late(tiny, conditioning):
    return tiny.with_options(conditioning, start_percent=0.5, end_percent=1.0)


@pytest.fixture
def parts(tiny):
    """(prior, domain, base, prompt, x, core's prediction of a model on a conditioning)."""
    x = noisy(1)

    def core(model, conditioning, sigma=SIGMA):
        return tiny.denoised(model, conditioning, x, sigma)

    return tiny.prior(0), tiny.prior(1), tiny.conditioning(1), tiny.conditioning(2), x, core


@pytest.mark.parametrize("weights", [(2.5, 3.0), (0.4, 0.6)], ids=["base needed", "base cancels elsewhere"])
def test_a_mask_confines_a_term(tiny, internals, parts, weights):
    prior, domain, base, prompt, x, core = parts

    def predict(conditioning, terms=2):
        chosen = [
            internals.Term("control", None, prompt, weights[1]),
            internals.Term("domain", domain, conditioning, weights[0]),
        ]
        return tiny.predict(internals.TermGuider(prior, base, chosen[:terms]), x, SIGMA)

    result, everywhere, without = predict(upper_half(tiny, base)), predict(base), predict(base, terms=1)
    assert relative(result[:, :, :8], everywhere[:, :, :8]) < 1e-6
    assert relative(result[:, :, 8:], without[:, :, 8:]) < 1e-6
    assert relative(everywhere[:, :, 8:], without[:, :, 8:]) > 1e-2


def test_an_area_confines_a_term_of_the_prior(tiny, internals, parts):
    prior, domain, base, prompt, x, core = parts
    area = tiny.with_options(prompt, area=(8, 16, 8, 0), strength=0.8)
    terms = [internals.Term("domain", domain, None, 1.5), internals.Term("control", None, area, 3.0)]
    result = tiny.predict(internals.TermGuider(prior, base, terms), x, SIGMA)
    # Core gives every conditioning a further entry of the area, which base and domain are averaged with.
    core_guider = tiny.comfy.samplers.CFGGuider(prior)
    core_guider.set_conds(area, base)
    core_guider.set_cfg(0.0)
    u = tiny.predict(core_guider, x, SIGMA)
    core_guider = tiny.comfy.samplers.CFGGuider(domain)
    core_guider.set_conds(area, base)
    core_guider.set_cfg(0.0)
    d, control = tiny.predict(core_guider, x, SIGMA), core(prior, area)
    expected = u + 1.5 * (d - u)
    assert relative(result[:, :, :8], expected[:, :, :8]) < 1e-5
    expected = expected + 3.0 * (control - u)
    assert relative(result[:, :, 8:], expected[:, :, 8:]) < 1e-5


def test_a_step_range_confines_a_term(tiny, internals, parts):
    prior, domain, base, _, x, core = parts
    term = internals.Term("domain", domain, late(tiny, base), 1.5)
    guider = internals.TermGuider(prior, base, [term])
    assert torch.equal(tiny.predict(guider, x, 10.0), core(prior, base, 10.0))
    u = core(prior, base, 0.5)
    assert relative(tiny.predict(guider, x, 0.5), u + 1.5 * (core(domain, base, 0.5) - u)) < 1e-5


def test_what_fills_a_gap_is_the_terms_own_reference(tiny, internals, parts):
    prior, domain, base, prompt, x, core = parts
    weak, masked = tiny.prior(2), upper_half(tiny, prompt)
    terms = [
        internals.Term("weak", weak, prompt, 0.5),
        internals.Term("domain", domain, masked, 2.0, reference="weak"),
        internals.Term("again", domain, masked, 0.7),
        # Its reference has a gap of its own, which the reference's reference fills.
        internals.Term("chained", weak, base, 1.1, reference="domain"),
    ]
    result = tiny.predict(internals.TermGuider(prior, base, terms), x, SIGMA)
    u, w, v, d = core(prior, base), core(weak, prompt), core(weak, base), core(domain, prompt)
    inside = u + 0.5 * (w - u) + 2.0 * (d - w) + 0.7 * (d - u) + 1.1 * (v - d)
    outside = u + 0.5 * (w - u) + 1.1 * (v - w)
    assert relative(result[:, :, :8], inside[:, :, :8]) < 1e-5
    assert relative(result[:, :, 8:], outside[:, :, 8:]) < 1e-5


def test_masks_that_cover_everything_together_leave_no_gap(tiny, internals, parts):
    prior, domain, base, prompt, x, core = parts
    mask = torch.ones(1, 128, 128)
    mask[:, :64] = 0.0
    both = upper_half(tiny, base) + tiny.with_options(prompt, mask=mask)
    guider = internals.TermGuider(prior, base, [internals.Term("domain", domain, both, 1.5)])
    u = core(prior, base)
    assert relative(tiny.predict(guider, x, SIGMA), u + 1.5 * (core(domain, both) - u)) < 1e-5
    coverage = importlib.import_module("indomain_guidance.nodes.comfy_internals.guiding.gaps")
    assert coverage.covered([{"mask": mask}, {"cross_attn": None}], None, None) is None, "one look at the keys"


def test_a_default_conditioning_fills_the_gap_itself(tiny, internals, parts):
    prior, domain, base, prompt, x, core = parts
    both = upper_half(tiny, base) + tiny.with_options(prompt, default=True)
    guider = internals.TermGuider(prior, base, [internals.Term("domain", domain, both, 1.5)])
    u = core(prior, base)
    assert relative(tiny.predict(guider, x, SIGMA), u + 1.5 * (core(domain, both) - u)) < 1e-5


def test_a_masked_prompt_beside_a_domain_model(comfyui, tiny, internals, parts):
    prior, domain, base, prompt, x, core = parts
    masked, u = upper_half(tiny, prompt), core(prior, base)
    result = tiny.predict(internals.in_domain_guider(prior, domain, masked, base, 1.5, 3.0), x, SIGMA)
    expected = u + 1.5 * (core(domain, base) - u)
    assert relative(result[:, :, 8:], expected[:, :, 8:]) < 1e-5
    expected = expected + 3.0 * (core(prior, prompt) - u)
    assert relative(result[:, :, :8], expected[:, :, :8]) < 1e-5
    # While the domain term rests the rule is the same; without a domain term the node is KSampler.
    resting = internals.in_domain_guider(prior, domain, masked, base, 1.5, 3.0, domain_start_percent=0.9)
    assert relative(tiny.predict(resting, x, SIGMA)[:, :, 8:], u[:, :, 8:]) < 1e-5
    latent = tiny.latent(size=16)
    (kept,) = comfyui.nodes.common_ksampler(prior, 1, 3, 3.0, "euler", "normal", masked, base, latent)
    alone = internals.in_domain_guider(prior, domain, masked, base, 0.0, 3.0)
    assert torch.equal(tiny.sample(alone, latent=latent), kept["samples"])


def test_a_masked_base_is_cores(comfyui, tiny, internals, parts):
    # Core's CFG takes 0 where the negative conditioning covers nothing, and so does this; a twin's term adds nothing.
    prior, _, base, prompt, x, core = parts
    masked = upper_half(tiny, base)
    plain = comfyui.samplers.CFGGuider(prior)
    plain.set_conds(prompt, masked)
    plain.set_cfg(3.0)
    result = tiny.predict(internals.in_domain_guider(prior, tiny.prior(0), prompt, masked, 1.5, 3.0), x, SIGMA)
    assert relative(result, tiny.predict(plain, x, SIGMA)) < 1e-5


def test_hooks_see_the_filled_prediction(tiny, internals, parts):
    prior, domain, base, prompt, x, core = parts
    masked = upper_half(tiny, prompt)
    expected = tiny.predict(internals.in_domain_guider(prior, domain, masked, base, 1.5, 3.0), x, SIGMA)
    hooked, seen = prior.clone(), {}

    def again(args):
        options = args["model_options"]
        run = tiny.comfy.samplers.calc_cond_batch
        (seen["again"],) = run(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        seen["cond"] = args["cond_denoised"]
        return args["denoised"]

    hooked.set_model_sampler_post_cfg_function(again)
    result = tiny.predict(internals.in_domain_guider(hooked, domain, masked, base, 1.5, 3.0), x, SIGMA)
    assert relative(result, expected) < 1e-5
    # A hook that runs the prior again, undisturbed, finds no difference, outside the mask either.
    assert relative(seen["again"], seen["cond"]) < 1e-5


@pytest.mark.parametrize("limit, sigma", [(upper_half, SIGMA), (late, 10.0)], ids=["mask", "step range"])
def test_another_terms_area_does_not_undo_a_limit(tiny, internals, parts, limit, sigma):
    """Core gives every conditioning a further entry of each area, without its own mask and range."""
    prior, domain, base, prompt, x, core = parts
    regional = [*prompt, *tiny.with_options(tiny.conditioning(3), area=(8, 16, 8, 0), strength=1.0)]
    terms = [internals.Term("control", None, regional, 3.0), internals.Term("domain", domain, limit(tiny, base), 1.5)]
    made = [tiny.predict(internals.TermGuider(prior, base, terms[:n]), x, sigma) for n in (1, 2)]
    apart = slice(8, 16) if limit is upper_half else slice(None)
    assert relative(made[1][:, :, apart], made[0][:, :, apart]) < 1e-6
    if limit is upper_half:
        assert relative(made[1][:, :, :8], made[0][:, :, :8]) > 1e-2


def test_a_term_of_weight_0_gives_its_area_to_nobody(tiny, internals, parts):
    prior, domain, base, prompt, x, _ = parts
    control = internals.Term("control", None, prompt, 3.0)
    regional = tiny.with_options(tiny.conditioning(3), area=(8, 8, 0, 0), strength=1.0)
    off = internals.Term("region", None, regional, 0.0)
    expected = tiny.predict(internals.TermGuider(prior, base, [control]), x, SIGMA)
    for terms in ([control, off], [off, control]):
        assert torch.equal(tiny.predict(internals.TermGuider(prior, base, terms), x, SIGMA), expected)


def test_what_core_cannot_spread_over_an_area_is_refused(tiny, internals, parts):
    """Core itself divides by zero there, in the middle of sampling."""
    prior, domain, base, prompt, x, _ = parts
    area = tiny.with_options(base, area=(8, 16, 8, 0), strength=1.0)
    bounds = [[cond, {**options, "set_area_to_bounds": True}] for cond, options in upper_half(tiny, base)]
    old = tiny.with_options(prompt, control=tiny.control_net(size=16), control_apply_to_uncond=True)
    boxes = tiny.with_options(prompt, gligen=("position", None, []))

    def guider(positive, own, base=base):
        terms = [internals.Term("control", None, positive, 3.0), internals.Term("domain", domain, own, 1.5)]
        return internals.TermGuider(prior, base, terms)

    for positive, own, words in ((old, area, "OLD"), (old, bounds, "OLD"), (boxes, area, "GLIGEN")):
        with pytest.raises(ValueError, match=rf"Term 'domain': expected .* not for an area alone beside .*{words}"):
            guider(positive, own)
    with pytest.raises(ValueError, match="Term 'base': expected"):
        guider(old, base, area)
    tiny.predict(guider(old, [*area, *base]), x, SIGMA)
    tiny.predict(guider(tiny.with_options(old, control_apply_to_uncond=False), area), x, SIGMA)


def test_what_core_may_ask_of_a_model_tomorrow_is_there(comfyui, tiny, internals, parts, monkeypatch):
    prior, domain, base, prompt, x, core = parts
    asked, calc_cond_batch = [], comfyui.samplers.calc_cond_batch

    def of_tomorrow(model, *args):
        asked.append(model.of_tomorrow() and model.current_patcher.of_tomorrow())
        return calc_cond_batch(model, *args)

    for owner in (comfyui.model_base.BaseModel, comfyui.model_patcher.ModelPatcher):
        monkeypatch.setattr(owner, "of_tomorrow", lambda self: True, raising=False)
    monkeypatch.setattr(comfyui.samplers, "calc_cond_batch", of_tomorrow)
    terms = [internals.Term("domain", domain, upper_half(tiny, base), 1.5)]
    tiny.predict(internals.TermGuider(prior, base, terms), x, SIGMA)
    assert len(asked) == 3 and all(asked), "the base, the domain, and where the domain's conditioning is"
