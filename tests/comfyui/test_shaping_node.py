"""Shape Guidance Term: its arithmetic written out, the library's own multi-guidance, chains of it, and refusals."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

SIGMA = 2.0
DOMAIN_WEIGHT, CONTROL_WEIGHT = 1.5, 2.0


def library(name: str):
    return importlib.import_module(f"indomain_guidance.guidance.{name}")


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def noisy(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * 3.0


class Setting:
    """A prior, a domain model and two conditionings; the chain domain, control; what core alone predicts for each."""

    def __init__(self, guiders, tiny) -> None:
        self.guiders, self.tiny = guiders, tiny
        self.prior, self.domain = tiny.prior(0), tiny.prior(1)
        self.positive, self.negative = tiny.conditioning(1), tiny.conditioning(2)
        self.sources = {
            "base": (self.prior, self.negative),
            "domain": (self.domain, self.negative),
            "control": (self.prior, self.positive),
        }

    def chain(self, *more: dict) -> tuple:
        terms = None
        for term in (
            {"name": "domain", "weight": DOMAIN_WEIGHT, "model": self.domain},
            {"name": "control", "weight": CONTROL_WEIGHT, "conditioning": self.positive},
            *more,
        ):
            terms = self.guiders.GuidanceTerm.execute(**term, terms=terms).result[0]
        return terms

    def shape(self, terms=None, term: str = "domain", **widgets) -> tuple:
        terms = self.chain() if terms is None else terms
        return self.guiders.ShapeGuidanceTerm.execute(terms=terms, term=term, **widgets).result[0]

    def guider(self, terms):
        return self.guiders.MultiGuidanceGuider.execute(self.prior, self.negative, terms).result[0]

    def predict(self, terms, x: torch.Tensor) -> torch.Tensor:
        return self.tiny.predict(self.guider(terms), x, SIGMA)

    def directions(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(D_u, D_domain - D_u, D_control - D_u) from core alone."""
        u, d, c = (self.tiny.denoised(*self.sources[name], x, SIGMA) for name in ("base", "domain", "control"))
        return u, d - u, c - u

    def callables(self):
        """The same predictions as the library wants them: model(x, sigma), by name."""

        def model(name: str):
            return lambda x, sigma: self.tiny.denoised(*self.sources[name], x, float(sigma.flatten()[0]))

        return {name: model(name) for name in self.sources}


@pytest.fixture
def setting(guiders, tiny) -> Setting:
    return Setting(guiders, tiny)


# ---------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("per", ["image", "position"])
def test_an_orthogonal_domain_term_has_no_component_along_the_control(setting, per):
    x = noisy(1)
    result = setting.predict(setting.shape(mode="orthogonal", per=per), x)
    u, d, c = setting.directions(x)
    over = (1, 2, 3) if per == "image" else (1,)
    along = (d * c).sum(over, keepdim=True) / (c * c).sum(over, keepdim=True) * c
    assert relative(result, u + DOMAIN_WEIGHT * (d - along) + CONTROL_WEIGHT * c) < 1e-5
    added = (result - u - CONTROL_WEIGHT * c) / DOMAIN_WEIGHT
    sizes = [value.square().sum(over).sqrt() for value in (added, c)]
    assert float(((added * c).sum(over).abs() / (sizes[0] * sizes[1])).max()) < 1e-3
    assert float((d - added).abs().max()) > 1e-2, "the two directions must have had something in common"


@pytest.mark.parametrize(("mode", "width"), [("frequencies", 1.0), ("frequencies", 3.0), ("mean", 1.0)])
def test_the_two_bands_have_their_own_strengths(setting, mode, width):
    x = noisy(2)
    terms = setting.shape(mode=mode, width=width, low_strength=0.25, high_strength=2.0)
    u, d, c = setting.directions(x)
    low = d.mean((2, 3), keepdim=True) if mode == "mean" else library("frequency").Bands(width, 1.0, 0.0)(d, ())
    expected = u + DOMAIN_WEIGHT * (0.25 * low + 2.0 * (d - low)) + CONTROL_WEIGHT * c
    guider = setting.guider(terms)
    assert relative(setting.tiny.predict(guider, x, SIGMA), expected) < 1e-5
    assert relative(setting.predict(setting.chain(), x), expected) > 1e-2
    # One evaluation of each model, and the weights that methods made for CFG see are those of the terms.
    assert guider.evaluations == {"base": 1, "domain": 1, "control": 1}
    assert guider.cfg == DOMAIN_WEIGHT + CONTROL_WEIGHT


