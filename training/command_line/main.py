"""The command line: ``indomain train | bake | adapt | resume | check-data | convert | inspect | sample | mini-data``.

Results go to standard output (JSON with ``--json``), progress and messages to standard error. The exit status is 0 when
everything was done, 1 for a problem in the data, a file or the run, 2 for a command or settings that make no sense, and
128 + the signal's number (130 for Ctrl+C, 143 for SIGTERM) after a stop with everything saved.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from ..engine.memory import is_memory_problem
from ..engine.settings import ConfigProblem
from .check_data import add_check_data
from .convert import add_convert
from .inspect import add_inspect
from .mini_data import add_mini_data
from .parser import PROBLEM, USAGE, Parser, UsageProblem
from .runs import MemoryFull, add_adapt, add_bake, add_resume, add_train
from .sample import add_sample

STARTS = (add_train, add_bake, add_adapt, add_resume)
COMMANDS = (*STARTS, add_check_data, add_convert, add_inspect, add_sample, add_mini_data)
MEMORY_FULL = "the memory is full; close other programs that use it, or ask for smaller pictures or fewer at once."


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="indomain",
        description="Train, inspect and try domain models (text-free UNets that learn a folder of images), put them "
        "into LoRAs, and adapt image generators to prompts.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for add in COMMANDS:
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the output cannot hold ends no command
    options = build_parser().parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        _complain(options, "stopped at once; no file was left half written, training goes on from its last checkpoint.")
        return 130
    except BrokenPipeError:  # whoever reads the output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PROBLEM
    except (UsageProblem, ConfigProblem) as problem:
        _complain(options, str(problem))
        return USAGE
    except (ValueError, OSError, MemoryError, RuntimeError, MemoryFull) as problem:
        full = isinstance(problem, (MemoryError, RuntimeError)) and is_memory_problem(problem)
        if os.environ.get("INDOMAIN_TRACEBACK") or (isinstance(problem, RuntimeError) and not full):
            raise
        _complain(options, MEMORY_FULL if full else str(problem) or type(problem).__name__)
        return PROBLEM


def _complain(options: argparse.Namespace, message: str) -> None:
    print(f"{options.parser.prog}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
