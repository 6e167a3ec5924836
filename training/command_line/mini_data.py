"""``indomain mini-data``: images of the mini world, to try training on."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..mini_world.pictures import export_pictures
from .parser import DONE, add_command, add_option, add_output, print_result, whole


def add_mini_data(commands: Any) -> None:
    command = add_command(
        commands,
        "mini-data",
        _mini_data,
        "write images of the mini world, to try training on",
        "Handwritten digits as PNG files of 64 x 64 pixels, without captions: a domain for --base mini_world.",
    )
    add_option(command, "folder", "a new or empty folder", metavar="DIR")
    command.add_argument(
        "--domain",
        choices=("handwriting", "narrow"),
        default="handwriting",
        help="handwriting: in 16 pairs of colours (default); narrow: white on black",
    )
    add_option(command, "--count", "how many (default 500; 1 to 8000)", whole(1, 8000), default=500)
    add_option(command, "--seed", "of the colours (default 0)", whole(0, 2**63 - 1), default=0)
    add_output(command, "folder and count as one JSON object", quiet=False)


def _mini_data(options: argparse.Namespace) -> int:
    paths = export_pictures(Path(options.folder), options.domain, options.count, options.seed)
    found = {"folder": os.path.abspath(options.folder), "count": len(paths)}
    print_result(found if options.json else options.folder)
    return DONE
