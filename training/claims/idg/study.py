"""In-domain guidance as a study: the paper's plans, methods, claims and report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..deciding import Claim
from ..keeping import Row
from ..prompted import PromptedStudy
from ..report import Report
from ..study import Plan
from .claims import claims
from .confirming import confirming
from .methods import METHODS
from .report import report
from .sweep import PLANS


class IdgStudy(PromptedStudy):
    """`study.Study` of arXiv 2312.08195."""

    paper, title = "idg", "in-domain guidance (arXiv 2312.08195)"
    methods = METHODS

    def __init__(self, plan: Plan, work: Path) -> None:
        super().__init__(plan, work, work / "models")

    @classmethod
    def open(cls, size: str, work: Path, samples: int | None) -> IdgStudy:
        """size: a plan's name, or "confirm" for the best of the full one, measured so far, drawn anew; samples: a
        point, None for the plan's own number (with "confirm": of the full sweep)."""
        study = cls(PLANS["full" if size == "confirm" else size].with_samples(samples), work)
        return cls(confirming(study.plan, study.gather(measuring=False)), work) if size == "confirm" else study

    def claims(self, rows: Sequence[Row]) -> list[Claim]:
        return claims(self.floors(rows), rows)

    def report(self, rows: Sequence[Row]) -> Report:
        return report(self.plan, rows, self.floors(rows))
