"""Core's nodes that change the sampling function, on the prior of a multi-guidance run.

Two kinds of oracle. With twins for all models and one conditioning for all terms, multi-guidance is a plain CFG of
scale W, so a core node must give what it gives on core's own CFG. And for different models the result is computed by
hand from c_eff.
"""

from __future__ import annotations

import importlib

import pytest
import torch

W_DOMAIN, W_CONTROL, SIGMA = 1.5, 2.0, 2.0
SCALE = W_DOMAIN + W_CONTROL


def noisy(seed: int, batch: int = 2) -> torch.Tensor:
    # 16x16, because Self-Attention Guidance skips smaller middle blocks.
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * 3.0


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def extra(module: str, node: str):
    # In ComfyUI 0.8 nodes_latent cannot be the first of the two to be imported.
    importlib.import_module("comfy_extras.nodes_post_processing")
    return getattr(importlib.import_module(f"comfy_extras.{module}"), node)


def v3(module: str, node: str, **inputs):
    return lambda model: extra(module, node).execute(model, **inputs).result[0]


def rescale(model):
    return extra("nodes_model_advanced", "RescaleCFG")().patch(model, 0.7)[0]


def tonemap(model):
    operation = extra("nodes_latent", "LatentOperationTonemapReinhard").execute(1.0).result[0]
    return extra("nodes_latent", "LatentApplyOperationCFG").execute(model, operation).result[0]


def perp_neg(tiny):
    return v3("nodes_perpneg", "PerpNeg", empty_conditioning=tiny.conditioning(9), neg_scale=1.3)


def skip_middle_layer(model):
    """What SkipLayerGuidanceDiT does, on a UNet: run the prior again with a layer switched off."""
    model = model.clone()

    def post(args):
        options = set_replace(
            args["model_options"].copy(), lambda q, k, v, extra_options, mask=None: v, "attn1", "middle", 0
        )
        (weak,) = calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + (args["cond_denoised"] - weak) * 2.0

    set_replace = importlib.import_module("comfy.model_patcher").set_model_options_patch_replace
    calc_cond_batch = importlib.import_module("comfy.samplers").calc_cond_batch
    model.set_model_sampler_post_cfg_function(post)
    return model


def nodes(tiny) -> dict:
    layers = {"double_layers": "7", "single_layers": "8", "start_percent": 0.0, "end_percent": 1.0}
    return {
        "RescaleCFG": rescale,
        "APG": v3("nodes_apg", "APG", eta=0.3, norm_threshold=4.0, momentum=0.0),
        "APG momentum": v3("nodes_apg", "APG", eta=1.0, norm_threshold=0.0, momentum=-0.5),
        "TCFG": v3("nodes_tcfg", "TCFG"),
        "CFGZeroStar": v3("nodes_cfg", "CFGZeroStar"),
        "CFGNorm": v3("nodes_cfg", "CFGNorm", strength=0.9),
        "Mahiro": v3("nodes_mahiro", "Mahiro"),
        "FreSca": v3("nodes_fresca", "FreSca", scale_low=1.0, scale_high=1.5, freq_cutoff=2),
        "RenormCFG": v3("nodes_lumina2", "RenormCFG", cfg_trunc=100.0, renorm_cfg=1.0),
        "EpsilonScaling": v3("nodes_eps", "EpsilonScaling", scaling_factor=1.1),
        "LatentApplyOperationCFG": tonemap,
        "PAG": v3("nodes_pag", "PerturbedAttentionGuidance", scale=3.0),
        "SLG": skip_middle_layer,
        "SLG DiT": v3("nodes_slg", "SkipLayerGuidanceDiT", **layers, scale=3.0, rescaling_scale=0.5),
        "SLG DiT simple": v3("nodes_slg", "SkipLayerGuidanceDiTSimple", **layers),
        "SAG": v3("nodes_sag", "SelfAttentionGuidance", scale=0.8, blur_sigma=2.0),
        "PerpNeg": perp_neg(tiny),
    }


NAMES = [
    "RescaleCFG",
    "APG",
    "APG momentum",
    "TCFG",
    "CFGZeroStar",
    "CFGNorm",
    "Mahiro",
    "FreSca",
    "RenormCFG",
    "EpsilonScaling",
    "LatentApplyOperationCFG",
    "PAG",
    "SLG",
    "SLG DiT",
    "SLG DiT simple",
    "SAG",
    "PerpNeg",
]

# A UNet has no DiT layers to skip; what remains is that the hook is called with the pair that it expects.
NO_EFFECT = {"SLG DiT simple"}


def core(comfyui, model, positive, negative, scale=SCALE):
    guider = comfyui.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    return guider


