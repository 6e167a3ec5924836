"""Whole sampling runs: every sampler and scheduler, repeated, broken off, masked, with areas and ControlNets."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest
import torch

from ..conftest import WIDTH, randomize


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.fixture
def in_domain(tiny, internals):
    """Builds an In-Domain guider on fresh models."""

    def build(domain_weight=1.5, control_weight=2.0, **options):
        prior, domain = tiny.prior(0), tiny.prior(1)
        return internals.in_domain_guider(
            prior, domain, tiny.conditioning(1), tiny.conditioning(2), domain_weight, control_weight, **options
        )

    return build


def as_one_model(tiny, domain_weight, control_weight):
    """Twins of one model, with which the In-Domain guider is core's CFG of scale w_c, whatever the domain weight."""
    return tiny.prior(0), tiny.prior(0), tiny.conditioning(1), tiny.conditioning(2), domain_weight, control_weight


def names(kind: str) -> list[str]:
    """Core's samplers or schedulers, from its text, since tests are collected before ComfyUI is imported."""
    path = os.environ.get("INDOMAIN_COMFYUI_PATH")
    if not path:
        return ["none"]
    text = Path(path, "comfy", "samplers.py").read_text(encoding="utf-8")
    if kind == "schedulers":
        return re.findall(r'^    "(\w+)": SchedulerHandler', text, re.M)
    listed = re.search(r"KSAMPLER_NAMES = \[(.*?)\]", text, re.S)
    return re.findall(r'"(\w+)"', listed.group(1) if listed else "") + ["ddim", "uni_pc", "uni_pc_bh2"]


def test_the_lists_are_complete(comfyui):
    assert names("samplers") == list(comfyui.samplers.KSampler.SAMPLERS)
    assert names("schedulers") == list(comfyui.samplers.KSampler.SCHEDULERS)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", names("samplers"))
def test_every_sampler(comfyui, tiny, internals, sampler):
    if sampler == "none":
        pytest.skip("no ComfyUI")
    # A twin as domain model: the domain term vanishes, and the run must be core's, except that nothing is skipped.
    prior, twin, positive, negative, *weights = as_one_model(tiny, 1.5, 2.0)
    latent = tiny.latent(batch=2)
    guider = internals.in_domain_guider(prior, twin, positive, negative, *weights)
    result = internals.sample_latent(guider, latent, 3, 4, sampler, "karras", 1.0)["samples"]
    (expected,) = comfyui.nodes.common_ksampler(prior, 3, 4, 2.0, sampler, "karras", positive, negative, latent)
    assert result.isfinite().all() and guider.evaluations["domain"] >= 4
    # Adaptive step sizes amplify rounding.
    assert relative(result, expected["samples"]) < (2e-2 if sampler == "dpm_adaptive" else 1e-3)


@pytest.mark.parametrize("scheduler", names("schedulers"))
def test_every_scheduler(comfyui, tiny, internals, scheduler):
    if scheduler == "none":
        pytest.skip("no ComfyUI")
    prior, twin, positive, negative, *weights = as_one_model(tiny, 1.5, 2.0)
    latent = tiny.latent(batch=1)
    guider = internals.in_domain_guider(prior, twin, positive, negative, *weights)
    result = internals.sample_latent(guider, latent, 3, 4, "euler", scheduler, 1.0)["samples"]
    (expected,) = comfyui.nodes.common_ksampler(prior, 3, 4, 2.0, "euler", scheduler, positive, negative, latent)
    assert relative(result, expected["samples"]) < 1e-4


@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp", "dpmpp_2m"])
def test_mask_batch_and_denoise(comfyui, tiny, internals, sampler):
    prior, twin, positive, negative, *weights = as_one_model(tiny, 2.5, 2.5)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1.0
    latent = tiny.latent(3, batch=2, noise_mask=mask, batch_index=[2, 0])
    guider = internals.in_domain_guider(prior, twin, positive, negative, *weights)
    result = internals.sample_latent(guider, latent, 3, 4, sampler, "normal", 0.6)["samples"]
    (expected,) = comfyui.nodes.common_ksampler(
        prior, 3, 4, 2.5, sampler, "normal", positive, negative, latent, denoise=0.6
    )
    assert relative(result, expected["samples"]) < 1e-4
    assert torch.allclose(result[..., :4], latent["samples"][..., :4], atol=1e-5), "outside the mask nothing changes"


