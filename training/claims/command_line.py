"""``python run.py claims PAPER``: measure a paper's sweep, decide its claims, write table, plots and JSON lines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .idg.study import IdgStudy
from .report import print_lines, write_report
from .sgf.study import SgfStudy
from .study import gather

STUDIES = {study.paper: study for study in (IdgStudy, SgfStudy)}
CONFIRM = "confirm"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="run.py claims",
        description="Measure a paper's claims on the mini world. Results go to standard output, one JSON object a "
        "line. Every point is kept: stop with Ctrl+C whenever you like, the same command goes on; started twice, two "
        "processes share the work.",
    )
    titles = "; ".join(f"{name}: {study.title}" for name, study in STUDIES.items())
    found.add_argument("paper", choices=STUDIES, help=titles)
    size = found.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a coarse look, in one to two hours on two cores")
    size.add_argument(
        "--tiny", action="store_true", help="show that everything runs, in seconds; the numbers mean nothing"
    )
    size.add_argument(
        "--confirm",
        action="store_true",
        help="idg only: draw the best settings of the sweep, as far as it is measured, anew: 2,000 samples each of "
        "another seed; --samples then says which sweep",
    )
    found.add_argument(
        "--work",
        type=Path,
        default=Path("mini_world_work") / "claims",
        metavar="DIR",
        help="folder of points, trained models and latents (default: %(default)s)",
    )
    found.add_argument(
        "--report", type=Path, metavar="DIR", help="folder for PAPER.md, .png and .jsonl (default: WORK/[PAPER/]SIZE)"
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

    size = next((name for name in ("tiny", "quick", CONFIRM) if getattr(options, name)), "full")
    study_class = STUDIES[options.paper]
    if size == CONFIRM and study_class is not IdgStudy:
        parser().error(f"--confirm: expected the paper idg, whose sweep chooses among settings, found {options.paper}")
    study = study_class.open(size, options.work, options.samples)
    if options.list:
        for point in study.plan.points:
            print(f"{'measured' if study.find(point) else '-':<9}{point}")
        return 0
    rows, stopped = gather(study, minutes=options.minutes, limit=options.limit, measuring=not options.report_only)
    if not rows:
        print("nothing measured yet, so there is nothing to report", file=sys.stderr)
        return 130 if stopped else 0
    lines, paths = write_report(options.report or study.folder / size, study, rows)
    print_lines(lines)
    for path in paths:
        print(f"wrote {path}", file=sys.stderr)
    return 0
