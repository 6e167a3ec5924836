"""The claims, decided by code from the measured points: confirmed, refuted or undecided, each with one number.

Every claim is one number with a target and a 95 % bootstrap interval over samples: confirmed when the whole interval
reaches the target, refuted when none of it does, else undecided. While points of the sweep that could still turn the
outcome are missing, and in coarse sweeps always, it is only "confirmed so far" or "refuted so far"; where floors and
ceiling make a question invalid, all of its claims stay undecided. Refuted means refuted by the points of this sweep:
settings nobody tried could still do it. Choosing the best of a sweep on the same samples makes every method look a
little better than it is, the more so the more settings it has; the interval repeats the choice in every replicate,
which does not undo it.

All is decided on domain models of the fine-tunes' own trainer and images. The shipped domain models come from another
recipe (more coloured pictures, another rate); they have verdicts of their own, which say nothing about fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..deciding import Decision, decide
from ..keeping import Row, columns
from ..statistics import hypervolume, lowest, ratio_of_lowest, reaches, worst_ratio, worst_share
from .points import Point
from .questions import QUESTIONS
from .sweep import Plan

PAPER = ("multi_guidance",)
BEYOND = ("multi_guidance", "scheduled", "orthogonal", "bands")
FINE_TUNES = ("fine_tune", "fine_tune_prior_u")
DIGIT_TOLERANCE = 0.03
COLOURS_RIGHT = 0.8
AFFORDABLE_SAMPLES = 2.0
FINE_TUNE_KINDS = {"full": "full fine-tunes", "low_rank": "LoRA fine-tunes"}
METHOD_SETS = {"paper": PAPER, "beyond": BEYOND}
TRAINED, SHIPPED = "domain", "shipped"  # kinds of domain models
LEAST_CEILING = 20.0  # of the ceiling over the floor
MOST_AUTOENCODER = 0.05  # of the autoencoder's floor over the prior's lowest distance
# A part of a claim's points: in own colours or foreign ones, and the methods.
Part = tuple[bool, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Verdict(Decision):
    """One decided claim of this paper. models: TRAINED or SHIPPED."""

    claim: str
    domain: str
    methods: str
    models: str = TRAINED

    @property
    def name(self) -> str:
        more = [self.methods] * (self.methods != "paper") + [self.models] * (self.models != TRAINED)
        return "/".join([self.domain, self.claim, *more])


@dataclass(frozen=True)
class Validity:
    """Whether distances of a question mean anything. ceiling: the ceiling over the floor; autoencoder: the
    autoencoder's floor over the prior's lowest distance, None while no prior is measured. Floors are the uncorrected
    ones, which are too high if anything."""

    question: str
    ceiling: float
    autoencoder: float | None

    @property
    def holds(self) -> bool:
        return self.ceiling >= LEAST_CEILING and self.autoencoder is not None and self.autoencoder <= MOST_AUTOENCODER

    def __str__(self) -> str:
        share = "not known without the prior" if self.autoencoder is None else f"{self.autoencoder:.2%}"
        return (
            f"ceiling / floor {self.ceiling:.0f} (at least {LEAST_CEILING:.0f}), autoencoder floor / prior {share} "
            f"(at most {MOST_AUTOENCODER:.0%}): {'valid' if self.holds else 'not valid'}"
        )


def validities(rows: Iterable[Row], floors: Mapping[str, Mapping[str, float]]) -> dict[str, Validity]:
    """By question; floors as `questions.Examiner.floors` gives them."""
    rows, found = list(rows), {}
    for question, values in floors.items():
        priors = [
            row.numbers["distance"] for row in rows if row.point.question == question and row.point.method == "prior"
        ]
        share = values["autoencoder_floor_uncorrected"] / max(min(priors), 1e-9) if priors else None
        found[question] = Validity(question, values["ceiling"] / max(values["floor_uncorrected"], 1e-9), share)
    return found


class Evidence:
    """The rows of one domain, in its own colours and in foreign ones, of one training seed and one kind of domain
    models; ceilings: the worst distances, against which hypervolumes are measured, by question; points: all that the
    sweep will measure (left out: nothing but the rows); coarse: as in `sweep.Plan`."""

    def __init__(
        self,
        rows: Iterable[Row],
        domain: str,
        ceilings: dict[str, float],
        seed: int = 0,
        models: str = TRAINED,
        points: Iterable[Point] | None = None,
        coarse: bool = False,
    ) -> None:
        self.domain, self.ceilings, self.seed, self.models, self.coarse = domain, ceilings, seed, models, coarse
        self.rows = [row for row in rows if self._is_mine(row.point)]
        points = [row.point for row in self.rows] if points is None else points
        self.points = [point for point in points if self._is_mine(point)]

    def _is_mine(self, point: Point) -> bool:
        if QUESTIONS[point.question].domain != self.domain:
            return False
        model = point.model
        other = SHIPPED if self.models == TRAINED else TRAINED
        return model is None or (model.seed == self.seed and model.kind != other)

    def only(self, kind: str) -> Evidence:
        """The same of one kind of models alone."""
        rows = [row for row in self.rows if row.point.model and row.point.model.kind == kind]
        points = [point for point in self.points if point.model and point.model.kind == kind]
        return Evidence(rows, self.domain, self.ceilings, self.seed, self.models, points, self.coarse)

    def progress(self, *parts: Part) -> tuple[int, int]:
        """(measured, planned) points of some parts."""
        sets = [
            {
                point
                for own, methods in parts
                for point in some
                if point.question == self.question(own) and point.method in methods
            }
            for some in ([row.point for row in self.rows], self.points)
        ]
        return len(sets[0]), len(sets[0] | sets[1])

    def settled(self, *parts: Part) -> bool:
        """Whether no point of these parts can still change anything."""
        measured, planned = self.progress(*parts)
        return measured == planned and not self.coarse

    def question(self, own: bool) -> str:
        return next(name for name, one in QUESTIONS.items() if one.domain == self.domain and one.own_colours == own)

    def of(self, own: bool, methods: Sequence[str], keep: Callable[[Row], bool] = lambda row: True) -> list[Row]:
        name = self.question(own)
        return [row for row in self.rows if row.point.question == name and row.point.method in methods and keep(row)]

    def ceiling(self, own: bool) -> float:
        return self.ceilings[self.question(own)]


def claim_a(evidence: Evidence, methods: str = "paper") -> Verdict:
    """Multi-guidance against every fine-tune over digit accuracy, in the domain's own colours."""
    statement = "at every digit accuracy that both reach, its distance over that of the best fine-tune is below 1"
    ours, theirs = evidence.of(True, METHOD_SETS[methods]), evidence.of(True, FINE_TUNES)
    if not ours or not theirs:
        return _missing("a", evidence, methods, statement, "ratio", 1.0)
    own = columns(ours, "distance"), columns(ours, "digit")
    values = worst_ratio(*own, columns(theirs, "distance"), columns(theirs, "digit"))
    details = {
        "hypervolume": float(hypervolume(*own, evidence.ceiling(True))[0]),
        "hypervolume of the fine-tunes": float(
            hypervolume(columns(theirs, "distance"), columns(theirs, "digit"), evidence.ceiling(True))[0]
        ),
    }
    at = worst_share(*(one[:, :1] for one in (*own, columns(theirs, "distance"), columns(theirs, "digit"))))
    nearest = [_nearest(rows, "digit", at) for rows in (ours, theirs)]
    details["worst at a digit accuracy of"] = f"{at:.1%}, {' against '.join(nearest)}"
    for method, title in (("fine_tune", "own unconditional"), ("fine_tune_prior_u", "prior's unconditional")):
        some = evidence.of(True, (method,))
        if some:
            ratio = worst_ratio(*own, columns(some, "distance"), columns(some, "digit"))
            details[f"ratio against fine-tunes with the {title}"] = float(ratio[0])
    mine, rivals = (True, METHOD_SETS[methods]), (True, FINE_TUNES)
    settled = {"confirmed": (mine, rivals), "refuted": (mine,)}
    return _decided("a", evidence, methods, statement, "ratio", values, 1.0, "lower", details, settled)