def test_denoise_zero_returns_the_latent(tiny, internals, in_domain):
    latent = tiny.latent(3)
    assert torch.equal(
        internals.sample_latent(in_domain(), latent, 1, 4, "euler", "normal", 0.0)["samples"], latent["samples"]
    )


def test_twice_in_a_row(tiny, in_domain):
    guider = in_domain()
    first = tiny.sample(guider, steps=4, batch=2)
    assert guider.evaluations == {"base": 4, "domain": 4, "control": 4}
    assert torch.equal(tiny.sample(guider, steps=4, batch=2), first)
    assert guider.evaluations == {"base": 4, "domain": 4, "control": 4}
    assert guider.samples_per_step == 3.0
    assert not torch.equal(first, tiny.sample(in_domain(domain_weight=0.0), steps=4, batch=2))


def left_behind(guider) -> list:
    """What a run must not leave on models, whatever ended it."""
    patchers = [guider.model_patcher, *(branch.patcher for branch in guider.branches)]
    return [
        (patcher, patcher.model.current_patcher, patcher.hook_patches_backup, patcher.hook_mode.name)
        for patcher in patchers
        if patcher.model.current_patcher is not None or patcher.hook_patches_backup is not None
    ] + [branch for branch in guider.branches if branch.conds or branch.options]


@pytest.mark.parametrize("where", ["prior", "domain"])
def test_error_in_the_middle_then_again(tiny, in_domain, where):
    guider = in_domain()
    expected = tiny.sample(guider, steps=4)
    patcher = guider.model_patcher if where == "prior" else next(iter(guider.branches)).patcher
    original, calls = patcher.model.apply_model, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return original(*args, **kwargs)

    patcher.model.apply_model = failing
    with pytest.raises(RuntimeError, match="out of luck"):
        tiny.sample(guider, steps=4)
    assert left_behind(guider) == []
    patcher.model.apply_model = original
    assert torch.equal(tiny.sample(guider, steps=4), expected)


def test_error_before_the_first_step_then_again(tiny, in_domain):
    guider = in_domain()
    expected = tiny.sample(guider, steps=4)
    (branch,) = guider.branches
    original = branch.patcher.model.extra_conds
    branch.patcher.model.extra_conds = lambda **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tiny.sample(guider, steps=4)
    assert left_behind(guider) == []
    branch.patcher.model.extra_conds = original
    assert torch.equal(tiny.sample(guider, steps=4), expected)


def test_interruption_then_again(comfyui, tiny, in_domain, monkeypatch):
    guider = in_domain()
    expected = tiny.sample(guider, steps=4)
    seen = []

    class Bar:
        def __init__(self, total, node_id=None):
            pass

        def update_absolute(self, value, total=None, preview=None):
            # As main.py hooks ComfyUI's progress bar: every update is where a run can be interrupted.
            seen.append(value)
            if value == 2:
                comfyui.model_management.interrupt_current_processing()
            comfyui.model_management.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(comfyui.utils, "ProgressBar", Bar)
    with pytest.raises(comfyui.model_management.InterruptProcessingException):
        tiny.sample(guider, steps=4)
    assert seen == [1, 2] and left_behind(guider) == []
    monkeypatch.undo()
    assert torch.equal(tiny.sample(guider, steps=4), expected)


def test_interval_costs_only_its_own_steps(tiny, in_domain):
    guider = in_domain(domain_start_percent=0.5)
    tiny.sample(guider, steps=4, scheduler="sgm_uniform")
    # sgm_uniform starts its 4 steps at 0, 1/4, 2/4, 3/4 of the training timesteps.
    assert guider.evaluations == {"base": 4, "domain": 2, "control": 4}
    assert guider.samples_per_step == 2.5
    nothing = in_domain(domain_start_percent=1.0)
    tiny.sample(nothing, steps=4)
    assert nothing.evaluations == {"base": 4, "control": 4}


