"""Several models in one run: prediction types, shared checkpoints, patches, hooks, and what is refused."""

from __future__ import annotations

import copy
import gc
import importlib
import logging
import weakref

import pytest
import torch

LOGGER = "indomain_guidance.nodes.comfy_internals.guiding.branches"


def noisy(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * 3.0


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def by_hand(tiny, base, terms, x, sigma):
    """D_u + sum w (D_i - D_u), every prediction from core alone."""
    predicted = tiny.denoised(*base, x, sigma)
    return predicted + sum(weight * (tiny.denoised(model, cond, x, sigma) - predicted) for model, cond, weight in terms)


@pytest.mark.parametrize("sigma", [12.0, 1.5])
@pytest.mark.parametrize(("prior_type", "domain_type"), [("EPS", "V_PREDICTION"), ("V_PREDICTION", "EPS")])
def test_eps_and_v_models_mix(tiny, internals, sigma, prior_type, domain_type):
    prior, domain = tiny.prior(0, prediction=prior_type), tiny.prior(1, prediction=domain_type)
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    x = noisy(1)
    guider = internals.in_domain_guider(prior, domain, positive, negative, 1.5, 3.0)
    expected = by_hand(tiny, (prior, negative), [(domain, negative, 1.5), (prior, positive, 3.0)], x, sigma)
    assert relative(tiny.predict(guider, x, sigma), expected) < 1e-5


def test_references_and_third_models(tiny, internals):
    prior, strong, weak = tiny.prior(0), tiny.prior(1), tiny.prior(2)
    base, cond, own = tiny.conditioning(1), tiny.conditioning(2), tiny.conditioning(3)
    guider = internals.TermGuider(
        prior,
        base,
        [
            internals.Term("weak", weak, cond, 0.0),
            internals.Term("strong", strong, cond, 2.0, reference="weak"),
            internals.Term("third", weak, own, -0.5),
        ],
    )
    x = noisy(2)
    d = {
        name: tiny.denoised(m, c, x, 2.0)
        for name, m, c in (("u", prior, base), ("weak", weak, cond), ("strong", strong, cond), ("third", weak, own))
    }
    expected = d["u"] + 2.0 * (d["strong"] - d["weak"]) - 0.5 * (d["third"] - d["u"])
    assert relative(tiny.predict(guider, x, 2.0), expected) < 1e-5
    assert guider.evaluations == {"base": 1, "weak": 1, "strong": 1, "third": 1}


def two_loras(tiny):
    checkpoint = tiny.prior(0)
    return tiny.lora(checkpoint, 1), tiny.lora(checkpoint, 2)


def check_two_loras(tiny, internals, prior, domain):
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    x = noisy(3)
    expected = by_hand(tiny, (prior, negative), [(domain, negative, 1.5), (prior, positive, 3.0)], x, 2.0)
    confused = by_hand(tiny, (prior, negative), [(prior, negative, 1.5), (prior, positive, 3.0)], x, 2.0)
    assert relative(confused, expected) > 1e-2, "the LoRAs must differ"
    guider = internals.in_domain_guider(prior, domain, positive, negative, 1.5, 3.0)
    for _ in range(2):
        assert relative(tiny.predict(guider, x, 2.0), expected) < 1e-5
    # And afterwards each still predicts what it did.
    again = by_hand(tiny, (prior, negative), [(domain, negative, 1.5), (prior, positive, 3.0)], x, 2.0)
    assert torch.equal(again, expected)
    return guider


def test_two_loras_on_one_checkpoint_get_a_copy(tiny, internals, caplog):
    prior, domain = two_loras(tiny)
    with caplog.at_level(logging.INFO, LOGGER):
        guider = check_two_loras(tiny, internals, prior, domain)
    assert "own copy of the weights" in caplog.text
    (branch,) = guider.branches
    assert branch.patcher.model is not prior.model
    assert guider.model_patcher.get_additional_models() == [branch.patcher]


def test_two_loras_on_one_checkpoint_take_turns_where_memory_is_short(comfyui, tiny, internals, caplog, monkeypatch):
    prior, domain = two_loras(tiny)
    free = comfyui.model_management.get_free_memory

    def little(device=None, torch_free_too=False):
        return free(device, True) if torch_free_too else 2**20

    monkeypatch.setattr(comfyui.model_management, "get_free_memory", little)
    with caplog.at_level(logging.INFO, LOGGER):
        guider = check_two_loras(tiny, internals, prior, domain)
    assert "patched anew" in caplog.text
    (branch,) = guider.branches
    assert branch.patcher.model is prior.model
    # A whole run, in which the prior has to be back in place whenever core asks for it.
    first = tiny.sample(guider)
    monkeypatch.undo()
    copied = internals.in_domain_guider(prior, domain, tiny.conditioning(1), tiny.conditioning(2), 1.5, 3.0)
    assert relative(first, tiny.sample(copied)) < 1e-4


def test_copies_do_not_disturb_a_loaded_checkpoint(tiny, internals):
    # The prior is loaded, with its LoRA, when the copy is made: the copy must start from the clean weights.
    prior, domain = two_loras(tiny)
    tiny.denoised(prior, tiny.conditioning(1), noisy(3), 2.0)
    check_two_loras(tiny, internals, prior, domain)


@pytest.mark.slow
def test_a_copy_is_made_once_and_goes_with_its_model(comfyui, tiny, internals, monkeypatch):
    checkpoint = tiny.prior(0)
    prior, domain = tiny.lora(checkpoint, 1), tiny.lora(checkpoint, 2)
    copied, deepcopy = [], copy.deepcopy

    def spy(thing, *args):
        copied.extend([1] if thing is checkpoint.model else [])
        return deepcopy(thing, *args)

    monkeypatch.setattr(copy, "deepcopy", spy)
    modules = []
    # Every queue builds a guider of the same MODELs; in between, the copy may stay loaded or be unloaded.
    for unload in (False, False, True):
        guider = check_two_loras(tiny, internals, prior, domain)
        modules.append(weakref.ref(next(iter(guider.branches)).patcher.model))
        del guider
        gc.collect()
        assert any(entry.real_model() is modules[0]() for entry in comfyui.model_management.current_loaded_models)
        if unload:
            comfyui.model_management.unload_all_models()
            check_two_loras(tiny, internals, prior, domain)
    assert len(copied) == 1 and len({id(module()) for module in modules}) == 1
    # Patches added to the same MODEL go into the same copy, a MODEL with another LoRA gets its own.
    key, patches = next(iter(domain.patches.items()))
    domain.add_patches({key: patches[0][1]}, 2.0)
    check_two_loras(tiny, internals, prior, domain)
    assert len(copied) == 1
    check_two_loras(tiny, internals, prior, tiny.lora(checkpoint, 3))
    assert len(copied) == 2
    del domain
    gc.collect()
    assert modules[0]() is None, "ComfyUI let the MODEL go, and with it goes the copy"
    assert not any(entry.is_dead() for entry in comfyui.model_management.current_loaded_models)


def test_what_clones_of_one_module_may_share_tomorrow_is_the_copys_own(comfyui, tiny, internals, monkeypatch):
    patcher_class = comfyui.model_patcher.ModelPatcher
    init, clone = patcher_class.__init__, patcher_class.clone

    def init_of_tomorrow(patcher, *args, **kwargs):
        init(patcher, *args, **kwargs)
        patcher.backup_of_tomorrow = {}

    def clone_of_tomorrow(patcher, *args, **kwargs):
        made = clone(patcher, *args, **kwargs)
        made.backup_of_tomorrow = patcher.backup_of_tomorrow
        return made

    monkeypatch.setattr(patcher_class, "__init__", init_of_tomorrow)
    monkeypatch.setattr(patcher_class, "clone", clone_of_tomorrow)
    prior, domain = two_loras(tiny)
    one, other = (next(iter(check_two_loras(tiny, internals, prior, domain).branches)).patcher for _ in range(2))
    assert domain.backup_of_tomorrow is prior.backup_of_tomorrow
    assert one.backup_of_tomorrow is other.backup_of_tomorrow is not domain.backup_of_tomorrow


def test_another_noise_schedule_on_one_checkpoint(comfyui, tiny, internals):
    # An object patch is no weight patch, and core's own comparison of clones does not see it.
    prior = tiny.prior(0)
    domain = prior.clone()

    class VPrediction(comfyui.model_sampling.ModelSamplingDiscrete, comfyui.model_sampling.V_PREDICTION):
        pass

    domain.add_object_patch("model_sampling", VPrediction(prior.model.model_config))
    check_two_loras(tiny, internals, prior, domain)


def test_clone_with_the_same_weights_needs_no_second_copy(tiny, internals):
    prior = tiny.prior(0)
    other = prior.clone()
    other.model_options["transformer_options"]["marker"] = 1
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    guider = internals.in_domain_guider(prior, other, positive, negative, 1.5, 3.0)
    assert guider.model_patcher.get_additional_models() == []
    x = noisy(4)
    expected = by_hand(tiny, (prior, negative), [(prior, negative, 1.5), (prior, positive, 3.0)], x, 2.0)
    assert relative(tiny.predict(guider, x, 2.0), expected) < 1e-5


def hooked(comfyui, tiny, conditioning, seed, keyframes=()):
    """A conditioning under a LoRA hook, with strengths over sampling if given."""
    model = tiny.prior(0)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: ("diff", (0.5 * weight.std() * torch.randn(weight.shape, generator=generator),))
        for key, weight in model.model.state_dict().items()
        if "attn1" in key and key.endswith("weight")
    }
    hook = comfyui.hooks.WeightHook(1.0, 1.0)
    hook.weights, hook.need_weight_init = weights, False
    group = comfyui.hooks.HookGroup()
    group.add(hook)
    if keyframes:
        frames = comfyui.hooks.HookKeyframeGroup()
        for start, strength in keyframes:
            frames.add(comfyui.hooks.HookKeyframe(strength, start, guarantee_steps=0))
        group.set_keyframes_on_hooks(frames)
    return tiny.with_options(conditioning, hooks=group)


