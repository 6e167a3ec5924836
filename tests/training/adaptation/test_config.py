"""The configuration of an adaptation: checked, compared, and agreeing with the library's own names."""

from __future__ import annotations

import dataclasses
import json

import pytest
from indomain_guidance.guidance.distillation.methods import METHODS
from indomain_guidance.guidance.distillation.objective import MODES
from indomain_guidance.guidance.distillation.timesteps import T_SCHEDULES
from indomain_guidance.guidance.distillation.weighting import WEIGHTINGS
from indomain_guidance.guidance.options import options_of
from indomain_guidance.training.adaptation.config import OPTIONS_OF_METHODS, AdaptConfig
from indomain_guidance.training.adaptation.layers import TRAINED
from indomain_guidance.training.command_line.kinds import KINDS, kind_of
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.settings import ConfigProblem, fields_of, kinds_of

NEEDED = {"generator": "g.pkl", "base": "m"}


def test_the_choices_are_the_librarys():
    choices = {one.name: one.metadata.get("choices") for one in dataclasses.fields(AdaptConfig)}
    assert choices["method"] == tuple(METHODS) and choices["mode"] == MODES
    assert choices["t_schedule"] == T_SCHEDULES and choices["weighting"] == tuple(WEIGHTINGS)
    assert set(choices["train"]) == set(TRAINED)


def test_each_option_of_a_method_is_a_field_and_comes_back_by_its_own_name():
    fields = {one.name: one for one in dataclasses.fields(AdaptConfig)}
    for name, method in METHODS.items():
        config = AdaptConfig(**NEEDED, method=name)
        assert config.method_options() == {one.name: one.default for one in options_of(method)}
        for one in options_of(method):
            assert fields[f"{name}_{one.name}"].metadata["help"] == f"method {name} only: {one.metadata['help']}"
    assert AdaptConfig(**NEEDED, method="vsd", vsd_rank=8).method_options() == {"rank": 8, "learning_rate": 1e-4}
    with pytest.raises(ConfigProblem, match="vsd_rank: expected a number from 1 to 256, found 0"):
        AdaptConfig(**NEEDED, vsd_rank=0)


def test_options_of_methods_stand_in_the_order_of_the_methods():
    assert list(OPTIONS_OF_METHODS) == [f"{name}_{one.name}" for name in METHODS for one in options_of(METHODS[name])]
    assert set(OPTIONS_OF_METHODS) <= {one.name for one in dataclasses.fields(AdaptConfig)}


def test_every_field_can_be_shown():
    kinds = kinds_of(AdaptConfig)
    assert {one.name for one in fields_of(AdaptConfig)} == set(kinds)
    for one in dataclasses.fields(AdaptConfig):
        about = one.metadata
        assert about["help"]
        if kinds[one.name] in (int, float):
            assert about["min"] <= one.default <= about["max"]
        if "choices" in about:
            assert one.default in about["choices"]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"base": "m"}, "expected a field generator, the generator to adapt"),
        ({**NEEDED, "generator": ""}, "generator: expected .* name the generator"),
        ({**NEEDED, "t_min": 300, "t_max": 200}, "t_min: expected at most t_max, found 300 and 200"),
        ({**NEEDED, "resolution": 100}, "the nearest is 96|the nearest is 104"),
        ({**NEEDED, "method": "brige"}, r"did you mean bridge\?"),
        ({**NEEDED, "form": "cached"}, "'form' is no field"),
        ({**NEEDED, "name": "a/b"}, "name: expected a plain file name"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(ConfigProblem, match=message):
        AdaptConfig.from_mapping(values)


def test_it_comes_back_from_json_and_is_told_from_a_training(tmp_path):
    config = AdaptConfig(**NEEDED, prompt="a cat", learning_rate=0.1)
    config.write_json(tmp_path / "c.json")
    assert AdaptConfig.read(tmp_path / "c.json") == config
    assert kind_of(json.loads((tmp_path / "c.json").read_text())) is AdaptConfig
    other = TrainConfig(base="m")
    assert kind_of(other.to_dict()) is TrainConfig and KINDS["training"] is TrainConfig
    with pytest.raises(ConfigProblem, match="kind: expected adaptation, settings of `indomain adapt`, found .training"):
        AdaptConfig.from_mapping(other.to_dict())
    for values in ({}, {"kind": "sculpture"}, {"kind": ["training"]}):
        with pytest.raises(ConfigProblem, match="expected the kind of run \\(training, baking, adaptation\\)"):
            kind_of(values)


def test_only_fields_that_change_the_numbers_bind_a_resumed_run():
    config = AdaptConfig(**NEEDED)
    assert config.differences(config.with_changes(steps=5, generator="moved.pkl", sample_count=9, device="cpu")) == {}
    other = config.with_changes(scale=7.5, prompt="x")  # another prompt is noticed by what the critic thinks
    assert config.differences(other) == {"scale": (100.0, 7.5)}