def test_base_is_not_evaluated_where_it_cancels(tiny, in_domain):
    guider = in_domain(domain_weight=0.4, control_weight=0.6)
    tiny.sample(guider, steps=2)
    assert guider.evaluations == {"domain": 2, "control": 2}
    # CFG++ samplers step along the base and need it.
    tiny.sample(guider, steps=2, sampler="euler_cfg_pp")
    assert guider.evaluations == {"base": 2, "domain": 2, "control": 2}
    alone = in_domain(domain_weight=1.0, control_weight=0.0)
    tiny.sample(alone, steps=2)
    assert alone.evaluations == {"domain": 2}


def test_the_base_is_evaluated_where_a_node_asks_for_it(tiny, internals):
    prior = tiny.prior()
    prior.model_options["disable_cfg1_optimization"] = True
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    guider = internals.in_domain_guider(prior, tiny.prior(1), positive, negative, 0.4, 0.6)
    tiny.sample(guider, steps=2)
    assert guider.evaluations == {"base": 2, "domain": 2, "control": 2}
    alone = internals.in_domain_guider(prior, tiny.prior(1), positive, negative, 0.0, 1.0)
    tiny.sample(alone, steps=2)
    assert alone.evaluations == {"base": 2, "control": 2}


def test_one_model_call_for_the_conditionings_of_one_model(comfyui, tiny, internals):
    prior, domain = tiny.prior(0), tiny.prior(1)
    conds = [tiny.conditioning(i) for i in range(4)]
    terms = [internals.Term(f"t{i}", None, conds[i], 1.0) for i in (1, 2)]
    terms += [internals.Term("again", None, conds[1], 0.5)]
    terms += [internals.Term("d0", domain, None, 1.0), internals.Term("d3", domain, conds[3], 1.0)]
    guider = internals.TermGuider(prior, conds[0], terms)
    batches = []
    for patcher in (prior, domain):
        original = patcher.model.apply_model

        def spy(x, *args, original=original, **kwargs):
            batches.append(x.shape[0])
            return original(x, *args, **kwargs)

        patcher.model.apply_model = spy
    tiny.sample(guider, steps=1, batch=2)
    # Both models once: three conditionings on the prior (one is used twice), two on the domain model, two images.
    assert sorted(batches) == [4, 6]
    assert guider.evaluations == {"base": 1, "t1 and again": 1, "t2": 1, "d0": 1, "d3": 1}


def test_models_are_loaded_in_one_call(comfyui, tiny, in_domain, monkeypatch):
    guider = in_domain()
    calls = []
    load = comfyui.model_management.load_models_gpu

    def spy(models, *args, **kwargs):
        calls.append(set(models))
        return load(models, *args, **kwargs)

    monkeypatch.setattr(comfyui.model_management, "load_models_gpu", spy)
    tiny.sample(guider)
    (branch,) = guider.branches
    assert calls == [{guider.model_patcher, branch.patcher}]


# ---- what the domain model sees -------------------------------------------------------------------------------------


def by_hand(tiny, guider_inputs, x, sigma):
    prior, domain, positive, negative, domain_weight, control_weight = guider_inputs
    u = tiny.denoised(prior, negative, x, sigma)
    d = tiny.denoised(domain, negative, x, sigma)
    return u + domain_weight * (d - u) + control_weight * (tiny.denoised(prior, positive, x, sigma) - u)


def noisy(seed: int, batch: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed)) * 3.0


def masked(tiny, seed):
    mask = torch.zeros(1, 128, 128)
    mask[:, :64] = 1.0
    return tiny.with_options(tiny.conditioning(seed), mask=mask, mask_strength=0.7) + tiny.conditioning(seed + 50)


def areas(tiny, seed):
    area = tiny.with_options(tiny.conditioning(seed), area=(8, 8, 0, 0), strength=0.8)
    return area + tiny.with_options(tiny.conditioning(seed + 50), area=("percentage", 1.0, 0.5, 0.0, 0.5))


