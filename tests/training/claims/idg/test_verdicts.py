"""The claims' logic on made-up points whose verdicts are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from indomain_guidance.training.claims import deciding
from indomain_guidance.training.claims.idg import verdicts
from indomain_guidance.training.claims.idg.models import ModelSpec
from indomain_guidance.training.claims.idg.points import Point, Row, Sampling
from indomain_guidance.training.claims.idg.sweep import PLANS, SCHEDULES, Plan, cheap_schedule

CEILINGS = {"handwriting": 300.0, "handwriting_foreign": 300.0, "narrow": 300.0, "narrow_foreign": 300.0}
FLOORS = {
    name: {"floor_uncorrected": 1.5, "autoencoder_floor_uncorrected": 0.1, "ceiling": ceiling}
    for name, ceiling in CEILINGS.items()
}
DOMAIN = ModelSpec("domain", "handwriting", 1000)
SHIPPED = ModelSpec("shipped", "handwriting")
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


def evidence(*rows: Row, domain: str = "handwriting", seed: int = 0, **more) -> verdicts.Evidence:
    return verdicts.Evidence(rows, domain, CEILINGS, seed, **more)


def plan_of(*rows: Row, coarse: bool = False) -> Plan:
    return Plan("full", Sampling(2000), tuple(row.point for row in rows), coarse=coarse)


def named(found: list[verdicts.Verdict], name: str) -> verdicts.Verdict:
    (verdict,) = [one for one in found if one.name == name]
    return verdict


def prior() -> list[Row]:
    return [
        row("handwriting", "prior", 200.0, 0.98),
        row("handwriting", "prior", 180.0, 0.90),
        row("handwriting_foreign", "prior", 200.0, 0.99),
    ]


def guided(distance: float, share: float, question: str = "handwriting", model: ModelSpec = DOMAIN, **more) -> Row:
    return row(question, "multi_guidance", distance, share, model, **({"w_d": 1.0, "w_c": distance} | more))


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


def test_a_says_where_it_is_worst():
    verdict = verdicts.claim_a(evidence(guided(20, 0.6), guided(60, 0.95), tuned(40, 0.6), tuned(50, 0.8)))
    where = verdict.details["worst at a digit accuracy of"]
    assert where.startswith("80.0%, 60.0 (multi_guidance [handwriting-domain") and "against 50.0 (fine_tune [" in where


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
    longer = replace(TUNED, steps=1000)
    opposed = [
        [tuned(50, 0.9, scale=2.0, model=model), tuned(100, 0.8, "fine_tune_prior_u", scale=2.0, model=model)]
        for model in (other, longer)
    ]
    # Adapters and full fine-tunes are decided apart: they need not agree.
    apart = evidence(*rows, *opposed[0])
    assert (verdicts.claim_c(apart).outcome, verdicts.claim_c(apart, kind="low_rank").outcome) == (
        "confirmed",
        "refuted",
    )
    both = verdicts.claim_c(evidence(*rows, *opposed[1]))
    assert both.details[str(longer)].startswith("-0.22 (") and both.claim == "c, full fine-tunes"
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
    assert only_cheap.outcome == "confirmed" and only_cheap.value is None
    assert only_cheap.words == "only the schedules reach it"
    only_constant = verdicts.claim_e(
        evidence(
            *prior(),
            guided(60, 0.96),
            row("handwriting", "scheduled", 5, 0.5, DOMAIN, cost=2.0, **cheap_schedule(*SCHEDULES[0])),
        ),
        True,
    )
    assert only_constant.outcome == "refuted" and only_constant.words == "only constant weights reach it"
    # Constant weights of a model without schedules, as other training lengths are, say nothing about schedules.
    longer = guided(10, 0.99, model=ModelSpec("domain", "handwriting", 300))
    assert verdicts.claim_e(evidence(*rows, longer, cheap(55, 2.0)), True).outcome == "confirmed"


def test_d_and_e_take_a_point_of_exactly_the_share_asked_for():
    exact = guided(160, 0.9, "handwriting_foreign", colours=0.8)
    found = verdicts.claim_d(evidence(*prior(), exact))
    assert found.value == pytest.approx(0.8)
    cheap = row("handwriting_foreign", "scheduled", 200, 0.8, DOMAIN, cost=2.0, **cheap_schedule(*SCHEDULES[0]))
    found = verdicts.claim_e(evidence(*prior(), exact, cheap), False)
    assert found.value == pytest.approx(200 / 160) and not found.words


def test_every_claim_is_undecided_without_points_and_both_domains_are_asked():
    found = verdicts.all_verdicts([], {}, PLANS["full"]())
    assert {verdict.outcome for verdict in found} == {"undecided"}
    names = [verdict.name for verdict in found]
    assert len(set(names)) == len(names) == 30
    assert {f"{domain}/{claim}" for domain in ("handwriting", "narrow") for claim in "abde"} <= set(names)
    assert {f"narrow/c, {kind} fine-tunes" for kind in ("full", "LoRA")} <= set(names)
    assert {f"{domain}/{claim}/shipped" for domain in ("handwriting", "narrow") for claim in "abde"} <= set(names)


def test_while_points_are_missing_nothing_is_settled_that_they_could_turn():
    """Made-up sweeps of which one kind of point is missing at a time."""
    ours, rival = guided(20, 0.95), tuned(40, 0.95)
    more_of_ours, other_rival = guided(30, 0.6), tuned(10, 0.6, model=ModelSpec("low_rank", "handwriting", 300))

    def a(rows: list[Row], missing: list[Row], **more) -> str:
        found = verdicts.claim_a(evidence(*rows, points=[row.point for row in rows + missing], **more))
        assert found.measured == len(rows) and found.planned == len(rows + missing)
        return found.outcome

    assert a([ours, rival], []) == "confirmed"
    assert a([ours, rival], [other_rival]) == "confirmed so far"
    assert a([ours, rival], [], coarse=True) == "confirmed so far"
    # One nearer fine-tune refutes "every fine-tune"; only points of ours could turn that.
    assert a([ours, rival, tuned(10, 0.9)], [other_rival]) == "refuted"
    assert a([ours, rival, tuned(10, 0.9)], [more_of_ours]) == "refuted so far"
    # Points of other questions, seeds and kinds of domain models are not waited for.
    others = [
        guided(1, 1.0, "handwriting_foreign"),
        guided(1, 1.0, model=SHIPPED),
        tuned(1, 1.0, model=ModelSpec("full", "handwriting", 300, seed=1)),
    ]
    points = [one.point for one in (ours, rival, *others)]
    assert verdicts.claim_a(evidence(ours, rival, points=points)).outcome == "confirmed"

    # More of ours could only strengthen (b); another scale of the prior could lower what it is held against.
    rows = [*prior(), guided(85, 0.96)]
    for missing, outcome in ((more_of_ours, "confirmed"), (row("handwriting", "prior", 9.0, 0.9), "confirmed so far")):
        points = [one.point for one in (*rows, missing)]
        assert verdicts.claim_b(evidence(*rows, points=points)).outcome == outcome


def test_a_stopped_sweep_confirms_nothing_about_every_fine_tune():
    """The real plan's first points, all in favour of (a): the verdict stays open until the last fine-tune."""
    plan = PLANS["full"]()
    first = [
        row(p.question, p.method, 20.0 if p.method == "multi_guidance" else 90.0, 0.9, p.model, **p.values)
        for p in plan.points[:25]
    ]
    verdict = named(verdicts.all_verdicts(first, FLOORS, plan), "handwriting/a")
    assert verdict.outcome == "confirmed so far" and verdict.value < 1
    assert verdict.measured < 25 and verdict.planned > 100
    quick = PLANS["quick"]()
    rows = [
        row(p.question, p.method, 20.0 if p.method == "multi_guidance" else 90.0, 0.9, p.model, **p.values)
        for p in quick.points
    ]
    verdict = named(verdicts.all_verdicts(rows, FLOORS, quick), "handwriting/a")
    assert verdict.outcome == "confirmed so far" and verdict.measured == verdict.planned


