"""Claims of the papers, measured on the mini world: ``python run.py claims idg [--quick]``, ``claims sgf``.

Of every paper: `statistics` holds the uncertainty, `keeping` the measured rows, `deciding` goes from a number to a
verdict, `lines` and `plot` show, `command_line` runs a paper's study. Of in-domain guidance alone (StyleGAN-Fusion's is
`claims_sgf`): `questions` says what is asked and its exact targets, `models` trains what is compared, `methods` says
how it samples, `points` measures, `sweep` lists what to measure in which order, `verdicts` decides, `report` shows,
`study` holds them together.
"""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """The command line; imports happen here so that importing the package costs nothing."""
    from .command_line import main as run

    return run(arguments)