def ranged(tiny, seed):
    early = tiny.with_options(tiny.conditioning(seed), start_percent=0.0, end_percent=0.5)
    return early + tiny.with_options(tiny.conditioning(seed + 50), start_percent=0.5, end_percent=1.0)


@pytest.mark.parametrize("shape", [masked, areas, ranged])
@pytest.mark.parametrize("sigma", [10.0, 0.5])
def test_masks_areas_and_ranges_of_the_base_apply_to_the_domain(tiny, internals, shape, sigma):
    inputs = (tiny.prior(0), tiny.prior(1), shape(tiny, 1), shape(tiny, 2), 1.5, 2.0)
    x = noisy(1, size=16)
    expected = by_hand(tiny, inputs, x, sigma)
    result = tiny.predict(internals.in_domain_guider(*inputs), x, sigma)
    assert relative(result, expected) < 1e-5
    plain = (inputs[0], inputs[1], inputs[2], tiny.conditioning(99), 1.5, 2.0)
    assert relative(by_hand(tiny, plain, x, sigma), expected) > 1e-3


def test_areas_of_the_control_alone_are_core_with_a_twin(comfyui, tiny, internals):
    # Core gives the base a matching area wherever the control has one; the domain model must be cut the same way.
    prior, twin, _, negative, *weights = as_one_model(tiny, 1.5, 2.0)
    positive = areas(tiny, 1) + tiny.conditioning(3)
    x = noisy(2, size=16)
    core = comfyui.samplers.CFGGuider(prior)
    core.set_conds(positive, negative)
    core.set_cfg(2.0)
    expected = tiny.predict(core, x, 2.0)
    assert (
        relative(tiny.predict(internals.in_domain_guider(prior, twin, positive, negative, *weights), x, 2.0), expected)
        < 1e-5
    )
    blind = tiny.denoised(prior, negative, x, 2.0)
    assert relative(blind, expected) > 1e-3


def test_control_net_of_a_branch_alone_is_loaded_prepared_and_cleaned(comfyui, tiny, internals):
    # A ControlNet that only another model's conditioning carries: the prior never sees it.
    prior, other = tiny.prior(0), tiny.prior(1)
    base, control = tiny.conditioning(1), tiny.control_net()
    own = tiny.with_options(tiny.conditioning(2), control=control)
    guider = internals.TermGuider(prior, base, [internals.Term("other", other, own, 1.5)])
    x = noisy(3)
    loaded = []
    load = comfyui.model_management.load_models_gpu
    comfyui.model_management.load_models_gpu = lambda models, *a, **k: (
        loaded.append(list(models)),
        load(models, *a, **k),
    )[1]
    try:
        result = tiny.predict(guider, x, 2.0)
    finally:
        comfyui.model_management.load_models_gpu = load
    assert control.control_model_wrapped in loaded[0] and len(loaded) == 1
    assert control.cond_hint is None and control.model_sampling_current is None
    u, d = tiny.denoised(prior, base, x, 2.0), tiny.denoised(other, own, x, 2.0)
    assert relative(result, u + 1.5 * (d - u)) < 1e-5
    assert relative(d, tiny.denoised(other, tiny.conditioning(2), x, 2.0)) > 1e-2


def test_control_net_is_prepared_once_by_the_prior(comfyui, tiny, internals):
    # Its timesteps are the prior's, even where the domain model counts noise differently.
    prior, domain = tiny.prior(0), tiny.prior(1, prediction="V_PREDICTION", zero_snr=True)
    control, prepared = tiny.control_net(), []
    original = control.pre_run
    control.pre_run = lambda model, percent: (prepared.append(model), original(model, percent))[1]
    positive, negative = (tiny.with_options(tiny.conditioning(i), control=control) for i in (1, 2))
    tiny.predict(internals.in_domain_guider(prior, domain, positive, negative), noisy(4), 2.0)
    assert set(map(id, prepared)) == {id(prior.model)}


