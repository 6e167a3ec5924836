"""The page and the JSON lines say what the points and verdicts say."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from indomain_guidance.training.claims import report as shared
from indomain_guidance.training.claims.fronts import LEVELS, Front
from indomain_guidance.training.claims.idg import report
from indomain_guidance.training.claims.idg.study import IdgStudy
from indomain_guidance.training.claims.idg.sweep import PLANS
from indomain_guidance.training.claims.keeping import Row
from indomain_guidance.training.claims.points import ModelSpec, Point
from indomain_guidance.training.claims.study import Sampling

FLOORS = {
    "handwriting": {
        "floor": 0.9,
        "floor_uncorrected": 1.7,
        "autoencoder_floor": 0.05,
        "autoencoder_floor_uncorrected": 0.07,
        "ceiling": 305.0,
        "ceiling_uncorrected": 306.0,
    }
}


def row(method: str, distance: float, digit: float, model: ModelSpec | None = None, **settings) -> Row:
    shares = dict.fromkeys(("digit", "both_colours", "in_domain", "ink", "ground"), digit)
    numbers = {
        "distance": distance,
        **shares,
        "kernel": 1.25,
        "diversity": 7.0,
        "samples_per_step": 3.0,
        "seconds": 720.0,
        "digit_second_judge": 0.95,
    }
    draws = {
        name: torch.full((10,), value, dtype=torch.float64) for name, value in {"distance": distance, **shares}.items()
    }
    return Row(Point.of("handwriting", method, model, **settings), numbers, draws)


TUNED = ModelSpec("low_rank", "handwriting", 300, "a digit")
ROWS = [
    row("prior", 200.0, 0.98, scale=2.0),
    row("prior", 250.0, 0.9, scale=5.0),
    row("multi_guidance", 50.0, 0.97, ModelSpec("domain", "handwriting", 1000), w_d=1.5, w_c=3.0),
    row("multi_guidance", 40.0, 0.97, ModelSpec("shipped", "handwriting"), w_d=1.5, w_c=3.0),
    *(row("fine_tune", 80.0 + 10 * seed, 0.9, replace(TUNED, seed=seed), scale=1.5) for seed in range(3)),
]


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(IdgStudy, "floors", lambda self, rows: FLOORS)
    return IdgStudy(PLANS["full"], tmp_path)


def page_of(study: IdgStudy) -> str:
    return "\n".join(shared.page(study, ROWS, study.verdicts(ROWS), study.report(ROWS)))


def test_the_page_has_the_verdicts_the_fronts_and_the_seeds(study):
    page = page_of(study)
    assert (
        "| (b) | handwriting | constant weights |" in page
        and "0.25 (0.25 to 0.25) | at most 0.5 | 3 of 35 | **confirmed so far** |" in page
    )
    assert "| prior |  | scale 2 | 200.0 (200.0 to 200.0) | 1.25 | 98.0% (98.0% to 98.0%) | 95.0% |" in page
    assert "| (b) | handwriting | constant weights, shipped model |" in page and "0.2 (0.2 to 0.2) |" in page
    assert "\n| multi-guidance, shipped model | shipped handwriting |" in page
    assert "7 of 440 points" in page
    assert "scale 5" not in page.split("## Handwriting")[1]  # dominated
    assert "| 3 | 90.0 (80.0 to 100.0) | 90.0% (90.0% to 90.0%) |" in page
    assert "| handwriting, its own colours | 1.70 | 0.07 | 305 | 179 | 0.04% | yes |" in page
    assert "autoencoder floor / prior 0.04% (at most 5%): valid." in page.split("## Handwriting")[1]
    nearest = page.split("## Handwriting")[1]
    assert "| multi-guidance | 1 | 50.0 (50.0 to 50.0) |" in nearest and "| all fine-tunes | 1 | 80.0" in nearest
    assert "| multi-guidance, shipped model | 1 | 40.0" in nearest
    # Ours are those of the fine-tunes' trainer, and the fine-tune has no point above 90 %.
    ratio = next(line for line in nearest.splitlines() if line.startswith("| multi-guidance / all fine-tunes |"))
    assert ratio.count("0.62 (0.62 to 0.62)") == 7 and ratio.endswith("| no rival |  |")
    for line in page.splitlines():  # tables have one width each
        assert not line.startswith("|") or line.endswith("|")


def test_json_lines_are_strict_json_in_the_benchmarks_format(study, tmp_path):
    paths = shared.write_report(tmp_path / "new", study, ROWS)
    assert [path.name for path in paths] == ["idg.jsonl", "idg.md"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    lines = paths[0].read_text().splitlines()
    for line in lines:
        record = json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
        assert {"name", "value", "unit", "target", "better", "samples", "seed"} <= record.keys()
        assert record["name"].startswith("claims/idg/")
    assert json.loads(shared.json_line("idg", "x", math.inf, "ratio", Sampling(1), low=-math.inf))["value"] is None
    (valid,) = [json.loads(line) for line in lines if "handwriting/valid/ceiling" in line]
    assert valid["valid"] is True and valid["target"] == 20 and valid["value"] == round(305 / 1.7, 5)
    (nearest,) = [json.loads(line) for line in lines if 'handwriting/nearest/multi-guidance"' in line]
    assert nearest["at"]["0.95"] == [50.0, 50.0, 50.0] and nearest["value"] == round(0.97 * 255 / 305, 5)
    verdict = json.loads(next(line for line in lines if 'claim/handwriting/b"' in line))
    assert verdict["outcome"] == "confirmed so far" and verdict["value"] == 0.25 and verdict["interval"] == [0.25, 0.25]


def test_the_page_names_the_command_that_makes_it(study, tmp_path):
    assert "`python run.py claims idg`; do not" in page_of(study)
    page = page_of(IdgStudy(PLANS["full"].with_samples(500), tmp_path))
    assert "`python run.py claims idg --samples 500`; do not" in page and "500 samples each" in page
    assert "`python run.py claims idg --quick`; do not" in page_of(IdgStudy(PLANS["quick"], tmp_path))


def test_families_tell_fine_tunes_apart():
    names = [report.family(row(method, 1.0, 0.5, TUNED, scale=2.0)) for method in ("fine_tune", "fine_tune_prior_u")]
    assert names == ["LoRA fine-tune", "LoRA fine-tune, prior's u"]
    models = [ModelSpec("domain", "handwriting", 1000), ModelSpec("shipped", "handwriting")]
    names = [report.family(row("scheduled", 1.0, 0.5, model, w_d=1.0, w_c=1.0)) for model in models]
    assert names == ["scheduled terms", "scheduled terms, shipped model"]


# -------------------------------------------------------------------------------------------------------------- fronts


def spread_row(method: str, distance: float, share: float, spread: float = 0.1) -> Row:
    """Replicates spread evenly over +-spread of the distance; shares are exact."""
    steps = torch.linspace(-1, 1, 100, dtype=torch.float64)
    draws = {"distance": distance * (1 + spread * steps), "digit": torch.full_like(steps, share)}
    model = None if method == "prior" else ModelSpec("domain", "handwriting", 1000)
    point = Point.of("handwriting", method, model, scale=distance)
    return Row(point, {"distance": distance, "digit": share}, draws)


def fronts(*rows: Row, ceiling: float = 100.0) -> dict[str, Front]:
    return {front.name: front for front in report.fronts_of_question(rows, ceiling)}


def test_the_lowest_distance_at_every_level_with_its_interval():
    found = fronts(spread_row("multi_guidance", 20, 0.55), spread_row("multi_guidance", 60, 0.92))["multi-guidance"]
    at = dict(zip(LEVELS, found.at))
    assert [at[level][0] for level in (0.3, 0.5, 0.6, 0.9)] == [20, 20, 60, 60] and found.points == 2
    value, low, high = at[0.9]
    assert low == pytest.approx(60 * 0.905, abs=0.2) and high == pytest.approx(60 * 1.095, abs=0.2)
    assert math.isinf(at[0.95][0])
    # The rectangle up to 100 and 1: 20 to 60 at .55, from there .92.
    assert found.volume is not None and found.volume[0] == pytest.approx(0.4 * 0.55 + 0.4 * 0.92)


def test_ratios_pair_the_replicates_and_cells_are_empty_where_nobody_is():
    """Both spread alike, so that their ratio does not spread at all."""
    rows = [spread_row("multi_guidance", 20, 0.6), spread_row("prior", 40, 0.82), spread_row("bands", 120, 0.92)]
    found = fronts(*rows, ceiling=200.0)
    ratio, ours = found["multi-guidance / prior"], found["all of ours"]
    assert dict(zip(LEVELS, ratio.at))[0.5] == pytest.approx((0.5, 0.5, 0.5)) and ratio.volume is None
    cells = [ratio.cell(index) for index in range(len(LEVELS))]
    assert cells[0] == "0.50 (0.50 to 0.50)" and cells[4:] == ["not reached", "neither", "neither", "neither"]
    assert ours.cell(0) == "20.0 (18.1 to 21.9)" and ours.cell(6) == "120 (108 to 132)" and ours.cell(7) == ""
    assert found["all of ours / prior"].cell(4) == "3.00 (3.00 to 3.00)"
    assert found["all of ours / prior"].cell(5) == "no rival"
