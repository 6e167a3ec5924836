"""Points are measured once on the real parts: adapted, kept, found again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.files.generator import GeneratorMetadata, write_generator
from indomain_guidance.guidance.networks.stylegan2 import random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig
from indomain_guidance.training.claims.sgf import study as sgf_study
from indomain_guidance.training.claims.sgf.study import SgfStudy
from indomain_guidance.training.claims.sgf.sweep import Point
from indomain_guidance.training.claims.study import Plan, Sampling

pytestmark = pytest.mark.slow

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
        return SgfStudy(Plan(sampling, (POINT,), stops=stops, fine_tune=1), tmp_path, source)

    return make


def refuse_to_adapt(monkeypatch):
    def adapt(*arguments, **options):
        raise AssertionError("adapted again")

    monkeypatch.setattr(sgf_study, "adapt", adapt)


def test_a_point_is_measured_once_and_read_back_to_the_last_digit(make_study, monkeypatch):
    study = make_study()
    first = study.measure(POINT)
    assert {"accuracy", "diversity", "recall", "distance", "changed", "moved", "gflops"} <= first.numbers.keys()
    assert first.numbers["changed"] > 0.5 and first.numbers["gflops"] > 0.1
    assert first.draws["distance"].shape == (20,) and first.column("accuracy").shape == (21,)
    refuse_to_adapt(monkeypatch)
    again = make_study().measure(POINT)
    assert again.numbers == first.numbers and again.intervals == first.intervals
    assert all(torch.equal(again.draws[name], first.draws[name]) for name in first.draws)


def weights_of(study: SgfStudy, point: Point) -> dict[str, torch.Tensor]:
    return study.generator(point).state_dict()


def files_of(study: SgfStudy) -> list:
    return sorted((study.folder / "generators").glob("*.safetensors"))


def test_stops_of_a_run_are_one_adaptation_and_a_missed_stop_is_made_again(make_study):
    study, later = make_study(), replace(SDS, step=2)
    first, second = weights_of(study, SDS), weights_of(study, later)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    # Weights after two steps are the same when the run went there at once; so is a stop that the run has gone past.
    for path in files_of(study):
        path.unlink()
    for point, before in ((later, second), (SDS, first)):
        found = weights_of(study, point)
        assert all(torch.equal(found[key], before[key]) for key in before)


def test_stops_that_will_be_asked_for_are_kept_in_passing(make_study, monkeypatch):
    study = make_study(stops=(1, 2, 3))
    study.generator(replace(SDS, step=2))
    refuse_to_adapt(monkeypatch)
    assert study.generator(SDS) is not None and len(files_of(study)) == 2


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
    study = make_study()
    names = ("sds", "sds_directional", "shared_directional", "sds_layers_3")
    cost = {name: study.gflops(replace(SDS, method=name)) for name in names}
    assert cost["sds"] < cost["shared_directional"] < cost["sds_directional"]
    assert cost["sds"] < cost["sds_layers_3"]