def test_what_core_may_ask_of_a_control_net_tomorrow_is_asked_of_itself(comfyui, tiny, internals, monkeypatch):
    control, asked, pre_run_control = tiny.control_net(), [], comfyui.samplers.pre_run_control

    def of_tomorrow(model, conds):
        asked.extend(entry["control"].of_tomorrow for entry in conds if "control" in entry)
        return pre_run_control(model, conds)

    control.of_tomorrow = control
    monkeypatch.setattr(comfyui.samplers, "pre_run_control", of_tomorrow)
    positive, negative = (tiny.with_options(tiny.conditioning(i), control=control) for i in (1, 2))
    tiny.predict(internals.in_domain_guider(tiny.prior(0), tiny.prior(1), positive, negative), noisy(4), 2.0)
    assert asked == [control] * 2, "once for each of the prior's conditionings, never by the domain model"


@pytest.fixture
def adapter(comfyui, tiny):
    """A T2I-Adapter with two hint images behind a ControlNet, and a UNet of which it fits the blocks."""
    module = importlib.import_module("comfy.t2i_adapter.adapter")
    unet = {"num_res_blocks": [2, 2], "transformer_depth": [1] * 4, "transformer_depth_output": [1] * 6}
    network = randomize(module.Adapter([WIDTH, 2 * WIDTH], nums_rb=1, cin=3 * 64, ksize=1, sk=True, xl=False), 7)
    control = comfyui.controlnet.T2IAdapter(network, 3, 8, "nearest-exact", torch.device("cpu"))
    hints = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    last = tiny.control_net(**unet)
    return last.set_previous_controlnet(control.set_cond_hint(hints)), unet


def test_an_adapter_with_several_hints_reaches_every_model(tiny, internals, adapter, caplog):
    # An adapter keeps its output in the batch size of the call that came first: two images of the domain model, or two
    # conditionings of the prior.
    control, unet = adapter
    prior, domain = tiny.prior(0, **unet), tiny.prior(1, **unet)
    positive, negative = (tiny.with_options(tiny.conditioning(i), control=control) for i in (1, 2))
    x = noisy(6)
    expected = by_hand(tiny, (prior, domain, positive, negative, 1.5, 2.0), x, 2.0)
    guider = internals.in_domain_guider(prior, domain, positive, negative, 1.5, 2.0)
    assert relative(tiny.predict(guider, x, 2.0), expected) < 1e-5
    before = control.previous_controlnet
    control.previous_controlnet = None
    assert relative(by_hand(tiny, (prior, domain, positive, negative, 1.5, 2.0), x, 2.0), expected) > 1e-3
    control.previous_controlnet = before
    # From one conditioning a model to core's own pair, and the other way round.
    for interval in ({"domain_end_percent": 0.5}, {"domain_start_percent": 0.5}):
        guider = internals.in_domain_guider(prior, domain, positive, negative, 0.4, 0.6, **interval)
        tiny.sample(guider, steps=4, batch=2)
        assert guider.evaluations["base"] == guider.evaluations["domain"] == 2
    assert "could not be applied" not in caplog.text


@pytest.mark.parametrize("given", [True, False])
def test_inpainting_models_see_the_masked_image(comfyui, tiny, internals, given):
    # Such UNets take mask and masked image as further channels, which every model encodes for itself: from the
    # conditioning, or from the latent and its noise mask.
    prior, twin = tiny.prior(0, in_channels=9), tiny.prior(0, in_channels=9)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1.0
    extra = {"concat_latent_image": tiny.latent(5)["samples"], "concat_mask": mask} if given else {}
    positive, negative = (tiny.with_options(tiny.conditioning(i), **extra) for i in (1, 2))
    latent = tiny.latent(5, noise_mask=mask)
    (expected,) = comfyui.nodes.common_ksampler(prior, 1, 3, 2.0, "euler", "normal", positive, negative, latent)
    result = tiny.sample(internals.in_domain_guider(prior, twin, positive, negative, 1.5, 2.0), latent=latent)
    assert relative(result, expected["samples"]) < 1e-4


