"""The guider in the hands of samplers, wrappers and packs that take it for core's CFGGuider.

Each of them reads or sets what packs read and set on core's. Where the guidance is core's CFG the oracle is core under
the same treatment, to the last bit; elsewhere the formula.
"""

from __future__ import annotations

import copy

import pytest
import torch

from ..conftest import Tiny

SIGMA = 2.0


def noisy(seed: int = 1, batch: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed)) * 3.0


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.fixture
def pair(comfyui, tiny: Tiny, internals):
    """Builds (ours, core's) on one prior; with domain weight 0 they must be one."""

    def build(domain_weight=0.0, control_weight=6.0, prior=None, **options):
        prior = tiny.prior(0) if prior is None else prior
        positive, negative = tiny.conditioning(1), tiny.conditioning(2)
        core = comfyui.samplers.CFGGuider(prior)
        core.set_conds(positive, negative)
        core.set_cfg(control_weight)
        ours = internals.in_domain_guider(
            prior, tiny.prior(1), positive, negative, domain_weight, control_weight, **options
        )
        return ours, core

    return build


def by_hand(tiny, guider, weights, x=None, positive=1, negative=2):
    """u + w_d (dom - u) + w_c (c - u), each of core's."""
    x = noisy() if x is None else x
    domain, control = weights
    term = guider.guidance.terms[0]
    u = tiny.denoised(guider.guidance.base.model, tiny.conditioning(negative), x, SIGMA)
    d = tiny.denoised(term.model, tiny.conditioning(negative), x, SIGMA)
    c = tiny.denoised(guider.guidance.base.model, tiny.conditioning(positive), x, SIGMA)
    return u + domain * (d - u) + control * (c - u)


# ---- the scale ------------------------------------------------------------------------------------------------------


