"""``python run.py claims PAPER``: measure a paper's sweep, decide its claims, write table, plot and JSON lines."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ..engine.lock import Busy
from .keeping import Row
from .lines import say_lines

# Modules with open_study(size, work, samples) -> Study.
STUDIES = {"idg": ".idg.study", "sgf": ".sgf.study"}
WAIT_S = 10  # before looking again at what other processes measure
TITLES = {
    "idg": "in-domain guidance (arXiv 2312.08195)",
    "sgf": "StyleGAN-Fusion, diffusion guided adaptation of generators (arXiv 2212.04473)",
}


class Study(Protocol):
    """A paper's sweep: points in order, each measured once and kept."""

    points: Sequence[Any]
    folder: Path

    def find(self, point: Any) -> Row | None:
        """The point as measured before, or None."""

    def measure(self, point: Any) -> Row:
        """The point, measured now where it is missing. Raises Busy while another process does what it takes."""

    def line(self, row: Row) -> str:
        """The row as a JSON line."""

    def conclude(self, rows: Sequence[Row]) -> tuple[list[str], Callable[[Path], list[Path]]]:
        """The lines beside the rows', verdicts among them, and what writes the report into a folder."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="run.py claims",
        description="Measure a paper's claims on the mini world. Results go to standard output, one "
        "JSON object a line. Every point is kept: stop with Ctrl+C whenever you like, the same command goes on; "
        "started twice, two processes share the work.",
    )
    found.add_argument("paper", choices=STUDIES, help="; ".join(f"{name}: {title}" for name, title in TITLES.items()))
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


def gather(study: Study, options: argparse.Namespace) -> tuple[list[Row], bool]:
    """(the rows in the plan's order, measured now as far as the options allow; whether Ctrl+C ended that).

    What another process is at is left to it, and looked at again until it is there: should that process end without it,
    it is measured here.
    """
    rows: dict[int, Row] = {}
    left, measured, stopped, started = list(enumerate(study.points, 1)), 0, False, time.monotonic()

    def done() -> bool:
        late = options.minutes is not None and time.monotonic() - started >= 60 * options.minutes
        return options.report_only or stopped or late or measured == options.limit

    while left:
        busy, before = [], measured
        for number, point in left:
            row = study.find(point)
            minutes = (time.monotonic() - started) / 60
            if row is None and not done():
                print(f"{number}/{len(study.points)} after {minutes:.1f} min: {point}", file=sys.stderr, flush=True)
                try:
                    row = study.measure(point)
                    measured += 1
                    say_lines([study.line(row)])
                except Busy:
                    print("  left to another process, which is at it", file=sys.stderr, flush=True)
                    busy.append((number, point))
                except KeyboardInterrupt:
                    stopped = True
                    print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
            if row is not None:
                rows[number] = row
        left = busy
        if left and measured == before:
            if done():
                break
            try:
                time.sleep(WAIT_S)
            except KeyboardInterrupt:
                stopped = True
    return [rows[number] for number in sorted(rows)], stopped


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 also when stopped by Ctrl+C after a report was written, 130 when there was nothing to report."""
    options = parser().parse_args(arguments)
    for name, least in (("limit", 0), ("minutes", 0), ("samples", 10)):
        given = getattr(options, name)
        if given is not None and not given >= least:
            parser().error(f"--{name}: expected {least} or more, found {given}")

    size = next((name for name in ("tiny", "quick", "confirm") if getattr(options, name)), "full")
    if size == "confirm" and options.paper != "idg":
        parser().error("--confirm: expected the paper idg, whose sweep chooses among settings, found " + options.paper)
    study: Study = import_module(STUDIES[options.paper], __package__).open_study(size, options.work, options.samples)
    if options.list:
        for point in study.points:
            print(f"{'measured' if study.find(point) else '-':<9}{point}")
        return 0
    rows, stopped = gather(study, options)
    if not rows:
        print("nothing measured yet, so there is nothing to report", file=sys.stderr)
        return 130 if stopped else 0
    said, write_report = study.conclude(rows)
    say_lines(said)
    for path in write_report(options.report or study.folder / size):
        print(f"wrote {path}", file=sys.stderr)
    return 0
