"""Claims of papers and of this project, measured on the mini world: ``python run.py claims idg | sgf | bake``.

Once for every study: `statistics` holds the uncertainty, `keeping` what is measured and trained, `study` the sweep,
`deciding` goes from numbers to verdicts, `report` writes them down, `command_line` runs a study. Studies of methods
that answer the mini world's prompts also share `questions`, `points`, `models`, `methods`, `prompted` (how points are
drawn), `comparing` (their numbers) and `fronts` (their tables). A study has a folder: its methods, the table of its
sweep, the table of its claims, what its page shows, and a `study.Study` that holds them together. Results are in
docs/claims.
"""
