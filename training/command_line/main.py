"""The command line: ``indomain train | adapt | resume | check-data | convert | inspect | sample | mini-data``.

Results go to standard output (JSON with ``--json``), progress and messages to standard error. The exit status is 0 when
everything was done, 1 for a problem in the data, a file or the run, 2 for a command or settings that make no sense, and
128 + the signal's number (130 for Ctrl+C, 143 for SIGTERM) after a stop with everything saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ...guidance.errors import Problem, printable
from ...guidance.files import FileProblem
from ..adaptation.config import AdaptConfig
from ..domain.config import TrainConfig
from ..engine.paths import is_of_windows, meant_path
from ..engine.settings import ConfigProblem, Settings, fields_of, kinds_of
from ..engine.signals import StopRequest
from ..engine.small_files import read_values
from ..mini_world import MINI_WORLD
from .console import Console, own_command
from .kinds import kind_of

DONE, PROBLEM, USAGE = 0, 1, 2
EXIT_CODES = """exit status:
  0    done
  1    a problem in the data, a file or the run, named in the last line of standard error
  2    a command or configuration that makes no sense; nothing was started
  130  stopped by Ctrl+C, 143 by SIGTERM: the step was finished and everything saved (a second Ctrl+C does not wait)
"""
MEMORY_FULL = (
    "the memory is full; try --gradient-checkpointing, with which this run can go on, or in a run of another --name a "
    "smaller --batch-size with more --accumulation, a smaller --resolution, or --train low_rank --learning-rate 1e-4. "
    "What was saved is usable."
)
MEMORY_FULL_ADAPTING = (
    "the memory is full; try --gradient-checkpointing, with which this run can go on, or in a run of another --name "
    "--batch-size 1, a smaller --resolution, --precision bf16 on a GPU, or another --method than vsd. What was saved "
    "is usable."
)
GROUP_TITLES = {
    "what": "what to train",
    "model": "the model",
    "data": "the images",
    "distillation": "from the diffusion model's opinion to gradients",
    "generator": "the generator",
    "optimisation": "optimisation",
    "reporting": "checkpoints, samples, the finished file",
}
# Single letters for what a first run needs.
SHORT = {"data": "-d", "base": "-b", "name": "-n", "output": "-o", "steps": "-s", "generator": "-g", "prompt": "-p"}


def _path(text: str) -> str:
    """A reader of paths, for argparse: shells leave the "~" of --option=~/here as it is."""
    if "\0" in text or not _can_be(text, os.fsencode):
        raise argparse.ArgumentTypeError(f"expected a path, found {text!r:.80}, which no file is called")
    path = meant_path(text)
    if is_of_windows(text) and not os.path.lexists(path):
        raise argparse.ArgumentTypeError(
            f"expected a path of this system, found one of Windows, {text!r:.80}; give the place where it lies here"
        )
    return path


def _text(text: str) -> str:
    """A reader of prompts and names, for argparse."""
    if not _can_be(text, str.encode):
        raise argparse.ArgumentTypeError(f"expected text, found {text!r:.80}, which UTF-8 cannot hold; write it anew")
    return text


def _can_be(text: str, encode: Callable[[str], bytes]) -> bool:
    try:
        encode(text)
    except UnicodeEncodeError:  # halves of characters
        return False
    return True


class _Parser(argparse.ArgumentParser):
    """Full option names only, help that keeps the epilog's lines, and one-line errors."""

    def __init__(self, **more: Any) -> None:
        more = {"allow_abbrev": False, "formatter_class": _formatter, "epilog": EXIT_CODES, **more}
        super().__init__(**more)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}\n(help: {own_command(*self.prog.split()[1:], '--help')})\n")


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; the options of train, adapt and resume are the fields of their configurations."""
    parser = _Parser(
        prog="indomain",
        description="Train, inspect and try domain models (text-free UNets that learn a folder of images), and adapt "
        "image generators to prompts.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (
        _add_train,
        _add_adapt,
        _add_resume,
        _add_check_data,
        _add_convert,
        _add_inspect,
        _add_sample,
        _add_mini_data,
    ):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Callable, summary: str, description: str = "") -> argparse.ArgumentParser:
    first = summary[0].upper() + summary[1:] + "."
    text = textwrap.fill(f"{first} {description}".strip(), 79)
    command = commands.add_parser(name, help=summary, description=text)
    command.set_defaults(run=run, parser=command)
    return command


def _whole(least: int, most: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` to `most`, for argparse."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, found {text[:40]!r}")
        return number

    return read


def _add_json(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--json", action="store_true", help=f"standard output: {what}")


def _add_fields(
    command: argparse.ArgumentParser,
    keep: Callable[[dataclasses.Field], bool],
    settings: type[Settings] = TrainConfig,
    note: str = "",
) -> None:
    """An option for every field of `settings` that `keep` accepts; options that are not given leave no trace."""
    kinds = kinds_of(settings)
    kept = [one for one in fields_of(settings) if keep(one)]
    names = dict.fromkeys(one.metadata["group"] for one in kept)
    groups = {name: command.add_argument_group(GROUP_TITLES[name] + note) for name in names}
    for one in kept:
        _add_field(groups[one.metadata["group"]], one, kinds[one.name])


def _add_field(group: Any, one: dataclasses.Field, kind: type) -> None:
    about, flags = one.metadata, [f"--{one.name.replace('_', '-')}"]
    if one.name in SHORT:
        flags.insert(0, SHORT[one.name])
    more: dict[str, Any] = {"dest": one.name, "default": argparse.SUPPRESS}
    if kind is bool:
        more |= {"action": argparse.BooleanOptionalAction}
    elif kind is tuple:
        more |= {"nargs": "+", "action": "extend", "metavar": "PATH" if about["path"] else "TEXT"}
    elif "choices" in about:
        more |= {"choices": about["choices"], "metavar": "{" + ",".join(about["choices"]) + "}"}
    else:
        more |= {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "PATH" if about["path"] else "TEXT")}
    group.add_argument(*flags, help=_field_help(one, kind), **more)


def _field_help(one: dataclasses.Field, kind: type) -> str:
    about, facts = one.metadata, []
    if one.default is not dataclasses.MISSING and one.default not in ((), ""):
        facts.append(f"default {'on' if one.default is True else 'off' if one.default is False else one.default}")
    if kind in (int, float):
        facts.append(f"{about['min']:g} to {about['max']:g}" if about["max"] < 1e5 else f"at least {about['min']:g}")
    return (about["help"] + (f" ({'; '.join(facts)})" if facts else "")).replace("%", "%%")


# ------------------------------------------------------------------------------------------------------ train, resume


def _add_train(commands: Any) -> None:
    command = _command(
        commands,
        "train",
        _train,
        "learn a folder of images",
        "Needs --base and --data, as options or in a file of settings. Called again with the same settings, a stopped "
        "run goes on where it was.",
    )
    command.usage = "indomain train -b PATH -d PATH [PATH ...] [-n TEXT] [--config FILE] [OPTION ...]"
    _add_start_options(command)
    _add_fields(command, lambda one: True)


def _add_adapt(commands: Any) -> None:
    command = _command(
        commands,
        "adapt",
        _adapt,
        "move an image generator into a prompt's domain",
        "A StyleGAN2 generator is taught by a diffusion model (StyleGAN-Fusion, arXiv 2212.04473). Needs --generator, "
        "--base and --prompt, as options or in a file of settings. Called again with the same settings, a stopped run "
        "goes on where it was.",
    )
    command.usage = "indomain adapt -g PATH -b PATH -p TEXT [-n TEXT] [--config FILE] [OPTION ...]"
    _add_start_options(command)
    _add_fields(command, lambda one: True, AdaptConfig)
    command.set_defaults(memory_full=MEMORY_FULL_ADAPTING)


def _add_resume(commands: Any) -> None:
    command = _command(
        commands,
        "resume",
        _resume,
        "go on with a stopped run",
        "The options are those that do not change what is learned: with --steps a finished run learns on.",
    )
    command.usage = "indomain resume RUN [OPTION ...]"
    command.add_argument("folder", type=_path, metavar="RUN", help="the run's folder, which holds its config.json")
    _add_run_options(command)
    known = {one.name for one in dataclasses.fields(TrainConfig)}
    _add_fields(command, _may_change)
    _add_fields(command, lambda one: _may_change(one) and one.name not in known, AdaptConfig, " (adaptations only)")


def _may_change(one: dataclasses.Field) -> bool:
    """Whether a field may be another one when a run goes on."""
    return one.metadata["free"] and one.name not in ("output", "name")


def _add_start_options(command: argparse.ArgumentParser) -> None:
    """What every command that starts a run takes."""
    command.add_argument(
        "--config",
        type=_path,
        metavar="FILE",
        help="settings from a .toml or .json file, such as another run's config.json, or mini_world for those of a "
        "first run on the miniature; options given here come first. With another --name the run's folder is NAME "
        "beside the file's output, where it names one",
    )
    _add_run_options(command)
    command.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="expect a stopped run in the output folder, or refuse one (default: go on if there is one)",
    )


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="print the settings and the estimate of memory (of training also disk and time), and stop",
    )
    command.add_argument("--quiet", action="store_true", help="no progress on standard error, only problems")
    _add_json(command, "one JSON object a line, an event each, the result last")


def _train(options: argparse.Namespace) -> int:
    values = _given(options)
    if options.config == MINI_WORLD:
        from ..mini_world.first_runs import FIRST_RUN

        config = _usage(lambda: TrainConfig.from_mapping({**FIRST_RUN, **values}, source="options"))
    elif options.config is not None:
        config = _usage(lambda: _read_settings(TrainConfig, options.config, values))
    else:
        if "base" not in values:
            options.parser.error("expected --base FILE, the prior to start from (mini_world is the one that ships).")
        config = _usage(lambda: TrainConfig.from_mapping(values, source="options"))
    if not config.data:
        options.parser.error("expected --data FOLDER, the images to learn.")
    return _learn(config, options, options.resume)


def _adapt(options: argparse.Namespace) -> int:
    values = _given(options, kinds_of(AdaptConfig))
    if options.config == MINI_WORLD:
        from ..mini_world.first_runs import FIRST_ADAPTATION

        config = _usage(lambda: AdaptConfig.from_mapping({**FIRST_ADAPTATION, **values}, source="options"))
    elif options.config is not None:
        config = _usage(lambda: _read_settings(AdaptConfig, options.config, values))
    else:
        for name, (what, role) in AdaptConfig.required.items():
            if name not in values:
                options.parser.error(f"expected --{name}, {role} ({what}).")
        config = _usage(lambda: AdaptConfig.from_mapping(values, source="options"))
    _usage(config.check_prompts)
    return _learn(config, options, options.resume)


def _resume(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    settings = folder / "config.json"
    if not settings.is_file():
        raise UsageProblem(f"{folder}: expected a run's folder, found no config.json in it; runs lie in runs/NAME.")
    kind = _usage(lambda: kind_of(read_values(settings), str(settings)))
    if kind is AdaptConfig:
        options.memory_full = MEMORY_FULL_ADAPTING
    given = _given(options, {**kinds_of(TrainConfig), **kinds_of(AdaptConfig)})
    config = _usage(lambda: kind.read(settings, **given, output=str(folder)))
    _usage(config.check_files)
    return _learn(config, options, True if _has_saved(folder, config.name) else "auto")


def _has_saved(folder: Path, name: str) -> bool:
    """Whether the run in a folder ever saved something; one that was stopped before its first step has not."""
    from ..engine.checkpoints import find_checkpoints
    from ..engine.events import Saved
    from ..engine.log import read_log

    if find_checkpoints(folder) or (folder / f"{name}.safetensors").exists():
        return True
    return any(isinstance(event, Saved) for event in read_log(folder / "log.jsonl"))


def _read_settings(kind: type[Settings], path: str, values: dict[str, Any]) -> Settings:
    """The settings of a file, with `values` in place of its own; another name never goes on in the file's own run."""
    config = kind.read(path, **values)
    renamed = "name" in values and read_values(path).get("name") != config.name
    if not renamed or "output" in values or not config.output:
        return config
    beside = os.path.dirname(os.path.abspath(meant_path(config.output)))
    return config.with_changes(output=os.path.join(beside, config.name))


