"""``indomain mini-data``: images of the mini world, to try training on."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..mini_world.pictures import export_pictures
from .parser import DONE, add_command, add_number, add_output, path, print_result


def add_mini_data(commands: Any) -> None:
    command = add_command(
        commands,
        "mini-data",
        _mini_data,
        "write images of the mini world, to try training on",
        "Handwritten digits as PNG files of 64 x 64 pixels, without captions: a domain for --base mini_world.",
    )
    command.add_argument("folder", type=path, metavar="DIR", help="a new or empty folder")
    command.add_argument(
        "--domain",
        choices=("handwriting", "narrow"),
        default="handwriting",
        help="handwriting: in 16 pairs of colours (default); narrow: white on black",
    )
    add_number(command, "--count", 500, 1, 8000, "how many, 1 to 8000")
    add_number(command, "--seed", 0, 0, 2**63 - 1, "of the colours")
    add_output(command, "folder and count as one JSON object", quiet=False)


def _mini_data(options: argparse.Namespace) -> int:
    paths = export_pictures(Path(options.folder), options.domain, options.count, options.seed)
    found = {"folder": os.path.abspath(options.folder), "count": len(paths)}
    print_result(found if options.json else options.folder)
    return DONE
