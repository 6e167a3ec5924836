"""What can go wrong with images: no image can be used, one file cannot, or somebody asked to stop."""

from __future__ import annotations

from ...guidance.errors import Problem


class DataProblem(Problem):
    """Images that cannot be trained on, in one sentence: what was expected, what was found, what to do."""


class BadImage(DataProblem):
    """One file that cannot be used.

    kind: "empty", "corrupt", "too large" or "unreadable" (permissions, a lost drive).
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Cancelled(Exception):
    """Somebody asked to stop while images were looked for or read."""


class CachingStopped(Cancelled):
    """Somebody asked to stop while images were encoded; what is done stays in the cache."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"Stopped after {done} of {total} images were encoded; they stay in the cache.")
        self.done, self.total = done, total
