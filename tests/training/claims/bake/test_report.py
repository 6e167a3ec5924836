"""The page and the JSON lines say what the points and verdicts say."""

from __future__ import annotations

import json

import pytest
import torch
from indomain_guidance.training.claims import report as shared
from indomain_guidance.training.claims.bake import report
from indomain_guidance.training.claims.bake.recipes import BakedSpec
from indomain_guidance.training.claims.bake.study import BakeStudy
from indomain_guidance.training.claims.bake.sweep import PLANS
from indomain_guidance.training.claims.keeping import Row
from indomain_guidance.training.claims.points import ModelSpec, Point
from indomain_guidance.training.claims.questions import QUESTIONS

DOMAIN, BAKED = ModelSpec("domain", "handwriting", 300), BakedSpec("baked", "handwriting", 500)
AUTOMATIC = ModelSpec("low_rank", "handwriting", 300, "automatic")
SHARES = ("digit", "both_colours", "in_domain")


def row(method: str, distance: float, share: float, model=None, **settings) -> Row:
    numbers = {**dict.fromkeys(SHARES, share), "distance": distance, "digit_second_judge": share}
    numbers |= {"kernel": 0.1, "diversity": 4.0, "samples_per_step": 2.0}
    draws = {name: torch.full((20,), numbers[name], dtype=torch.float64) for name in (*SHARES, "distance")}
    return Row(Point.of("handwriting", method, model, **settings), numbers, draws)


def looked_at() -> Row:
    numbers = {"error": 0.123, "cosine": 0.99, "error_at_50": 0.2}
    draws = {name: torch.full((20,), numbers[name], dtype=torch.float64) for name in ("error", "cosine")}
    return Row(Point.of("handwriting", "text_kept", BAKED), numbers, draws)


ROWS = [
    row("prior", 200, 0.95, scale=3.0),
    row("multi_guidance", 60, 0.9, DOMAIN, w_d=1.5, w_c=3.0),
    row("baked", 50, 0.92, BAKED, scale=3.0),
    row("baked", 52, 0.9, BakedSpec("baked", "handwriting", 500, seed=1), scale=3.0),
    row("ablation", 55, 0.91, BakedSpec("baked", "handwriting", 500, recipe="rank 4"), scale=3.0),
    row("ablation", 70, 0.91, BakedSpec("baked", "handwriting", 100), scale=3.0),
    row("fine_tune_prior_u", 90, 0.9, AUTOMATIC, scale=3.0, strength=0.5),
    looked_at(),
]


@pytest.fixture
def study(tmp_path, monkeypatch):
    floors = {"floor": 1.0, "floor_uncorrected": 1.5, "autoencoder_floor_uncorrected": 0.1, "ceiling": 300.0}
    monkeypatch.setattr(BakeStudy, "floors", lambda self, rows: dict.fromkeys(QUESTIONS, floors))
    return BakeStudy(PLANS["quick"], tmp_path)


def test_the_page_has_verdicts_fronts_and_what_predictions_keep(study):
    page = "\n".join(shared.page(study, ROWS, study.verdicts(ROWS), study.report(ROWS)))
    assert f"8 of {len(PLANS['quick'].points)} points of the sweep are measured, 200 samples each" in page
    (line,) = [one for one in page.splitlines() if one.startswith("| (a) | handwriting, its own colours |")]
    assert "0.833 (0.833 to 0.833) | at most 1 |" in line and line.endswith("**confirmed so far** |")
    assert f"| of the text, handwriting, its own colours | {BAKED} | 0.123 (0.123 to 0.123) |" in page
    assert "| all baked LoRAs / guidance | 2 | 0.83 (0.83 to 0.83) |" in page
    assert (
        "| LoRA fine-tune, prior's u | handwriting-low_rank-automatic-seed0, 300 steps | scale 3, strength 0.5 |"
        in page
    )
    assert "51.0 (50.0 to 52.0)" in page  # training seeds
    for one in page.splitlines():
        assert not one.startswith("|") or one.endswith("|")


def test_families_of_ablations_are_what_they_change():
    assert list(report.families([row for row in ROWS if row.point.method == "ablation"])) == [
        "ablation: rank 4",
        "ablation: 100 steps",
    ]


def test_json_lines_are_strict_json_in_the_benchmarks_format(study):
    lines = [shared.row_line("bake", row, study.plan.sampling) for row in ROWS]
    lines += [*study.report(ROWS).lines]
    lines += [shared.verdict_line("bake", verdict, study.plan.sampling) for verdict in study.verdicts(ROWS)]
    for line in lines:
        record = json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
        assert {"name", "value", "unit", "target", "better", "samples", "seed"} <= record.keys()
        assert record["name"].startswith("claims/bake/")
    predicted = json.loads(lines[len(ROWS) - 1])
    assert predicted["value"] is None and predicted["error"] == 0.123
