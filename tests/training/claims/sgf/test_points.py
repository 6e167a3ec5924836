"""Points are measured once on the real parts: adapted, kept, found again, also after a kill."""

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
from indomain_guidance.guidance.files.generator import GeneratorMetadata, write_generator
from indomain_guidance.guidance.networks.stylegan2 import random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig
from indomain_guidance.training import bootstrap
from indomain_guidance.training.claims import command_line
from indomain_guidance.training.claims.idg.models import Models
from indomain_guidance.training.claims.sgf import runs as runs_module
from indomain_guidance.training.claims.sgf import sweep
from indomain_guidance.training.claims.sgf.points import Bench, Point, Sampling
from indomain_guidance.training.claims.sgf.runs import Run, Runs
from indomain_guidance.training.engine.lock import Busy, locked
from indomain_guidance.training.mini_world import assets

TINY = Sampling(24, answers=80, rendered=4, rendered_steps=2, replicates=20)
POINT = Point("yellow_on_blue", "sds_directional", 1)


@pytest.fixture(scope="module")
def world():
    return assets.load_mini_world()


@pytest.fixture(scope="module")
def source():
    config = GeneratorConfig(64, (8, 8, 8, 8, 8), z_dim=8, w_dim=8, mapping_layers=1, use_noise=False)
    return random_generator(config, 0).eval().requires_grad_(False)


@pytest.fixture
def make_bench(world, source, tmp_path):
    def make(sampling: Sampling = TINY) -> Bench:
        path = tmp_path / "source.safetensors"
        if not path.exists():
            write_generator(path, source, GeneratorMetadata(name="source"), "fp32")
        runs = Runs(tmp_path / "generators", source, path, Models(tmp_path / "models", world), 1)
        return Bench(
            tmp_path / "points",
            runs,
            world,
            source,
            assets.load_classifier(),
            sampling,
            assets.load_classifier(held_out=True),
        )

    return make


def refuse_to_adapt(monkeypatch):
    def adapt(*arguments, **options):
        raise AssertionError("adapted again")

    monkeypatch.setattr(runs_module, "adapt", adapt)


def test_a_point_is_measured_once_and_read_back_to_the_last_digit(make_bench, monkeypatch):
    bench = make_bench()
    first = bench.measure(POINT)
    assert {"accuracy", "diversity", "recall", "distance", "changed", "moved", "gflops"} <= first.numbers.keys()
    assert first.numbers["changed"] > 0.5 and first.numbers["gflops"] > 0.1
    assert first.draws["distance"].shape == (20,) and first.column("accuracy").shape == (21,)
    assert bench.shown(POINT).shape == (8, 3, 64, 64)
    refuse_to_adapt(monkeypatch)
    again = make_bench().measure(POINT)
    assert again.numbers == first.numbers and again.intervals == first.intervals
    assert all(torch.equal(again.draws[name], first.draws[name]) for name in first.draws)


def test_stops_of_a_run_are_one_adaptation_and_a_missed_stop_is_made_again(make_bench):
    runs = make_bench().runs
    run = Run("yellow_on_blue", "sds")
    first, second = runs.adapted(run, 1), runs.adapted(run, 2)
    assert runs.finished_steps(run) == [1, 2]
    bits = second.read_bytes(), first.read_bytes()
    assert bits[0] != bits[1]
    # Weights after two steps are the same when the run went there at once; so is a stop that the run has gone past.
    for path in (second, first):
        path.unlink()
    at_once = runs.generator(run, 2).state_dict()
    passed = runs.generator(run, 1).state_dict()
    from indomain_guidance.guidance.files.generator import read_generator

    for found, before in ((at_once, bits[0]), (passed, bits[1])):
        kept = runs.folder / "before.safetensors"
        kept.write_bytes(before)
        expected = read_generator(kept).generator.state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_stops_that_will_be_asked_for_are_kept_in_passing(make_bench, monkeypatch):
    runs, run = make_bench().runs, Run("yellow_on_blue", "sds")
    runs.stops = (1, 2, 3)
    runs.adapted(run, 2)
    assert runs.finished_steps(run) == [1, 2]
    refuse_to_adapt(monkeypatch)
    assert runs.adapted(run, 1) == runs.path(run, 1)