def claim_b(evidence: Evidence, methods: str = "paper") -> Verdict:
    """Half the prior's distance at nearly its digit accuracy, which is taken at the most accurate scale."""
    statement = (
        "its best distance with digits within 3 points of the prior's, over the prior's best distance, is at most 0.5"
    )
    ours, prior = evidence.of(True, METHOD_SETS[methods]), evidence.of(True, ("prior",))
    if not ours or not prior:
        return _missing("b", evidence, methods, statement, "ratio", 0.5)
    wanted = columns(prior, "digit").amax(0) - DIGIT_TOLERANCE
    best = columns(prior, "distance").amin(0)
    values = lowest(columns(ours, "distance"), columns(ours, "digit"), wanted) / best
    details = {
        "prior's best distance": float(best[0]),
        "digit accuracy asked for": float(wanted[0]),
        **_best(ours, "digit", float(wanted[0])),
    }
    settled = {"confirmed": ((True, ("prior",)),), "refuted": ((True, METHOD_SETS[methods]),)}
    return _decided("b", evidence, methods, statement, "ratio", values, 0.5, "lower", details, settled)


def claim_c(evidence: Evidence, methods: str = "paper", kind: str = "full") -> Verdict:
    """`u + w (ft(c) - u)` with the fine-tune's own u against the prior's u, at the scales that both have.

    kind: "full" or "low_rank" fine-tunes, which need not agree.
    """
    statement = (
        f"hypervolume with the prior's u minus hypervolume with the fine-tune's u, mean over {FINE_TUNE_KINDS[kind]}, "
        "is above 0"
    )
    name, evidence = f"c, {FINE_TUNE_KINDS[kind]}", evidence.only(kind)
    differences = {}
    for model in dict.fromkeys(row.point.model for row in evidence.of(True, ("fine_tune",))):
        own, theirs = (
            {row.point.settings: row for row in evidence.of(True, (method,), lambda row: row.point.model == model)}  # noqa: B023
            for method in FINE_TUNES
        )
        both = [settings for settings in own if settings in theirs]
        if both:
            volumes = [
                hypervolume(
                    columns([rows[s] for s in both], "distance"),
                    columns([rows[s] for s in both], "digit"),
                    evidence.ceiling(True),
                )
                for rows in (theirs, own)
            ]
            differences[model] = volumes[0] - volumes[1]
    if not differences:
        return _missing(name, evidence, methods, statement, "share", 0.0, "higher")
    decided = {model: decide(one, 0.0, "higher") for model, one in differences.items()}
    outcomes = [outcome for *_, outcome in decided.values()]
    details = {
        "fine-tunes compared": len(differences),
        "better with the prior's u": outcomes.count("confirmed"),
        "worse with the prior's u": outcomes.count("refuted"),
        **{str(model): f"{value:.2f} ({low:.2f} to {high:.2f})" for model, (value, low, high, _) in decided.items()},
    }
    settled = dict.fromkeys(("confirmed", "refuted"), ((True, FINE_TUNES),))
    mean = torch.stack(list(differences.values())).mean(0)
    return _decided(name, evidence, methods, statement, "share", mean, 0.0, "higher", details, settled)


