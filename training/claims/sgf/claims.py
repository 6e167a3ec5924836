"""The claims as a table, and the few numbers that they ask for.

Replicates resample the measured latents, the same ones for every point, and the training seeds of each task, so an
interval holds both kinds of chance; with three seeds the second is known roughly, with one not at all. A run may stop
early: what it keeps is taken at the best of its stops that reaches the accuracy asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from ..deciding import Claim, Details, Number, Sides
from ..keeping import Row, columns
from .recipes import BEYOND, DIRECTIONAL, LAYERS, RECIPES, RECONSTRUCTION, SGF
from .sweep import Point
from .tasks import COLOURS, DARK, DOMAIN, INK, LONG, SEVEN, TASKS

ACCURATE, DIVERSE = 0.9, 0.8
LEAST_EXACT = 0.95  # of the exact answers that the judge must accept
LEAST_PRIOR = 0.9  # of the prior's own pictures of the prompt: a critic that does not know it can teach nobody
DEFAULT = "sds_directional"  # SGF's setting whose full run is the budget of (e)
# What counts as an effect: the learned constant is in no layer, so layer selection changes a little less in any case,
# and a handful of samples more is no domain.
FEWER, PULLED = 0.9, 0.1
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
PROMPTED = tuple(GROUPS)[:-1]
OTHERS = tuple(name for name in (*DIRECTIONAL, *RECONSTRUCTION) if name not in SGF)  # SGF's settings too

Key = tuple[str, int]  # task, seed
Runs = dict[Key, list[Row]]  # the rows of each run of a recipe, in the order of steps
RunsOf = Mapping[str, Runs]  # by recipe
Measure = Callable[[Claim, Runs, RunsOf], Number]  # of the runs of one recipe that have rivals


def mean(values: Mapping[Key, Tensor]) -> Tensor:
    """The mean over tasks of the mean over seeds, replicates resampling the seeds: [1 + R]."""
    parts = []
    for task in dict.fromkeys(key[0] for key in values):
        own = torch.stack([values[key] for key in sorted(values) if key[0] == task])  # [S, 1 + R]
        weights = torch.full_like(own, 1 / len(own))
        drawn = torch.randint(len(own), own[:, 1:].shape, generator=Generator().manual_seed(len(own)))
        weights[:, 1:] = torch.stack([(drawn == seed).double().mean(0) for seed in range(len(own))])
        parts.append(torch.where(weights > 0, own * weights, 0.0).sum(0))
    return torch.stack(parts).mean(0)


def numbers_of(rows: Sequence[Row], name: str) -> Tensor:
    """[P, 1] of a number without replicates."""
    return torch.tensor([[row.numbers[name]] for row in rows]).double()


def accurate(rows: Sequence[Row]) -> Tensor:
    """Which stops of a run are accurate enough, in every replicate: bool [P, 1 + R]."""
    return columns(rows, "accuracy") >= ACCURATE


def ends(name: str, claim: Claim, runs: Runs, rivals: RunsOf) -> Number:
    """A number at the end of training, less that of the rival where there is one."""
    # What `measures.diversity` says where hardly any sample obeys.
    silent = sum(rows[-1].numbers[name] == 0.0 for rows in runs.values()) if name == "diversity" else 0
    if silent:
        reason = f"at the end of {silent} of {len(runs)} runs hardly any sample obeys: diversity is unknown"
        return Number(reason=reason)
    values = {key: rows[-1].column(name) for key, rows in runs.items()}
    for rival in claim.sides.get("rivals", ()):
        values = {key: value - rivals[rival][key][-1].column(name) for key, value in values.items()}
    return Number(mean(values))


def kept(claim: Claim, runs: Runs, rivals: RunsOf) -> Number:
    """The highest diversity among the stops that are accurate enough; 0 without any."""
    best = {key: columns(rows, "diversity").where(accurate(rows), 0.0).amax(0) for key, rows in runs.items()}
    reached = sum(bool(accurate(rows)[:, 0].any()) for rows in runs.values())
    return Number(mean(best), {"runs that reach 90 %": f"{reached} of {len(runs)}"})


def fewer(name: str, claim: Claim, runs: Runs, rivals: RunsOf) -> Number:
    """How much of the generator had changed at the first stop that is accurate enough, over the rival's."""

    def first(rows: Sequence[Row]) -> Tensor:
        changed = numbers_of(rows, name).where(accurate(rows), torch.inf)
        return changed.gather(0, accurate(rows).long().argmax(0, keepdim=True))[0]

    before = {key: first(rows) for key, rows in rivals[claim.sides["rivals"][0]].items()}
    usable = {key: rows for key, rows in runs.items() if torch.isfinite(before[key][0])}
    ratios = {key: (first(rows) / before[key]).nan_to_num(1.0, torch.inf) for key, rows in usable.items()}
    return Number(mean(ratios)) if ratios else Number(reason="no run of SDS with all layers reaches the accuracy")


