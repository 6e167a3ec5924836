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
from indomain_guidance.guidance.files.generator import GeneratorMetadata, read_generator, write_generator
from indomain_guidance.guidance.networks.stylegan2 import random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig
from indomain_guidance.training import bootstrap
from indomain_guidance.training.claims import command_line
from indomain_guidance.training.claims.keeping import key_of
from indomain_guidance.training.claims.sgf import generators, sweep
from indomain_guidance.training.claims.sgf.points import Point
from indomain_guidance.training.claims.sgf.study import SgfStudy
from indomain_guidance.training.claims.study import Plan, Sampling
from indomain_guidance.training.engine.lock import Busy, locked

TINY = Sampling(24, steps=2, targets=80, rendered=4, replicates=20)
POINT = Point("yellow_on_blue", "sds_directional", 1)
SDS = Point("yellow_on_blue", "sds", 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = GeneratorConfig(64, (8, 8, 8, 8, 8), z_dim=8, w_dim=8, mapping_layers=1, use_noise=False)
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    write_generator(path, random_generator(config, 0), GeneratorMetadata(name="source"), "fp32")
    return path


@pytest.fixture
def make_study(source, tmp_path):
    def make(sampling: Sampling = TINY, stops: tuple[int, ...] = ()) -> SgfStudy:
        return SgfStudy(Plan("test", sampling, (POINT,), stops=stops, fine_tune=1), tmp_path, source)

    return make


def refuse_to_adapt(monkeypatch):
    def adapt(*arguments, **options):
        raise AssertionError("adapted again")

    monkeypatch.setattr(generators, "adapt", adapt)


def test_a_point_is_measured_once_and_read_back_to_the_last_digit(make_study, monkeypatch):
    study = make_study()
    first = study.measure(POINT)
    assert {"accuracy", "diversity", "recall", "distance", "changed", "moved", "gflops"} <= first.numbers.keys()
    assert first.numbers["changed"] > 0.5 and first.numbers["gflops"] > 0.1
    assert first.draws["distance"].shape == (20,) and first.column("accuracy").shape == (21,)
    assert study.shown(POINT).shape == (8, 3, 64, 64)
    refuse_to_adapt(monkeypatch)
    again = make_study().measure(POINT)
    assert again.numbers == first.numbers and again.intervals == first.intervals
    assert all(torch.equal(again.draws[name], first.draws[name]) for name in first.draws)


def test_stops_of_a_run_are_one_adaptation_and_a_missed_stop_is_made_again(make_study):
    made, later = make_study().generators, replace(SDS, step=2)
    first, second = made.file(SDS), made.file(later)
    expected = [read_generator(path).generator.state_dict() for path in (second, first)]
    assert any(not torch.equal(expected[0][key], expected[1][key]) for key in expected[0])
    # Weights after two steps are the same when the run went there at once; so is a stop that the run has gone past.
    for path in (second, first):
        path.unlink()
    for point, before in ((later, expected[0]), (SDS, expected[1])):
        found = made.generator(point).state_dict()
        assert all(torch.equal(found[key], before[key]) for key in before)


def test_stops_that_will_be_asked_for_are_kept_in_passing(make_study, monkeypatch):
    made = make_study(stops=(1, 2, 3)).generators
    made.file(replace(SDS, step=2))
    refuse_to_adapt(monkeypatch)
    assert made.file(SDS).is_file() and len(list(made.folder.glob("*.safetensors"))) == 2


def test_a_run_that_another_process_works_on_is_left_to_it(make_study, monkeypatch):
    """From looking at its stops on, not only while it trains: else a stop could get the weights of a later one."""
    made = make_study().generators
    refuse_to_adapt(monkeypatch)
    with locked(made.folder, f".{SDS.run}-{key_of(made.facts(SDS))[:10]}.lock"), pytest.raises(Busy):
        made.file(SDS)
    assert not list(made.folder.glob("*.safetensors"))


def test_whatever_decides_the_numbers_is_in_the_key(make_study):
    study = make_study()
    points = [
        POINT,
        replace(POINT, step=2),
        replace(POINT, seed=1),
        replace(POINT, method="sds"),
        replace(POINT, question="orange_on_green"),
        Point("yellow_on_blue", "source"),
        Point("yellow_on_blue", "exact"),
        Point("handwriting", "domain", 1),
        Point("handwriting", "fine_tune", 1),
    ]
    keys = [study.key(point) for point in points]
    changes = ({"samples": 25}, {"targets": 81}, {"rendered": 5}, {"steps": 3}, {"replicates": 21}, {"seed": 1})
    keys += [make_study(replace(TINY, **change)).key(POINT) for change in changes]
    assert len(set(keys)) == len(keys)


def test_the_source_and_the_exact_answers_need_no_adaptation(make_study, monkeypatch):
    refuse_to_adapt(monkeypatch)
    study = make_study()
    source, exact = study.measure(Point("yellow_on_blue", "source")), study.measure(Point("yellow_on_blue", "exact"))
    assert source.numbers["correspondence"] == 1.0 and source.numbers["accuracy"] < 0.2
    assert exact.numbers["recall"] == 1.0
    assert exact.numbers["distance_uncorrected"] < source.numbers["distance_uncorrected"]
    assert "changed" not in source.numbers


def test_regularizers_cost_operations_and_layer_selection_too(make_study):
    made = make_study().generators
    names = ("sds", "sds_directional", "shared_directional", "sds_layers_3")
    cost = {name: made.gflops(replace(SDS, method=name)) for name in names}
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
    listed = capsys.readouterr().out.splitlines()[-len(sweep.PLANS["tiny"].points) :]
    assert sum(line.startswith("measured ") for line in listed) == len(kept) + 2