def _given(options: argparse.Namespace, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The fields of TrainConfig (or those of `names`) that were given as options."""
    return {name: getattr(options, name) for name in names or kinds_of(TrainConfig) if hasattr(options, name)}


def _learn(config: TrainConfig | AdaptConfig, options: argparse.Namespace, resume: bool | str) -> int:
    from .sample import comfyui_tokenizer

    config = config.absolute()
    if isinstance(config, AdaptConfig):
        from ..adaptation.adapt import adapt as run

        prompts: tuple[str, ...] = (config.prompt, config.negative, config.source_prompt)
    else:
        from ..domain.train import train as run

        prompts = (config.caption, *config.sample_prompts)
    if any(prompts) and not config.tokenizer:
        config = config.with_changes(tokenizer=comfyui_tokenizer())
    console = Console(options.json, options.quiet, options.dry_run)
    with StopRequest(console.stop_requested) as request:
        result = run(config, resume=resume, listener=console, should_stop=request, dry_run=options.dry_run)
    console.result(result)
    return request.exit_code if result.status == "stopped" else DONE


# ---------------------------------------------------------------------------------------------- check-data, mini-data


def _add_check_data(commands: Any) -> None:
    command = _command(
        commands,
        "check-data",
        _check_data,
        "report what is wrong with a folder of images",
        "Corrupt, truncated, too small and duplicate images, and what training makes of the others; nothing is "
        "changed. The exit status is 1 when an image has to be left out, a folder, shard or link cannot be read to its "
        "end, or no image can be used.",
    )
    command.add_argument(
        "data", nargs="+", type=_path, metavar="PATH", help="folders, searched recursively, or .tar shards"
    )
    command.add_argument(
        "--config",
        type=_path,
        metavar="FILE",
        help="judge by these settings of train: a .toml or .json file, or mini_world",
    )
    command.add_argument(
        "-b",
        "--base",
        type=_path,
        metavar="PATH",
        help="the prior that will be trained, a file or mini_world: what it was made for is the default resolution",
    )
    kinds = kinds_of(TrainConfig)
    for one in dataclasses.fields(TrainConfig):
        if one.name in CHECKED_BY:
            _add_field(command, one, kinds[one.name])
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
    _add_json(command, "the report as one JSON object")


# What check-data does with the images depends on these fields of TrainConfig.
CHECKED_BY = ("resolution", "min_side", "buckets", "bucket_step", "bucket_max_ratio")


def _check_data(options: argparse.Namespace) -> int:
    from ..data.check import check_data

    values, judged = _usage(lambda: _judged_by(options))
    config = _usage(lambda: TrainConfig(base=MINI_WORLD, data=options.data, **values))
    console = Console(quiet=options.quiet)
    with StopRequest(console.stop_requested) as request:
        report = check_data(
            config.data,
            **{name: getattr(config, name) for name in CHECKED_BY},
            should_stop=request,
            progress=lambda done, total: console.count("looking at images", done, total),
        )
    _print({**report.to_dict(), "resolution_from": judged} if options.json else f"{report.to_text()}\n{judged}")
    if report.stopped:
        return request.exit_code
    return PROBLEM if report.bad or report.places or not report.ok else DONE


def _judged_by(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The fields of TrainConfig that images are judged by, and in one sentence where their resolution comes from."""
    from ..domain.export import base_resolution

    settings = {} if options.config is None else _settings_of(options.config)
    values = {name: value for name, value in settings.items() if name in CHECKED_BY} | _given(options, CHECKED_BY)
    base = options.base or settings.get("base")
    if "resolution" in values:
        return values, f"judged at {values['resolution']} px, as given"
    found = base_resolution(base) if isinstance(base, str) and base else None
    if found is not None:
        return {**values, "resolution": found}, f"judged at {found} px, which {os.path.basename(base)} was made for"
    default = TrainConfig(base=MINI_WORLD).resolution
    return values, (
        f"judged at {default} px, the default of train; --base or --config says what will be trained, --resolution at "
        "what size"
    )


def _settings_of(config: str) -> dict[str, Any]:
    """The unchecked settings of a file, or those of the first run on the miniature."""
    if config != MINI_WORLD:
        return read_values(config)
    from ..mini_world.first_runs import FIRST_RUN

    return dict(FIRST_RUN)


def _add_mini_data(commands: Any) -> None:
    command = _command(
        commands,
        "mini-data",
        _mini_data,
        "write images of the mini world, to try training on",
        "Handwritten digits as PNG files of 64 x 64 pixels, without captions: a domain for --base mini_world.",
    )
    command.add_argument("folder", type=_path, metavar="DIR", help="a new or empty folder")
    command.add_argument(
        "--domain",
        choices=("handwriting", "narrow"),
        default="handwriting",
        help="handwriting: in 16 pairs of colours (default); narrow: white on black",
    )
    command.add_argument(
        "--count", type=_whole(1, 8000), default=500, metavar="N", help="how many (default 500; 1 to 8000)"
    )
    command.add_argument("--seed", type=_whole(0, 2**63 - 1), default=0, metavar="N", help="of the colours (default 0)")
    _add_json(command, "folder and count as one JSON object")


def _mini_data(options: argparse.Namespace) -> int:
    from ..mini_world.pictures import export_pictures

    paths = export_pictures(Path(options.folder), options.domain, options.count, options.seed)
    _print({"folder": os.path.abspath(options.folder), "count": len(paths)} if options.json else options.folder)
    return DONE


# --------------------------------------------------------------------------------------------------- files of models


def _add_inspect(commands: Any) -> None:
    command = _command(
        commands,
        "inspect",
        _inspect,
        "tell everything a model file knows about itself",
        "Domain models of every form, LoRAs, checkpoints and UNets, and StyleGAN2 generators of every readable format.",
    )
    command.add_argument(
        "file",
        type=_path,
        metavar="MODEL",
        help="a .safetensors file, a generator's .pkl or .pt, a run's folder or checkpoint, or one "
        "that ships: mini-handwriting (domain model), mini_world (generator)",
    )
    _add_json(command, "all of it as one JSON object")


def _inspect(options: argparse.Namespace) -> int:
    from ..domain.export import inspect, inspect_text
    from .sample import find_model

    file = find_model(options.file, unfinished=True)
    _print(inspect(file) if options.json else inspect_text(file))
    return DONE


def _add_convert(commands: Any) -> None:
    kinds = {one.name: one for one in dataclasses.fields(TrainConfig)}
    command = _command(
        commands,
        "convert",
        _convert,
        "make a domain model file from a checkpoint, or a generator file from a pickle",
        "From a checkpoint: its UNet alone, or with --form cached or constant an untrained text-free one. From a "
        "domain model: the same in another number format. From a StyleGAN2 generator (NVIDIA's .pkl, rosinality's or "
        "StyleGAN-NADA's .pt): the generator as .safetensors, read without running anything that the file contains.",
    )
    command.add_argument(
        "source",
        type=_path,
        metavar="FROM",
        help="a checkpoint, a domain model, a generator, a finished run's folder, or one that ships: "
        "mini_world (checkpoint), mini-handwriting (domain model)",
    )
    command.add_argument("target", type=_path, metavar="TO", help="the .safetensors file to write")
    command.add_argument(
        "--form",
        choices=kinds["form"].metadata["choices"],
        default="",
        help="from a checkpoint: cached, constant (which is measured, so takes a while) or full (default)",
    )
    command.add_argument(
        "--file-dtype",
        choices=kinds["file_dtype"].metadata["choices"],
        default="",
        help="numbers of the file (default fp16; a generator's fp32)",
    )
    command.add_argument(
        "--prediction",
        choices=kinds["prediction"].metadata["choices"],
        default="auto",
        help=kinds["prediction"].metadata["help"],
    )
    command.add_argument(
        "--resolution",
        type=_whole(64, 8192),
        default=None,
        metavar="PIXELS",
        help="form constant: size of the pictures it is measured on (default: what the checkpoint was "
        "made for, 512 for SD 1.5, 1024 for SDXL)",
    )
    command.add_argument(
        "--name", type=_text, default="", metavar="TEXT", help="what to call the model (default: the file's name)"
    )
    command.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, xpu")
    command.add_argument("--overwrite", action="store_true", help="replace TO if it exists")
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
    _add_json(command, "what inspect says of the new file")


def _convert(options: argparse.Namespace) -> int:
    from ..domain.export import convert, inspect
    from ..engine.processes import pick_device
    from .sample import find_model

    source = options.source if options.source == MINI_WORLD else find_model(options.source)
    if os.path.exists(options.target) and not options.overwrite:
        raise FileProblem(f"{options.target}: expected a new file to write, found one there; add --overwrite.")
    console = Console(quiet=options.quiet)
    path = convert(
        source,
        options.target,
        form=options.form,
        file_dtype=options.file_dtype,
        prediction=options.prediction,
        resolution=options.resolution,
        name=options.name,
        device=_usage(lambda: pick_device(options.device)),
        on_probe=lambda done, total: console.count("measuring", done, total),
    )
    _print(inspect(path) if options.json else str(path))
    return DONE


# ----------------------------------------------------------------------------------------------------------- pictures


def _add_sample(commands: Any) -> None:
    command = _command(
        commands,
        "sample",
        _sample,
        "draw pictures with a base and a domain model, or with an image generator",
        "In-domain guidance, base + w_d (domain - base) + w_c (prompt - base); a weight of 0 leaves its part out, "
        "--domain-weight 1 --control-weight 0 is the domain model alone. Of an image generator, StyleGAN2 in any of "
        "the files that adapt takes, only count, seed, truncation, output and device matter.",
    )
    command.add_argument(
        "domain",
        type=_path,
        metavar="MODEL",
        help="a domain model or generator file, a run's folder, or one that ships: mini-handwriting "
        "(domain model), mini_world (generator)",
    )
    command.add_argument(
        "-b", "--base", type=_path, metavar="PATH", help="the prior, a file or mini_world (default: the run's)"
    )
    command.add_argument(
        "-p",
        "--prompt",
        type=_text,
        action="append",
        metavar="TEXT",
        help="what to draw; again for more (default: the empty prompt)",
    )
    command.add_argument(
        "--negative", type=_text, default="", metavar="TEXT", help="prompt of the base (default: empty)"
    )
    command.add_argument(
        "-o",
        "--output",
        type=_path,
        default="pictures",
        metavar="DIR",
        help="folder (default: pictures); a picture whose name is taken gets a number behind it",
    )
    command.add_argument(
        "-c", "--count", type=_whole(1, 1_000_000), default=4, metavar="N", help="pictures per prompt (default 4)"
    )
    command.add_argument(
        "--seed", type=_whole(0, 2**62), default=0, metavar="N", help="of the first; the next one has N + 1"
    )
    command.add_argument("--domain-weight", type=float, default=2.5, metavar="X", help="usually 0 to 5 (default 2.5)")
    command.add_argument("--control-weight", type=float, default=2.5, metavar="X", help="usually 0 to 8 (default 2.5)")
    command.add_argument(
        "--domain-start",
        type=float,
        default=0.0,
        metavar="X",
        help="where in sampling the domain model begins, 0 to 1 (default 0)",
    )
    command.add_argument("--domain-end", type=float, default=1.0, metavar="X", help="and where it ends (default 1)")
    command.add_argument(
        "--truncation",
        type=float,
        default=0.7,
        metavar="X",
        help="image generators only: 1 none, 0 the mean image (default 0.7)",
    )
    command.add_argument("--steps", type=_whole(1, 1000), default=25, metavar="N", help="model steps (default 25)")
    command.add_argument(
        "--method", choices=("euler", "ddim", "dpmpp_2m"), default="dpmpp_2m", help="(default dpmpp_2m)"
    )
    command.add_argument(
        "--spacing",
        choices=("uniform", "sgm_uniform", "karras"),
        default="uniform",
        help="of the noise levels, as ComfyUI has them: uniform (the default; there called normal), "
        "sgm_uniform (the released code's of the paper), karras",
    )
    command.add_argument(
        "--width",
        type=_whole(64, 16384),
        metavar="PIXELS",
        help="(default: the resolution it was trained at, else what the prior was made for)",
    )
    command.add_argument("--height", type=_whole(64, 16384), metavar="PIXELS", help="(default: the width)")
    command.add_argument(
        "--batch-size", type=_whole(1, 4096), default=4, metavar="N", help="pictures drawn at once (default 4)"
    )
    command.add_argument("--vae", type=_path, default="", metavar="PATH", help="another VAE than the checkpoint's")
    command.add_argument(
        "--tokenizer",
        type=_path,
        default="",
        metavar="PATH",
        help="folder with CLIP's vocab.json and merges.txt (default: the run's, else ComfyUI's)",
    )
    command.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 on GPUs that have it, else fp32",
    )
    command.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, xpu")
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
    _add_json(command, "one JSON object a picture")


