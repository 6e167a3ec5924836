"""``indomain train | bake | adapt | resume``: the commands that run a training."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..adaptation.adapt import adapt
from ..adaptation.config import AdaptConfig
from ..baking.bake import bake
from ..baking.config import BakeConfig
from ..domain.config import TrainConfig
from ..domain.train import train
from ..engine.folder import CONFIG, has_saved
from ..engine.memory import memory_problem
from ..engine.paths import meant_path
from ..engine.run import Result
from ..engine.settings import kinds_of
from ..engine.signals import StopRequest
from ..engine.small_files import read_values
from ..mini_world import MINI_WORLD
from ..mini_world.first_runs import FIRST_ADAPTATION, FIRST_BAKING, FIRST_RUN
from ..prior.settings import PriorSettings
from .console import Console
from .kinds import KINDS, kind_of
from .models import comfyui_tokenizer
from .parser import DONE, UsageProblem, add_command, add_option, add_output, add_settings, as_usage, given

AGAIN = "as options or in a file of settings. Called again with the same settings, a stopped run goes on where it was."
Kind = TypeVar("Kind", bound=PriorSettings)


class MemoryFull(Exception):
    """A run did not fit into memory; the message is what to do about it."""


def add_train(commands: Any) -> None:
    command = add_command(commands, "train", _train, "learn a folder of images", f"Needs --base and --data, {AGAIN}")
    command.usage = "indomain train -b PATH -d PATH [PATH ...] [-n TEXT] [--config FILE] [OPTION ...]"
    _add_start_options(command)
    add_settings(command, TrainConfig)


def add_bake(commands: Any) -> None:
    command = add_command(
        commands,
        "bake",
        _bake,
        "put a domain model's guidance into a LoRA",
        "With the LoRA on the prior, plain CFG draws what in-domain guidance draws, in any program, at two "
        "predictions a step instead of three; the LoRA's strength is the domain weight. Needs --base, --domain and "
        f"--data, {AGAIN}",
    )
    command.usage = "indomain bake -b PATH --domain PATH -d PATH [PATH ...] [-n TEXT] [--config FILE] [OPTION ...]"
    _add_start_options(command)
    add_settings(command, BakeConfig)


def add_adapt(commands: Any) -> None:
    command = add_command(
        commands,
        "adapt",
        _adapt,
        "move an image generator into a prompt's domain",
        "A StyleGAN2 generator is taught by a diffusion model (StyleGAN-Fusion, arXiv 2212.04473). Needs --generator, "
        f"--base and --prompt, {AGAIN}",
    )
    command.usage = "indomain adapt -g PATH -b PATH -p TEXT [-n TEXT] [--config FILE] [OPTION ...]"
    _add_start_options(command)
    add_settings(command, AdaptConfig)


def add_resume(commands: Any) -> None:
    command = add_command(
        commands,
        "resume",
        _resume,
        "go on with a stopped run",
        "The options are those that do not change what is learned: with --steps a finished run learns on.",
    )
    command.usage = "indomain resume RUN [OPTION ...]"
    add_option(command, "folder", "the run's folder, which holds its config.json", metavar="RUN")
    _add_run_options(command)
    known: set[str] = {"output", "name"}
    for number, kind in enumerate(KINDS.values()):
        fields = {field.name for field in dataclasses.fields(kind) if field.metadata["free"]} - known
        note = f" ({kind.command} only)" if number else ""
        add_settings(command, kind, lambda field, fields=fields: field.name in fields, note)
        known |= fields


def _add_start_options(command: argparse.ArgumentParser) -> None:
    """What every command that starts a run takes."""
    config = (
        "settings from a .toml or .json file, such as another run's config.json, or mini_world for those of a first "
        "run on the miniature; options given here come first. With another --name the run's folder is NAME beside the "
        "file's output, where it names one"
    )
    add_option(command, "--config", config, metavar="FILE")
    _add_run_options(command)
    command.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="expect a stopped run in the output folder, or refuse one (default: go on if there is one)",
    )


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dry-run", action="store_true", help="print the settings and the estimate of what the run needs, and stop"
    )
    add_output(command, "one JSON object a line, an event each, the result last")


def _train(options: argparse.Namespace) -> int:
    config = _settings(options, TrainConfig, FIRST_RUN)
    if not config.data:
        options.parser.error("expected --data FOLDER, the images to learn.")
    return _run(config, options, options.resume)


def _bake(options: argparse.Namespace) -> int:
    config = _settings(options, BakeConfig, FIRST_BAKING)
    if not config.data and "pictures" in config.states:
        options.parser.error("expected --data FOLDER, pictures to noise, or --states own alone.")
    return _run(config, options, options.resume)


def _adapt(options: argparse.Namespace) -> int:
    config = _settings(options, AdaptConfig, FIRST_ADAPTATION)
    as_usage(config.check_prompts)
    return _run(config, options, options.resume)


def _resume(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    file = folder / CONFIG
    if not file.is_file():
        raise UsageProblem(f"{folder}: expected a run's folder, found no {CONFIG} in it; runs lie in runs/NAME.")
    kind = as_usage(lambda: kind_of(read_values(file), str(file)))
    values = given(options, {name for known in KINDS.values() for name in kinds_of(known)})
    config = as_usage(lambda: kind.read(file, **values, output=str(folder)))
    as_usage(config.check_files)
    return _run(config, options, True if has_saved(folder, config.name) else "auto")


def _settings(options: argparse.Namespace, kind: type[Kind], first_run: Mapping[str, Any]) -> Kind:
    """The settings of a new run from the options and the file (or first run) that they name."""
    values = given(options, kinds_of(kind))
    if options.config == MINI_WORLD:
        return as_usage(lambda: kind.from_mapping({**first_run, **values}, source="options"))
    if options.config is not None:
        return as_usage(lambda: _read_settings(kind, options.config, values))
    for name, (what, role) in kind.required.items():
        if name not in values:
            options.parser.error(f"expected --{name}, {role} ({what}).")
    return as_usage(lambda: kind.from_mapping(values, source="options"))


def _read_settings(kind: type[Kind], file: str, values: dict[str, Any]) -> Kind:
    """The settings of a file, with `values` in place of its own; another name never goes on in the file's own run."""
    config = kind.read(file, **values)
    renamed = "name" in values and read_values(file).get("name") != config.name
    if not renamed or "output" in values or not config.output:
        return config
    beside = os.path.dirname(os.path.abspath(meant_path(config.output)))
    return config.with_changes(output=os.path.join(beside, config.name))


def _run(config: PriorSettings, options: argparse.Namespace, resume: bool | str) -> int:
    """Train with these settings; the exit status."""
    config = config.absolute()
    if config.needs_tokenizer and not config.tokenizer:
        config = config.with_changes(tokenizer=comfyui_tokenizer())
    run: Callable[..., Result] = {TrainConfig.kind: train, BakeConfig.kind: bake, AdaptConfig.kind: adapt}[config.kind]
    console = Console(options.json, options.quiet, options.dry_run)
    with StopRequest(console.stop_requested) as request:
        try:
            result = run(config, resume=resume, listener=console, should_stop=request, dry_run=options.dry_run)
        except (MemoryError, RuntimeError) as problem:
            advice = memory_problem(problem, config)
            if advice is None:
                raise
            raise MemoryFull(f"{advice} What was saved is usable.") from problem
    console.result(result)
    return request.exit_code if result.status == "stopped" else DONE
