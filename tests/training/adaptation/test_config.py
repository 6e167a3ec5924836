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
from indomain_guidance.training.adaptation.adapter import TRAINED
from indomain_guidance.training.adaptation.config import (
    GROUPS,
    AdaptConfig,
    configuration_kind,
    prompt_text,
    same_prompt,
)
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.settings import ConfigProblem, kinds_of

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


def test_every_field_can_be_shown():
    kinds = kinds_of(AdaptConfig)
    for one in dataclasses.fields(AdaptConfig):
        about = one.metadata
        assert about["help"] and about["group"] in GROUPS
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
    assert configuration_kind(json.loads((tmp_path / "c.json").read_text())) is AdaptConfig
    assert configuration_kind(TrainConfig(base="m").to_dict()) is TrainConfig


def test_only_fields_that_change_the_numbers_bind_a_resumed_run():
    config = AdaptConfig(**NEEDED)
    assert config.differences(config.with_changes(steps=5, generator="moved.pkl", sample_rows=9, device="cpu")) == {}
    other = config.with_changes(scale=7.5, prompt="x")
    assert config.differences(other) == {"prompt": ("", "x"), "scale": (100.0, 7.5)}
    # What the generator makes now is a question of some methods only.
    for method, binds in (("sds", False), ("dds", True), ("bridge", True)):
        config = AdaptConfig(**NEEDED, method=method, source_prompt="a photo")
        assert ("source_prompt" in config.differences(config.with_changes(source_prompt="a seven"))) == binds


SIGNATURE = "[0a1b2c-" + "003c" * 7 + "{}]"  # 1.0 seven times, and another number


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("a cat", "a cat", True),
        ("a cat", "a dog", False),
        ("", "a cat", False),
        # Of connected conditionings the signatures count, and not what is known of their texts.
        (f"a cat {SIGNATURE}", f"connected: {SIGNATURE}", True),
        (f"a cat {SIGNATURE}", f"A  Cat {SIGNATURE}", True),
        (f"a cat {SIGNATURE}", f"a cat {SIGNATURE}".replace("a1b2c", "a1b2d"), False),
        (f"{SIGNATURE}, unwanted {SIGNATURE}", f"{SIGNATURE}", False),
        (f"a cat {SIGNATURE}", "a cat", False),
        (f"a cat {SIGNATURE}", "connected:", False),
    ],
)
def test_prompts_are_known_again(one, other, same):
    one, other = (text.replace("{}", "003c") for text in (one, other))
    assert same_prompt(one, other) == same_prompt(other, one) == same


@pytest.mark.parametrize(
    "bits, same", [("013c", True), ("083c", True), ("283c", False), ("00bc", False), ("007e", False)]
)
def test_signatures_may_differ_by_last_bits(bits, same):
    config = AdaptConfig(**NEEDED, negative=SIGNATURE.format("003c"))
    assert (config.differences(config.with_changes(negative=SIGNATURE.format(bits))) == {}) == same
    assert prompt_text(f"a cat {config.negative}, unwanted a dog {config.negative}") == "a cat, unwanted a dog"
