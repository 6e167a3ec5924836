"""The claims, decided by code from the measured points: confirmed, refuted or undecided, each with one number.

Every claim is one number with a target and a 95 % bootstrap interval: confirmed when the whole interval reaches the
target, refuted when none of it does, else undecided. Replicates resample the measured latents, the same ones for every
point, and the training seeds of each task, so an interval holds both kinds of chance; with three seeds the second is
known roughly, with one not at all. While points are missing, and in coarse sweeps always, an outcome is only "so far".

A run may stop early: what it keeps is taken at the best of its stops that reaches the accuracy asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..deciding import Decision, decide
from ..keeping import Row, columns
from .recipes import BEYOND, DIRECTIONAL, GUIDED, GUIDED_BACK, LAYERS, RECIPES, RECONSTRUCTION, SGF
from .sweep import Plan
from .tasks import COLOURS, DARK, DOMAIN, INK, LONG, SEVEN, TASKS

ACCURATE = 0.9
DIVERSE = 0.8
LEAST_EXACT = 0.95  # of the exact answers that the judge must accept
LEAST_PRIOR = 0.9  # of the prior's own pictures of the prompt: a critic that does not know it can teach nobody
DEFAULT = "sds_directional"  # SGF's setting whose full run is the budget of (e)
# What counts as an effect: the learned constant is in no layer, so layer selection changes a little less in any case,
# and a handful of samples more is no domain.
FEWER = 0.9
PULLED = 0.1
OTHERS = tuple(name for name in (*DIRECTIONAL, *RECONSTRUCTION) if name not in SGF)  # SGF's settings too
# Dark ink on a light ground is only looked at: this source never drew it, and few recipes are asked for it. The colour
# that keeps the source's ground is decided among the colours and by itself: it alone is reached by most recipes (a
# group made after that had been seen).
GROUPS = {
    "colours": tuple(task.name for task in COLOURS if task != DARK),
    "ink alone": (INK.name,),
    "long prompt": (LONG.name,),
    "shape": (SEVEN.name,),
    "domain": (DOMAIN.name,),
}

Key = tuple[str, int]  # task, seed
Values = dict[Key, Tensor]  # one number of each run with its replicates, [1 + R]


@dataclass(frozen=True, kw_only=True)
class Verdict(Decision):
    """One decided claim. group: which tasks it is about, of GROUPS; part: what of the claim."""

    claim: str
    group: str
    part: str

    @property
    def name(self) -> str:
        return f"{self.group}/{self.claim}/{self.part}".replace(" ", "_")


class Evidence:
    """The rows of one group of tasks."""

    def __init__(self, rows: Sequence[Row], plan: Plan, group: str) -> None:
        self.plan, self.group = plan, group
        self.invalid = {name: why for name, why in invalidities(rows).items() if name in GROUPS[group]}
        self.tasks = tuple(name for name in GROUPS[group] if name not in self.invalid)
        self.rows = [row for row in rows if row.point.task in self.tasks and row.point.recipe in RECIPES]
        self.points = [one for one in plan.points if one.task in self.tasks and one.recipe in RECIPES]
        self.framed = {row.point for row in rows}

    def progress(self, recipes: Sequence[str]) -> tuple[int, int]:
        """(measured, planned) points of some recipes."""
        measured = {row.point for row in self.rows if row.point.recipe in recipes}
        return len(measured), len(measured | {one for one in self.points if one.recipe in recipes})

    def settled(self, recipes: Sequence[str]) -> bool:
        measured, planned = self.progress(recipes)
        # What a task is held against: an answer that the judge refuses, or a prompt unknown to the prior, voids it.
        framed = {one for one in self.plan.points if one.task in self.tasks and one.recipe in ("exact", "prior")}
        return measured == planned and framed <= self.framed and not self.plan.coarse

    def curves(self, recipe: str) -> dict[Key, list[Row]]:
        """The rows of each run of a recipe in the order of steps; runs that begin late do not count."""
        found: dict[Key, list[Row]] = {}
        for row in sorted((one for one in self.rows if one.point.recipe == recipe), key=lambda one: one.point.step):
            found.setdefault((row.point.task, row.point.seed), []).append(row)
        return found

    def complete(self, recipe: str) -> dict[Key, list[Row]]:
        """The runs of which the last planned stop is measured."""
        last = {}
        for point in self.points:
            if point.recipe == recipe:
                last[point.task, point.seed] = max(point.step, last.get((point.task, point.seed), 0))
        return {key: rows for key, rows in self.curves(recipe).items() if rows[-1].point.step >= last.get(key, 0)}

    def mean(self, values: Values) -> Tensor:
        """The mean over tasks of the mean over seeds, replicates resampling the seeds: [1 + R]."""
        parts = []
        for task in dict.fromkeys(key[0] for key in values):
            own = torch.stack([values[key] for key in sorted(values) if key[0] == task])  # [S, 1 + R]
            weights = torch.full_like(own, 1 / len(own))
            drawn = torch.randint(len(own), own[:, 1:].shape, generator=Generator().manual_seed(len(own)))
            weights[:, 1:] = torch.stack([(drawn == seed).double().mean(0) for seed in range(len(own))])
            parts.append(torch.where(weights > 0, own * weights, 0.0).sum(0))
        return torch.stack(parts).mean(0)


def invalidities(rows: Sequence[Row]) -> dict[str, str]:
    """Why a task decides nothing: the judge refuses its exact answers, or the prior itself cannot draw its prompt."""
    found: dict[str, str] = {}
    for row in rows:
        task, share = row.point.task, row.numbers["accuracy"]
        if row.point.recipe == "exact" and share < LEAST_EXACT:
            found[task] = f"the judge accepts {share:.0%} of the exact answers (at least {LEAST_EXACT:.0%})"
        if row.point.recipe == "prior" and share < LEAST_PRIOR and TASKS[task].kind != "domain":
            found[task] = f"of the prior's own pictures {share:.0%} obey the prompt (at least {LEAST_PRIOR:.0%})"
    return found


def at_end(rows: Sequence[Row], name: str) -> Tensor:
    return rows[-1].column(name)


def kept(rows: Sequence[Row], name: str = "diversity") -> Tensor:
    """The highest value among the stops that are accurate enough; 0 without any."""
    return columns(rows, name).masked_fill(columns(rows, "accuracy") < ACCURATE, 0.0).amax(0)


def nearest(rows: Sequence[Row], most_gflops: float = float("inf")) -> Tensor:
    """The lowest distance among the stops that are accurate enough and within the budget; infinite without any."""
    cost = torch.tensor([[row.point.step * row.numbers["gflops"]] for row in rows]).double()
    out = (columns(rows, "accuracy") < ACCURATE) | (cost > most_gflops)
    return columns(rows, "distance").masked_fill(out, torch.inf).amin(0)


def changed_at(rows: Sequence[Row], name: str = "changed") -> Tensor:
    """How much of the generator had changed at the first stop that is accurate enough; infinite without any."""
    out = columns(rows, "accuracy") < ACCURATE
    changed = torch.tensor([[row.numbers[name]] for row in rows]).double().expand(out.shape)
    return changed.masked_fill(out, torch.inf).gather(0, out.long().argmin(0, keepdim=True))[0]


def most_tasks(found: Mapping[str, Mapping[Key, object]]) -> list[str]:
    """Those recipes whose runs are on as many tasks as any recipe's."""
    counts = {recipe: len({task for task, _ in runs}) for recipe, runs in found.items()}
    return [recipe for recipe, count in counts.items() if count and count == max(counts.values())]