def claim_d(evidence: Evidence, methods: str = "paper") -> Verdict:
    """Colours the domain never had: prompts are obeyed and the distance still falls."""
    statement = (
        "its best distance with both colours right in at least 80 %, over the prior's best distance, is at most 0.7"
    )
    ours, prior = evidence.of(False, METHOD_SETS[methods]), evidence.of(False, ("prior",))
    if not ours or not prior:
        return _missing("d", evidence, methods, statement, "ratio", 0.7)
    best = columns(prior, "distance").amin(0)
    points = columns(ours, "distance"), columns(ours, "both_colours")
    details = {
        "prior's best distance": float(best[0]),
        **_best(ours, "both_colours", COLOURS_RIGHT),
        "hypervolume": float(hypervolume(*points, evidence.ceiling(False))[0]),
    }
    values = lowest(*points, COLOURS_RIGHT) / best
    settled = {"confirmed": ((False, ("prior",)),), "refuted": ((False, METHOD_SETS[methods]),)}
    return _decided("d", evidence, methods, statement, "ratio", values, 0.7, "lower", details, settled)


def claim_e(evidence: Evidence, own: bool) -> Verdict:
    """Beyond the paper: schedules at plain CFG's cost against constant weights, at the accuracy of (b) or (d)."""
    share, where = ("digit", "own colours") if own else ("both_colours", "foreign colours")
    statement = (
        f"{where}: the best distance of schedules at an average of at most 2 samples a step, over the best of "
        f"constant weights, at the accuracy that ({'b' if own else 'd'}) asks for, is at most 1"
    )
    name = "e" if own else "e, foreign colours"
    cheap = evidence.of(own, ("scheduled",), lambda row: row.numbers["samples_per_step"] <= AFFORDABLE_SAMPLES)
    models = {row.point.model for row in cheap}  # other training lengths have no schedules
    constant, prior = evidence.of(own, PAPER, lambda row: row.point.model in models), evidence.of(own, ("prior",))
    if not cheap or not constant or not prior:
        return _missing(name, evidence, "paper", statement, "ratio", 1.0)
    colours = torch.tensor([COLOURS_RIGHT], dtype=torch.float64)
    wanted = columns(prior, "digit").amax(0) - DIGIT_TOLERANCE if own else colours
    ours, theirs = (lowest(columns(rows, "distance"), columns(rows, share), wanted) for rows in (cheap, constant))
    if bool(ours[0].isinf() & theirs[0].isinf()):
        return _missing(
            name, evidence, "paper", statement, "ratio", 1.0, reason="neither reaches the accuracy asked for"
        )
    # Where only one of the two reaches it, the ratio is 0 or infinite: it decides, but is no number to show.
    points = (columns(rows, name) for rows in (cheap, constant) for name in ("distance", share))
    values = ratio_of_lowest(*points, wanted)
    words = "only the schedules reach it" if theirs[0].isinf() else "only constant weights reach it"
    details = {
        "accuracy asked for": float(wanted[0]),
        "best distance of constant weights": float(theirs[0]),
        **_best(cheap, share, float(wanted[0])),
        "hypervolume of the schedules": float(
            hypervolume(columns(cheap, "distance"), columns(cheap, share), evidence.ceiling(own))[0]
        ),
        "hypervolume of constant weights": float(
            hypervolume(columns(constant, "distance"), columns(constant, share), evidence.ceiling(own))[0]
        ),
    }
    settled = {"confirmed": ((own, ("prior", *PAPER)),), "refuted": ((own, ("prior", "scheduled")),)}
    found = _decided(name, evidence, "paper", statement, "ratio", values, 1.0, "lower", details, settled)
    if bool(ours[0].isinf() | theirs[0].isinf()):
        return replace(found, value=None, low=None, high=None, words=words)
    return found


