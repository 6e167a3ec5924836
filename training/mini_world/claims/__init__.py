"""Claims of the papers, measured on the mini world: ``python run.py claims idg [--quick]``.

`statistics` holds the uncertainty, `questions` what is asked and its exact targets, `models` trains what is compared,
`methods` says how it samples, `points` measures and caches, `sweep` lists what to measure in which order, `verdicts`
decides, `plot` and `report` show.
"""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """The command line; imports happen here so that importing the package costs nothing."""
    from .command_line import main as run

    return run(arguments)