def best_of(
    evidence: Evidence, recipes: Sequence[str], measure: Callable[[list[Row]], Tensor], lowest: bool = False
) -> tuple[Tensor, str] | None:
    """The best recipe's mean of a measure over its complete runs, and its name; every replicate chooses anew.

    Recipes that were asked fewer of the tasks than others are no rivals: tasks are not equally hard.
    """
    found = {recipe: evidence.complete(recipe) for recipe in recipes}
    everywhere = most_tasks(found)
    means = {
        recipe: evidence.mean({key: measure(rows) for key, rows in found[recipe].items()}) for recipe in everywhere
    }
    if not means:
        return None
    stacked = torch.stack(list(means.values()))
    best = stacked.amin(0) if lowest else stacked.amax(0)
    return best, next(name for name, mean in means.items() if mean[0] == best[0])


def claim_a(evidence: Evidence) -> list[Verdict]:
    """SDS alone reaches the prompt and loses diversity: both at the end of training."""
    statements = {
        "reaches the prompt": ("accuracy", "SDS alone: prompt accuracy at the end of training", ACCURATE, "higher"),
        "loses diversity": ("diversity", "SDS alone: its share of the source's diversity at the end", DIVERSE, "lower"),
    }
    found, runs = [], evidence.complete("sds")
    for part, (name, statement, target, better) in statements.items():
        if not runs:
            found.append(_missing("a", part, evidence, statement, target, better))
            continue
        # What `measures.diversity` says where hardly any sample obeys.
        silent = sum(rows[-1].numbers["diversity"] == 0.0 for rows in runs.values())
        if name == "diversity" and silent:
            reason = f"at the end of {silent} of {len(runs)} runs hardly any sample obeys: diversity is unknown"
            found.append(_missing("a", part, evidence, statement, target, better, reason))
            continue
        values = evidence.mean({key: at_end(rows, name) for key, rows in runs.items()})
        details, literal = _runs(runs), evidence.complete("sds_100")
        if literal:
            details["at the released scale of 100"] = _mean(literal, lambda rows, name=name: rows[-1].numbers[name])
        if name == "diversity":
            best = evidence.mean({key: kept(rows) for key, rows in runs.items()})
            details["at its best accurate stop"] = float(best[0])
            details["recall at the end"] = _mean(runs, lambda rows: rows[-1].numbers["recall"])
            details["correspondence at the end"] = _mean(runs, lambda rows: rows[-1].numbers["correspondence"])
        found.append(_decided("a", part, evidence, statement, values, target, better, details, ("sds",)))
    return found