def all_verdicts(rows: Sequence[Row], floors: Mapping[str, Mapping[str, float]], plan: Plan) -> list[Verdict]:
    """Claims (a) to (d) for both domains, with the paper's constant weights and with everything beyond; and (e).

    Then (a), (b), (d) and (e) of the shipped domain models. Where the floors make a question invalid, all of its
    claims are undecided.
    """
    found, ceilings = [], {question: values["ceiling"] for question, values in floors.items()}
    for domain in dict.fromkeys(question.domain for question in QUESTIONS.values()):
        evidence = Evidence(rows, domain, ceilings, points=plan.points, coarse=plan.coarse)
        of_kinds = [partial(claim_c, kind=kind) for kind in FINE_TUNE_KINDS]
        for claim in (claim_a, claim_b, *of_kinds, claim_d):
            for methods in METHOD_SETS if claim not in of_kinds else ("paper",):
                verdict = claim(evidence, methods)
                if methods == "paper":
                    _add_training_seeds(verdict, claim, rows, domain, ceilings)
                found.append(verdict)
        found += [claim_e(evidence, True), claim_e(evidence, False)]
        evidence = Evidence(rows, domain, ceilings, models=SHIPPED, points=plan.points, coarse=plan.coarse)
        found += [claim(evidence) for claim in (claim_a, claim_b, claim_d)]
        found += [claim_e(evidence, True), claim_e(evidence, False)]
    valid = validities(rows, floors)
    return [_where_valid(verdict, valid) for verdict in found]