@pytest.mark.parametrize(
    "change", [{"floor_uncorrected": 16.0}, {"ceiling": 29.0}, {"autoencoder_floor_uncorrected": 9.1}]
)
def test_an_invalid_question_decides_nothing(change):
    """Limits: ceiling / floor of 20, and 5 % of the prior's 180."""
    foreign = guided(60, 0.9, "handwriting_foreign")
    rows = [*prior(), guided(60, 0.96), tuned(90, 0.96), foreign]
    floors = FLOORS | {"handwriting": FLOORS["handwriting"] | change}
    found = verdicts.all_verdicts(rows, floors, plan_of(*rows))
    for claim in "ab":
        verdict = named(found, f"handwriting/{claim}")
        assert verdict.outcome == "undecided" and "not valid" in verdict.details["reason"]
        assert verdict.value is not None  # the number stays
        valid = named(verdicts.all_verdicts(rows, FLOORS, plan_of(*rows)), verdict.name)
        assert valid.outcome == "confirmed"
    assert named(found, "handwriting/d").outcome == "confirmed"  # its own question's floors are fine
    unknown = verdicts.validities(rows[3:], FLOORS)["handwriting"]
    assert unknown.autoencoder is None and not unknown.holds


def test_the_shipped_models_decide_nothing_but_their_own_rows():
    rows = [*prior(), guided(90, 0.96), guided(10, 0.99, model=SHIPPED), tuned(50, 0.96)]
    found = verdicts.all_verdicts(rows, FLOORS, plan_of(*rows))
    trained, shipped = named(found, "handwriting/a"), named(found, "handwriting/a/shipped")
    assert trained.outcome == "refuted" and trained.value == pytest.approx(90 / 50)
    assert shipped.outcome == "confirmed" and shipped.value == pytest.approx(10 / 50)
    assert named(found, "handwriting/b").value == pytest.approx(90 / 180)
    assert named(found, "handwriting/b/shipped").value == pytest.approx(10 / 180)