def claim_b(evidence: Evidence) -> list[Verdict]:
    """Each regularizer keeps at least 80 % of the diversity at a prompt accuracy of at least 90 %."""
    found = []
    for part, recipes in (("directional", DIRECTIONAL), ("reconstruction", RECONSTRUCTION)):
        statement = f"{part} regularizer: share of the source's diversity at its best stop of accuracy 90 %"
        best = best_of(evidence, recipes, kept)
        if best is None:
            found.append(_missing("b", part, evidence, statement, DIVERSE, "higher"))
            continue
        values, recipe = best
        runs = evidence.complete(recipe)
        reached = [float(columns(rows, "accuracy")[:, 0].max()) >= ACCURATE for rows in runs.values()]
        details = {
            **_runs(runs),
            "setting": RECIPES[recipe].title,
            "runs that reach 90 %": f"{sum(reached)} of {len(reached)}",
            "diversity at the end": _mean(runs, lambda rows: rows[-1].numbers["diversity"]),
            "accuracy at the end": _mean(runs, lambda rows: rows[-1].numbers["accuracy"]),
            "correspondence at the end": _mean(runs, lambda rows: rows[-1].numbers["correspondence"]),
        }
        found.append(_decided("b", part, evidence, statement, values, DIVERSE, "higher", details, recipes))
    return found


def claim_c(evidence: Evidence) -> list[Verdict]:
    """Layer selection changes fewer parameters for the same accuracy, by a tenth at least."""
    found = []
    for part, name in (("parameters changed", "changed"), ("distance moved", "moved")):
        statement = f"{part} when accuracy reaches 90 %: with layer selection, over without"
        every, ratios = evidence.curves("sds"), {}
        for recipe in LAYERS:
            runs = {key: rows for key, rows in evidence.complete(recipe).items() if key in every}
            before = {key: changed_at(every[key], name) for key in runs}
            usable = [key for key in runs if torch.isfinite(before[key][0])]
            if usable:
                ratio = {key: changed_at(runs[key], name) / before[key] for key in usable}
                ratios[recipe] = evidence.mean({key: one.nan_to_num(1.0, torch.inf) for key, one in ratio.items()})
        if not ratios:
            reached = any(bool(torch.isfinite(changed_at(rows, name)[0])) for rows in every.values())
            reason = "no run of SDS with all layers reaches the accuracy" if every and not reached else ""
            found.append(_missing("c", part, evidence, statement, FEWER, "lower", reason))
            continue
        stacked = torch.stack(list(ratios.values()))
        best = min(ratios, key=lambda one: float(ratios[one][0]))
        runs = evidence.complete(best)
        details = {
            **_runs(runs),
            "setting": RECIPES[best].title,
            "accuracy at the end": _mean(runs, lambda rows: rows[-1].numbers["accuracy"]),
            "share changed at the end": _mean(runs, lambda rows: rows[-1].numbers["changed"]),
            "diversity at the end": _mean(runs, lambda rows: rows[-1].numbers["diversity"]),
        }
        found.append(
            _decided(
                "c", part, evidence, statement, stacked.amin(0), FEWER, "lower", details, ("sds", *LAYERS), "ratio"
            )
        )
    return found


