"""What the commands' parsers are made of: readers of options, options made from settings, and exit statuses."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from ...guidance.errors import Problem, printable
from ...guidance.files import FileProblem
from ..engine.paths import path_here
from ..engine.settings import ConfigProblem, Settings, fields_of, kinds_of
from .console import own_command

DONE, PROBLEM, USAGE = 0, 1, 2
EXIT_STATUSES = """exit status:
  0    done
  1    a problem in the data, a file or the run, named in the last line of standard error
  2    a command or configuration that makes no sense; nothing was started
  130  stopped by Ctrl+C, 143 by SIGTERM: the step was finished and everything saved (a second Ctrl+C does not wait)
"""
GROUP_TITLES = {
    "what": "what to train",
    "model": "the model",
    "target": "what is baked in",
    "matching": "what it is matched on",
    "low_rank": "low-rank additions (with train low_rank)",
    "data": "the images",
    "distillation": "from the diffusion model's opinion to gradients",
    "generator": "the generator",
    "optimisation": "optimisation",
    "reporting": "checkpoints, samples, the finished file",
}
# Single letters for what a first run needs.
SHORT = {
    "--data": "-d",
    "--base": "-b",
    "--name": "-n",
    "--output": "-o",
    "--steps": "-s",
    "--generator": "-g",
    "--prompt": "-p",
}
Made = TypeVar("Made")


class UsageProblem(Problem):
    """A command that makes no sense, in one sentence."""


class Parser(argparse.ArgumentParser):
    """Full option names only, help that keeps the epilog's lines, and one-line errors."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _formatter, "epilog": EXIT_STATUSES, **more})

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}\n(help: {own_command(*self.prog.split()[1:], '--help')})\n")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The command and its options; leaves the process with status 2 and a hint when something is misspelt."""
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [flag for action in options.parser._actions for flag in action.option_strings]
            word = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(word.replace("_", "-"), known, n=1) if word.startswith("-") else []
            hint = f"; did you mean {near[0]}?" if near else "."
            options.parser.error(f"{unknown[0]!r} is not understood here{hint}")
        return options


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str = ""
) -> Parser:
    """A command that `run` does, which gets the options and gives the exit status."""
    first = summary[0].upper() + summary[1:] + "."
    command = commands.add_parser(name, help=summary, description=textwrap.fill(f"{first} {description}".strip(), 79))
    command.set_defaults(run=run, parser=command)
    return command


# ---- options that several commands have


def add_output(command: argparse.ArgumentParser, json_is: str, quiet: bool = True) -> None:
    """--json, for which standard output is what `json_is` says, and --quiet."""
    if quiet:
        command.add_argument("--quiet", action="store_true", help="no progress on standard error, only problems")
    command.add_argument("--json", action="store_true", help=f"standard output: {json_is}")


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, xpu")


def add_option(
    command: argparse.ArgumentParser, flags: str, help: str, reader: Callable[[str], Any] | None = None, **more: Any
) -> None:
    """An option, or an argument without dashes. reader: of its value, a path where it is None."""
    reader = reader or path
    metavar = {path: "PATH", text: "TEXT", float: "X"}.get(reader, "N")
    command.add_argument(*flags.split(), **{"type": reader, "metavar": metavar, "help": help, **more})


# ---- readers


def path(value: str) -> str:
    """A reader of paths, for argparse: shells leave the "~" of --option=~/here as it is."""
    if "\0" in value or not _can_be(value, os.fsencode):
        raise argparse.ArgumentTypeError(f"expected a path, found {value!r:.80}, which no file is called")
    try:
        return path_here(value)
    except Problem as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def text(value: str) -> str:
    """A reader of prompts and names, for argparse."""
    if not _can_be(value, str.encode):
        raise argparse.ArgumentTypeError(f"expected text, found {value!r:.80}, which UTF-8 cannot hold; write it anew")
    return value


def whole(least: int, most: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` to `most`, for argparse."""

    def read(value: str) -> int:
        with suppress(ValueError):
            if least <= (number := int(value)) <= most:
                return number
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, found {value[:40]!r}")

    return read


def _can_be(value: str, encode: Callable[[str], bytes]) -> bool:
    try:
        encode(value)
    except UnicodeEncodeError:  # halves of characters
        return False
    return True


# ---- options made from settings


def add_settings(
    command: argparse.ArgumentParser,
    settings: type[Settings],
    keep: Callable[[dataclasses.Field], bool] = lambda field: True,
    note: str = "",
) -> None:
    """An option for every field of `settings` that `keep` accepts, in groups; those not given leave no trace.

    note: behind the groups' titles.
    """
    kinds, groups = kinds_of(settings), {}
    for field in filter(keep, fields_of(settings)):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = command.add_argument_group(GROUP_TITLES[name] + note)
        add_setting(groups[name], field, kinds[field.name])


def add_setting(group: Any, field: dataclasses.Field, kind: type) -> None:
    """An option for one field of settings; kind: its type, as in `kinds_of`."""
    about, flag = field.metadata, f"--{field.name.replace('_', '-')}"
    flags = [SHORT[flag], flag] if flag in SHORT else [flag]
    words = "PATH" if about["path"] else "TEXT"
    more: dict[str, Any]
    if kind is bool:
        more = {"action": argparse.BooleanOptionalAction}
    elif kind is tuple:
        more = {"nargs": "+", "action": "extend", "metavar": words}
    elif "choices" in about:
        more = {"choices": about["choices"], "metavar": "{" + ",".join(about["choices"]) + "}"}
    else:
        reader = whole(about["min"], about["max"]) if kind is int else kind
        more = {"type": reader, "metavar": {int: "N", float: "X"}.get(kind, words)}
    facts = []
    if field.default is not dataclasses.MISSING and field.default not in ((), ""):
        switch = {True: "on", False: "off"} if kind is bool else {}
        default = " ".join(field.default) if kind is tuple else switch.get(field.default, field.default)
        facts.append(f"default {default}")
    if kind in (int, float):
        facts.append(f"{about['min']:g} to {about['max']:g}" if about["max"] < 1e5 else f"at least {about['min']:g}")
    told = about["help"] + (f" ({'; '.join(facts)})" if facts else "")
    group.add_argument(*flags, dest=field.name, default=argparse.SUPPRESS, help=told.replace("%", "%%"), **more)


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The settings of these names that were given as options."""
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


# ---- results


def as_usage(make: Callable[[], Made]) -> Made:
    """The result of `make`, with its complaints about settings marked as wrong usage."""
    try:
        return make()
    except (ConfigProblem, FileProblem) as problem:
        raise UsageProblem(str(problem)) from problem


def print_result(result: Any) -> None:
    """A text as it is, anything else as JSON, on standard output."""
    if isinstance(result, str):  # with names from files, which a terminal would take for commands
        print(printable(result, 12 * len(result)), flush=True)
    else:
        print(json.dumps(result), flush=True)