@pytest.mark.parametrize("shared", [False, True])
def test_hooks_of_the_base_act_on_the_domain_model(comfyui, tiny, internals, shared):
    prior = tiny.prior(0)
    domain = prior.clone() if shared else tiny.prior(1)
    domain.model_options["transformer_options"]["marker"] = 1
    positive, negative = tiny.conditioning(1), hooked(comfyui, tiny, tiny.conditioning(2), 9)
    x = noisy(5)
    expected = by_hand(tiny, (prior, negative), [(domain, negative, 1.5), (prior, positive, 3.0)], x, 2.0)
    bare = tiny.conditioning(2)
    assert (
        relative(by_hand(tiny, (prior, bare), [(domain, bare, 1.5), (prior, positive, 3.0)], x, 2.0), expected) > 1e-2
    )
    guider = internals.in_domain_guider(prior, domain, positive, negative, 1.5, 3.0)
    modes = prior.hook_mode, domain.hook_mode
    for _ in range(2):
        assert relative(tiny.predict(guider, x, 2.0), expected) < 1e-5
    assert not prior.hook_patches and not domain.hook_patches
    # A run whose conditionings agree about hooks does without caching hooked weights; afterwards the mode is as it was.
    tiny.predict(internals.in_domain_guider(prior, domain, positive, bare, 1.5, 3.0), x, 2.0)
    assert (prior.hook_mode, domain.hook_mode) == modes


