"""Command line of the mini world: make it again from a seed, or measure the shipped weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import render
from . import glyphs, stages
from .report import PARTS, WeightsReport


def _count(text: str) -> int:
    value = int(text)
    if value < 10:
        raise argparse.ArgumentTypeError(f"expected at least 10, one prompt a digit, found {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py mini-world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = (
        "train everything again (about two and a half hours on two cores) and replace the shipped weights when "
        "all is done; it can be stopped at any time and continues when it is run again"
    )
    make = commands.add_parser("make", help=about, description=about[0].upper() + about[1:] + ".")
    make.add_argument(
        "--work",
        type=Path,
        default=Path("mini_world_work"),
        help="folder of checkpoints, cached latents and finished files, 0.3 GB (default: %(default)s)",
    )
    make.add_argument("--seed", type=int, default=0, help="of weights, pictures and noise (default: 0, as shipped)")
    make.add_argument(
        "--fonts",
        action="store_true",
        help="first fetch the fonts, in the pinned versions, and rasterise them again (needs npm)",
    )
    about = "measure the shipped weights; one JSON object a line, progress on standard error"
    check = commands.add_parser("check", help=about, description=about[0].upper() + about[1:] + ".")
    check.add_argument(
        "--samples", type=_count, default=1000, help="pictures or prompts of a measurement, at least 10 (default: 1000)"
    )
    check.add_argument("--seed", type=int, default=0, help="of prompts, pictures and noise (default: 0)")
    check.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given several times")
    check.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep sampled pictures here, and use those that an earlier run left"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "check":
            report = WeightsReport(options.samples, options.seed, options.keep)
            for name in options.part or PARTS:
                PARTS[name](report)
        else:
            if options.fonts:
                glyphs.build(render.DATA / "glyphs.npz", progress=lambda line: print(line, file=sys.stderr))
            for path in stages.make_everything(options.work, options.seed):
                print(path)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumable = options.command == "make" or options.keep is not None
        more = "run it again to continue" if resumable else "with --keep DIR it can be continued"
        print(f"\nstopped; {more}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
