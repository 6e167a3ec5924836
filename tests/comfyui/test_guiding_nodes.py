"""The guiding nodes as ComfyUI sees them; what Shape Guidance Term computes is in test_shaping_node."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from .conftest import execute

NODES = ["GuidanceTerm", "ShapeGuidanceTerm", "MultiGuidanceGuider", "InDomainGuider", "InDomainSampler"]

# Published inputs may be added to, never removed, renamed or moved: saved workflows store widgets by position.
INPUTS = {
    "InDomainGuidanceTerm": (
        ["name", "weight", "start_percent", "end_percent", "ramp"],
        ["reference", "model", "conditioning", "terms"],
    ),
    "InDomainShapeTerm": (
        ["terms", "term", "mode"],
        ["width", "low_strength", "high_strength", "orthogonal_to", "share", "only_opposing", "per"],
    ),
    "InDomainMultiGuidanceGuider": (["prior", "base"], ["terms"]),
    "InDomainGuider": (
        ["prior", "domain", "positive", "negative", "domain_weight", "control_weight"],
        ["domain_start_percent", "domain_end_percent"],
    ),
    "InDomainSampler": (
        [
            "prior",
            "domain",
            "positive",
            "negative",
            "latent_image",
            "seed",
            "steps",
            "sampler_name",
            "scheduler",
            "domain_weight",
            "control_weight",
            "denoise",
        ],
        ["domain_start_percent", "domain_end_percent"],
    ),
}
WIRED = {"prior", "domain", "positive", "negative", "latent_image", "base", "model", "conditioning", "terms", "name"}


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", NODES)
def test_schema(guiders, name):
    node = getattr(guiders, name)
    schema = node.GET_SCHEMA()
    types = node.INPUT_TYPES()
    required, optional = INPUTS[schema.node_id]
    assert list(types["required"])[: len(required)] == required
    assert list(types.get("optional", {}))[: len(optional)] == optional
    assert schema.category == "In-Domain Guidance/guidance"
    for key, (_, options) in {**types["required"], **types.get("optional", {})}.items():
        tooltip = options["tooltip"]
        assert tooltip.endswith(".") and len(tooltip) > 20
        if key not in WIRED:
            assert any(word in tooltip for word in ("0 ", "neutral", "default", "Empty")), (
                f"{key}: range or no-op value"
            )
    assert (Path(guiders.__file__).parent / "web" / "docs" / f"{schema.node_id}.md").is_file()


@pytest.mark.parametrize("name", NODES)
def test_help_page_names_every_input(guiders, name):
    schema = getattr(guiders, name).GET_SCHEMA()
    page = (Path(guiders.__file__).parent / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    for key in sum(INPUTS[schema.node_id], []):
        assert f"`{key}`" in page


@pytest.mark.parametrize(
    ("ramp", "percent", "expected"),
    [
        ("constant", 0.5, 3.0),
        ("constant", 0.1, 0.0),
        ("constant", 0.9, 0.0),
        ("linear rise", 0.5, 1.5),
        ("linear rise", 0.7, 3.0 * 0.5 / 0.6),
        ("linear rise", 0.1, 0.0),
        ("linear rise", 0.9, 0.0),
        ("linear fall", 0.35, 3.0 * 0.45 / 0.6),
        ("cosine rise", 0.35, 3.0 * (0.5 - 0.5 * math.cos(math.pi * 0.25))),
        ("cosine fall", 0.5, 1.5),
    ],
)
def test_ramps(guiders, ramp, percent, expected):
    def percent_to_sigma(p):
        return 10.0 * (1.0 - p)

    weight = guiders.weight_over_sampling(3.0, 0.2, 0.8, ramp)
    assert weight.at(percent_to_sigma(percent), percent_to_sigma) == pytest.approx(expected, abs=1e-5)


def test_whole_run_at_full_weight_is_a_plain_number(guiders):
    assert guiders.weight_over_sampling(3.0, 0.0, 1.0, "constant") == 3.0


@pytest.mark.parametrize("ramp", ["constant", "cosine rise"])
def test_weight_0_is_0_whatever_its_interval(guiders, ramp):
    """Else the term's model would be loaded for nothing."""
    assert guiders.weight_over_sampling(0.0, 0.3, 1.0, ramp) == 0.0
    with pytest.raises(ValueError, match="interval"):
        guiders.weight_over_sampling(0.0, 0.7, 0.2, ramp)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"weight": float("nan")}, "weight to be a finite number"),
        ({"weight": float("inf"), "ramp": "linear rise"}, "weight to be a finite number"),
        ({"start_percent": 0.7, "end_percent": 0.2}, "'mine': .* interval"),
        ({"start_percent": 0.7, "end_percent": 0.2, "ramp": "linear fall"}, "'mine': .* interval"),
        ({"ramp": "exponential"}, "ramp to be one of constant, linear rise"),
    ],
)
def test_unusable_terms_are_refused_by_name(guiders, tiny, inputs, words):
    with pytest.raises(ValueError, match=words) as problem:
        term = guiders.GuidanceTerm.execute(**{"name": "mine", "weight": 1.0, **inputs}).result[0]
        guiders.MultiGuidanceGuider.execute(tiny.prior(), tiny.conditioning(1), term)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ([], "at least one Guidance Term"),
        ([{"name": "a", "reference": "a"}], "refers to itself"),
        ([{"name": "a", "reference": "b"}], "none of: base, a"),
        ([{"name": "a", "reference": "b"}, {"name": "b", "reference": "a"}], "cycle"),
        ([{"name": "a"}, {"name": "a"}], "twice"),
        ([{"name": " "}], "name"),
    ],
)
def test_chains_that_do_not_fit_are_refused(guiders, tiny, terms, words):
    chain = None
    with pytest.raises(ValueError, match=words) as problem:
        for term in terms:
            chain = guiders.GuidanceTerm.execute(weight=1.0, terms=chain, **term).result[0]
        guiders.MultiGuidanceGuider.execute(tiny.prior(), tiny.conditioning(1), chain)
    assert "\n" not in str(problem.value)