def test_nested_latents(comfyui, tiny, internals):
    # Latents of several parts (video with sound) arrive packed into one row; every model must be told the shapes.
    prior, twin, positive, negative, *weights = as_one_model(tiny, 1.5, 2.0)
    shapes = []
    for patcher in (prior, twin):
        original = patcher.model.apply_model

        def unpacked(x, t, *args, patcher=patcher, original=original, **kwargs):
            shapes.append((patcher, getattr(patcher.model, "latent_shapes", None)))
            parts = comfyui.utils.unpack_latents(x, [(x.shape[0], 4, 8, 8), (x.shape[0], 4, 4, 4)])
            done = [original(part, t, *args, **kwargs) for part in parts]
            return comfyui.utils.pack_latents(done)[0]

        patcher.model.apply_model = unpacked
    parts = [torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 4, 4)]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(part.shape, generator=generator) for part in parts]
    nested = comfyui.nested_tensor.NestedTensor
    results = []
    core = comfyui.samplers.CFGGuider(prior)
    core.set_conds(positive, negative)
    core.set_cfg(2.0)
    for guider in (core, internals.in_domain_guider(prior, twin, positive, negative, *weights)):
        sigmas = torch.tensor([10.0, 3.0, 0.0])
        results.append(
            guider.sample(nested(noise), nested(parts), comfyui.samplers.sampler_object("euler"), sigmas, seed=1)
        )
    for ours, theirs in zip(results[1].unbind(), results[0].unbind()):
        assert relative(ours, theirs) < 1e-4
    assert {id(patcher) for patcher, seen in shapes if patcher is twin and seen is not None} == {id(twin)}


# ---- latents that nothing can be made of ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (torch.zeros(0, 4, 8, 8), r"at least one image and one pixel, got one of shape \[0, 4, 8, 8\]"),
        (torch.zeros(1, 4, 0, 8), "at least one image and one pixel"),
        (torch.full((1, 4, 8, 8), float("nan")), "found NaN or infinity"),
        (torch.full((1, 4, 8, 8), float("inf")), "found NaN or infinity"),
        (torch.zeros(1, 4, 1, 1), r"large enough for its models, got \[1, 1\] pixels: Expected more than 1 value"),
        (torch.zeros(1, 4, 8), "4 channels and 2 dimensions a picture"),
        (torch.zeros(1, 4, 1, 8, 8), "4 channels and 2 dimensions a picture"),
        (torch.ones(1, 16, 8, 8), "4 channels and 2 dimensions a picture"),
    ],
)
def test_a_latent_that_cannot_be_sampled_is_refused_in_a_sentence(tiny, internals, in_domain, samples, words):
    guider = in_domain()
    problem = importlib.import_module("indomain_guidance.guidance.errors").Problem
    with pytest.raises(problem, match=words) as refused:
        internals.sample_latent(guider, {"samples": samples}, 1, 2, "euler", "normal", 1.0)
    assert "\n" not in str(refused.value) and left_behind(guider) == []
    assert tiny.sample(guider, steps=2).isfinite().all()


def test_a_mask_of_no_numbers_is_refused(tiny, internals, in_domain):
    for mask in (torch.full((1, 1, 64, 64), float("nan")), torch.zeros(0, 1, 64, 64)):
        with pytest.raises(ValueError, match="Expected a noise mask of finite numbers"):
            internals.sample_latent(in_domain(), tiny.latent(noise_mask=mask), 1, 2, "euler", "normal", 1.0)


def test_a_latent_of_no_numbers_is_refused_in_cores_sampler_too(comfyui, tiny, in_domain):
    custom = comfyui.nodes_custom_sampler
    sampler, sigmas = comfyui.samplers.sampler_object("euler"), torch.tensor([10.0, 1.0, 0.0])
    latent = {"samples": torch.full((1, 4, 8, 8), float("nan"))}
    with pytest.raises(ValueError, match="found NaN or infinity"):
        custom.SamplerCustomAdvanced.execute(custom.Noise_RandomNoise(7), in_domain(), sampler, sigmas, latent)
