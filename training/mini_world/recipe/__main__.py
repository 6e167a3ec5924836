"""Command line of the mini world: make it again from a seed, or measure the shipped weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import stages
from .report import PARTS


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
    make = commands.add_parser("make", help=about, description=about)
    work = "folder of checkpoints, cached latents and finished files, 0.3 GB (default: %(default)s)"
    make.add_argument("--work", type=Path, default=Path("mini_world_work"), help=work)
    make.add_argument("--seed", type=int, default=0, help="of weights, pictures and noise (default: 0, as shipped)")
    about = "measure the shipped weights; one JSON object a line, progress on standard error"
    check = commands.add_parser("check", help=about, description=about)
    samples = "pictures or prompts of a measurement, at least 10 (default: 1000)"
    check.add_argument("--samples", type=_count, default=1000, help=samples)
    check.add_argument("--seed", type=int, default=0, help="of prompts, pictures and noise (default: 0)")
    check.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given several times")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "check":
            for name in options.part or PARTS:
                PARTS[name](options.samples, options.seed)
        else:
            for path in stages.make_everything(options.work, options.seed):
                print(path)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        more = "; run it again to continue" if options.command == "make" else ""
        print(f"\nstopped{more}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