def nearer(claim: Claim, runs: Runs, rivals: RunsOf) -> Number:
    """The distance over that of the best rival, both at the stops that are accurate enough and within the operations of
    SGF's full run. Where only one side reaches it, the ratio is 0 or infinite and is said in words."""

    def cost(rows: Sequence[Row]) -> Tensor:
        return numbers_of(rows, "gflops") * torch.tensor([[row.point.step] for row in rows])

    def nearest(key: Key, recipes: Sequence[Runs]) -> Tensor:
        rows = [row for other in recipes for row in other.get(key, ())]
        budget = cost(rivals[DEFAULT][key][-1:]) * 1.000001  # within a millionth: products of rounded numbers
        return columns(rows, "distance").where(accurate(rows) & (cost(rows) <= budget), torch.inf).amin(0)

    others = [rivals[name] for name in claim.sides["rivals"]]
    ours, theirs = (mean({key: nearest(key, side) for key in runs}) for side in ([runs], others))
    if ours[0].isinf() and theirs[0].isinf():
        return Number(reason="neither side reaches 90 % in every run that both have")
    words = "only the method here reaches it in every run" if theirs[0].isinf() else ""
    words = "only SGF reaches it in every run" if ours[0].isinf() else words
    ratio = torch.where(theirs.isinf(), ours.isinf().double(), ours / theirs)
    return Number(ratio, {}, words)


def best(measure: Measure, claim: Claim, sides: Sides) -> Number:
    """The best recipe's number; every replicate chooses anew. Recipes that were asked fewer of the tasks than others do
    not count: tasks are not equally hard."""
    runs = complete_runs([row for side in sides.values() for row in side], claim.facts["last step"])
    rivals = [runs[rival] for rival in claim.sides.get("rivals", ()) if rival not in OTHERS]
    found: dict[str, tuple[Runs, Number, Tensor]] = {}
    reason = Number.reason
    for recipe in claim.sides["ours"]:
        own = {key: rows for key, rows in runs[recipe].items() if all(key in rival for rival in rivals)}
        number = measure(claim, own, runs) if own else Number()
        if number.values is not None:
            found[recipe] = own, number, number.values
        elif own:
            reason = number.reason
    tasks = {recipe: len({task for task, _ in own}) for recipe, (own, _, _) in found.items()}
    compared = [recipe for recipe in found if tasks[recipe] == max(tasks.values())]
    if not compared:
        return Number(reason=reason)
    stacked = torch.stack([found[recipe][2] for recipe in compared])
    values = stacked.amin(0) if claim.better == "lower" else stacked.amax(0)
    chosen = compared[int((stacked[:, 0] == values[0]).int().argmax())]
    own, number, _ = found[chosen]
    names, seeds = dict.fromkeys(task for task, _ in own), {seed for _, seed in own}
    details: Details = {"runs": f"{len(own)} ({', '.join(names)}; {len(seeds)} seeds)"}
    details |= {"setting": RECIPES[chosen].title, "settings compared": len(compared)}
    return Number(values, {**details, **number.details, **claim.facts["left out"]}, number.words)


def complete_runs(rows: Sequence[Row], last_step: int) -> dict[str, Runs]:
    """By recipe, the runs of which the last stop is measured."""
    found: dict[str, Runs] = defaultdict(dict)
    for end in rows:
        if end.point.step == last_step:
            own = [row for row in rows if row.point.run == end.point.run]
            key = end.point.question, end.point.seed
            found[end.point.method][key] = sorted(own, key=lambda row: row.point.step)
    return found


def row(
    letter: str, part: str, statement: str, target: float, measure: Measure, *sides: tuple[str, ...], **more: Any
) -> Claim:
    """A row of the table. sides: ours, and the rivals' where there are any; further fields as `deciding.Claim`."""
    more = {"better": "higher", "unit": "share", "about": PROMPTED, **more}
    named: dict[str, tuple[str, ...]] = dict(zip(("ours", "rivals"), sides))
    return Claim(letter, statement, target, partial(best, measure), named, part, **more)