def test_hook_keyframes_reach_every_model(comfyui, tiny, internals):
    # With the prior's own weights as "domain model" the whole is a CFG, whatever the hook does over time.
    prior, twin = tiny.prior(0), tiny.prior(0)
    positive = hooked(comfyui, tiny, tiny.conditioning(1), 9, keyframes=[(0.0, 1.0), (0.5, -2.0)])
    negative = hooked(comfyui, tiny, tiny.conditioning(2), 9, keyframes=[(0.0, 0.0), (0.4, 3.0)])
    latent = tiny.latent(batch=2)
    (expected,) = comfyui.nodes.common_ksampler(prior, 1, 6, 3.0, "euler", "normal", positive, negative, latent)
    guider = internals.in_domain_guider(prior, twin, positive, negative, 2.5, 3.0)
    assert relative(tiny.sample(guider, seed=1, steps=6, latent=latent), expected["samples"]) < 1e-4


def test_sdxl_sizes_reach_every_model(comfyui, tiny, internals):
    # SDXL's y is made from pooled text, sizes and crops by each model itself, once for the positive, once for the base.
    unet = {"adm_in_channels": 2816, "num_classes": "sequential", "model_channels": 64}
    prior, twin = (tiny.prior(0, family="SDXL", **unet) for _ in range(2))
    pooled = torch.randn(2, 1, 1280, generator=torch.Generator().manual_seed(0))
    sizes = [{"width": 512, "height": 768, "crop_h": 64}, {"width": 1024, "target_width": 256}]
    positive, negative = (tiny.conditioning(i, pooled_output=pooled[i], **sizes[i]) for i in range(2))
    core = comfyui.samplers.CFGGuider(prior)
    core.set_conds(positive, negative)
    core.set_cfg(2.0)
    x = noisy(7)
    expected = tiny.predict(core, x, 2.0)
    assert (
        relative(tiny.predict(internals.in_domain_guider(prior, twin, positive, negative, 1.5, 2.0), x, 2.0), expected)
        < 1e-5
    )
    assert (
        relative(tiny.predict(internals.in_domain_guider(prior, twin, positive, positive, 1.5, 2.0), x, 2.0), expected)
        > 1e-3
    )


