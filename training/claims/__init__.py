"""Claims of the papers, measured on the mini world: ``python run.py claims idg [--quick]``, ``claims sgf``.

Once for every paper: `statistics` holds the uncertainty, `keeping` what is measured and trained, `study` the sweep,
`deciding` goes from numbers to verdicts, `report` writes them down, `command_line` runs a paper's study. A paper has a
folder: its points, the table of its sweep, the table of its claims, what it measures, what its page shows, and a
`study.Study` that holds them together. Results are in docs/claims.
"""
