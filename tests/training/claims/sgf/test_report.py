"""The page, the plots and the JSON lines say what the points and verdicts say."""

from __future__ import annotations

import json
import math

import pytest
import torch
from indomain_guidance.training.claims import report as shared
from indomain_guidance.training.claims.keeping import Row
from indomain_guidance.training.claims.sgf import report
from indomain_guidance.training.claims.sgf.points import Point
from indomain_guidance.training.claims.sgf.study import SgfStudy
from indomain_guidance.training.claims.sgf.sweep import PLANS
from PIL import Image

PLAN = PLANS["quick"]
TASK = "yellow_on_blue"
SHARES = ("accuracy", "correspondence", "handwritten", "diversity", "recall")


def row(recipe: str, step: int = 0, seed: int = 0, value: float = 0.95, distance: float = 20.0) -> Row:
    numbers = dict.fromkeys((*SHARES, "ink_right", "ground_right", "accuracy_second_judge", "precision"), value)
    numbers |= {"distance": distance, "distance_rendered": 99.0, "seconds": 60.0}
    if step:
        numbers |= {"changed": 0.5, "moved": 0.123, "gflops": 6.0}
    draws = {name: torch.full((20,), numbers[name], dtype=torch.float64) for name in (*SHARES, "distance")}
    intervals = {name: (numbers[name] - 0.01, numbers[name] + 0.01) for name in (*SHARES, "distance")}
    return Row(Point(TASK, recipe, step, seed), numbers, intervals, draws)


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
    verdicts = study.verdicts(ROWS)
    page = "\n".join(shared.page("sgf", PLAN, ROWS, verdicts, study.report(ROWS, verdicts)))
    assert f"15 of {len(PLAN.points)} points of the sweep are measured, 300 samples each" in page
    assert "--quick`; do not edit" in page and "took 0.2 hours; the rest would take" in page
    assert "few settings are asked" in page
    (line,) = [one for one in page.splitlines() if one.startswith("| (a) | colours | SDS alone: its share")]
    assert "0.79 (0.79 to 0.79) | at most 0.8 |" in line and line.endswith("**confirmed so far** |")
    assert "| **SDS alone** | 300 | 3 | 11.0 (10.0 to 12.0) | 99.0 | 79.0% (79.0% to 79.0%) |" in page
    assert "| source, not adapted |  |  | 20.0 (20.0 to 20.0) |" in page
    assert (
        "Prompt: 'a yellow digit on a blue background'. The judge accepts 95.0% of the exact answers (at least 95%)"
        in page
    )
    assert "(sgf.png)" in page and "(sgf_samples.png)" not in page and "## Every latent a seven" not in page
    for one in page.splitlines():  # tables have one width each
        assert not one.startswith("|") or one.endswith("|")
    widths = [one.count("|") for one in page.splitlines() if "| 11.0 (" in one or one.startswith("| recipe |")]
    assert len(set(widths)) == 1


def test_json_lines_are_strict_json_in_the_benchmarks_format(study):
    lines = [study.line(row) for row in ROWS]
    lines += [shared.verdict_line("sgf", verdict, PLAN.sampling) for verdict in study.verdicts(ROWS)]
    for line in lines:
        record = json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
        assert {"name", "value", "unit", "target", "better", "samples", "seed"} <= record.keys()
        assert record["name"].startswith("claims/sgf/")
    found = json.loads(next(line for line in lines if "claim/colours/a/loses_diversity" in line))
    assert found["outcome"] == "confirmed so far" and found["target"] == 0.8 and found["better"] == "lower"
    assert found["about"] == ["colours"] and math.isclose(found["value"], 0.79)


def test_curves_begin_at_the_source_and_join_the_seeds():
    found = {one.label: one for one in report.curves(ROWS, "distance")}
    assert list(found) == ["SDS alone", "SDS + directional 1"]
    assert found["SDS alone"].points == [(0.0, 20.0), (75.0, 11.0), (150.0, 11.0), (300.0, 11.0)]
    assert found["SDS alone"].intervals[1] == ((75, 75), (10.0, 12.0))


def test_the_report_is_written_whole(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "shown", lambda point: torch.zeros(4, 3, 64, 64))
    paths = shared.write_report(tmp_path / "new", study, ROWS)[1]
    assert [path.name for path in paths] == ["sgf.jsonl", "sgf.png", "sgf_samples.png", "sgf.md"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    # A heading and five strips: source, exact, prior, SDS and the directional regularizer, of seed 0 at the last step.
    assert Image.open(paths[2]).size == (300 + 4 * 68, 26 + 5 * 68)
    assert Image.open(paths[1]).width == 3 * 560
    monkeypatch.setattr(study, "shown", lambda point: None)
    alone = shared.write_report(tmp_path / "less", study, ROWS[:1])[1]
    assert [path.name for path in alone] == ["sgf.jsonl", "sgf.md"]  # nothing to draw yet


def test_the_last_step_of_every_run_stands_in_the_tables():
    found = report.last_rows(ROWS)
    assert [(one.point.method, one.point.step, one.point.seed) for one in found] == [
        ("source", 0, 0),
        ("exact", 0, 0),
        ("prior", 0, 0),
        ("sds", 300, 0),
        ("sds", 300, 1),
        ("sds", 300, 2),
        ("sds_directional", 300, 0),
    ]
