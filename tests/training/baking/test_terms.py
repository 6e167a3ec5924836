"""The terms that settings and files name, and what is wrong with others."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, write_domain_file
from indomain_guidance.guidance.frequency import Bands
from indomain_guidance.guidance.schedules import Constant, Interval
from indomain_guidance.training.baking.terms import BakedTerm, check_not_nothing, check_terms, open_terms
from indomain_guidance.training.engine.settings import ConfigProblem
from indomain_guidance.training.prior.opening import open_prior

from .conftest import domain_of

FIRST_HALF = {"type": "interval", "value": 1, "start": 0, "end": 0.5}
LOW = {"name": "frequencies", "low_strength": 0.5}


def write(path, *terms):
    path.write_text(json.dumps({"terms": list(terms)}), encoding="utf-8")
    return str(path)


def test_a_domain_model_with_its_weight_over_noise_level(settings, base, domain):
    (term,) = open_terms(settings(), base, domain)
    assert (term.name, term.weight, term.text, term.shaping) == ("domain", Constant(1.5), None, None)
    (late,) = open_terms(settings(domain_start=0.3, domain_weight=2.0), base, domain)
    assert late.weight == Interval(Constant(2.0), 0.3, 1.0)
    assert late.facts != term.facts and term.facts == open_terms(settings(), base, domain)[0].facts


def test_the_model_that_ships_is_found_by_its_name(settings):
    (term,) = open_terms(settings(domain="mini-handwriting"), open_prior("mini_world"))
    assert term.model[1].domain_name and term.model[1].latent_format == "mini_world"


def test_a_file_of_terms(settings, base, domain, tmp_path):
    weights, metadata = domain
    metadata = dataclasses.replace(metadata, latent_format=None)
    write_domain_file(tmp_path / "model.safetensors", weights, metadata)
    file = write(
        tmp_path / "terms.json",
        {
            "name": "far",
            "model": "model.safetensors",
            "weight": {"type": "interval", "value": 1, "start": 0, "end": 0.5},
        },
        {"name": "circle", "prompt": "a circle", "weight": -0.5, "reference": "far", "shaping": LOW},
    )
    far, circle = open_terms(settings(domain="", terms=file), base)
    assert far.weight == Interval(1.0, 0.0, 0.5) and torch.equal(far.model[0]["out.2.bias"], weights["out.2.bias"])
    assert (circle.weight, circle.reference, circle.model) == (Constant(-0.5), "far", None)
    assert torch.equal(circle.text.context, base.encode_text(["a circle"]).context)
    assert isinstance(circle.shaping, Bands) and circle.shaping.low_strength == 0.5


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, "expected a list of guidance terms in the field terms"),
        ({"terms": []}, "expected a list of guidance terms in the field terms"),
        ({"terms": [1], "more": 2}, "expected a list of guidance terms in the field terms and nothing else"),
        ({"terms": [1]}, "expected terms of name and weight"),
        ({"terms": [{"name": "x"}]}, "expected terms of name and weight"),
        ({"terms": [{"name": "x", "weight": 1, "scale": 2}]}, "expected terms of name and weight"),
        ({"terms": [{"name": 3, "weight": 1}]}, "expected the name of a term as a text, found 3"),
        ({"terms": [{"name": "x", "weight": "strong"}]}, "term 'x': Expected a weight to be a number"),
        ({"terms": [{"name": "x", "weight": {"type": "loud"}}]}, "term 'x': Expected the type of a weight"),
        ({"terms": [{"name": "x", "weight": 1, "shaping": {"name": "loud"}}]}, "term 'x': Expected a shaping of"),
        ({"terms": [{"name": "x", "weight": 1, "shaping": 3}]}, "term 'x': expected a shaping as its name and options"),
        ({"terms": [{"name": "x", "weight": 1, "shaping": "mean"}]}, "term 'x': expected a shaping as its name"),
        ({"terms": [{"name": "x", "weight": 1, "shaping": {"name": ["mean"]}}]}, "term 'x': expected a shaping as"),
        ({"terms": [{"name": "x", "weight": 1, "shaping": {"name": "mean", "loud": 1}}]}, "term 'x': Expected options"),
        ({"terms": [{"name": "", "weight": 1}]}, "expected the name of a term as a text, found ''"),
        ({"terms": [{"name": "x", "weight": 1, "prompt": []}]}, r"expected the prompt of a term as a text, found \[\]"),
        ({"terms": [{"name": "x", "weight": {"type": "interval", "value": 1}}]}, "term 'x': Expected the fields of"),
        ({"terms": [{"name": "x", "weight": float("nan")}]}, "found a mistake: NaN, which is no number in JSON"),
        ({"terms": [{"name": "x", "weight": 1, "prompt": "unseen"}]}, "term 'x': .*prompts that were encoded"),
        ({"terms": [{"name": "x", "weight": 1, "model": "none.safetensors"}]}, "none.safetensors"),
    ],
)
def test_files_that_name_no_terms(content, words, settings, base, tmp_path):
    (tmp_path / "terms.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(FileProblem, match=words):
        open_terms(settings(domain="", terms=str(tmp_path / "terms.json")), base)


@pytest.mark.parametrize(
    "written", ["name = 'x'", "[[terms]]\nname = 'x'\nweight = nan", "terms = 3", "[[terms]]\nname="]
)
def test_toml_that_names_no_terms(written, settings, base, tmp_path):
    (tmp_path / "terms.toml").write_text(written, encoding="utf-8")
    with pytest.raises(FileProblem, match=r"terms\.toml: "):
        open_terms(settings(domain="", terms=str(tmp_path / "terms.toml")), base)


@pytest.mark.parametrize("name", ["gone.json", "folder.json", "terms.yaml"])
def test_what_is_no_file_of_terms(name, settings, base, tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(FileProblem, match=name):
        open_terms(settings(domain="", terms=str(tmp_path / name)), base)


def test_weights_of_zero_are_nothing(settings, base, domain):
    zero = [Constant(0), Interval(0.0, 0.2, 1.0), Interval(Constant(0), 0.0, 0.5)]
    for config, weights in ((settings(), zero), (settings(domain="", target="guided", control_weight=1), [])):
        with pytest.raises(ConfigProblem, match="bake"):
            check_not_nothing(config, [BakedTerm("x", weight, domain) for weight in weights], ["a circle"])
    for weight in (Constant(0.1), Interval(0.0, 0.0, 0.5, outside=1.0)):
        check_not_nothing(settings(), [BakedTerm("x", weight, domain), BakedTerm("y", zero[0], domain)], [])
    check_not_nothing(settings(target="guided"), [BakedTerm("x", zero[0], domain)], ["a circle"])


def test_terms_that_need_the_prompt_are_refused(settings, base, tmp_path):
    for term in (
        {"name": "control", "weight": 1},
        {"name": "x", "weight": 1, "reference": "control"},
        {"name": "x", "weight": 1, "shaping": {"name": "orthogonal", "orthogonal_to": "control"}},
    ):
        file = write(tmp_path / "terms.json", term)
        with pytest.raises(ConfigProblem, match="terms: expected terms that need no prompt, found"):
            open_terms(settings(domain="", terms=file), base)
    check_terms([BakedTerm("domain", Constant(1.0), domain_of(base))])


def test_a_model_of_other_channels_is_refused(settings, base, domain):
    weights, metadata = domain
    wide = dataclasses.replace(metadata, config=dataclasses.replace(metadata.config, in_channels=9))
    with pytest.raises(FileProblem, match="expected a model of 4 input and 4 output channels, .* found 9 and 4"):
        open_terms(settings(), base, (weights, wide))
