"""What the page of StyleGAN-Fusion shows: a table of each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..keeping import Row
from ..report import Column, Report, capitalized, number, table
from ..study import Plan
from .claims import LEAST_EXACT, LEAST_PRIOR
from .recipes import RECIPES, SGF
from .tasks import TASKS, Task

FRAMES = {"source": "source, not adapted", "exact": "exact answers", "prior": "the prior's own pictures"}
TITLES = {**FRAMES, **{name: recipe.title for name, recipe in RECIPES.items()}}


def report(plan: Plan, rows: Sequence[Row]) -> Report:
    """The description of the page."""
    more = []
    for task in TASKS.values():
        own = [row for row in rows if row.point.question == task.name]
        more += _section(task, own) if own else []
    drawn = f"runs looked at after {', '.join(map(str, plan.stops))} steps"
    return Report("The claims of StyleGAN-Fusion, measured", ("tasks",), drawn, more)


def last_rows(rows: Sequence[Row]) -> list[list[Row]]:
    """Of each method, in the order of TITLES, the rows at its last measured step, a seed each."""
    found: dict[str, list[Row]] = {}
    for method in TITLES:
        own = [row for row in rows if row.point.method == method]
        found[method] = [row for row in own if row.point.step == max(other.point.step for other in own)]
    return [sorted(own, key=lambda row: row.point.seed) for own in found.values() if own]


def _section(task: Task, rows: Sequence[Row]) -> list[str]:
    """A task's last rows: the mean over seeds, with the lowest and highest of several, or the interval of one."""
    accuracy = {row.point.method: row.numbers["accuracy"] for row in rows}
    judged = ""
    if "exact" in accuracy:
        judged = f" The judge accepts {accuracy['exact']:.1%} of the exact answers (at least {LEAST_EXACT:.0%})."
    if "prior" in accuracy and task.kind != "domain":
        judged += f" Of the prior's own pictures {accuracy['prior']:.1%} obey (at least {LEAST_PRIOR:.0%})."

    def of_trained(number: Callable[[list[Row]], int]) -> Callable[[list[Row]], str]:
        return lambda group: str(number(group)) if group[0].point.is_trained else ""

    def title(group: list[Row]) -> str:
        method = group[0].point.method
        return f"**{TITLES[method]}**" if method in SGF else TITLES[method]

    _, kept = number("correspondence", ".1%", plain=True)
    named = [head for head, _ in task.named] or ["ink", "ground", "world"]
    columns: list[Column] = [
        ("recipe", title),
        ("steps", of_trained(lambda group: group[0].point.step)),
        ("seeds", of_trained(len)),
        number("distance", ".1f"),
        number("to the prior's pictures", ".1f", "distance_rendered", plain=True),
        number("accuracy", ".1%"),
        *(number(f"{head} right", ".1%", plain=True) for head in named),
        number("second judge", ".1%", "accuracy_second_judge", plain=True),
        ("correspondence", lambda group: "" if group[0].point.method == "prior" else kept(group)),
        number("diversity", ".2f"),
        number("recall", ".2f", plain=True),
        number("handwritten", ".1%", plain=True),
        number("changed", ".1%", plain=True),
        number("moved", ".3f", plain=True),
        number("GFLOPs a step", ".2f", "gflops", plain=True),
    ]
    lines = table(columns, last_rows(rows))
    return [f"## {capitalized(task.title)}", "", f"Prompt: {task.prompt!r}.{judged}", "", *lines]