def claim_d(evidence: Evidence) -> list[Verdict]:
    """A domain model or a fine-tuned model as critic pulls where the prompt alone cannot, by ten points at least."""
    found = []
    critics = {
        "domain model": ("sds", ("domain", "domain_mild", "domain_directional")),
        "fine-tuned model": ("sds", ("fine_tune",)),
        "domain model, way back": ("sds_back", ("domain_back", "domain_mild_back", "domain_directional_back")),
        "fine-tuned model, way back": ("sds_back", ("fine_tune_back",)),
    }
    for part, (prompt_alone, recipes) in critics.items():
        assert set(recipes) <= {*GUIDED, *GUIDED_BACK}
        alone = evidence.complete(prompt_alone)
        statement = f"{part} as critic: samples judged to be of the domain at the end, less those of the prompt alone"
        differences = {}
        for recipe in recipes:
            runs = {key: rows for key, rows in evidence.complete(recipe).items() if key in alone}
            if runs:
                differences[recipe] = evidence.mean(
                    {key: at_end(rows, "accuracy") - at_end(alone[key], "accuracy") for key, rows in runs.items()}
                )
        if not differences:
            found.append(_missing("d", part, evidence, statement, PULLED, "higher"))
            continue
        best = max(differences, key=lambda one: float(differences[one][0]))
        runs = evidence.complete(best)
        details = {
            **_runs(runs),
            "setting": RECIPES[best].title,
            "in the domain": _mean(runs, lambda rows: rows[-1].numbers["accuracy"]),
            "in the domain with the prompt alone": _mean(alone, lambda rows: rows[-1].numbers["accuracy"]),
            "distance": _mean(runs, lambda rows: rows[-1].numbers["distance"]),
            "distance with the prompt alone": _mean(alone, lambda rows: rows[-1].numbers["distance"]),
        }
        values = torch.stack(list(differences.values())).amax(0)
        rows = (prompt_alone, *recipes)
        found.append(_decided("d", part, evidence, statement, values, PULLED, "higher", details, rows))
    return found