@pytest.mark.parametrize(
    "neutral",
    [
        {"mode": "orthogonal", "share": 0.0},
        {"mode": "frequencies", "low_strength": 1.0, "high_strength": 1.0},
        {"mode": "mean", "low_strength": 1.0, "high_strength": 1.0},
    ],
)
def test_neutral_values_change_no_bit(setting, neutral):
    terms = setting.chain()
    assert setting.shape(terms, **neutral) == terms
    plain, shaped = (setting.tiny.sample(setting.guider(chain)) for chain in (terms, setting.shape(terms, **neutral)))
    assert torch.equal(plain, shaped)
    # Nor do neutral values take a shaping away.
    once = setting.shape(terms)
    assert setting.shape(once, **neutral) == once != terms


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_equal_strengths_are_a_weight(setting, strength):
    x = noisy(3)
    u, d, c = setting.directions(x)
    shaped = setting.predict(setting.shape(low_strength=strength, high_strength=strength), x)
    assert relative(shaped, u + strength * DOMAIN_WEIGHT * d + CONTROL_WEIGHT * c) < 1e-5


def test_two_terms_of_one_model_are_two_bands_with_intervals_of_their_own(setting):
    terms = setting.shape(term="", terms=setting.chain()[:1], low_strength=0.0)
    terms = setting.guiders.GuidanceTerm.execute("coarse", 0.5, 0.5, 1.0, model=setting.domain, terms=terms).result[0]
    guider = setting.guider(setting.shape(terms, "coarse", low_strength=1.0, high_strength=0.0))
    setting.tiny.sample(guider, steps=4)
    assert guider.evaluations == {"base": 4, "domain and coarse": 4}


# ----------------------------------------------------------------------------------------------------- as the library's

SHAPINGS = {
    "orthogonal": (
        {"mode": "orthogonal", "share": 0.75, "only_opposing": True, "per": "image"},
        lambda: [(1.0, library("orthogonal").Orthogonal("control", 0.75, True, "image"))],
    ),
    "per position": (
        {"mode": "orthogonal"},
        lambda: [(1.0, library("orthogonal").Orthogonal(("control",), per="position"))],
    ),
    "frequencies": (
        {"mode": "frequencies", "width": 1.5, "low_strength": 0.3, "high_strength": 1.2},
        lambda: [(0.3, library("frequency").Bands(1.5, 1.0, 0.0)), (1.2, library("frequency").Bands(1.5, 0.0, 1.0))],
    ),
    "mean": ({"mode": "mean", "low_strength": 0.0}, lambda: [(1.0, library("frequency").Bands(math.inf, 0.0, 1.0))]),
}


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("name", SHAPINGS)
def test_sampling_equals_the_librarys_own(comfyui, setting, name, sampler):
    widgets, shapings = SHAPINGS[name]
    model, (combination, terms, sampling) = setting.callables(), map(library, ("combination", "terms", "sampling"))
    guided = library("multi_guidance").MultiGuidance(
        combination.Guidance(
            terms.Source(model["base"]),
            [
                *(
                    terms.Term(f"domain {i}", model["domain"], None, DOMAIN_WEIGHT * strength, shaping=shaping)
                    for i, (strength, shaping) in enumerate(shapings())
                ),
                terms.Term("control", model["control"], None, CONTROL_WEIGHT),
            ],
        )
    )
    # Below the model's highest noise level, from where core would scale the noise in its own way.
    sigmas = torch.tensor([9.0, 3.0, 1.0, 0.3, 0.0])
    noise = noisy(4) / 3.0
    expected = sampling.sample(guided, noise, sigmas, sampler)
    guider = setting.guider(setting.shape(**widgets))
    result = guider.sample(
        noise, torch.zeros_like(noise), comfyui.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=0
    )
    expected = guider.model_patcher.model.process_latent_out(expected)
    assert relative(result, expected) < 1e-4
    assert guider.samples_per_step == 3.0 and guided.samples_per_step == [3.0] * 4


# -------------------------------------------------------------------------------------------------------------- chains