def _sample(options: argparse.Namespace) -> int:
    from . import sample as sample_command

    console = Console(quiet=options.quiet)
    for picture in sample_command.run(options, console):
        _print(picture if options.json else picture["path"])
    return DONE


# ------------------------------------------------------------------------------------------------------------ running


class UsageProblem(Problem):
    """A command that makes no sense, in one sentence."""


def _usage(make: Callable[[], Any]) -> Any:
    """The result of `make`, with its complaints about a configuration marked as wrong usage."""
    try:
        return make()
    except (ConfigProblem, FileProblem) as problem:
        raise UsageProblem(str(problem)) from problem


def _print(result: Any) -> None:
    if isinstance(result, str):  # with names from files, which a terminal would take for commands
        print(printable(result, 12 * len(result)), flush=True)
    else:
        print(json.dumps(result), flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options; leaves the process with status 2 and a hint when something is misspelt."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [flag for action in options.parser._actions for flag in action.option_strings]
        word = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(word.replace("_", "-"), known, n=1) if word.startswith("-") else []
        hint = f"; did you mean {near[0]}?" if near else "."
        options.parser.error(f"{unknown[0]!r} is not understood here{hint}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the output cannot hold ends no command
    options = parse(sys.argv[1:] if arguments is None else arguments)
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
    except (ValueError, OSError, MemoryError, RuntimeError) as problem:
        from ..engine.memory import is_memory_problem

        full = isinstance(problem, (MemoryError, RuntimeError)) and is_memory_problem(problem)
        if isinstance(problem, RuntimeError) and not full:
            raise
        if os.environ.get("INDOMAIN_TRACEBACK"):
            raise
        advice = getattr(options, "memory_full", MEMORY_FULL)
        _complain(options, advice if full else str(problem) or type(problem).__name__)
        return PROBLEM


def _complain(options: argparse.Namespace, message: str) -> None:
    print(f"{options.parser.prog}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
