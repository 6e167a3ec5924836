"""The claims' logic on made-up points whose verdicts are known."""

from __future__ import annotations

import math

import pytest
import torch
from indomain_guidance.training.mini_world.claims import verdicts
from indomain_guidance.training.mini_world.claims.models import ModelSpec
from indomain_guidance.training.mini_world.claims.points import Point, Row, Sampling
from indomain_guidance.training.mini_world.claims.sweep import SCHEDULES, cheap_schedule

CEILINGS = {"handwriting": 300.0, "handwriting_foreign": 300.0, "narrow": 300.0, "narrow_foreign": 300.0}
DOMAIN = ModelSpec("shipped", "handwriting")
TUNED = ModelSpec("full", "handwriting", 300, "a digit")
REPLICATES = 200


def row(
    question: str,
    method: str,
    distance: float,
    share: float,
    model: ModelSpec | None = None,
    cost: float = 3.0,
    spread: float = 0.01,
    colours: float | None = None,
    **settings,
) -> Row:
    """A point whose replicates spread evenly: +-spread of the distance, +-spread/10 of the shares."""
    point = Point.of(question, method, model, **(settings or {"scale": distance}))
    steps = torch.linspace(-1, 1, REPLICATES, dtype=torch.float64)
    colours = share if colours is None else colours
    numbers = {"distance": distance, "digit": share, "both_colours": colours, "samples_per_step": cost}
    draws = {
        "distance": distance * (1 + spread * steps),
        "digit": share + 0.1 * spread * steps,
        "both_colours": colours + 0.1 * spread * steps,
    }
    return Row(point, Sampling(2000), numbers, {}, draws)


def evidence(*rows: Row, domain: str = "handwriting", seed: int = 0) -> verdicts.Evidence:
    return verdicts.Evidence(rows, domain, CEILINGS, seed)


def prior() -> list[Row]:
    return [
        row("handwriting", "prior", 200.0, 0.98),
        row("handwriting", "prior", 180.0, 0.90),
        row("handwriting_foreign", "prior", 200.0, 0.99),
    ]


def guided(distance: float, share: float, question: str = "handwriting", **more) -> Row:
    return row(question, "multi_guidance", distance, share, DOMAIN, w_d=1.0, w_c=distance, **more)


def tuned(distance: float, share: float, method: str = "fine_tune", scale: float | None = None, **more) -> Row:
    return row(
        "handwriting",
        method,
        distance,
        share,
        more.pop("model", TUNED),
        cost=2.0,
        scale=distance if scale is None else scale,
        **more,
    )


def test_a_is_confirmed_only_when_no_accuracy_belongs_to_a_fine_tune():
    ours = [guided(20, 0.6), guided(60, 0.95)]
    verdict = verdicts.claim_a(evidence(*ours, tuned(40, 0.6), tuned(120, 0.95)))
    assert verdict.outcome == "confirmed" and verdict.value == pytest.approx(0.5)
    # One early stop that is nearer at .8 refutes it, although both ends are ours.
    verdict = verdicts.claim_a(evidence(*ours, tuned(40, 0.6), tuned(50, 0.8), tuned(120, 0.95)))
    assert verdict.outcome == "refuted" and verdict.value == pytest.approx(60 / 50)
    # Accuracies that only one of them reaches are not compared.
    assert verdicts.claim_a(evidence(*ours, tuned(70, 0.99), tuned(65, 0.7))).outcome == "confirmed"


def test_a_within_the_noise_is_undecided():
    verdict = verdicts.claim_a(evidence(guided(50, 0.9, spread=0.1), tuned(52, 0.8, spread=-0.1)))
    assert verdict.outcome == "undecided" and verdict.low < 1 < verdict.high


def test_a_counts_fine_tunes_with_either_unconditional_and_names_both():
    verdict = verdicts.claim_a(evidence(guided(50, 0.9), tuned(90, 0.9), tuned(40, 0.9, "fine_tune_prior_u")))
    assert verdict.outcome == "refuted"
    assert verdict.details["ratio against fine-tunes with the own unconditional"] == pytest.approx(50 / 90)
    assert verdict.details["ratio against fine-tunes with the prior's unconditional"] == pytest.approx(50 / 40)


def test_b_asks_for_the_accuracy_of_the_priors_best_scale():
    near_enough = verdicts.claim_b(evidence(*prior(), guided(85, 0.96), guided(20, 0.94)))
    assert near_enough.outcome == "confirmed" and near_enough.value == pytest.approx(85 / 180)
    assert near_enough.details["best point"].endswith("w_c 85, w_d 1") and near_enough.details["its distance"] == 85
    assert verdicts.claim_b(evidence(*prior(), guided(95, 0.96), guided(20, 0.94))).outcome == "refuted"
    none = verdicts.claim_b(evidence(*prior(), guided(20, 0.9)))
    assert none.outcome == "refuted" and math.isinf(none.value) and none.details["best point"] == "none qualifies"


