#!/usr/bin/env python3
"""One command for everything: ``python run.py demo | test | lint | serve | indomain | bench | claims | mini-world``.

This is stage one. It needs nothing but the standard library: it finds or builds a Python environment that can run
ComfyUI, and starts that environment's Python on stage two (``nodes/host/``), which does the work.

Which ComfyUI is used, in this order: ``--comfyui PATH``, the environment variable ``COMFYUI_PATH``, the ComfyUI in
whose ``custom_nodes`` folder this checkout lies, and else a pinned one, downloaded once into the user's cache
(``INDOMAIN_CACHE``, or ``XDG_CACHE_HOME``, ``LOCALAPPDATA``, ``~/.cache``). Nothing is ever installed into a ComfyUI of
the user's own.
"""

from __future__ import annotations

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
# This checkout's nodes/ would shadow ComfyUI's nodes.py for anything that inherits this path.
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != os.path.realpath(_HERE)]

if sys.version_info < (3, 10):
    sys.exit("run.py needs Python 3.10 or newer, found %d.%d: start it with a newer python." % sys.version_info[:2])

import argparse
import importlib.util
import json
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(_HERE)


def _load_environment() -> ModuleType:
    """nodes/host/environment.py by its path: importing the package `nodes` needs what the environment has."""
    spec = importlib.util.spec_from_file_location("indomain_environment", ROOT / "nodes" / "host" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = _load_environment()

COMMANDS = {
    "demo": "make images with the prior alone, the domain model alone and multi-guidance, side by side",
    "test": "run every test, the ones that drive a real ComfyUI server included, on all cores; --quick leaves the slow "
    "ones and the servers out (other arguments go to pytest, which then runs in one process)",
    "lint": "check the code's style, format and types with ruff and pyright, as .ci/run does; --fix first mends what "
    "ruff can",
    "serve": "open the graph editor with these nodes and the mini world installed; Ctrl+C ends it",
    "indomain": "train, inspect and try domain models from the command line; --help tells all",
    "bench": "run a benchmark by its name, or all of them; --list lists them (further arguments go to it, as --quick)",
    "claims": "measure claims on the mini world: idg, sgf or bake (further arguments go to it, as --quick)",
    "mini-world": "run the recipe that makes the mini world (further arguments go to it)",
}
# These answer --help themselves.
OWN_HELP = ("indomain", "claims")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. What the commands that start another program do not know is handed on, in order, in `.rest`."""
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        description = what[0].upper() + what[1:] + "."
        about = {"help": what, "description": description, "add_help": name not in OWN_HELP}
        command = commands.add_parser(name, allow_abbrev=False, **about)
        command.add_argument("--comfyui", metavar="PATH", help="a ComfyUI of your own, used as it is")
        command.add_argument("--python", metavar="EXE", help="that ComfyUI's Python, where it is not found by itself")
        if name == "demo":
            command.add_argument("--output", metavar="DIR", help="where the images go (default: output/demo)")
        if name == "serve":
            kept = "a folder that keeps models, images and settings (default: in the cache)"
            command.add_argument("--output", metavar="DIR", help=kept)
            command.add_argument("--port", type=int, default=0, help="a fixed port (default: any free one)")
        if name == "lint":
            command.add_argument("--fix", action="store_true", help="first mend what ruff can, format included")
        if name == "bench":
            command.add_argument("--list", action="store_true", help="list the benchmarks")
        if name in ("demo", "serve"):
            command.add_argument("flags", nargs="*", metavar="-- FLAG", help="further flags for ComfyUI, after --")
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command in ("demo", "serve", "lint"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    known.rest = rest[1:] if rest[:1] == ["--"] else rest
    return known


def benches_training(options: argparse.Namespace) -> bool:
    """Whether the benchmark `training` will run: by its name, or among all, and not only listed."""
    named = options.rest[0] if options.rest and not options.rest[0].startswith("-") else "training"
    return not options.list and named == "training" and not {"-h", "--help"} & set(options.rest)


def tools_for(options: argparse.Namespace, python: Path) -> Path | None:
    """A folder with the packages that a command needs beside ComfyUI's; None where it needs none."""
    if options.command == "test":
        is_old = environment.runs(python, "import sys; assert sys.version_info < (3, 11)")
        names = (*environment.TEST_TOOLS, *environment.TEST_TOOLS_BEFORE_311) if is_old else environment.TEST_TOOLS
        return environment.side_tools(python, "test-tools", "the test tools", names, "pytest")
    if options.command == "lint":
        return environment.side_tools(python, "lint-tools", "ruff and pyright", environment.LINT_TOOLS, "ruff")
    if options.command == "bench" and benches_training(options):
        return environment.side_tools(
            python, "bench-tools", "what the benchmark compares with", environment.BENCH_TOOLS, "diffusers"
        )
    return None


def typed_command(options: argparse.Namespace, typed: Sequence[str], arguments: Sequence[str]) -> str:
    """How `indomain` was called, as one pastes it into a terminal. typed: the whole command; arguments: its end."""
    named = [f"--{name}={getattr(options, name)}" for name in ("comfyui", "python") if getattr(options, name)]
    words = [*typed[: len(typed) - len(arguments)], options.command, *named]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def hand_over(python: Path, order: dict, environ: dict[str, str]) -> int:
    """Start stage two under `python`; where it can, this process becomes it, so that signals reach it directly."""
    command = [str(python), str(ROOT / "training" / "bootstrap.py"), "indomain_guidance.nodes.host", json.dumps(order)]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":
        os.execve(command[0], command, environ)
    with subprocess.Popen(command, env=environ) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the console sent it to stage two as well, which is ending its server
                continue


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    try:
        comfyui = environment.own_comfyui(options.comfyui)
        if comfyui is None:
            if options.python:
                raise environment.SetupProblem(
                    "--python names the Python of a ComfyUI of your own: give --comfyui PATH with it."
                )
            comfyui, python = environment.pinned_environment()
        else:
            python = environment.own_interpreter(comfyui, options.python)
        environ = environment.clean_environ(INDOMAIN_COMFYUI_PATH=str(comfyui))
        if options.command == "indomain":
            environ["INDOMAIN_COMMAND"] = typed_command(options, sys.orig_argv, arguments)
        tools = tools_for(options, python)
        if tools:
            environ["PYTHONPATH"] = str(tools)
    except environment.SetupProblem as problem:
        environment.say(f"run.py: {problem}")
        return 2
    except OSError as problem:  # a cache that cannot be written, a full disk
        environment.say(
            f"run.py: the folder for downloads and environments, {environment.cache_root()}, cannot be used "
            f"({problem}): set INDOMAIN_CACHE to a folder that can be written to."
        )
        return 2
    order = {key: value for key, value in vars(options).items() if key != "python"}
    order |= {"comfyui": str(comfyui), "cache": str(environment.cache_root()), "tools": str(tools) if tools else None}
    return hand_over(python, order, environ)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