@pytest.mark.parametrize("name", NAMES)
def test_as_on_core_when_all_terms_agree(comfyui, tiny, internals, name):
    # The domain model is a twin of the prior, on the positive conditioning: c_eff = D_control, whatever the weights.
    assert list(nodes(tiny)) == NAMES
    node = nodes(tiny)[name]
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    # Core's RenormCFG takes one image at a time.
    x = noisy(1, batch=1 if name == "RenormCFG" else 2)
    expected = tiny.predict(core(comfyui, node(tiny.prior(0)), positive, negative), x, SIGMA)
    guider = internals.TermGuider(
        node(tiny.prior(0)),
        negative,
        [
            internals.Term("domain", tiny.prior(0), positive, W_DOMAIN),
            internals.Term("control", None, positive, W_CONTROL),
        ],
    )
    assert relative(tiny.predict(guider, x, SIGMA), expected) < 1e-4
    if name not in NO_EFFECT:
        plain = tiny.predict(core(comfyui, tiny.prior(0), positive, negative), x, SIGMA)
        assert relative(plain, expected) > 1e-3, "the node must do something for the comparison to mean anything"


@pytest.fixture
def two_models(tiny, internals):
    """(guider for a prior under a node, predictions of core) for an In-Domain run with a different domain model."""
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    prior, domain = tiny.prior(0), tiny.prior(1)
    x = noisy(2)
    d = {
        "u": tiny.denoised(prior, negative, x, SIGMA),
        "domain": tiny.denoised(domain, negative, x, SIGMA),
        "control": tiny.denoised(prior, positive, x, SIGMA),
    }
    d["effective"] = d["u"] + (W_DOMAIN * (d["domain"] - d["u"]) + W_CONTROL * (d["control"] - d["u"])) / SCALE
    d["result"] = d["u"] + SCALE * (d["effective"] - d["u"])

    def build(node, domain_weight=W_DOMAIN, control_weight=W_CONTROL):
        return internals.in_domain_guider(node(prior), domain, positive, negative, domain_weight, control_weight)

    return build, d, x, (prior, domain, positive, negative)


def test_a_scale_method_gets_the_effective_condition(tiny, two_models):
    build, d, x, _ = two_models
    result = tiny.predict(build(v3("nodes_cfg", "CFGZeroStar")), x, SIGMA)
    alpha = extra("nodes_cfg", "optimized_scale")(x - d["effective"], x - d["u"])
    expected = d["result"] + d["u"] * (alpha - 1.0) + SCALE * d["u"] * (1.0 - alpha)
    assert relative(result, expected) < 1e-4


def test_all_kinds_see_one_cfg_in_their_order(tiny, two_models):
    build, d, x, _ = two_models
    seen = []

    def node(model):
        model = model.clone()
        model.set_model_sampler_calc_cond_batch_function(
            lambda a: (
                seen.append(("batch", len(a["conds"]))),
                calc(a["model"], a["conds"], a["input"], a["sigma"], a["model_options"]),
            )[1]
        )
        model.set_model_sampler_pre_cfg_function(
            lambda a: (seen.append(("pre", a)), [p + 1.0 for p in a["conds_out"]])[1]
        )
        model.set_model_sampler_cfg_function(
            lambda a: (seen.append(("cfg", a)), a["uncond"] + a["cond_scale"] * (a["cond"] - a["uncond"]))[1]
        )
        model.set_model_sampler_post_cfg_function(lambda a: (seen.append(("post", a)), a["denoised"] * 2.0)[1])
        model.set_model_sampler_post_cfg_function(lambda a: (seen.append(("post 2", a)), a["denoised"] + 3.0)[1])
        return model

    calc = importlib.import_module("comfy.samplers").calc_cond_batch
    guider = build(node)
    result = tiny.predict(guider, x, SIGMA)
    assert [what for what, _ in seen] == ["batch", "pre", "cfg", "post", "post 2"]
    assert seen[0][1] == 2
    pre, cfg, post = (args for _, args in seen[1:4])
    assert relative(pre["conds_out"][0], d["effective"]) < 1e-5 and relative(pre["conds_out"][1], d["u"]) < 1e-5
    for args in (pre, cfg, post):
        assert args["cond_scale"] == SCALE and args["model"] is guider.model_patcher.model
    assert (
        relative(cfg["cond_denoised"], d["effective"] + 1.0) < 1e-5
        and cfg["input_cond"] is post["cond"] is pre["conds"][0]
    )
    assert relative(post["denoised"], d["result"] + 1.0) < 1e-5
    assert relative(result, (d["result"] + 1.0) * 2.0 + 3.0) < 1e-5