def claim_e(evidence: Evidence) -> list[Verdict]:
    """Beyond the paper: the best method here against the best of SGF's settings at equal compute."""
    statement = (
        "best method here: distance to the exact answers at an accuracy of 90 %, over the best of SGF's settings, both "
        "within the operations of SGF's full run with the directional regularizer"
    )
    part, sgf, ratios, words = "equal compute", {name: evidence.complete(name) for name in SGF}, {}, {}
    budget_runs, others = sgf[DEFAULT], [evidence.complete(name) for name in OTHERS]
    rivalled = {}
    for recipe in BEYOND:
        runs = {key: rows for key, rows in evidence.complete(recipe).items() if key in budget_runs}
        rivalled[recipe] = {key: rows for key, rows in runs.items() if all(key in one for one in sgf.values())}
    for recipe, runs in rivalled.items():
        if not runs:
            continue
        budget = {key: budget_runs[key][-1].point.step * budget_runs[key][-1].numbers["gflops"] for key in runs}
        # Within a millionth: budgets are products of rounded numbers.
        ours = {key: nearest(rows, budget[key] * 1.000001) for key, rows in runs.items()}
        rivals = [*sgf.values(), *others]
        theirs = {
            key: torch.stack([nearest(one[key], budget[key] * 1.000001) for one in rivals if key in one]).amin(0)
            for key in runs
        }
        mean, other = evidence.mean(ours), evidence.mean(theirs)
        if mean[0].isinf() and other[0].isinf():
            continue
        both = mean.isinf() & other.isinf()
        ratios[recipe] = torch.where(both, 1.0, torch.where(other.isinf(), 0.0, mean / other))
        words[recipe] = "only the method here reaches it in every run" if other[0].isinf() else ""
        words[recipe] = "only SGF reaches it in every run" if mean[0].isinf() else words[recipe]
    if not ratios:
        measured = any(evidence.complete(name) for name in BEYOND) and all(sgf.values())
        reason = "neither side reaches 90 % in every run that both have" if measured else ""
        return [_missing("e", part, evidence, statement, 1.0, "lower", reason)]
    compared = most_tasks({name: rivalled[name] for name in ratios})
    best = min(compared, key=lambda one: float(ratios[one][0]))
    runs = evidence.complete(best)
    details = {
        **_runs(runs),
        "best": f"{RECIPES[best].title}, of {len(compared)} methods by these same numbers",
        **{
            f"ratio of {RECIPES[name].title}{'' if name in compared else ', on fewer tasks'}": float(one[0])
            for name, one in ratios.items()
            if name != best
        },
        "GFLOPs a step": _mean(runs, lambda rows: rows[-1].numbers["gflops"]),
        "GFLOPs a step of SGF's": _mean(budget_runs, lambda rows: rows[-1].numbers["gflops"]),
        "diversity at the end": _mean(runs, lambda rows: rows[-1].numbers["diversity"]),
    }
    values = torch.stack([ratios[name] for name in compared]).amin(0)
    recipes = (*SGF, *OTHERS, *BEYOND)
    return [_decided("e", part, evidence, statement, values, 1.0, "lower", details, recipes, "ratio", words[best])]


def all_verdicts(rows: Sequence[Row], plan: Plan) -> list[Verdict]:
    """(a), (b), (c) and (e) for the colours, one of them alone, the long prompt and the shape, (d) for the domain."""
    found = []
    for group in ("colours", "ink alone", "long prompt", "shape"):
        evidence = Evidence(rows, plan, group)
        for claim in (claim_a, claim_b, claim_c, claim_e):
            found += claim(evidence)
    found += claim_d(Evidence(rows, plan, "domain"))
    return sorted(found, key=lambda verdict: verdict.claim)


def _runs(runs: dict[Key, list[Row]]) -> dict[str, float | str]:
    tasks = list(dict.fromkeys(key[0] for key in runs))
    return {"runs": f"{len(runs)} ({', '.join(tasks)}; {len({key[1] for key in runs})} seeds)"}


def _mean(runs: dict[Key, list[Row]], number: Callable[[list[Row]], float]) -> float:
    return sum(map(number, runs.values())) / len(runs)


def _decided(
    claim: str,
    part: str,
    evidence: Evidence,
    statement: str,
    values: Tensor,
    target: float,
    better: str,
    details: dict[str, float | str],
    recipes: Sequence[str],
    unit: str = "share",
    words: str = "",
) -> Verdict:
    value, low, high, outcome = decide(values, target, better)
    if outcome != "undecided" and not evidence.settled(recipes):
        outcome += " so far"
    for task, why in evidence.invalid.items():
        details[f"left out: {task}"] = why
    numbers = (None, None, None) if words else (value, low, high)
    return Verdict(
        statement,
        unit,
        *numbers,
        target,
        better,
        outcome,
        details,
        *evidence.progress(recipes),
        words,
        claim=claim,
        group=evidence.group,
        part=part,
    )


def _missing(
    claim: str, part: str, evidence: Evidence, statement: str, target: float, better: str, reason: str = ""
) -> Verdict:
    reason = reason or "; ".join(f"{task}: {why}" for task, why in evidence.invalid.items())
    return Verdict(
        statement,
        "share",
        None,
        None,
        None,
        target,
        better,
        "undecided",
        {"reason": reason or "points not measured yet"},
        claim=claim,
        group=evidence.group,
        part=part,
    )


assert {name for names in GROUPS.values() for name in names} == set(TASKS) - {DARK.name}
