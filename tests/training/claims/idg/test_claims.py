"""The claims' logic on made-up points whose verdicts are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from indomain_guidance.training.claims.comparing import validity
from indomain_guidance.training.claims.deciding import Verdict, decide
from indomain_guidance.training.claims.idg import claims
from indomain_guidance.training.claims.idg.sweep import CHEAP, PLANS, cheap_schedule
from indomain_guidance.training.claims.keeping import Row
from indomain_guidance.training.claims.points import ModelSpec, Point
from indomain_guidance.training.claims.study import Plan, Sampling

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
    return Row(point, numbers, draws)


def verdicts_of(rows, floors=None, plan: Plan | None = None) -> list[Verdict]:
    """All claims, of a sweep that plans nothing but these rows unless it is given."""
    plan, floors = plan or plan_of(*rows), FLOORS if floors is None else floors
    return [decide(claim, rows, plan.points, plan.coarse) for claim in claims.claims(floors, rows)]


def decided(name: str, *rows: Row, points: list[Point] | None = None, coarse: bool = False) -> Verdict:
    """One claim of coloured handwriting, whether or not its questions are valid."""
    (claim,) = (claim for claim in claims.claims(FLOORS, rows) if claim.name == name)
    points = [row.point for row in rows] if points is None else points
    return decide(replace(claim, invalid=""), rows, points, coarse)


def plan_of(*rows: Row, coarse: bool = False) -> Plan:
    return Plan(Sampling(2000), tuple(row.point for row in rows), coarse=coarse)


def named(found: list[Verdict], name: str) -> Verdict:
    (verdict,) = [verdict for verdict in found if verdict.claim.name == name]
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
    verdict = decided("handwriting/a", *ours, tuned(40, 0.6), tuned(120, 0.95))
    assert verdict.outcome == "confirmed" and verdict.value == pytest.approx(0.5)
    # One early stop that is nearer at .8 refutes it, although both ends are ours.
    verdict = decided("handwriting/a", *ours, tuned(40, 0.6), tuned(50, 0.8), tuned(120, 0.95))
    assert verdict.outcome == "refuted" and verdict.value == pytest.approx(60 / 50)
    # Accuracies that only one of them reaches are not compared.
    assert decided("handwriting/a", *ours, tuned(70, 0.99), tuned(65, 0.7)).outcome == "confirmed"


def test_a_within_the_noise_is_undecided():
    verdict = decided("handwriting/a", guided(50, 0.9, spread=0.1), tuned(52, 0.8, spread=-0.1))
    assert verdict.outcome == "undecided" and verdict.low < 1 < verdict.high


def test_a_says_where_it_is_worst():
    verdict = decided("handwriting/a", guided(20, 0.6), guided(60, 0.95), tuned(40, 0.6), tuned(50, 0.8))
    where = verdict.details["worst at an accuracy of"]
    assert where.startswith("80.0%, 60.0 (multi_guidance [handwriting-domain") and "against 50.0 (fine_tune [" in where


def test_a_counts_fine_tunes_with_either_unconditional():
    verdict = decided("handwriting/a", guided(50, 0.9), tuned(90, 0.9), tuned(40, 0.9, "fine_tune_prior_u"))
    assert verdict.outcome == "refuted" and verdict.value == pytest.approx(50 / 40)


def test_b_asks_for_the_accuracy_of_the_priors_best_scale():
    near_enough = decided("handwriting/b", *prior(), guided(85, 0.96), guided(20, 0.94))
    assert near_enough.outcome == "confirmed" and near_enough.value == pytest.approx(85 / 180)
    assert near_enough.details["best point"].endswith("w_c 85, w_d 1") and near_enough.details["its distance"] == 85
    assert decided("handwriting/b", *prior(), guided(95, 0.96), guided(20, 0.94)).outcome == "refuted"
    none = decided("handwriting/b", *prior(), guided(20, 0.9))
    assert none.outcome == "refuted" and math.isinf(none.value) and none.details["best point"] == "none qualifies"


def test_beyond_adds_our_own_methods_to_the_papers():
    rows = [*prior(), guided(95, 0.96), row("handwriting", "scheduled", 60, 0.97, DOMAIN, cost=2.0, **CHEAP[0])]
    assert decided("handwriting/b", *rows).outcome == "refuted"
    assert decided("handwriting/b/beyond", *rows).outcome == "confirmed"


def test_c_compares_the_same_scales_of_the_same_model():
    rows = [tuned(100, 0.8, scale=2.0), tuned(50, 0.9, "fine_tune_prior_u", scale=2.0)]
    verdict = decided("handwriting/c, full fine-tunes", *rows)
    assert verdict.outcome == "confirmed"
    assert verdict.value == pytest.approx((250 * 0.9 - 200 * 0.8) / 300)
    # A scale that only one of them was measured at changes nothing.
    more = decided("handwriting/c, full fine-tunes", *rows, tuned(5, 0.99, scale=9.0))
    assert more.value == pytest.approx(verdict.value)
    other = ModelSpec("low_rank", "handwriting", 300)
    longer = replace(TUNED, steps=1000)
    opposed = [
        [tuned(50, 0.9, scale=2.0, model=model), tuned(100, 0.8, "fine_tune_prior_u", scale=2.0, model=model)]
        for model in (other, longer)
    ]
    # Adapters and full fine-tunes are decided apart: they need not agree.
    apart = [*rows, *opposed[0]]
    kinds = ("full fine-tunes", "LoRA fine-tunes")
    assert tuple(decided(f"handwriting/c, {kind}", *apart).outcome for kind in kinds) == ("confirmed", "refuted")
    both = decided("handwriting/c, full fine-tunes", *rows, *opposed[1])
    assert both.details[str(longer)].startswith("-0.22 (") and both.claim.letter == "c"
    assert both.value == pytest.approx(0.0) and both.outcome == "undecided"
    worse = [tuned(50, 0.9, scale=2.0), tuned(100, 0.8, "fine_tune_prior_u", scale=2.0)]
    assert decided("handwriting/c, full fine-tunes", *worse).outcome == "refuted"


def test_d_asks_for_both_colours_in_foreign_colours():
    rows = [
        *prior(),
        guided(130, 0.9, "handwriting_foreign", colours=0.85),
        guided(60, 0.9, "handwriting_foreign", colours=0.5),
    ]
    verdict = decided("handwriting/d", *rows)
    assert verdict.outcome == "confirmed" and verdict.value == pytest.approx(0.65)
    assert decided("handwriting/d", *prior(), rows[-1]).outcome == "refuted"


def test_e_takes_only_schedules_that_cost_no_more_than_cfg():
    def cheap(distance: float, cost: float) -> Row:
        return row(
            "handwriting", "scheduled", distance, 0.97, DOMAIN, cost=cost, **cheap_schedule(0.2, 0.6, distance, 4.0)
        )

    rows = [*prior(), guided(60, 0.96)]
    assert decided("handwriting/e", *rows, cheap(55, 2.0)).outcome == "confirmed"
    assert decided("handwriting/e", *rows, cheap(70, 2.0), cheap(10, 2.04)).outcome == "refuted"
    nobody = decided(
        "handwriting/e",
        *prior(),
        guided(60, 0.5),
        row("handwriting", "scheduled", 5, 0.5, DOMAIN, cost=2.0, **CHEAP[0]),
    )
    assert nobody.outcome == "undecided" and "neither" in nobody.details["reason"]
    only_cheap = decided("handwriting/e", *prior(), guided(60, 0.5), cheap(55, 2.0))
    assert only_cheap.outcome == "confirmed" and only_cheap.value is None
    assert only_cheap.words == "only the schedules reach it"
    only_constant = decided(
        "handwriting/e",
        *prior(),
        guided(60, 0.96),
        row("handwriting", "scheduled", 5, 0.5, DOMAIN, cost=2.0, **CHEAP[0]),
    )
    assert only_constant.outcome == "refuted" and only_constant.words == "only constant weights reach it"
    # Constant weights of a model without schedules, as other training lengths are, say nothing about schedules.
    longer = guided(10, 0.99, model=ModelSpec("domain", "handwriting", 300))
    assert decided("handwriting/e", *rows, longer, cheap(55, 2.0)).outcome == "confirmed"


def test_d_and_e_take_a_point_of_exactly_the_share_asked_for():
    exact = guided(160, 0.9, "handwriting_foreign", colours=0.8)
    found = decided("handwriting/d", *prior(), exact)
    assert found.value == pytest.approx(0.8)
    cheap = row("handwriting_foreign", "scheduled", 200, 0.8, DOMAIN, cost=2.0, **CHEAP[0])
    found = decided("handwriting/e, foreign colours", *prior(), exact, cheap)
    assert found.value == pytest.approx(200 / 160) and not found.words


def test_every_claim_is_undecided_without_points_and_both_domains_are_asked():
    found = verdicts_of([], {}, PLANS["full"])
    assert {verdict.outcome for verdict in found} == {"undecided"}
    names = [verdict.claim.name for verdict in found]
    assert len(set(names)) == len(names) == 30
    assert {f"{domain}/{claim}" for domain in ("handwriting", "narrow") for claim in "abde"} <= set(names)
    assert {f"narrow/c, {kind} fine-tunes" for kind in ("full", "LoRA")} <= set(names)
    assert {f"{domain}/{claim}/shipped" for domain in ("handwriting", "narrow") for claim in "abde"} <= set(names)


def test_while_points_are_missing_nothing_is_settled_that_they_could_turn():
    """Made-up sweeps of which one kind of point is missing at a time."""
    ours, rival = guided(20, 0.95), tuned(40, 0.95)
    more_of_ours, other_rival = guided(30, 0.6), tuned(10, 0.6, model=ModelSpec("low_rank", "handwriting", 300))

    def a(rows: list[Row], missing: list[Row], **more) -> str:
        found = decided("handwriting/a", *rows, points=[row.point for row in rows + missing], **more)
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
    assert decided("handwriting/a", ours, rival, points=points).outcome == "confirmed"

    # More of ours could only strengthen (b); another scale of the prior could lower what it is held against.
    rows = [*prior(), guided(85, 0.96)]
    for missing, outcome in ((more_of_ours, "confirmed"), (row("handwriting", "prior", 9.0, 0.9), "confirmed so far")):
        points = [one.point for one in (*rows, missing)]
        assert decided("handwriting/b", *rows, points=points).outcome == outcome


def test_a_stopped_sweep_confirms_nothing_about_every_fine_tune():
    """The real plan's first points, all in favour of (a): the verdict stays open until the last fine-tune."""
    plan = PLANS["full"]
    first = [
        row(p.question, p.method, 20.0 if p.method == "multi_guidance" else 90.0, 0.9, p.model, **p.values)
        for p in plan.points[:25]
    ]
    verdict = named(verdicts_of(first, plan=plan), "handwriting/a")
    assert verdict.outcome == "confirmed so far" and verdict.value < 1
    assert verdict.measured < 25 and verdict.planned > 100
    quick = PLANS["quick"]
    rows = [
        row(p.question, p.method, 20.0 if p.method == "multi_guidance" else 90.0, 0.9, p.model, **p.values)
        for p in quick.points
    ]
    verdict = named(verdicts_of(rows, plan=quick), "handwriting/a")
    assert verdict.outcome == "confirmed so far" and verdict.measured == verdict.planned


