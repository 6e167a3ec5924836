"""``indomain check-data``: what is wrong with a folder of images, and what training makes of them."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from ..data.check import check_data
from ..domain.config import TrainConfig
from ..engine.settings import kinds_of
from ..engine.signals import StopRequest
from ..engine.small_files import read_values
from ..mini_world import MINI_WORLD
from ..mini_world.first_runs import FIRST_RUN
from ..prior.families import NATIVE_RESOLUTIONS, native_resolution
from .console import Console
from .inspect import inspect
from .parser import DONE, PROBLEM, add_command, add_option, add_output, add_setting, as_usage, given, print_result

# What becomes of the images depends on these settings.
CHECKED_BY = ("resolution", "min_side", "buckets", "bucket_step", "bucket_max_ratio")


def add_check_data(commands: Any) -> None:
    command = add_command(
        commands,
        "check-data",
        _check_data,
        "report what is wrong with a folder of images",
        "Corrupt, truncated, too small and duplicate images, and what training makes of the others; nothing is "
        "changed. The exit status is 1 when an image has to be left out, a folder, shard or link cannot be read to its "
        "end, or no image can be used.",
    )
    add_option(command, "data", "folders, searched recursively, or .tar shards", nargs="+")
    config = "judge by these settings of train: a .toml or .json file, or mini_world"
    add_option(command, "--config", config, metavar="FILE")
    base = "the prior that will be trained, a file or mini_world: what it was made for is the default resolution"
    add_option(command, "-b --base", base)
    kinds = kinds_of(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name in CHECKED_BY:
            add_setting(command, field, kinds[field.name])
    add_output(command, "the report as one JSON object")


def _check_data(options: argparse.Namespace) -> int:
    values, judged = as_usage(lambda: _judged_by(options))
    config = as_usage(lambda: TrainConfig(base=MINI_WORLD, data=options.data, **values))
    console = Console(quiet=options.quiet)
    with StopRequest(console.stop_requested) as request:
        report = check_data(
            config.data,
            **{name: getattr(config, name) for name in CHECKED_BY},
            should_stop=request,
            progress=lambda done, total: console.count("looking at images", done, total),
        )
    print_result({**report.to_dict(), "resolution_from": judged} if options.json else f"{report.to_text()}\n{judged}")
    if report.stopped:
        return request.exit_code
    return PROBLEM if report.bad or report.places or not report.ok else DONE


def _judged_by(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The settings that images are judged by, and in one sentence where their resolution comes from."""
    file = {}
    if options.config is not None:
        file = FIRST_RUN if options.config == MINI_WORLD else read_values(options.config)
    values = {name: value for name, value in file.items() if name in CHECKED_BY} | given(options, CHECKED_BY)
    base = options.base or file.get("base")
    if "resolution" in values:
        return values, f"judged at {values['resolution']} px, as given"
    if isinstance(base, str) and base:
        found = _resolution_of(base)
        if found is not None:
            return {**values, "resolution": found}, f"judged at {found} px, which {os.path.basename(base)} was made for"
    return values, (
        f"judged at {TrainConfig(base=MINI_WORLD).resolution} px, the default of train; --base or --config says what "
        "will be trained, --resolution at what size"
    )


def _resolution_of(base: str) -> int | None:
    """The side in pixels that a prior was made for, from its file's header; None where that does not tell."""
    if base == MINI_WORLD:
        return NATIVE_RESOLUTIONS[MINI_WORLD]
    about = inspect(base)
    architecture = about.get("architecture") or {}
    is_v = "v_pred" in about.get("markers", ())
    return native_resolution(about.get("latent_format") or "", architecture.get("context_dim"), is_v)