def test_beyond_adds_our_own_methods_to_the_papers():
    rows = [
        *prior(),
        guided(95, 0.96),
        row("handwriting", "scheduled", 60, 0.97, DOMAIN, cost=2.0, **cheap_schedule(*SCHEDULES[0])),
    ]
    assert verdicts.claim_b(evidence(*rows)).outcome == "refuted"
    assert verdicts.claim_b(evidence(*rows), "beyond").outcome == "confirmed"


def test_c_compares_the_same_scales_of_the_same_model():
    rows = [tuned(100, 0.8, scale=2.0), tuned(50, 0.9, "fine_tune_prior_u", scale=2.0)]
    verdict = verdicts.claim_c(evidence(*rows))
    assert verdict.outcome == "confirmed"
    assert verdict.value == pytest.approx((250 * 0.9 - 200 * 0.8) / 300)
    # A scale that only one of them was measured at changes nothing.
    assert verdicts.claim_c(evidence(*rows, tuned(5, 0.99, scale=9.0))).value == pytest.approx(verdict.value)
    other = ModelSpec("low_rank", "handwriting", 300)
    both = verdicts.claim_c(
        evidence(
            *rows, tuned(50, 0.9, scale=2.0, model=other), tuned(100, 0.8, "fine_tune_prior_u", scale=2.0, model=other)
        )
    )
    assert both.value == pytest.approx(0.0) and both.outcome == "undecided"
    assert (both.details["better with the prior's u"], both.details["worse with the prior's u"]) == (1, 1)
    assert (
        verdicts.claim_c(
            evidence(*[tuned(50, 0.9, scale=2.0), tuned(100, 0.8, "fine_tune_prior_u", scale=2.0)])
        ).outcome
        == "refuted"
    )


def test_d_asks_for_both_colours_in_foreign_colours():
    rows = [
        *prior(),
        guided(130, 0.9, "handwriting_foreign", colours=0.85),
        guided(60, 0.9, "handwriting_foreign", colours=0.5),
    ]
    verdict = verdicts.claim_d(evidence(*rows))
    assert verdict.outcome == "confirmed" and verdict.value == pytest.approx(0.65)
    assert verdicts.claim_d(evidence(*prior(), rows[-1])).outcome == "refuted"


def test_e_takes_only_schedules_that_cost_no_more_than_cfg():
    def cheap(distance: float, cost: float) -> Row:
        return row(
            "handwriting", "scheduled", distance, 0.97, DOMAIN, cost=cost, **cheap_schedule(0.2, 0.6, distance, 4.0)
        )

    rows = [*prior(), guided(60, 0.96)]
    assert verdicts.claim_e(evidence(*rows, cheap(55, 2.0)), True).outcome == "confirmed"
    assert verdicts.claim_e(evidence(*rows, cheap(70, 2.0), cheap(10, 2.04)), True).outcome == "refuted"
    nobody = verdicts.claim_e(
        evidence(
            *prior(),
            guided(60, 0.5),
            row("handwriting", "scheduled", 5, 0.5, DOMAIN, cost=2.0, **cheap_schedule(*SCHEDULES[0])),
        ),
        True,
    )
    assert nobody.outcome == "undecided" and "neither" in nobody.details["reason"]
    only_cheap = verdicts.claim_e(evidence(*prior(), guided(60, 0.5), cheap(55, 2.0)), True)
    assert only_cheap.outcome == "confirmed" and only_cheap.value == 0.0


def test_every_claim_is_undecided_without_points_and_both_domains_are_asked():
    found = verdicts.all_verdicts([], CEILINGS)
    assert {verdict.outcome for verdict in found} == {"undecided"}
    names = [verdict.name for verdict in found]
    assert len(set(names)) == len(names) == 18
    assert {f"{domain}/{claim}" for domain in ("handwriting", "narrow") for claim in "abcde"} <= set(names)


def test_other_training_seeds_are_kept_apart_and_named():
    second = ModelSpec("domain", "handwriting", 1000, seed=1)
    rows = [*prior(), guided(85, 0.96), row("handwriting", "multi_guidance", 45, 0.97, second, w_d=1.0, w_c=1.0)]
    (verdict,) = [one for one in verdicts.all_verdicts(rows, CEILINGS) if one.name == "handwriting/b"]
    assert verdict.value == pytest.approx(85 / 180)
    assert verdict.details["training seed 1"] == pytest.approx(45 / 180)


def test_numbers_in_words():
    assert [verdicts.shown(value) for value in (None, math.inf, 0.12345)] == [
        "not measured",
        "no point qualifies",
        "0.123",
    ]