def watching_sampler(comfyui, seen, around=lambda model, call: call()):
    """Euler that notes the guider's scale before the run, at each step and after it."""

    class Watching(comfyui.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            x = noise * sigmas[0]
            seen.append(model_wrap.cfg)
            for sigma, following in zip(sigmas[:-1], sigmas[1:]):
                at = sigma.expand(x.shape[0])
                denoised = around(model_wrap, lambda x=x, at=at: model_wrap(x, at, **extra_args))
                seen.append(model_wrap.cfg)
                x = denoised + (x - denoised) * following / sigma
            return x

    return Watching()


def run(comfyui, guider, sampler=None, seed=3, sigmas=(10.0, 4.0, 1.0, 0.3, 0.0)):
    latent = torch.zeros(2, 4, 8, 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    sampler = comfyui.samplers.sampler_object("euler") if sampler is None else sampler
    return guider.sample(noise, latent, sampler, torch.tensor(sigmas), seed=seed, disable_pbar=True)


@pytest.mark.parametrize(
    ("weights", "interval", "scale"),
    [
        ((0.0, 6.0), {}, 6.0),
        ((2.0, 6.0), {}, 8.0),
        ((2.0, 6.0), {"domain_start_percent": 0.5}, 8.0),
        ((0.0, 1.0), {}, 1.0),
        ((-1.5, 1.0), {}, -0.5),
        ((0.0, 0.0), {}, 0.0),
    ],
)
def test_the_scale_is_the_same_before_during_and_after_two_runs(comfyui, pair, weights, interval, scale):
    guider, _ = pair(*weights, **interval)
    seen: list[float] = [guider.cfg]
    first, second = (run(comfyui, guider, watching_sampler(comfyui, seen)) for _ in range(2))
    assert set(seen) == {scale} and len(seen) == 11 and guider.cfg == scale
    assert torch.equal(first, second)


def test_a_sampler_that_scales_by_cfg_gives_cores_picture_twice(comfyui, pair):
    # As Detail-Daemon does: noise levels are moved by the scale that stands on the guider before the first call.
    class Daemon(comfyui.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            factor, x = 1.0 - 0.01 * model_wrap.cfg, noise * sigmas[0]
            for sigma, following in zip(sigmas[:-1], sigmas[1:]):
                denoised = model_wrap(x, (sigma * factor).expand(x.shape[0]), **extra_args)
                x = denoised + (x - denoised) * following / sigma
            return x

    ours, core = pair()
    expected = run(comfyui, core, Daemon())
    assert torch.equal(run(comfyui, ours, Daemon()), expected) and torch.equal(run(comfyui, ours, Daemon()), expected)


@pytest.mark.parametrize("own", [6.0, 1.0, 0.0])  # at 0 the run is the base alone, which is core's but for rounding
@pytest.mark.parametrize("scale", [3.0, 1.0, 0.0, -2.0])
def test_a_scale_set_for_single_calls_is_obeyed_bit_for_bit(comfyui, tiny, pair, own, scale):
    # As core's CFG Override and bleh's sampler do: set, call, set back.
    def override(model, call):
        saved, model.cfg = model.cfg, scale
        try:
            return call()
        finally:
            model.cfg = saved

    if scale == own == 0.0:
        pytest.skip("the same as not set")
    ours, core = pair(control_weight=own)
    expected = run(comfyui, core, watching_sampler(comfyui, [], override))
    assert torch.equal(run(comfyui, ours, watching_sampler(comfyui, [], override)), expected)
    evaluated = dict(ours.evaluations)
    assert evaluated == ({"control": 4} if scale == 1.0 else {"control": 4, "base": 4})
    # For a whole run, and back.
    for guider in (ours, core):
        guider.set_cfg(scale)
    assert torch.equal(run(comfyui, ours), run(comfyui, core))
    for guider in (ours, core):
        guider.set_cfg(own)
    back = run(comfyui, ours), run(comfyui, core)
    assert torch.equal(*back) if own else relative(*back) < 1e-4


def test_a_predict_noise_wrapper_sets_the_scale_for_a_part_of_the_run(comfyui, tiny, pair):
    kinds = comfyui.patcher_extension.WrappersMP

    def wrapper(executor, *args, **kwargs):
        guider, saved = executor.class_obj, executor.class_obj.cfg
        if float(args[1].flatten()[0]) < 2.0:
            guider.cfg = 1.0
        try:
            return executor(*args, **kwargs)
        finally:
            guider.cfg = saved

    prior = tiny.prior(0)
    prior.add_wrapper(kinds.PREDICT_NOISE, wrapper)
    ours, core = pair(prior=prior)
    plain, _ = pair()
    expected = run(comfyui, core)
    assert torch.equal(run(comfyui, ours), expected) and ours.evaluations == {"control": 4, "base": 2}
    assert not torch.equal(run(comfyui, plain), expected)
    # Where the domain has left the run, the guidance is core's CFG again, and the scale that of the call.
    early, _ = pair(2.0, 6.0, prior=prior, domain_end_percent=0.3)
    late = tiny.predict(early, noisy(), 0.3)
    core.set_cfg(1.0)
    assert torch.equal(late, tiny.predict(core, noisy(), 0.3))


@pytest.mark.parametrize(("scale", "weights"), [(4.0, (1.0, 3.0)), (1.0, (0.25, 0.75)), (0.0, (0.0, 0.0))])
def test_beside_a_domain_the_scale_is_the_total_weight_and_is_said_once(tiny, pair, caplog, scale, weights):
    guider, _ = pair(2.0, 6.0)
    guider.set_cfg(scale)
    for _ in range(2):
        assert relative(tiny.predict(guider, noisy(), SIGMA), by_hand(tiny, guider, weights)) < 1e-5
    assert caplog.text.count("scale of this guider (cfg) was set from outside") == 1
    caplog.clear()
    guider.set_cfg(8.0)
    assert relative(tiny.predict(guider, noisy(), SIGMA), by_hand(tiny, guider, (2.0, 6.0))) < 1e-5
    assert caplog.text == ""


def test_a_scale_without_effect_is_said(tiny, pair, caplog):
    guider, _ = pair(2.0, -2.0)
    assert guider.cfg == 0.0
    guider.set_cfg(3.0)
    assert relative(tiny.predict(guider, noisy(), SIGMA), by_hand(tiny, guider, (2.0, -2.0))) < 1e-5
    assert caplog.text.count("has no effect where the weights of its terms cancel") == 1


def test_hooks_see_the_scale_that_was_set(tiny, pair):
    prior, seen = tiny.prior(0), []
    prior.set_model_sampler_post_cfg_function(lambda args: seen.append(args["cond_scale"]) or args["denoised"])
    for weights in ((2.0, 6.0), (0.0, 6.0)):
        guider, _ = pair(*weights, prior=prior)
        guider.set_cfg(3.0)
        tiny.predict(guider, noisy(), SIGMA)
    assert seen == [3.0, 3.0]


# ---- conditionings --------------------------------------------------------------------------------------------------


def replace_all(guider, positive, negative):
    guider.set_conds(positive, negative)


def replace_on_a_copy(guider, positive, negative):
    made = copy.copy(guider)
    made.original_conds = dict(guider.original_conds)
    made.set_conds(positive, negative)
    return made


def replace_in_the_dictionary(guider, positive, negative):
    fresh = copy.copy(guider)
    fresh.original_conds = {}
    fresh.inner_set_conds({"negative": negative, "positive": positive})
    made = copy.copy(guider)
    made.original_conds = {**guider.original_conds, **fresh.original_conds}
    return made


def without_constructor(guider, positive, negative):
    made = object.__new__(type(guider))
    made.__dict__.update(guider.__dict__)
    made.original_conds = dict(guider.original_conds)
    made.inner_set_conds({"positive": positive, "negative": negative})
    return made


@pytest.mark.parametrize("replace", [replace_all, replace_on_a_copy, replace_in_the_dictionary, without_constructor])
@pytest.mark.parametrize("domain_weight", [0.0, 1.5])
def test_conditionings_that_are_replaced_count(comfyui, tiny, pair, caplog, replace, domain_weight):
    ours, core = pair(domain_weight)
    before = tiny.predict(ours, noisy(), SIGMA)
    positive, negative = tiny.conditioning(11), tiny.conditioning(12)
    changed = replace(ours, positive, negative) or ours
    result = tiny.predict(changed, noisy(), SIGMA)
    if domain_weight == 0.0:
        core.set_conds(positive, negative)
        assert torch.equal(result, tiny.predict(core, noisy(), SIGMA))
    expected = by_hand(tiny, ours, (domain_weight, 6.0), positive=11, negative=12)
    assert relative(result, expected) < 1e-5 and caplog.text == ""
    if changed is not ours:
        assert torch.equal(tiny.predict(ours, noisy(), SIGMA), before), "the original must not notice its copy"


def test_areas_that_are_set_from_outside_count(comfyui, tiny, pair):
    # Tiled samplers give each tile conditionings of its own; how much of them covers the picture is known only then.
    ours, _ = pair(1.5, 6.0)
    x = noisy(size=16)
    area = tiny.with_options(tiny.conditioning(11), area=(8, 16, 0, 0), strength=1.0)
    ours.set_conds(area, tiny.conditioning(2))
    expected = by_hand(tiny, ours, (1.5, 0.0), x)
    expected[:, :, :8] = by_hand(tiny, ours, (1.5, 6.0), x, positive=11)[:, :, :8]
    result = tiny.predict(ours, x, SIGMA)
    # Within the area the prompt was given the area's pixels alone, so that only the rest is compared.
    assert relative(result[:, :, 8:], expected[:, :, 8:]) < 1e-5
    assert relative(result[:, :, :8], by_hand(tiny, ours, (1.5, 0.0), x)[:, :, :8]) > 1e-2


def test_what_a_wrapper_changes_in_a_runs_conditionings_reaches_every_model(comfyui, tiny, internals):
    prior, domain = tiny.prior(0), tiny.prior(1)
    other = tiny.conditioning(12)

    def wrapper(executor, *args, **kwargs):
        executor.class_obj.conds["negative"][0]["cross_attn"] = other[0][0]
        return executor(*args, **kwargs)

    prior.add_wrapper(comfyui.patcher_extension.WrappersMP.OUTER_SAMPLE, wrapper)
    guider = internals.in_domain_guider(prior, domain, tiny.conditioning(1), tiny.conditioning(2), 1.5, 6.0)
    result = tiny.predict(guider, noisy(), SIGMA)
    plain = internals.in_domain_guider(tiny.prior(0), domain, tiny.conditioning(1), other, 1.5, 6.0)
    assert torch.equal(result, tiny.predict(plain, noisy(), SIGMA))


def test_conditionings_that_change_within_a_run_count_for_the_prior_and_are_said(comfyui, tiny, pair, caplog):
    ours, core = pair(1.5)
    other = tiny.conditioning(12)

    class Changing(comfyui.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
            at = torch.full((2,), SIGMA)
            self.before = model_wrap(noisy(), at, **extra_args)
            fresh = comfyui.comfy.sampler_helpers.convert_cond(other)
            processed = comfyui.samplers.process_conds(
                model_wrap.inner_model, noisy(), {"negative": fresh}, noisy().device, None, None, 0
            )
            model_wrap.conds["negative"] = processed["negative"]
            self.after = [model_wrap(noisy(), at, **extra_args) for _ in range(2)]
            return torch.zeros_like(noisy())

    sampler = Changing()
    ours.sample(torch.zeros_like(noisy()), torch.zeros_like(noisy()), sampler, torch.tensor([SIGMA, 0.0]), seed=0)
    prior, domain = ours.guidance.base.model, ours.guidance.terms[0].model
    u, c = tiny.denoised(prior, other, noisy(), SIGMA), tiny.denoised(prior, tiny.conditioning(1), noisy(), SIGMA)
    d = tiny.denoised(domain, tiny.conditioning(2), noisy(), SIGMA)
    for found in sampler.after:
        assert relative(found, u + 1.5 * (d - u) + 6.0 * (c - u)) < 1e-5
    assert relative(sampler.before, by_hand(tiny, ours, (1.5, 6.0))) < 1e-5
    assert caplog.text.count("conditionings were replaced within a run; the prior sees the new ones") == 1


def test_conditionings_without_effect_are_said_once(tiny, internals, caplog):
    prior, domain, base, own = tiny.prior(0), tiny.prior(1), tiny.conditioning(2), tiny.conditioning(5)
    guider = internals.TermGuider(prior, base, [internals.Term("style", domain, own, 1.5)])
    guider.set_conds(tiny.conditioning(11), tiny.conditioning(12))
    for _ in range(2):
        result = tiny.predict(guider, noisy(), SIGMA)
    u = tiny.denoised(prior, tiny.conditioning(12), noisy(), SIGMA)
    d = tiny.denoised(domain, own, noisy(), SIGMA)
    assert relative(result, u + 1.5 * (d - u)) < 1e-5
    assert caplog.text.count("that of term 'style', for another model, stays as it is") == 1
    assert caplog.text.count("no term guides with one: it has no effect") == 1
    guider.original_conds = {"positive": guider.original_conds["positive"]}
    with pytest.raises(ValueError, match="Expected the guider's conditionings negative, found positive; "):
        tiny.predict(guider, noisy(), SIGMA)


# ---- the model, its options and copies ------------------------------------------------------------------------------


@pytest.mark.parametrize("domain_weight", [0.0, 1.5])
def test_a_model_put_in_the_priors_place_counts(comfyui, tiny, pair, domain_weight):
    # As tiled samplers do: a copy of the guider with a patched clone of its model.
    ours, core = pair(domain_weight)
    made = copy.copy(ours)
    made.model_patcher = tiny.lora(ours.model_patcher, 4)
    made.model_options = made.model_patcher.model_options
    patched = tiny.lora(ours.guidance.base.model, 4)
    u, c = (tiny.denoised(patched, tiny.conditioning(i), noisy(), SIGMA) for i in (2, 1))
    d = tiny.denoised(ours.guidance.terms[0].model, tiny.conditioning(2), noisy(), SIGMA)
    plain = tiny.predict(ours, noisy(), SIGMA)
    for _ in range(2):
        result = tiny.predict(made, noisy(), SIGMA)
        assert relative(result, u + domain_weight * (d - u) + 6.0 * (c - u)) < 1e-5 and relative(result, plain) > 1e-3
        assert torch.equal(tiny.predict(ours, noisy(), SIGMA), plain)


def test_a_foreign_model_in_the_priors_place_has_the_branches_loaded_too(comfyui, tiny, pair, monkeypatch):
    ours, _ = pair(1.5)
    ours.model_patcher = foreign = tiny.prior(7)
    ours.model_options = foreign.model_options
    loaded, load = [], comfyui.model_management.load_models_gpu
    monkeypatch.setattr(
        comfyui.model_management,
        "load_models_gpu",
        lambda models, **k: (loaded.append(set(models)), load(models, **k))[1],
    )
    result = tiny.predict(ours, noisy(), SIGMA)
    domain = ours.guidance.terms[0].model
    assert loaded == [{foreign, domain}]
    u, c = (tiny.denoised(foreign, tiny.conditioning(i), noisy(), SIGMA) for i in (2, 1))
    d = tiny.denoised(domain, tiny.conditioning(2), noisy(), SIGMA)
    assert relative(result, u + 1.5 * (d - u) + 6.0 * (c - u)) < 1e-5
    ours.model_patcher = tiny.prior(0, prediction="FLOW")
    with pytest.raises(ValueError, match="Term 'domain': expected a model that adds noise as the prior does"):
        tiny.predict(ours, noisy(), SIGMA)


def test_a_model_that_shares_the_domains_weights_is_told_apart(tiny, internals):
    # The guider was made for two models of their own weights; now two LoRAs of one checkpoint are in it.
    checkpoint = tiny.prior(0)
    domain = tiny.lora(checkpoint, 1)
    guider = internals.in_domain_guider(tiny.prior(3), domain, tiny.conditioning(1), tiny.conditioning(2), 1.5, 3.0)
    guider.model_patcher = other = tiny.lora(checkpoint, 2)
    guider.model_options = other.model_options
    x = noisy()
    u, c = (tiny.denoised(other, tiny.conditioning(i), x, SIGMA) for i in (2, 1))
    d = tiny.denoised(domain, tiny.conditioning(2), x, SIGMA)
    assert relative(tiny.predict(guider, x, SIGMA), u + 1.5 * (d - u) + 3.0 * (c - u)) < 1e-5


def test_options_that_are_set_on_the_guider_count(comfyui, tiny, pair):
    for domain_weight in (0.0, 1.5):
        ours, core = pair(domain_weight)
        for guider in (ours, core):
            options = comfyui.model_patcher.create_model_options_clone(guider.model_options)
            options["model_function_wrapper"] = lambda run, a: 1.1 * run(a["input"], a["timestep"], **a["c"])
            guider.model_options = options
        result = tiny.predict(ours, noisy(), SIGMA)
        if domain_weight == 0.0:
            assert torch.equal(result, tiny.predict(core, noisy(), SIGMA))
        else:
            u, c = (1.1 * tiny.denoised(ours.guidance.base.model, tiny.conditioning(i), noisy(), SIGMA) for i in (2, 1))
            d = tiny.denoised(ours.guidance.terms[0].model, tiny.conditioning(2), noisy(), SIGMA)
            assert relative(result, u + 1.5 * (d - u) + 6.0 * (c - u)) < 1e-5


def test_one_made_of_a_model_alone_is_cores_and_says_so(tiny, pair, caplog):
    ours, core = pair(1.5)
    made = type(ours)(ours.guidance.base.model)
    assert made.original_conds == {} and made.cfg == 1.0 and caplog.text.count("made of a model alone") == 1
    made.set_conds(tiny.conditioning(1), tiny.conditioning(2))
    for scale in (1.0, 6.0, 0.0):
        for guider in (made, core):
            guider.set_cfg(scale)
        assert torch.equal(tiny.predict(made, noisy(), SIGMA), tiny.predict(core, noisy(), SIGMA))
    made.__dict__.update(ours.__dict__)
    assert torch.equal(tiny.predict(made, noisy(), SIGMA), tiny.predict(ours, noisy(), SIGMA))
    with pytest.raises(ValueError, match="at least one guidance term"):
        type(ours)(ours.guidance.base.model, tiny.conditioning(2), [])


@pytest.mark.parametrize("domain_weight", [0.0, 1.5])
def test_a_deep_copy_is_a_guider_of_its_own(tiny, pair, domain_weight):
    ours, core = pair(domain_weight)
    try:
        copy.deepcopy(core)
    except TypeError:
        pytest.skip("this version's models cannot be copied")
    expected = tiny.predict(ours, noisy(), SIGMA)
    made = copy.deepcopy(ours)
    assert torch.equal(tiny.predict(made, noisy(), SIGMA), expected)
    made.set_conds(tiny.conditioning(11), tiny.conditioning(12))
    result = tiny.predict(made, noisy(), SIGMA)
    assert relative(result, by_hand(tiny, ours, (domain_weight, 6.0), positive=11, negative=12)) < 1e-5
    assert torch.equal(tiny.predict(ours, noisy(), SIGMA), expected)


def test_a_subclass_and_a_replaced_method_work(tiny, pair):
    ours, _ = pair(1.5)
    expected = tiny.predict(ours, noisy(), SIGMA)

    class Doubled(type(ours)):
        def predict_noise(self, *args, **kwargs):
            return 2.0 * super().predict_noise(*args, **kwargs)

    made = copy.copy(ours)
    made.__class__ = Doubled
    assert torch.equal(tiny.predict(made, noisy(), SIGMA), 2.0 * expected)
    wrapped = copy.copy(ours)
    wrapped.predict_noise = lambda *args, **kwargs: 3.0 * ours.__class__.predict_noise(wrapped, *args, **kwargs)
    assert torch.equal(tiny.predict(wrapped, noisy(), SIGMA), 3.0 * expected)


def by_own_loop(comfyui, guider, x):
    """What packs do that copy core's sample() and outer_sample(): everything but those two."""
    samplers = comfyui.samplers
    guider.conds = {key: [entry.copy() for entry in found] for key, found in guider.original_conds.items()}
    guider.inner_model, guider.conds, guider.loaded_models = comfyui.comfy.sampler_helpers.prepare_sampling(
        guider.model_patcher, x.shape, guider.conds, guider.model_options
    )
    guider.model_patcher.pre_run()
    try:
        guider.conds = samplers.process_conds(guider.inner_model, x, guider.conds, x.device, None, None, 0)
        return guider.predict_noise(x, torch.full((2,), SIGMA), guider.model_options)
    finally:
        guider.model_patcher.cleanup()
        comfyui.comfy.sampler_helpers.cleanup_models(guider.conds, guider.loaded_models)


def test_a_loop_of_somebody_elses_is_cores_or_is_refused(comfyui, tiny, pair):
    ours, core = pair()
    assert torch.equal(by_own_loop(comfyui, ours, noisy()), by_own_loop(comfyui, core, noisy()))
    beside, _ = pair(1.5)
    with pytest.raises(
        ValueError, match="Term 'domain': expected a guider that prepares its models in its own sample()"
    ):
        by_own_loop(comfyui, beside, noisy())