def test_terms_and_in_domain_guider_are_the_same_in_sampler_custom_advanced(comfyui, guiders, tiny):
    prior, domain, positive, negative = tiny.prior(0), tiny.prior(1), tiny.conditioning(1), tiny.conditioning(2)
    first = guiders.GuidanceTerm.execute("domain", 1.5, 0.0, 0.6, model=domain).result[0]
    both = guiders.GuidanceTerm.execute("control", 2.0, conditioning=positive, terms=first).result[0]
    assert [term.name for term in both] == ["domain", "control"] and len(first) == 1
    custom = comfyui.nodes_custom_sampler
    results = []
    for guider in (
        guiders.MultiGuidanceGuider.execute(prior, negative, both).result[0],
        execute(guiders.InDomainGuider, prior, domain, positive, negative, 1.5, 2.0, 0.0, 0.6).result[0],
    ):
        noise = custom.Noise_RandomNoise(7)
        sigmas = comfyui.samplers.calculate_sigmas(prior.get_model_object("model_sampling"), "normal", 4)
        sampler = comfyui.samplers.sampler_object("euler")
        results.append(
            custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, tiny.latent()).result[0]["samples"]
        )
    assert torch.equal(*results)
    node = execute(
        guiders.InDomainSampler,
        prior,
        domain,
        positive,
        negative,
        tiny.latent(),
        7,
        4,
        "euler",
        "normal",
        1.5,
        2.0,
        1.0,
        0.0,
        0.6,
    )
    assert torch.equal(node.result[0]["samples"], results[0])


def test_sampler_reports_its_cost(guiders, tiny, caplog):
    prior, domain, positive, negative = tiny.prior(0), tiny.prior(1), tiny.conditioning(1), tiny.conditioning(2)

    def run(*weights, interval=(0.0, 1.0)):
        return execute(
            guiders.InDomainSampler,
            prior,
            domain,
            positive,
            negative,
            tiny.latent(),
            1,
            4,
            "euler",
            "sgm_uniform",
            *weights,
            1.0,
            *interval,
        ).ui

    with caplog.at_level("INFO"):
        assert run(2.5, 2.5) == {"samples_per_step": [{"value": 3.0}]}
    assert caplog.text.count("samples per step") == 1
    assert "4 steps, 3.00 samples per step (base 4, domain 4, control 4)" in caplog.text
    assert run(2.5, 2.5, interval=(0.5, 1.0)) == {"samples_per_step": [{"value": 2.5}]}
    assert run(0.0, 2.5) == {"samples_per_step": [{"value": 2.0}]}
    assert run(0.0, 1.0) == {"samples_per_step": [{"value": 1.0}]}
    assert run(2.0, 0.0) == {"samples_per_step": [{"value": 2.0}]}


def test_preview_and_progress(comfyui, guiders, tiny, monkeypatch):
    updates = []

    class Bar:
        def __init__(self, total, node_id=None):
            updates.append(("total", total))

        def update_absolute(self, value, total=None, preview=None):
            updates.append((value, total, preview))

    monkeypatch.setattr(comfyui.utils, "ProgressBar", Bar)
    monkeypatch.setattr(
        comfyui.latent_preview.args, "preview_method", comfyui.latent_preview.LatentPreviewMethod.Latent2RGB
    )
    execute(
        guiders.InDomainSampler,
        tiny.prior(0),
        tiny.prior(1),
        tiny.conditioning(1),
        tiny.conditioning(2),
        tiny.latent(),
        1,
        3,
        "euler",
        "normal",
        1.0,
        1.0,
    )
    assert updates[0] == ("total", 3)
    assert [update[:2] for update in updates[1:]] == [(1, 3), (2, 3), (3, 3)]
    assert all(update[2][0] == "JPEG" and update[2][1].size == (8, 8) for update in updates[1:])


@pytest.mark.parametrize("inputs", [{"sampler_name": "eulr"}, {"scheduler": "nrmal"}])
def test_unknown_samplers_and_schedulers_are_refused(guiders, tiny, inputs):
    # 0.3.75 does not check the lists of V3 nodes, and core's KSampler would silently take another sampler.
    with pytest.raises(ValueError, match="eulr|nrmal"):
        execute(
            guiders.InDomainSampler,
            tiny.prior(0),
            tiny.prior(1),
            tiny.conditioning(1),
            tiny.conditioning(2),
            tiny.latent(),
            1,
            3,
            **{"sampler_name": "euler", "scheduler": "normal", "domain_weight": 1.0, "control_weight": 1.0, **inputs},
        )
