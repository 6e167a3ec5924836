"""``python -m indomain_guidance``: the command line, as the console script ``indomain``.

A checkout's folder can have any name and its path may be given to Python directly (``python path/to/checkout``): then
this file is no part of a package, and the bootstrap makes it one.
"""

from __future__ import annotations

import os
import sys


def _start() -> int:
    if __package__:
        from .training.command_line.console import pasted
        from .training.command_line.main import main

        typed = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
        os.environ.setdefault("INDOMAIN_COMMAND", pasted(typed))
        return main()
    import runpy
    from pathlib import Path

    bootstrap = runpy.run_path(str(Path(__file__).resolve().parent / "training" / "bootstrap.py"))
    bootstrap["main"](["indomain_guidance", *sys.argv[1:]])
    return 0


if __name__ == "__main__":
    sys.exit(_start())