ENDS, SDS = partial(ends, "accuracy"), ("sds",)
REACHES = "SDS alone: prompt accuracy at the end of training"
LOSES = "SDS alone: its share of the source's diversity at the end"
KEEPS = "{} regularizer: share of the source's diversity at its best stop of accuracy 90 %"
CHANGES = "{} when accuracy reaches 90 %: with layer selection, over without"
PULLS = "{} as critic: samples judged to be of the domain at the end, less those of the prompt alone"
NEARER = (
    "best method here: distance to the exact answers at an accuracy of 90 %, over the best of SGF's settings, both "
    "within the operations of SGF's full run with the directional regularizer"
)
MODELS = ("domain", "domain_mild", "domain_directional")
CRITICS = {
    "domain model": (MODELS, SDS),
    "fine-tuned model": (("fine_tune",), SDS),
    "domain model, way back": (tuple(f"{name}_back" for name in MODELS), ("sds_back",)),
    "fine-tuned model, way back": (("fine_tune_back",), ("sds_back",)),
}
LOWER: dict[str, Any] = {"better": "lower", "unit": "ratio"}
MOVED, CHANGED = "distance moved", "parameters changed"
CLAIMS = (
    row("a", "reaches the prompt", REACHES, ACCURATE, ENDS, SDS),
    row("a", "loses diversity", LOSES, DIVERSE, partial(ends, "diversity"), SDS, better="lower"),
    row("b", "directional", KEEPS.format("directional"), DIVERSE, kept, DIRECTIONAL),
    row("b", "reconstruction", KEEPS.format("reconstruction"), DIVERSE, kept, RECONSTRUCTION),
    row("c", CHANGED, CHANGES.format(CHANGED), FEWER, partial(fewer, "changed"), LAYERS, SDS, **LOWER),
    row("c", MOVED, CHANGES.format(MOVED), FEWER, partial(fewer, "moved"), LAYERS, SDS, **LOWER),
    *(row("d", part, PULLS.format(part), PULLED, ENDS, *sides, about=("domain",)) for part, sides in CRITICS.items()),
    row("e", "equal compute", NEARER, 1.0, nearer, BEYOND, (*SGF, *OTHERS), **LOWER),
)


def claims(rows: Sequence[Row], points: Iterable[Point]) -> list[Claim]:
    """Every claim of the table, of each of its groups of tasks."""
    invalid, last_step = invalid_tasks(rows), max((point.step for point in points), default=0)
    bound = (in_group(claim, group, invalid, last_step) for claim in CLAIMS for group in claim.about)
    return sorted(bound, key=lambda claim: claim.letter)


def in_group(claim: Claim, group: str, invalid: Mapping[str, str], last_step: int) -> Claim:
    """A row of the table, asked of one group of tasks."""
    left_out = {task: why for task, why in invalid.items() if task in GROUPS[group]}
    tasks = tuple(task for task in GROUPS[group] if task not in invalid)
    return replace(
        claim,
        name=f"{group}/{claim.letter}/{claim.part}".replace(" ", "_"),
        about=(group,),
        questions=tasks,
        # What a task is held against: an answer that the judge refuses, or a prompt unknown to the prior, voids it.
        frames=("exact", "prior"),
        invalid="" if tasks else "; ".join(f"{task}: {why}" for task, why in left_out.items()),
        facts={"last step": last_step, "left out": {f"left out: {task}": why for task, why in left_out.items()}},
    )


def invalid_tasks(rows: Sequence[Row]) -> dict[str, str]:
    """Why a task decides nothing: the judge refuses its exact answers, or the prior itself cannot draw its prompt."""
    found: dict[str, str] = {}
    for row in rows:
        task, share = row.point.question, row.numbers["accuracy"]
        if row.point.method == "exact" and share < LEAST_EXACT:
            found[task] = f"the judge accepts {share:.0%} of the exact answers (at least {LEAST_EXACT:.0%})"
        if row.point.method == "prior" and share < LEAST_PRIOR and TASKS[task].kind != "domain":
            found[task] = f"of the prior's own pictures {share:.0%} obey the prompt (at least {LEAST_PRIOR:.0%})"
    return found