@pytest.mark.parametrize(
    "change", [{"floor_uncorrected": 16.0}, {"ceiling": 29.0}, {"autoencoder_floor_uncorrected": 9.1}]
)
def test_an_invalid_question_decides_nothing(change):
    """Limits: ceiling / floor of 20, and 5 % of the prior's 180."""
    foreign = guided(60, 0.9, "handwriting_foreign")
    rows = [*prior(), guided(60, 0.96), tuned(90, 0.96), foreign]
    floors = FLOORS | {"handwriting": FLOORS["handwriting"] | change}
    found = verdicts_of(rows, floors)
    for claim in "ab":
        verdict = named(found, f"handwriting/{claim}")
        assert verdict.outcome == "undecided" and "not valid" in verdict.details["reason"]
        assert verdict.value is not None  # the number stays
        valid = named(verdicts_of(rows), verdict.claim.name)
        assert valid.outcome == "confirmed"
    assert named(found, "handwriting/d").outcome == "confirmed"  # its own question's floors are fine
    unknown = validity("handwriting", FLOORS, rows[3:])
    assert math.isnan(unknown.autoencoder) and not unknown.holds


def test_the_shipped_models_decide_nothing_but_their_own_rows():
    rows = [*prior(), guided(90, 0.96), guided(10, 0.99, model=SHIPPED), tuned(50, 0.96)]
    found = verdicts_of(rows)
    trained, shipped = named(found, "handwriting/a"), named(found, "handwriting/a/shipped")
    assert trained.outcome == "refuted" and trained.value == pytest.approx(90 / 50)
    assert shipped.outcome == "confirmed" and shipped.value == pytest.approx(10 / 50)
    assert named(found, "handwriting/b").value == pytest.approx(90 / 180)
    assert named(found, "handwriting/b/shipped").value == pytest.approx(10 / 180)


def test_verdicts_are_those_of_training_seed_0():
    def point(distance: float, seed: int, w_c: float) -> Row:
        return guided(distance, 0.97, model=ModelSpec("domain", "handwriting", 1000, seed=seed), w_c=w_c)

    rows = [*prior(), point(90, 0, 3.0), point(45, 1, 3.0), guided(10, 0.99, model=SHIPPED)]
    verdict = named(verdicts_of(rows), "handwriting/b")
    assert verdict.value == pytest.approx(90 / 180) and verdict.measured == 3