def test_a_run_that_another_process_works_on_is_left_to_it(make_bench, monkeypatch):
    """From looking at its stops on, not only while it trains: else a stop could get the weights of a later one."""
    runs, run = make_bench().runs, Run("yellow_on_blue", "sds")
    refuse_to_adapt(monkeypatch)
    with locked(runs.folder, f".{run.name}-{runs.hash_of(run)}.lock"), pytest.raises(Busy):
        runs.adapted(run, 1)
    assert not runs.finished_steps(run)


def test_another_released_update_makes_its_points_anew_and_no_others(make_bench, monkeypatch):
    released = ("sds", "sds_layers_3", "domain")
    others = ("sds_back", "domain_back", "shared_directional", "csd", "first")
    points = [Point("handwriting", name, 1) for name in (*released, *others)] + [Point("handwriting", "source")]
    bench = make_bench()
    before = [bench.key(point) for point in points]
    monkeypatch.setattr(runs_module, "RELEASED_UPDATE", runs_module.RELEASED_UPDATE + 1)
    changed = {point.recipe for point, key in zip(points, before) if make_bench().key(point) != key}
    assert changed == set(released)


def test_whatever_decides_the_numbers_is_in_the_key(make_bench):
    bench = make_bench()
    points = [
        POINT,
        replace(POINT, step=2),
        replace(POINT, seed=1),
        replace(POINT, recipe="sds"),
        replace(POINT, task="orange_on_green"),
        Point("yellow_on_blue", "source"),
        Point("yellow_on_blue", "exact"),
        Point("handwriting", "domain", 1),
        Point("handwriting", "fine_tune", 1),
    ]
    keys = [bench.key(point) for point in points]
    changes = (
        {"samples": 25},
        {"answers": 81},
        {"rendered": 5},
        {"rendered_steps": 3},
        {"rendered_scale": 3.0},
        {"replicates": 21},
        {"seed": 1},
    )
    keys += [make_bench(replace(TINY, **change)).key(POINT) for change in changes]
    assert len(set(keys)) == len(keys)


def test_the_source_and_the_exact_answers_need_no_adaptation(make_bench, monkeypatch):
    refuse_to_adapt(monkeypatch)
    bench = make_bench()
    source, exact = bench.measure(Point("yellow_on_blue", "source")), bench.measure(Point("yellow_on_blue", "exact"))
    assert source.numbers["correspondence"] == 1.0 and source.numbers["accuracy"] < 0.2
    assert exact.numbers["recall"] == 1.0
    assert exact.numbers["distance_uncorrected"] < source.numbers["distance_uncorrected"]
    assert "changed" not in source.numbers


def test_regularizers_cost_operations_and_layer_selection_too(make_bench):
    runs = make_bench().runs
    cost = {
        name: runs.cost(Run("yellow_on_blue", name))["gflops"]
        for name in ("sds", "sds_directional", "shared_directional", "sds_layers_3")
    }
    assert cost["sds"] < cost["shared_directional"] < cost["sds_directional"]
    assert cost["sds"] < cost["sds_layers_3"]


@pytest.mark.slow
def test_a_killed_run_keeps_its_points_and_goes_on(tmp_path, capsys):
    command = [
        sys.executable,
        bootstrap.__file__,
        "indomain_guidance.training.claims",
        "sgf",
        "--tiny",
        "--work",
        str(tmp_path),
    ]
    folder = tmp_path / "tiny" / "sgf" / "points"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        deadline = time.monotonic() + 600
        while len(list(folder.glob("*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    kept = sorted(folder.glob("*.json"))
    assert len(kept) >= 3 and all(json.loads(path.read_text())["numbers"] for path in kept)
    before = {path: path.stat().st_mtime_ns for path in kept}

    assert command_line.main(["sgf", "--tiny", "--work", str(tmp_path), "--limit", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all({"name", "value", "unit", "target", "better", "samples", "seed"} <= line.keys() for line in lines)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert len(list(folder.glob("*.json"))) == len(kept) + 2
    report = tmp_path / "tiny" / "sgf" / "tiny"
    assert "| (a) | colours |" in (report / "sgf.md").read_text()
    assert command_line.main(["sgf", "--tiny", "--work", str(tmp_path), "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()[-len(sweep.PLANS["tiny"]().points) :]
    assert sum(line.startswith("measured ") for line in listed) == len(kept) + 2