def test_training_seeds_are_compared_at_the_points_that_all_of_them_have():
    def point(distance: float, seed: int, w_c: float) -> Row:
        return guided(distance, 0.97, model=ModelSpec("domain", "handwriting", 1000, seed=seed), w_c=w_c)

    # Seed 0 has its best point at a weight that seed 1 was never measured at, and the shipped model is nearer still.
    rows = [*prior(), point(45, 0, 5.0), point(90, 0, 3.0), point(72, 1, 3.0), guided(10, 0.99, model=SHIPPED)]
    verdict = named(verdicts.all_verdicts(rows, FLOORS, plan_of(*rows)), "handwriting/b")
    assert verdict.value == pytest.approx(45 / 180)
    at = "at the 1 points of every seed"
    assert verdict.details[f"training seed 0, {at}"] == pytest.approx(90 / 180)
    assert verdict.details[f"training seed 1, {at}"] == pytest.approx(72 / 180)
    alone = named(verdicts.all_verdicts(rows[:-2], FLOORS, plan_of(*rows)), "handwriting/b")
    assert not any("training seed" in name for name in alone.details)


def test_numbers_in_words():
    assert [deciding.shown(value) for value in (None, math.inf, 0.12345)] == [
        "not measured",
        "no point qualifies",
        "0.123",
    ]
    decision = deciding.Decision("s", "ratio", math.inf, 0.4871, math.inf, 0.5, "lower", "undecided")
    assert deciding.shown_interval(decision) == "no point qualifies (0.487 to none)"
    assert deciding.shown_interval(replace(decision, low=math.inf)) == "no point qualifies"


def test_an_interval_on_the_other_side_than_its_value_decides_nothing():
    """Replicates of a maximum overstate it."""
    draws = torch.linspace(1.01, 1.3, REPLICATES).double()
    outcome = {
        value: deciding.decide(torch.cat([torch.tensor([value]).double(), draws]), 1.0, "lower")[3]
        for value in (0.99, 1.02)
    }
    assert outcome == {0.99: "undecided", 1.02: "refuted"}