def test_only_the_named_term_changes_and_the_chain_before_stays(setting):
    terms = setting.chain()
    shaped = setting.shape(terms, "domain")
    assert [term.name for term in shaped] == ["domain", "control"] and shaped[1] is terms[1]
    assert terms[0].shaping is None and shaped[0].shaping is not None
    assert [term.shaping is None for term in setting.shape(terms, "")] == [True, False]
    # References to a shaped term mean its prediction, which no shaping changes.
    chain = setting.chain({"name": "third", "weight": 0.5, "reference": "domain", "model": setting.prior})
    x = noisy(5)
    u, d, c = setting.directions(x)
    expected = u + CONTROL_WEIGHT * c + 0.5 * -d
    result = setting.predict(setting.shape(chain, low_strength=0.0, high_strength=0.0), x)
    assert relative(result, expected) < 1e-5


def test_a_term_may_be_made_orthogonal_to_one_that_comes_later(setting):
    x = noisy(6)
    first = setting.shape(setting.chain()[:1], "domain", mode="orthogonal")
    later = setting.guiders.GuidanceTerm.execute(
        "control", CONTROL_WEIGHT, conditioning=setting.positive, terms=first
    ).result[0]
    assert torch.equal(setting.predict(later, x), setting.predict(setting.shape(mode="orthogonal"), x))


def test_shaping_again_adds_to_what_was_done_before(setting):
    x = noisy(7)
    u, d, c = setting.directions(x)
    project, low = (
        library("orthogonal").Orthogonal("control", per="position"),
        library("frequency").Bands(1.0, 1.0, 0.0),
    )
    orthogonal, coarse = {"mode": "orthogonal"}, {"low_strength": 1.0, "high_strength": 0.0}
    for order, expected in (
        ((orthogonal, coarse), low(project(d, [c]), ())),
        ((coarse, orthogonal), project(low(d, ()), [c])),
    ):
        terms = setting.chain()
        for widgets in order:
            terms = setting.shape(terms, **widgets)
        assert relative(setting.predict(terms, x), u + DOMAIN_WEIGHT * expected + CONTROL_WEIGHT * c) < 1e-5
    thrice = setting.shape(terms, mode="mean", low_strength=0.0)
    assert thrice[0].shaping.others == ("control",)


def test_spaces_around_names_do_not_matter(setting):
    x = noisy(8)
    spaced = setting.shape(term=" domain ", mode="orthogonal", orthogonal_to=" control , ")
    assert torch.equal(setting.predict(spaced, x), setting.predict(setting.shape(mode="orthogonal"), x))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("term", "widgets", "words"),
    [
        ("nobody", {}, r"terms so far \(domain, control\), got 'nobody'"),
        ("domain", {"mode": "sideways"}, "mode to be one of frequencies, mean, orthogonal.*, found 'sideways'"),
        ("domain", {"mode": "orthogonal", "orthogonal_to": " , "}, "Term 'domain': .* at least one term"),
        ("domain", {"mode": "orthogonal", "orthogonal_to": "control,control"}, "'control' twice"),
        *(
            ("domain", {"mode": "orthogonal", "orthogonal_to": name}, f"by '{name}', which is no other term: control")
            for name in ("style", "domain", "base")
        ),
        ("domain", {"mode": "orthogonal", "share": float("nan")}, "share to be a finite number"),
        ("domain", {"mode": "orthogonal", "per": "row"}, "per to be one of image, position"),
        ("domain", {"width": 0.0}, "width to be a finite number from"),
        ("domain", {"width": float("nan")}, "width to be a finite number from"),
        ("domain", {"low_strength": float("nan")}, "low_strength to be a finite number"),
        ("domain", {"mode": "mean", "high_strength": float("inf")}, "high_strength to be a finite number"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(setting, term, widgets, words):
    with pytest.raises(ValueError, match=words) as problem:
        setting.guider(setting.shape(term=term, **widgets))
    assert "\n" not in str(problem.value) and ". " not in str(problem.value)


def test_chains_that_cannot_be_shaped_are_refused(setting):
    for empty, words in (((), "at least one Guidance Term"), (None, "expected terms to be terms of Guidance Term")):
        with pytest.raises(ValueError, match=words):
            setting.guiders.ShapeGuidanceTerm.execute(terms=empty)
    twice = setting.chain({"name": "domain", "weight": 1.0})
    with pytest.raises(ValueError, match="'domain' twice among domain, control, domain"):
        setting.shape(twice, "domain")
    chain = setting.chain({"name": "style", "weight": 1.0, "model": setting.prior})
    once = setting.shape(chain, mode="orthogonal")
    with pytest.raises(ValueError, match="orthogonal to, got control and then style; name them all in one"):
        setting.shape(once, mode="orthogonal", orthogonal_to="style")