def _where_valid(verdict: Verdict, valid: Mapping[str, Validity]) -> Verdict:
    if verdict.outcome == "undecided":
        return verdict
    own = verdict.claim not in ("d", "e, foreign colours")
    validity = valid[Evidence((), verdict.domain, {}).question(own)]
    if validity.holds:
        return verdict
    return replace(verdict, outcome="undecided", details={"reason": str(validity), **verdict.details})


def _add_training_seeds(
    verdict: Verdict, claim: Callable, rows: Sequence[Row], domain: str, ceilings: dict[str, float]
) -> None:
    """The same number from each training seed, all seeds restricted to the points that all of them were measured at."""
    if verdict.value is None:
        return
    question = QUESTIONS[Evidence((), domain, ceilings).question(verdict.claim != "d")].name
    methods = {"a": PAPER + FINE_TUNES, "c": FINE_TUNES}.get(verdict.claim[0], PAPER)
    trained: dict[int, set[Point]] = {}
    for row in rows:
        point = row.point
        if point.question == question and point.method in methods and point.model.kind != SHIPPED:
            trained.setdefault(point.model.seed, set()).add(point.with_seed(0))
    if len(trained) < 2:
        return
    common = set.intersection(*trained.values())
    some = [row for row in rows if row.point.model is None or row.point.with_seed(0) in common]
    for seed in sorted(trained):
        again = claim(Evidence(some, domain, ceilings, seed))
        if again.value is not None:
            verdict.details[f"training seed {seed}, at the {len(common)} points of every seed"] = again.value


def _best(rows: Sequence[Row], share: str, at_least: float) -> dict[str, float | str]:
    """The point of the lowest distance among those whose share is at least so high."""
    good = [row for row in rows if reaches(row.numbers[share], at_least)]
    if not good:
        return {"best point": "none qualifies"}
    best = min(good, key=lambda row: row.numbers["distance"])
    return {
        "best point": str(best.point),
        "its distance": best.numbers["distance"],
        f"its {share}": best.numbers[share],
        "its samples per step": best.numbers["samples_per_step"],
    }


def _nearest(rows: Sequence[Row], share: str, at_least: float) -> str:
    """The nearest point at a share, in words."""
    good = [row for row in rows if reaches(row.numbers[share], at_least)]
    best = min(good, key=lambda row: row.numbers["distance"])
    return f"{best.numbers['distance']:.1f} ({str(best.point).partition(': ')[2]})"


def _decided(
    claim: str,
    evidence: Evidence,
    methods: str,
    statement: str,
    unit: str,
    values: Tensor,
    target: float,
    better: str,
    details: dict[str, float | str],
    settled: Mapping[str, tuple[Part, ...]],
) -> Verdict:
    """settled: the points that an outcome stands or falls with; what else is missing could only strengthen it."""
    value, low, high, outcome = decide(values, target, better)
    if outcome in settled and not evidence.settled(*settled[outcome]):
        outcome += " so far"
    measured, planned = evidence.progress(*(part for parts in settled.values() for part in parts))
    return Verdict(
        statement,
        unit,
        value,
        low,
        high,
        target,
        better,
        outcome,
        details,
        measured,
        planned,
        claim=claim,
        domain=evidence.domain,
        methods=methods,
        models=evidence.models,
    )


def _missing(
    claim: str,
    evidence: Evidence,
    methods: str,
    statement: str,
    unit: str,
    target: float,
    better: str = "lower",
    reason: str = "points not measured yet",
) -> Verdict:
    return Verdict(
        statement,
        unit,
        None,
        None,
        None,
        target,
        better,
        "undecided",
        {"reason": reason},
        claim=claim,
        domain=evidence.domain,
        methods=methods,
        models=evidence.models,
    )
