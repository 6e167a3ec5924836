"""The page, the plots and the JSON lines say what the points and verdicts say."""

from __future__ import annotations

import json
import math

import pytest
import torch
from indomain_guidance.training.claims import report as shared
from indomain_guidance.training.claims.keeping import Row
from indomain_guidance.training.claims.sgf import report
from indomain_guidance.training.claims.sgf.study import SgfStudy
from indomain_guidance.training.claims.sgf.sweep import PLANS, Point

PLAN = PLANS["quick"]
TASK = "yellow_on_blue"
SHARES = ("accuracy", "correspondence", "handwritten", "diversity", "recall")


def row(recipe: str, step: int = 0, seed: int = 0, value: float = 0.95, distance: float = 20.0) -> Row:
    numbers = dict.fromkeys((*SHARES, "ink_right", "ground_right", "accuracy_second_judge", "precision"), value)
    numbers |= {"distance": distance, "distance_rendered": 99.0, "seconds": 60.0}
    if step:
        numbers |= {"changed": 0.5, "moved": 0.123, "gflops": 6.0}
    draws = {name: torch.full((20,), numbers[name], dtype=torch.float64) for name in (*SHARES, "distance")}
    return Row(Point(TASK, recipe, step, seed), numbers, draws)


ROWS = [
    row("source", value=0.0),
    row("exact"),
    row("prior"),
    *(row("sds", step, seed, 0.99 - step / 1500, 10.0 + seed) for seed in range(3) for step in PLAN.stops),
    *(row("sds_directional", step) for step in PLAN.stops),
]


@pytest.fixture
def study(tmp_path):
    return SgfStudy(PLAN, tmp_path)


def test_the_page_has_verdicts_tables_and_what_is_missing(study):
    page = "\n".join(shared.page(study, ROWS, study.verdicts(ROWS), study.report(ROWS)))
    assert f"15 of {len(PLAN.points)} points of the sweep are measured, 300 samples each" in page
    assert "--quick`; do not edit" in page
    assert "few settings are asked" in page
    (line,) = [one for one in page.splitlines() if one.startswith("| (a) | colours | SDS alone: its share")]
    assert "0.79 (0.79 to 0.79) | at most 0.8 |" in line and line.endswith("**confirmed so far** |")
    assert "| **SDS alone** | 300 | 3 | 11.0 (10.0 to 12.0) | 99.0 | 79.0% (79.0% to 79.0%) |" in page
    assert "| source, not adapted |  |  | 20.0 (20.0 to 20.0) |" in page
    assert (
        "Prompt: 'a yellow digit on a blue background'. The judge accepts 95.0% of the exact answers (at least 95%)"
        in page
    )
    assert "## Every latent a seven" not in page
    for one in page.splitlines():  # tables have one width each
        assert not one.startswith("|") or one.endswith("|")
    widths = [one.count("|") for one in page.splitlines() if "| 11.0 (" in one or one.startswith("| recipe |")]
    assert len(set(widths)) == 1


def test_json_lines_are_strict_json_in_the_benchmarks_format(study):
    lines = [shared.row_line("sgf", row, PLAN.sampling) for row in ROWS]
    lines += [shared.verdict_line("sgf", verdict, PLAN.sampling) for verdict in study.verdicts(ROWS)]
    for line in lines:
        record = json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
        assert {"name", "value", "unit", "target", "better", "samples", "seed"} <= record.keys()
        assert record["name"].startswith("claims/sgf/")
    found = json.loads(next(line for line in lines if "claim/colours/a/loses_diversity" in line))
    assert found["outcome"] == "confirmed so far" and found["target"] == 0.8 and found["better"] == "lower"
    assert found["about"] == ["colours"] and math.isclose(found["value"], 0.79)


def test_the_report_is_written_whole(study, tmp_path):
    paths = shared.write_report(tmp_path / "new", study, ROWS)
    assert [path.name for path in paths] == ["sgf.jsonl", "sgf.md"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)


def test_the_last_step_of_every_run_stands_in_the_tables():
    found = [row for rows in report.last_rows(ROWS) for row in rows]
    assert [(one.point.method, one.point.step, one.point.seed) for one in found] == [
        ("source", 0, 0),
        ("exact", 0, 0),
        ("prior", 0, 0),
        ("sds", 300, 0),
        ("sds", 300, 1),
        ("sds", 300, 2),
        ("sds_directional", 300, 0),
    ]
