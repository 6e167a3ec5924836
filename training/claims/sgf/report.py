"""What the page of StyleGAN-Fusion shows: a table and plots of each task, and the same latents by every recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ...engine.lettering import default_font
from ...mini_world import render
from ..keeping import Row
from ..plot import Panel, Series, draw_panels
from ..report import Column, Picture, Report, number, table
from ..study import Plan
from .claims import ACCURATE, DIVERSE, LEAST_EXACT, LEAST_PRIOR
from .points import TITLES, Point
from .recipes import RECIPES, SGF
from .tasks import TASKS, Task

Shown = Callable[[Point], "Tensor | None"]  # the kept pictures [N, 3, 64, 64] of a point
GAP_PX, WORDS_PX, HEAD_PX = 4, 300, 26


def report(plan: Plan, rows: Sequence[Row], shown: Shown) -> Report:
    """The description of the page."""
    stops = ", ".join(map(str, plan.stops))
    pictures = [
        Picture("sgf.png", "Accuracy, diversity and distance over training", draw(rows)),
        Picture("sgf_samples.png", "The same latents, by every recipe", sheet(rows, shown)),
    ]
    more = [
        line
        for task in TASKS.values()
        for line in _section(task, [row for row in rows if row.point.question == task.name])
    ]
    title, drawn = "The claims of StyleGAN-Fusion, measured", f"runs looked at after {stops} steps"
    return Report(title, ("tasks",), drawn, pictures, more)


def last_rows(rows: Sequence[Row]) -> list[Row]:
    """Of each run its last measured step, in the order of TITLES."""
    last: dict[tuple[str, int], Row] = {}
    for row in sorted(rows, key=lambda row: row.point.step):
        last[row.point.method, row.point.seed] = row
    order = list(TITLES)
    return sorted(last.values(), key=lambda row: (order.index(row.point.method), row.point.seed))


def _section(task: Task, rows: Sequence[Row]) -> list[str]:
    """A task's last rows: the mean over seeds, with the lowest and highest of several, or the interval of one."""
    if not rows:
        return []
    accuracy = {row.point.method: row.numbers["accuracy"] for row in rows}
    judged = ""
    if "exact" in accuracy:
        judged = f" The judge accepts {accuracy['exact']:.1%} of the exact answers (at least {LEAST_EXACT:.0%})."
    if "prior" in accuracy and task.kind != "domain":
        judged += f" Of the prior's own pictures {accuracy['prior']:.1%} obey (at least {LEAST_PRIOR:.0%})."
    groups: dict[str, list[Row]] = {}
    for row in last_rows(rows):
        groups.setdefault(row.point.method, []).append(row)
    for recipe, group in groups.items():
        groups[recipe] = [row for row in group if row.point.step == max(row.point.step for row in group)]

    def of_trained(number: Callable[[list[Row]], int]) -> Callable[[list[Row]], str]:
        return lambda group: str(number(group)) if group[0].point.is_trained else ""

    def title(group: list[Row]) -> str:
        recipe = group[0].point.method
        return f"**{TITLES[recipe]}**" if recipe in SGF else TITLES[recipe]

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
    heading = f"## {task.title[0].upper()}{task.title[1:]}"
    return [heading, "", f"Prompt: {task.prompt!r}.{judged}", "", *table(columns, groups.values())]


def draw(rows: Sequence[Row]) -> Image.Image | None:
    """Accuracy, diversity and distance over training, a row of plots for each task."""
    panels: list[Panel] = []
    for task in TASKS.values():
        own = [row for row in rows if row.point.question == task.name]
        if any(row.point.is_trained for row in own):
            panels += [
                Panel(task.title, "steps", label, curves(own, name), top=top, level=level)
                for name, label, top, level in (
                    ("accuracy", "prompt accuracy", 1.0, ACCURATE),
                    ("diversity", "diversity of what obeys", 1.0, DIVERSE),
                    ("distance", "distance to the exact answers", 0.0, None),
                )
            ]
    return draw_panels(panels, columns=3, width=560, height=400) if panels else None


def curves(rows: Sequence[Row], name: str) -> list[Series]:
    """One series a recipe, from the source on: the mean over the seeds of a step, and its lowest and highest."""
    start = {row.point.step: [row.numbers[name]] for row in rows if row.point.method == "source"}
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.point.is_trained:
            by_step = found.setdefault(row.point.method, dict(start))
            by_step.setdefault(row.point.step, []).append(row.numbers[name])
    return [
        Series(
            TITLES[recipe],
            [(float(step), fmean(values)) for step, values in sorted(found[recipe].items())],
            [((step, step), (min(values), max(values))) for step, values in sorted(found[recipe].items())],
        )
        for recipe in RECIPES
        if recipe in found
    ]


def sheet(rows: Sequence[Row], shown: Shown) -> Image.Image | None:
    """The same latents by every recipe at the last step of seed 0, task by task."""
    strips: list[tuple[str, Tensor | None]] = []
    for task in TASKS.values():
        last = last_rows([row for row in rows if row.point.question == task.name and row.point.seed == 0])
        steps = {row.point: f", {row.point.step} steps" if row.point.is_trained else "" for row in last}
        own = [(TITLES[row.point.method] + steps[row.point], shown(row.point)) for row in last]
        own = [(words, pictures) for words, pictures in own if pictures is not None]
        strips += [(task.prompt if len(task.prompt) < 60 else task.title, None), *own] if own else []
    if not strips:
        return None
    side = render.SIDE_PX
    count = max(len(pictures) for _, pictures in strips if pictures is not None)
    height = sum(HEAD_PX if pictures is None else side + GAP_PX for _, pictures in strips)
    image = Image.new("RGB", (WORDS_PX + count * (side + GAP_PX), height), "white")
    pen, y = ImageDraw.Draw(image), 0
    for words, pictures in strips:
        row_px = HEAD_PX if pictures is None else side + GAP_PX
        pen.text((6, y + row_px // 2 - 7), words, fill="#222222", font=default_font(14 if pictures is None else 12))
        for index, picture in enumerate(render.to_uint8(pictures) if pictures is not None else ()):
            image.paste(Image.fromarray(np.ascontiguousarray(picture)), (WORDS_PX + index * (side + GAP_PX), y))
        y += row_px
    return image