@pytest.mark.parametrize("weights", [(W_DOMAIN, W_CONTROL), (2.5, 0.0), (0.4, 0.6)])
def test_running_the_model_again_keeps_the_pair_consistent(comfyui, tiny, two_models, weights):
    # PAG adds scale * (D_control - D_control with its attention off), whatever else guides.
    build, d, x, (prior, domain, positive, negative) = two_models
    node = v3("nodes_pag", "PerturbedAttentionGuidance", scale=3.0)
    with_pag = tiny.predict(core(comfyui, node(prior), positive, positive, 1.0), x, SIGMA)
    push = with_pag - d["control"]
    assert relative(push, d["control"]) > 1e-3
    expected = d["u"] + weights[0] * (d["domain"] - d["u"]) + weights[1] * (d["control"] - d["u"]) + push
    assert relative(tiny.predict(build(node, *weights), x, SIGMA), expected) < 1e-4


def test_without_a_control_conditioning_the_base_is_disturbed(comfyui, tiny, internals, two_models):
    _, d, x, (prior, domain, _, negative) = two_models
    node = v3("nodes_pag", "PerturbedAttentionGuidance", scale=3.0)
    push = tiny.predict(core(comfyui, node(prior), negative, negative, 1.0), x, SIGMA) - d["u"]
    guider = internals.TermGuider(node(prior), negative, [internals.Term("domain", domain, None, 1.5)])
    assert relative(tiny.predict(guider, x, SIGMA), d["u"] + 1.5 * (d["domain"] - d["u"]) + push) < 1e-4


def test_cancelling_weights_hand_over_the_result_itself(tiny, internals, two_models):
    build, d, x, _ = two_models
    seen = {}

    def node(model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda args: seen.update(args) or args["denoised"])
        return model

    result = tiny.predict(build(node, 2.0, -2.0), x, SIGMA)
    expected = d["u"] + 2.0 * (d["domain"] - d["control"])
    assert relative(result, expected) < 1e-5 and seen["cond_scale"] == 1.0
    assert relative(seen["cond_denoised"], expected) < 1e-5 and relative(seen["uncond_denoised"], d["u"]) < 1e-5


def test_hooks_survive_a_whole_run_and_the_next(comfyui, tiny, internals):
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    for name in ("RescaleCFG", "PAG", "SAG", "SLG DiT"):
        guider = internals.in_domain_guider(
            nodes(tiny)[name](tiny.prior(0)), tiny.prior(1), positive, negative, 1.5, 2.0
        )
        first = tiny.sample(guider, steps=3, size=16)
        assert first.isfinite().all() and torch.equal(tiny.sample(guider, steps=3, size=16), first)


def test_attention_patches_never_meet_a_third_conditioning(tiny, internals):
    # Such patches know cond (0) and uncond (1) and fail on anything else.
    prior, conds = tiny.prior(0), [tiny.conditioning(i) for i in range(4)]
    terms = [internals.Term(f"t{i}", None, conds[i], 1.0) for i in (1, 2, 3)]
    x = noisy(3)
    expected = tiny.predict(internals.TermGuider(prior, conds[0], terms), x, SIGMA)
    patched, met = prior.clone(), []

    def patch(q, k, v, extra_options):
        met.append(tuple(extra_options["cond_or_uncond"]))
        return q, k, v

    patched.set_model_attn1_patch(patch)
    result = tiny.predict(internals.TermGuider(patched, conds[0], terms), x, SIGMA)
    assert relative(result, expected) < 1e-5
    assert {index for call in met for index in call} == {0, 1}
    assert {len(call) for call in met} == {1, 2}


def test_easycache_survives_a_conditioning_that_joins_later(comfyui, tiny, internals):
    """Core's cache knows a difference of each conditioning it has seen, and skips whole calls."""
    nodes = importlib.import_module("comfy_extras.nodes_easycache")
    execute = nodes.EasyCacheNode.execute.__func__
    prior = execute(nodes.EasyCacheNode, tiny.prior(0), 3.0, 0.0, 1.0, False).result[0]
    base, prompt = tiny.conditioning(1), tiny.conditioning(2)
    ran = []
    handle = prior.model.diffusion_model.time_embed.register_forward_hook(lambda *args: ran.append(1))
    guider = internals.in_domain_guider(prior, tiny.prior(1), prompt, base, 1.5, 1.0, domain_start_percent=0.5)
    try:
        for _ in range(2):  # the next run begins as the first did
            ran.clear()
            assert torch.isfinite(tiny.sample(guider, steps=12, size=16)).all()
            assert 2 <= len(ran) < 12, "some steps are skipped, the first with the base is not"
    finally:
        handle.remove()
