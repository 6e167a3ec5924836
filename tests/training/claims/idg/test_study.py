"""Points are measured once: found again by what decides them, whole or not at all, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from indomain_guidance.training import bootstrap
from indomain_guidance.training.claims import prompted
from indomain_guidance.training.claims.idg.study import IdgStudy
from indomain_guidance.training.claims.points import ModelSpec, Point
from indomain_guidance.training.claims.questions import QUESTIONS, examine, floors
from indomain_guidance.training.claims.statistics import TargetSet
from indomain_guidance.training.claims.study import Plan, Sampling
from indomain_guidance.training.mini_world import assets, render
from indomain_guidance.training.mini_world.classifier import judge
from indomain_guidance.training.mini_world.distances import frechet_distance
from indomain_guidance.training.mini_world.prompts import target_pictures
from indomain_guidance.training.mini_world.recipe.quality import score

pytestmark = pytest.mark.slow

TINY = Sampling(20, steps=2, replicates=20, targets=40)
PRIOR = Point.of("handwriting", "prior", scale=2.0)


@pytest.fixture(scope="module")
def world():
    return assets.load_mini_world()


@pytest.fixture(scope="module")
def judge_model():
    return assets.load_classifier()


@pytest.fixture
def make_study(tmp_path):
    def make(sampling: Sampling = TINY) -> IdgStudy:
        return IdgStudy(Plan(sampling, (PRIOR,)), tmp_path)

    return make


def refuse_to_sample(monkeypatch):
    def sample(*arguments, **options):
        raise AssertionError("sampled again")

    monkeypatch.setattr(prompted, "sample_prompts", sample)


def test_a_point_is_measured_once_and_read_back_to_the_last_digit(make_study, monkeypatch):
    first = make_study().measure(PRIOR)
    assert first.numbers["samples_per_step"] == 2.0 and 0 <= first.numbers["digit_second_judge"] <= 1
    assert first.draws["distance"].shape == (20,) and first.column("digit").shape == (21,)
    low, high = first.intervals["distance"]
    assert low < first.numbers["distance"] < high < 400
    refuse_to_sample(monkeypatch)
    again = make_study().measure(PRIOR)
    assert again.numbers == first.numbers and again.intervals == first.intervals
    assert all(torch.equal(again.draws[name], first.draws[name]) for name in first.draws)
    assert list(make_study().points_folder.iterdir()) == [
        make_study().points_folder / f"{make_study().key(PRIOR)}.json"
    ]


def test_whatever_decides_the_numbers_is_in_the_key(make_study):
    study_ = make_study()
    keys = [
        study_.key(PRIOR),
        study_.key(Point.of("handwriting", "prior", scale=2.5)),
        study_.key(Point.of("narrow", "prior", scale=2.0)),
        study_.key(Point.of("handwriting", "multi_guidance", ModelSpec("shipped", "handwriting"), w_d=1.0, w_c=2.0)),
        study_.key(Point.of("handwriting", "multi_guidance", ModelSpec("shipped", "narrow"), w_d=1.0, w_c=2.0)),
    ]
    for change in (
        {"samples": 21},
        {"steps": 3},
        {"seed": 1},
        {"replicates": 21},
        {"targets": 41},
        {"precision": "bf16"},
    ):
        keys.append(make_study(replace(TINY, **change)).key(PRIOR))
    assert len(set(keys)) == len(keys)


def test_half_precision_networks_hardly_move_a_point(make_study):
    full, half = (make_study(replace(TINY, steps=4, precision=one)).measure(PRIOR).numbers for one in ("fp32", "bf16"))
    assert half["kernel"] != full["kernel"]
    assert half["kernel"] == pytest.approx(full["kernel"], rel=0.01) and half["ink"] == full["ink"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"numbers": {}}'])
def test_a_damaged_file_counts_as_not_there(make_study, damage):
    study_ = make_study()
    study_.points_folder.mkdir(parents=True)
    (study_.points_folder / f"{study_.key(PRIOR)}.json").write_text(damage)
    assert study_.find(PRIOR) is None


def test_a_point_of_a_model_that_does_not_exist_is_not_found_and_trains_nothing(make_study, tmp_path):
    point = Point.of("handwriting", "multi_guidance", ModelSpec("domain", "handwriting", 5), w_d=1.0, w_c=2.0)
    assert make_study().find(point) is None and not (tmp_path / "models").exists()


def test_the_measures_are_those_of_the_mini_world(judge_model):
    question, sampling = QUESTIONS["handwriting_foreign"], Sampling(60, replicates=50, targets=200)
    target, prompts = judge(judge_model, question.answers(sampling))[0], question.prompts(60, 0)
    pictures = target_pictures(prompts.digits, prompts.pairs, render.TRAIN_ROWS).images
    judges = judge_model, assets.load_classifier(held_out=True)
    numbers = examine(judges, target, pictures, prompts, sampling)[1]
    expected = score(judge_model, pictures, prompts, target)
    assert numbers["distance_uncorrected"] == pytest.approx(expected["distance"], rel=1e-6)
    for name in ("kernel", "digit", "ink", "both_colours", "in_domain", "diversity"):
        assert numbers[name] == pytest.approx(expected[name], rel=1e-6), name
    # Training handwriting in the asked colours is nearly right: few samples make it seem far, the correction less.
    assert numbers["distance"] < 0.7 * numbers["distance_uncorrected"]
    assert numbers["digit"] > 0.9 and numbers["both_colours"] == 1.0
    assert numbers["digit_second_judge"] > 0.8 and numbers["in_domain_second_judge"] > 0.8


def test_targets_wear_the_asked_colours_and_floors_are_in_order(world, judge_model):
    for question in QUESTIONS.values():
        pairs, own = question.pairs.tolist(), render.domain_pairs(question.domain).tolist()
        assert all(ink != ground for ink, ground in pairs)
        assert (pairs == own) if question.own_colours else not any(pair in own for pair in pairs)
    assert len(QUESTIONS["narrow_foreign"].pairs) == 43
    found = floors(QUESTIONS["narrow"], judge_model, world.autoencoder, Sampling(120, targets=120))
    assert found["autoencoder_floor"] < found["floor_uncorrected"] < 0.2 * found["ceiling"]


def test_the_target_set_gives_the_distance_of_the_metrics():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(100, 6, generator=generator) * 2 + 1, torch.randn(90, 6, generator=generator)
    ones = torch.ones(1, 100, dtype=torch.float64)
    assert float(TargetSet(b).distances(a, ones)[0]) == pytest.approx(frechet_distance(a, b), rel=1e-9)


SMALL = """
import sys
from indomain_guidance.training.claims.command_line import main
from indomain_guidance.training.claims.idg.sweep import PLANS
from indomain_guidance.training.claims.points import Point
from indomain_guidance.training.claims.study import Plan, Sampling
points = tuple(Point.of("handwriting", "prior", scale=float(scale)) for scale in range(1, 9))
PLANS["quick"] = Plan(Sampling(20, steps=2, replicates=20, targets=40), points, coarse=True, options=" --quick")
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_keeps_its_points_and_goes_on(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    command = [sys.executable, bootstrap.__file__, str(tmp_path / "small.py"), "idg", "--quick", "--work"]
    command.append(str(tmp_path / "work"))
    folder = tmp_path / "work" / "points"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 300
        while not list(folder.glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    kept = sorted(folder.glob("*.json"))
    assert kept and all(json.loads(path.read_text())["numbers"] for path in kept)
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert len([path for path in folder.glob("*.json") if not path.name.startswith("floors")]) == 8
    report = tmp_path / "work" / "quick"
    assert "8 of 8 points" in (report / "idg.md").read_text()
    assert sum('"settings"' in line for line in (report / "idg.jsonl").read_text().splitlines()) == 8
