"""``python run.py claims PAPER``: measure a paper's sweep, decide its claims, write a page and JSON lines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..engine.lock import Busy, locked
from .bake.study import BakeStudy
from .idg.study import IdgStudy
from .report import write_report
from .sgf.study import SgfStudy

STUDIES = {study.paper: study for study in (IdgStudy, SgfStudy, BakeStudy)}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="run.py claims",
        description="Measure a paper's claims on the mini world. Every point is kept: stop with Ctrl+C whenever you "
        "like, the report is written from what there is, and the same command goes on.",
    )
    titles = "; ".join(f"{name}: {study.title}" for name, study in STUDIES.items())
    found.add_argument("paper", choices=STUDIES, help=titles)
    size = found.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a coarse look, in half an hour to two hours on two cores")
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
        help="folder of points, trained models and reports (default: %(default)s)",
    )
    found.add_argument("--samples", type=int, metavar="N", help="samples a point instead of the sweep's own number")
    found.add_argument("--report-only", action="store_true", help="measure nothing, report what was measured before")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 also when stopped by Ctrl+C."""
    options = parser().parse_args(arguments)
    if options.samples is not None and options.samples < 10:
        parser().error(f"--samples: expected 10 or more, found {options.samples}")
    size = "quick" if options.quick else "confirm" if options.confirm else "full"
    study_class = STUDIES[options.paper]
    if size == "confirm" and study_class is not IdgStudy:
        parser().error(f"--confirm: expected the paper idg, whose sweep chooses among settings, found {options.paper}")
    try:
        with locked(options.work):
            study = study_class.open(size, options.work, options.samples)
            rows = study.gather(measuring=not options.report_only)
    except Busy:
        parser().error(f"--work: another process is measuring in {options.work}; wait for it or choose another folder")
    if not rows:
        print("nothing measured yet, so there is nothing to report", file=sys.stderr)
        return 0
    for path in write_report(study.folder / size, study, rows):
        print(f"wrote {path}", file=sys.stderr)
    return 0
