"""``python run.py claims idg``: measure the sweep, decide the claims, write table, plot and JSON lines."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from ..assets import load_autoencoder, load_classifier, load_mini_world

PAPERS = ("idg",)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="run.py claims",
        description="Measure a paper's claims on the mini world. Results go to standard output, one "
        "JSON object a line. Every point is kept: stop with Ctrl+C whenever you like, the same command goes on.",
    )
    found.add_argument("paper", choices=PAPERS, help="idg: in-domain guidance (arXiv 2312.08195)")
    size = found.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a coarse look: 30 points of 200 samples, two models of 300 steps"
    )
    size.add_argument(
        "--tiny", action="store_true", help="show that everything runs, in seconds; the numbers mean nothing"
    )
    found.add_argument(
        "--work",
        type=Path,
        default=Path("mini_world_work") / "claims",
        metavar="DIR",
        help="folder of points, trained models and latents (default: %(default)s)",
    )
    found.add_argument(
        "--report", type=Path, metavar="DIR", help="folder for idg.md, idg.png and idg.jsonl (default: WORK/SIZE)"
    )
    found.add_argument("--samples", type=int, metavar="N", help="samples a point instead of the sweep's own number")
    found.add_argument("--minutes", type=float, metavar="M", help="start no further point after M minutes, then report")
    found.add_argument("--limit", type=int, metavar="N", help="measure at most N new points, then report")
    found.add_argument("--report-only", action="store_true", help="measure nothing, report what was measured before")
    found.add_argument("--list", action="store_true", help="list the points in order and whether they were measured")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 also when stopped by Ctrl+C after a report was written, 130 when there was nothing to report."""
    options = parser().parse_args(arguments)
    for name, least in (("limit", 0), ("minutes", 0), ("samples", 10)):
        given = getattr(options, name)
        if given is not None and not given >= least:
            parser().error(f"--{name}: expected {least} or more, found {given}")
    from .models import Models
    from .points import Bench, Row
    from .report import floor_lines, row_line, say_lines, verdict_line, write_report
    from .sweep import PLANS
    from .verdicts import all_verdicts

    plan = PLANS["tiny" if options.tiny else "quick" if options.quick else "full"]()
    if options.samples:
        plan = replace(plan, sampling=replace(plan.sampling, samples=options.samples))
    world = load_mini_world()
    folder = options.work / plan.name if options.tiny else options.work
    wanted = [point.model for point in plan.points if point.model]
    models = Models(folder / "models", world, plan.images, plan.batch, wanted)
    bench = Bench(folder / "points", models, world, load_classifier(), plan.sampling, load_classifier(held_out=True))
    if options.list:
        for point in plan.points:
            print(f"{'measured' if bench.find(point) else '-':<9}{point}")
        return 0
    rows: list[Row] = []
    measured, stopped, started = 0, False, time.monotonic()
    for number, point in enumerate(plan.points, 1):
        row = bench.find(point)
        minutes = (time.monotonic() - started) / 60
        late = options.minutes is not None and minutes >= options.minutes
        if row is None and not (options.report_only or stopped or late or measured == options.limit):
            print(f"{number}/{len(plan.points)} after {minutes:.1f} min", file=sys.stderr, flush=True)
            try:
                row = bench.measure(point)
                measured += 1
                say_lines([row_line(row)])
            except KeyboardInterrupt:
                stopped = True
                print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        if row is not None:
            rows.append(row)
    if not rows:
        print("nothing measured yet, so there is nothing to report", file=sys.stderr)
        return 130 if stopped else 0
    autoencoder, _ = load_autoencoder()
    asked = dict.fromkeys(row.point.question for row in rows)
    floors = {name: bench.floors(name, autoencoder) for name in asked}
    verdicts = all_verdicts(rows, floors, plan)
    say_lines([*floor_lines(rows, floors, plan), *(verdict_line(verdict, plan) for verdict in verdicts)])
    for path in write_report(options.report or folder / plan.name, plan, rows, floors, verdicts):
        print(f"wrote {path}", file=sys.stderr)
    return 0
