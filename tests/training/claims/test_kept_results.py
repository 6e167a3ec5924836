"""The kept results are what the claims say today: kept rows give the values and counts that stand in the pages.

Kept lines have no bootstrap replicates, so intervals are not computed again: outcomes are, from the kept intervals.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from indomain_guidance.training.claims.deciding import decide, outcome_of
from indomain_guidance.training.claims.idg import claims as idg
from indomain_guidance.training.claims.idg.confirming import confirming
from indomain_guidance.training.claims.idg.sweep import PLANS
from indomain_guidance.training.claims.keeping import Row
from indomain_guidance.training.claims.sgf import claims as sgf
from indomain_guidance.training.claims.sgf.sweep import PLANS as SGF_PLANS
from indomain_guidance.training.claims.sgf.sweep import Point
from indomain_guidance.training.claims.study import Plan

DOCS = Path(__file__).resolve().parents[3] / "docs" / "claims"
STRUCK = "not measured again with the update as it is released"


def lines_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (DOCS / name).read_text(encoding="utf-8").splitlines()]


def row_of(point: object, line: dict) -> Row:
    numbers = {**{name: value for name, value in line.items() if isinstance(value, float)}, "distance": line["value"]}
    draws = {name: torch.full((4,), numbers[name], dtype=torch.float64) for name in line["intervals"]}
    return Row(point, numbers, draws)


def idg_rows(name: str, plan: Plan) -> list[Row]:
    kept = {
        (line["name"].removeprefix("claims/idg/"), json.dumps(line["settings"], sort_keys=True), line["model"]): line
        for line in lines_of(name)
        if "settings" in line
    }
    named = {(point.name, point.settings, str(point.model) if point.model else None): point for point in plan.points}
    assert kept.keys() <= named.keys()
    return [row_of(named[key], line) for key, line in kept.items()]


def idg_floors(name: str) -> dict[str, dict[str, float]]:
    floors: dict[str, dict[str, float]] = {}
    for line in lines_of(name):
        _, _, question, *rest = line["name"].split("/")
        if len(rest) == 1 and ("floor" in rest[0] or "ceiling" in rest[0]):
            floors.setdefault(question, {})[rest[0]] = line["value"]
    return floors


def check(name: str, prefix: str, claims: list, rows: list[Row], plan: Plan) -> int:
    kept = {line["name"].removeprefix(prefix): line for line in lines_of(name) if line["name"].startswith(prefix)}
    assert kept.keys() == {claim.name for claim in claims}
    compared = 0
    for claim in claims:
        line = kept[claim.name]
        if line["details"].get("reason") == STRUCK:
            continue
        found = decide(claim, rows, plan.points, plan.coarse)
        value = found.value if found.value is None or math.isfinite(found.value) else None  # null in the file
        assert value == (None if line["value"] is None else pytest.approx(line["value"], abs=2e-5)), claim.name
        counts = line["measured"], line["planned"], line["words"], line["statement"], line["target"], line["better"]
        now = found.measured, found.planned, found.words, claim.statement, claim.target, claim.better
        assert now == counts, claim.name
        if line["value"] is not None:
            low, high = (math.inf if end is None else end for end in line["interval"])
            outcome = outcome_of(line["value"], low, high, claim.target, claim.better)
            assert line["outcome"].removesuffix(" so far") == outcome, claim.name
            compared += 1
    return compared


def test_the_kept_rows_of_in_domain_guidance():
    full = PLANS["full"].with_samples(500)
    rows, floors = idg_rows("idg/full/idg.jsonl", full), idg_floors("idg/full/idg.jsonl")
    assert len(rows) == len(full.points) == 440
    assert check("idg/full/idg.jsonl", "claims/idg/claim/", idg.claims(floors, rows), rows, full) == 20
    confirm = confirming(full, rows)
    for name, plan, compared in (("idg/idg.jsonl", PLANS["quick"], 6), ("idg/confirmed/idg.jsonl", confirm, 14)):
        rows, floors = idg_rows(name, plan), idg_floors(name)
        assert len(rows) == len(plan.points)
        assert check(name, "claims/idg/claim/", idg.claims(floors, rows), rows, plan) == compared


def test_the_kept_rows_of_stylegan_fusion():
    plan, name = SGF_PLANS["full"].with_samples(500), "sgf/sgf.jsonl"
    rows = []
    for line in lines_of(name):
        if "training_seed" in line:
            question, method = line["name"].split("/")[2:]
            rows.append(row_of(Point(question, method, line["step"], line["training_seed"]), line))
    assert {row.point for row in rows} <= set(plan.points)
    assert check(name, "claims/sgf/claim/", sgf.claims(rows, plan.points), rows, plan) == 8