def test_every_model_keeps_its_own_options(tiny, internals):
    prior, domain = tiny.prior(0).clone(), tiny.prior(1).clone()
    prior.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k, 0.5 * v))
    domain.set_model_unet_function_wrapper(lambda run, args: 1.1 * run(args["input"], args["timestep"], **args["c"]))
    domain.set_model_attn2_patch(lambda q, k, v, extra_options: (q, k, -v))
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    x = noisy(8)
    expected = by_hand(tiny, (prior, negative), [(domain, negative, 1.5), (prior, positive, 3.0)], x, 2.0)
    assert (
        relative(
            tiny.predict(internals.in_domain_guider(prior, domain, positive, negative, 1.5, 3.0), x, 2.0), expected
        )
        < 1e-5
    )


# ---- refusals and warnings ------------------------------------------------------------------------------------------


def refusal(internals, prior, domain, tiny, weight=2.5):
    with pytest.raises(ValueError) as problem:
        internals.in_domain_guider(prior, domain, tiny.conditioning(1), tiny.conditioning(2), weight, 2.5)
    message = str(problem.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_other_latent_space_is_refused(comfyui, tiny, internals):
    message = refusal(internals, tiny.prior(0), tiny.prior(1, family="SDXL", model_channels=64), tiny)
    assert "SD15" in message and "SDXL" in message and "latent space" in message


def test_flow_with_eps_is_refused(comfyui, tiny, internals):
    message = refusal(internals, tiny.prior(0, prediction="FLOW"), tiny.prior(1), tiny)
    assert "flow" in message and "diffusion" in message


def test_other_text_family_is_refused(tiny, internals):
    message = refusal(internals, tiny.prior(0), tiny.prior(1, context_dim=40), tiny)
    assert "24" in message and "40" in message


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(tiny, internals, weight):
    assert "finite" in refusal(internals, tiny.prior(0), tiny.prior(1), tiny, weight)


def test_zero_snr_prior_and_eps_domain_must_meet(tiny, internals):
    prior, domain = tiny.prior(0, prediction="V_PREDICTION", zero_snr=True), tiny.prior(1)
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    with pytest.raises(ValueError, match=r"sigma 4519 .*0\.02917 to 14\.61.*prior 0\.02917 to 4519") as problem:
        tiny.sample(internals.in_domain_guider(prior, domain, positive, negative, 2.5, 2.5))
    assert "\n" not in str(problem.value)
    # Not active there, nothing to refuse; and the other way round the prior's whole range is covered.
    late = internals.in_domain_guider(prior, domain, positive, negative, 2.5, 2.5, domain_start_percent=0.5)
    assert tiny.sample(late).isfinite().all() and late.evaluations["domain"] > 0
    assert tiny.sample(internals.in_domain_guider(domain, prior, positive, negative, 2.5, 2.5)).isfinite().all()


def test_lora_on_the_prior_alone_is_warned_about(tiny, internals, caplog):
    checkpoint, domain = tiny.prior(0), tiny.prior(1)
    prior = tiny.lora(checkpoint, 1)
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    internals.in_domain_guider(prior, domain, positive, negative)
    assert caplog.text.count("same LoRA") == 1
    caplog.clear()
    internals.in_domain_guider(checkpoint, domain, positive, negative)
    internals.in_domain_guider(prior, tiny.lora(domain, 1), positive, negative)
    remedy = [
        internals.Term("plain", checkpoint, None, 0.0),
        internals.Term("domain", domain, None, 2.5, reference="plain"),
    ]
    internals.TermGuider(prior, negative, remedy)
    assert "LoRA" not in caplog.text


def test_patches_inside_the_prior_alone_are_warned_about(tiny, internals, caplog):
    # FreeU and IPAdapter leave the weights alone and patch the computation.
    checkpoint, domain = tiny.prior(0), tiny.prior(1)
    prior = checkpoint.clone()
    prior.set_model_output_block_patch(lambda h, skip, options: (1.1 * h, skip))
    prior.set_model_attn2_replace(lambda q, k, v, options: 0.5 * v, "middle", 0)
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    internals.in_domain_guider(prior, domain, positive, negative)
    assert caplog.text.count("pushes against them") == 1
    assert "term 'domain' lacks (output_block_patch, attn2)" in caplog.text
    caplog.clear()
    alike = domain.clone()
    alike.set_model_output_block_patch(lambda h, skip, options: (1.1 * h, skip))
    alike.set_model_attn2_replace(lambda q, k, v, options: 0.5 * v, "middle", 0)
    internals.in_domain_guider(prior, alike, positive, negative)
    internals.in_domain_guider(checkpoint, domain, positive, negative)
    internals.in_domain_guider(prior, domain, positive, negative, domain_weight=0.0)
    remedy = [
        internals.Term("plain", checkpoint, None, 0.0),
        internals.Term("domain", domain, None, 2.5, reference="plain"),
    ]
    internals.TermGuider(prior, negative, remedy)
    assert "pushes against" not in caplog.text


def test_patches_that_leave_the_base_alone_are_no_reason_to_warn(comfyui, tiny, internals, caplog):
    # The domain term is D_domain - D_base: what does not change D_base is nothing that it could push against.
    sag = importlib.import_module("comfy_extras.nodes_sag").SelfAttentionGuidance
    prior, domain = tiny.prior(0), tiny.prior(1)
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    models = [sag.execute(prior, 0.5, 2.0).result[0], tiny.lora(prior, 1, strength=0.0)]
    merged = prior.clone()
    merged.add_patches({key: (torch.zeros(1),) for key in prior.model.state_dict()}, 0.0, 1.0)  # ModelMerge at ratio 1
    models.append(merged)
    if (comfyui.root / "comfy_extras" / "nodes_nag.py").is_file():
        nag = importlib.import_module("comfy_extras.nodes_nag").NAGuidance
        models.append(nag.execute(prior, 5.0, 0.5, 1.5).result[0])
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    base = tiny.denoised(prior, negative, x, 2.0)
    for model in models:
        core = comfyui.samplers.CFGGuider(model)
        core.set_conds(positive, negative)
        core.set_cfg(0.0)
        core.model_options = {**model.model_options, "sampler_post_cfg_function": []}
        assert relative(tiny.predict(core, x, 2.0), base) < 1e-5
        internals.in_domain_guider(model, domain, positive, negative)
    assert caplog.text == ""
    other = sag.execute(prior, 0.5, 2.0).result[0].clone()
    other.set_model_attn1_replace(lambda q, k, v, options: 0.5 * v, "middle", 0, 1)
    internals.in_domain_guider(other, domain, positive, negative)
    assert caplog.text.count("pushes against them") == 1


def test_what_a_branch_leaves_out_of_a_models_options_is_said(comfyui, tiny, internals, caplog):
    differential = importlib.import_module("comfy_extras.nodes_differential_diffusion").DifferentialDiffusion
    prior = tiny.prior(0)
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    made = differential.execute(tiny.prior(1))
    internals.in_domain_guider(prior, getattr(made, "result", made)[0], positive, negative)
    assert caplog.text.count("denoise_mask_function on the model of term 'domain' is ignored") == 1
    caplog.clear()
    domain = tiny.prior(1)
    domain.model_options["disable_cfg1_optimization"] = True
    domain.model_options["sampler_of_some_pack"] = lambda args: args
    kinds = comfyui.patcher_extension.WrappersMP
    comfyui.patcher_extension.add_wrapper_with_key(
        kinds.PREDICT_NOISE, "some pack", lambda run, *args: run(*args), domain.model_options, is_model_options=True
    )
    guider = internals.in_domain_guider(prior, domain, positive, negative)
    assert "sampler_of_some_pack, some pack on the model of term 'domain' is ignored" in caplog.text
    expected = tiny.predict(internals.in_domain_guider(prior, tiny.prior(1), positive, negative), noisy(6), 2.0)
    assert torch.equal(tiny.predict(guider, noisy(6), 2.0), expected)
    caplog.clear()
    domain = tiny.prior(1)
    domain.model_options["disable_cfg1_optimization"] = True
    internals.in_domain_guider(prior, domain, positive, negative)
    assert "disable_cfg1_optimization on the model of term 'domain' is ignored" in caplog.text
    # What both have from one node in front of them acts, on the prior.
    caplog.clear()
    checkpoint = differential.execute(tiny.prior(0))
    checkpoint = getattr(checkpoint, "result", checkpoint)[0]
    checkpoint.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    internals.in_domain_guider(tiny.lora(checkpoint, 1), tiny.lora(checkpoint, 1), positive, negative)
    assert "is ignored" not in caplog.text


def test_sampling_hooks_on_other_models_are_ignored_with_one_warning(tiny, internals, caplog):
    prior, domain = tiny.prior(0), tiny.prior(1)
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    x = noisy(6)
    expected = tiny.predict(internals.in_domain_guider(prior, domain, positive, negative), x, 2.0)
    domain.set_model_sampler_cfg_function(lambda args: torch.zeros_like(args["input"]))
    domain.set_model_sampler_post_cfg_function(lambda args: torch.zeros_like(args["input"]))
    guider = internals.in_domain_guider(prior, domain, positive, negative)
    assert torch.equal(tiny.predict(guider, x, 2.0), expected)
    tiny.sample(guider)
    assert caplog.text.count("is ignored") == 1
    assert "sampler_cfg_function, sampler_post_cfg_function" in caplog.text


def test_a_method_whose_loop_part_cannot_run_does_not_run_in_part(comfyui, tiny, internals, caplog):
    # Packs register a wrapper around the loop and one around the model under one key; the second counts on the first.
    kinds = comfyui.patcher_extension.WrappersMP
    prior, domain = tiny.prior(0), tiny.prior(1)
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    x = noisy(6)
    expected = tiny.predict(internals.in_domain_guider(prior, domain, positive, negative), x, 2.0)

    def loop(executor, *args, **kwargs):
        raise AssertionError("the loop belongs to the prior")

    def apply(executor, *args, **kwargs):
        return 2.0 * executor(*args, **kwargs)

    domain.add_wrapper_with_key(kinds.APPLY_MODEL, "other pack", apply)
    alone = tiny.predict(internals.in_domain_guider(prior, domain, positive, negative), x, 2.0)
    assert relative(alone, expected) > 1e-2 and caplog.text == "", "a wrapper around the model alone is honoured"
    domain.add_wrapper_with_key(kinds.OUTER_SAMPLE, "other pack", loop)
    domain.add_wrapper(kinds.PREDICT_NOISE, loop)
    guider = internals.in_domain_guider(prior, domain, positive, negative)
    assert torch.equal(tiny.predict(guider, x, 2.0), expected)
    assert "a sampling wrapper, other pack on the model of term 'domain' is ignored" in caplog.text


def test_every_model_hears_the_sigmas_of_the_run(tiny, internals):
    heard = {}

    def listener(name):
        def wrapper(run, args):
            heard[name] = args["c"]["transformer_options"]["sample_sigmas"].tolist()
            return run(args["input"], args["timestep"], **args["c"])

        return wrapper

    prior, domain = tiny.prior(0), tiny.prior(1)
    prior.set_model_unet_function_wrapper(listener("prior"))
    domain.set_model_unet_function_wrapper(listener("domain"))
    tiny.sample(internals.in_domain_guider(prior, domain, tiny.conditioning(1), tiny.conditioning(2)), steps=4)
    assert len(heard["prior"]) == 5 and heard["domain"] == heard["prior"]


def test_a_control_lora_has_no_text_layers_to_be_made_of_in_a_text_free_model(comfyui, tiny, internals):
    base, prompt = tiny.conditioning(1), tiny.conditioning(2)
    domain = tiny.cached_domain(tiny.prior(1), torch.randn(1, 5, 24), 3)
    behind = tiny.control_net()
    behind.previous_controlnet = comfyui.controlnet.ControlLora({})

    def guider(control, base=base, model=domain):
        own = tiny.with_options(prompt, control=control)
        terms = [internals.Term("domain", model, own, 1.5)]
        return internals.TermGuider(tiny.prior(0), base, terms)

    for control in (comfyui.controlnet.ControlLora({}), behind):
        with pytest.raises(ValueError, match="Term 'domain': .* found a Control-LoRA.*tiny domain.*no text layers"):
            guider(control)
        guider(control, model=tiny.prior(2))
        guider(control, base=tiny.with_options(base, control=control))  # the prior lends its weights
    guider(tiny.control_net())
