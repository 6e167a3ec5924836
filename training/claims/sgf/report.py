"""Points and verdicts as JSON lines, as Markdown with tables, and as plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ....guidance.files.atomic import replacing, write_text
from ...mini_world import render
from .. import lines
from ..deciding import shown_details, shown_interval, shown_target
from ..keeping import Row
from ..plot import Curves, Series, draw_panels
from .points import FIXED, Point
from .recipes import RECIPES, SGF
from .sweep import Plan
from .tasks import TASKS, Task
from .verdicts import ACCURATE, DIVERSE, LEAST_EXACT, LEAST_PRIOR, Verdict

FIXED_TITLES = {"source": "source, not adapted", "exact": "exact answers", "prior": "the prior's own pictures"}
HOW_IT_IS_MEASURED = """\
The source draws white handwriting on black, and its latent alone decides the picture; so the right answer to a colour
prompt is known for every latent: its own picture, recoloured. Distance is the Frechet distance on the judge's 64
features to the whole set of right answers ({answers} of the source's latents; of a shape, those that show it; of the
domain, held-out handwriting in its colours), and beside it to {rendered} pictures that the prior itself draws of the
prompt. Accuracy is the share of samples with everything that the prompt names (of the domain: one of its colours for
ink and ground, and judged handwritten), correspondence the share of latents that keep what it leaves open. Diversity is
the mean distance to the class mean, within digit classes, of the samples that obey, over the right answers'; recall the
share of right answers within the manifold of the samples (arXiv 1904.06991, k = 3). The second judge never saw the
shapes that the generative models learned. Changed is the share of all numbers of the generator that differ from the
source's, moved the norm of the difference over the norm of the source. GFLOPs are counted in one step, forward and
backward, of this project's implementation, which is cheaper than the released organisation of the same update (`run.py
bench distillation`).

Intervals are 95 % bootstrap intervals: over the measured latents, the same ones for every point ({replicates}
replicates, the bias of the distance removed as in `claims idg`), and in verdicts also over training seeds. Tables give
the mean over seeds at the last step that was measured, with the lowest and highest seed where there are several."""


def title_of(recipe: str) -> str:
    return FIXED_TITLES.get(recipe) or RECIPES[recipe].title


def row_line(row: Row) -> str:
    numbers = {key: value for key, value in row.numbers.items() if key != "distance"}
    point = row.point
    return lines.json_line(
        "sgf",
        f"{point.task}/{point.recipe}",
        row.numbers["distance"],
        "frechet",
        row.sampling.samples,
        row.sampling.seed,
        step=point.step,
        training_seed=point.seed,
        prompt=TASKS[point.task].prompt,
        **numbers,
        intervals=row.intervals,
    )


def verdict_line(verdict: Verdict, plan: Plan) -> str:
    return lines.decision_line("sgf", verdict.name, verdict, plan.sampling.samples, plan.sampling.seed)


def write_report(
    folder: Path,
    plan: Plan,
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
    shown: Callable[[Point], Tensor | None] = lambda point: None,
) -> list[Path]:
    """Write sgf.jsonl, sgf.png, sgf_samples.png and sgf.md into a folder; returns their paths.

    shown: the kept pictures [N, 3, 64, 64] of a point, where there are any.
    """
    lines_ = [verdict_line(verdict, plan) for verdict in verdicts] + [row_line(row) for row in rows]
    written = [folder / "sgf.jsonl"]
    write_text(written[0], "\n".join(lines_) + "\n")
    for name, picture in (("sgf", draw(rows)), ("sgf_samples", sheet(rows, shown))):
        if picture is not None:
            written.append(folder / f"{name}.png")
            with replacing(written[-1]) as file:
                picture.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)  # a third of the bytes
    has = {path.stem for path in written if path.suffix == ".png"}
    written.append(folder / "sgf.md")
    write_text(written[-1], markdown(plan, rows, verdicts, has))
    return written


# ------------------------------------------------------------------------------------------------------------ pictures


def draw(rows: Sequence[Row]) -> Image.Image | None:
    """Accuracy, diversity and distance over training, a row of plots for each task."""
    panels: list[Curves] = []
    for task in TASKS.values():
        mine = [row for row in rows if row.point.task == task.name]
        if not any(row.point.recipe in RECIPES for row in mine):
            continue
        for name, label, top, level in (
            ("accuracy", "prompt accuracy", 1.0, ACCURATE),
            ("diversity", "diversity of what obeys", 1.0, DIVERSE),
            ("distance", "distance to the exact answers", 0.0, None),
        ):
            panels.append(Curves(task.title, "steps", label, curves(mine, name), top, level))
    return draw_panels(panels, columns=3, width_px=560, height_px=400) if panels else None


def curves(rows: Sequence[Row], name: str) -> list[Series]:
    """One series a recipe, from the source on: the mean over the seeds of a step, and its lowest and highest."""
    start = [row.numbers[name] for row in rows if row.point.recipe == "source"]
    found = []
    for recipe in RECIPES:
        by_step: dict[int, list[float]] = {0: start} if start else {}
        for row in rows:
            if row.point.recipe == recipe:
                by_step.setdefault(row.point.step, []).append(row.numbers[name])
        if set(by_step) <= {0}:
            continue
        points = [(float(step), fmean(values)) for step, values in sorted(by_step.items())]
        ends = [((step, step), (min(by_step[step]), max(by_step[step]))) for step in sorted(by_step)]
        found.append(Series(title_of(recipe), points, ends))
    return found


def sheet(rows: Sequence[Row], shown: Callable[[Point], Tensor | None]) -> Image.Image | None:
    """The same latents by every recipe at the last step of seed 0, task by task."""
    strips: list[tuple[str, Tensor | None]] = []
    for task in TASKS.values():
        own = []
        for row in last_rows([row for row in rows if row.point.task == task.name and row.point.seed == 0]):
            pictures = shown(row.point)
            if pictures is not None:
                steps = f", {row.point.step} steps" if row.point.recipe in RECIPES else ""
                own.append((title_of(row.point.recipe) + steps, pictures))
        if own:
            strips += [(task.prompt if len(task.prompt) < 60 else task.title, None), *own]
    if not strips:
        return None
    side, gap, words_px, head_px = render.SIDE_PX, 4, 300, 26
    count = max(len(pictures) for _, pictures in strips if pictures is not None)
    height = sum(head_px if pictures is None else side + gap for _, pictures in strips)
    image = Image.new("RGB", (words_px + count * (side + gap), height), "white")
    pen, y = ImageDraw.Draw(image), 0
    for words, pictures in strips:
        if pictures is None:
            _write(pen, 6, y + 6, words, 14)
            y += head_px
            continue
        _write(pen, 6, y + side // 2 - 7, words, 12)
        for index, picture in enumerate(render.to_uint8(pictures)):
            image.paste(Image.fromarray(np.ascontiguousarray(picture)), (words_px + index * (side + gap), y))
        y += side + gap
    return image


def _write(pen: ImageDraw.ImageDraw, x: int, y: int, words: str, size: int) -> None:
    try:
        font = ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        font = ImageFont.load_default()
    pen.text((x, y), words, fill="#222222", font=font)


# ---------------------------------------------------------------------------------------------------------------- page


def last_rows(rows: Sequence[Row]) -> list[Row]:
    """Of each run its last measured step, in the order of FIXED and RECIPES."""
    last: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = row.point.recipe, row.point.seed
        if key not in last or row.point.step > last[key].point.step:
            last[key] = row
    order = {name: index for index, name in enumerate((*FIXED, *RECIPES))}
    return sorted(last.values(), key=lambda row: (order[row.point.recipe], row.point.seed))


def markdown(plan: Plan, rows: Sequence[Row], verdicts: Sequence[Verdict], pictures: set[str]) -> str:
    """The whole result as a page."""
    sampling = plan.sampling
    took = lines.hours(rows, len(plan.points), "Adapting, drawing and scoring them")
    parts = [
        "# The claims of StyleGAN-Fusion, measured",
        "",
        f"Made by `python run.py claims sgf{'' if plan.name == 'full' else f' --{plan.name}'}`; do not edit. "
        f"{len(rows)} of {len(plan.points)} points of the sweep are measured, {sampling.samples} latents each, runs "
        f"looked at after {', '.join(map(str, plan.stops))} steps. {took} Settings and every number: sgf.jsonl.",
        "",
    ]
    if "sgf" in pictures:
        parts += ["![Accuracy, diversity and distance over training](sgf.png)", ""]
    coarse = ", or, as in all of this coarse sweep, that few settings and seeds are asked." if plan.coarse else "."
    parts += [
        "## Verdicts",
        "",
        f'"So far" means that points are missing that could still turn the outcome{coarse}',
        "",
        "| claim | tasks | number | value (95 % interval) | target | points | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for verdict in verdicts:
        counted = f"{verdict.measured} of {verdict.planned}" if verdict.planned else "-"
        parts.append(
            f"| ({verdict.claim}) | {verdict.group} | {verdict.statement} | {shown_interval(verdict)} | "
            f"{shown_target(verdict)} | {counted} | **{verdict.outcome}** |"
        )
    parts += ["", "What stands behind them:", ""]
    parts += [f"* ({verdict.claim}) {verdict.group}, {verdict.part}: {shown_details(verdict)}." for verdict in verdicts]
    parts.append("")
    if "sgf_samples" in pictures:
        parts += ["![The same latents, by every recipe](sgf_samples.png)", ""]
    for task in TASKS.values():
        parts += _table(task, [row for row in rows if row.point.task == task.name])
    how = HOW_IT_IS_MEASURED.format(
        answers=sampling.answers, rendered=sampling.rendered, replicates=sampling.replicates
    )
    parts += ["## How it is measured", "", how, ""]
    return "\n".join(parts)


def _table(task: Task, rows: Sequence[Row]) -> list[str]:
    """A task's last rows, seeds together."""
    if not rows:
        return []
    names = [f"{head} right" for head, _ in task.named] or ["ink right", "ground right", "world right"]
    head = [
        "recipe",
        "steps",
        "seeds",
        "distance",
        "to the prior's pictures",
        "accuracy",
        *names,
        "second judge",
        "correspondence",
        "diversity",
        "recall",
        "handwritten",
        "changed",
        "moved",
        "GFLOPs a step",
    ]
    exact = [row.numbers["accuracy"] for row in rows if row.point.recipe == "exact"]
    judged = f" The judge accepts {exact[0]:.1%} of the exact answers (at least {LEAST_EXACT:.0%})." if exact else ""
    prior = [row.numbers["accuracy"] for row in rows if row.point.recipe == "prior"]
    if prior and task.kind != "domain":
        judged += f" Of the prior's own pictures {prior[0]:.1%} obey (at least {LEAST_PRIOR:.0%})."
    parts = [
        f"## {task.title[0].upper()}{task.title[1:]}",
        "",
        f"Prompt: {task.prompt!r}.{judged}",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    last = last_rows(rows)
    for recipe in dict.fromkeys(row.point.recipe for row in last):
        own = [row for row in last if row.point.recipe == recipe]
        step = max(row.point.step for row in own)
        own = [row for row in own if row.point.step == step]
        trained, moving = recipe in RECIPES, recipe not in ("exact", "prior")
        cells = [
            f"**{title_of(recipe)}**" if recipe in SGF else title_of(recipe),
            str(step) if trained else "",
            str(len(own)) if trained else "",
            _cell(own, "distance", ".1f"),
            _cell(own, "distance_rendered", ".1f"),
            _cell(own, "accuracy", ".1%"),
            *(_cell(own, name.replace(" ", "_"), ".1%") for name in names),
            _cell(own, "accuracy_second_judge", ".1%"),
            _cell(own, "correspondence", ".1%") if moving or recipe == "exact" else "",
            _cell(own, "diversity", ".2f"),
            _cell(own, "recall", ".2f"),
            _cell(own, "handwritten", ".1%"),
            *(
                _cell(own, name, form) if trained else ""
                for name, form in (("changed", ".1%"), ("moved", ".3f"), ("gflops", ".2f"))
            ),
        ]
        parts.append(f"| {' | '.join(cells)} |")
    return [*parts, ""]


def _cell(rows: Sequence[Row], name: str, form: str) -> str:
    """The mean over seeds, with the lowest and highest of several, or the interval of one where it has one."""
    values = [row.numbers[name] for row in rows]
    if len(values) > 1:
        ends = min(values), max(values)
    else:
        ends = rows[0].intervals.get(name)
    span = f" ({ends[0]:{form}} to {ends[1]:{form}})" if ends and name in ("distance", "accuracy", "diversity") else ""
    return f"{fmean(values):{form}}{span}"
