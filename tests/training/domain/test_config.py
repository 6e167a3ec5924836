"""The configuration: read, checked, written, compared."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from indomain_guidance.guidance.files import FileProblem
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.settings import ConfigProblem, fields_of, kinds_of


def test_it_comes_back_from_json_and_toml(tmp_path):
    config = TrainConfig(base="a.safetensors", data=["x", "y"], steps=7, learning_rate=1, sample_prompts=["a cat"])
    config.write_json(tmp_path / "c.json")
    assert TrainConfig.read(tmp_path / "c.json") == config
    assert json.loads((tmp_path / "c.json").read_text()) == config.to_dict()
    (tmp_path / "c.toml").write_text(
        'base = "a.safetensors"\ndata = ["x", "y"]\nsteps = 7\nlearning_rate = 1\nsample_prompts = "a cat"\n'
    )
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    assert TrainConfig.read(tmp_path / "c.toml") == config
    assert TrainConfig.read(tmp_path / "c.toml", steps=9).steps == 9


@pytest.mark.parametrize(
    "name, content", [("c.json", '{"base": "m", "steps": 7}'), ("c.toml", 'base = "m"\nsteps = 7\n')]
)
def test_files_of_windows_editors_can_be_read(tmp_path, name, content):
    """PowerShell 5 and older Notepads put a byte order mark before UTF-8."""
    if name.endswith("toml") and sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert TrainConfig.read(tmp_path / name).steps == 7


def test_paths_of_any_characters_come_back(tmp_path):
    config = TrainConfig(base="a", data=["/old/caf\udce9", "/\u78c1\u5668"], sample_prompts=["une th\u00e9i\u00e8re"])
    config.write_json(tmp_path / "c.json")
    assert TrainConfig.read(tmp_path / "c.json") == config


@pytest.mark.parametrize(
    "values, message",
    [
        ({"base": "m", "learning_rat": 1e-4}, r"'learning_rat' is no field .* did you mean learning_rate\?"),
        ({"base": "m", "batch-size": 2}, r"did you mean batch_size\?"),
        ({"data": "x"}, "expected a field base"),
        ({"base": ""}, "name the prior"),
        ({"base": "m", "steps": 0}, "steps: expected a number from 1"),
        ({"base": "m", "steps": 1.5}, "steps: expected a whole number, found 1.5"),
        ({"base": "m", "steps": "7"}, "steps: expected a number, found '7'"),
        ({"base": "m", "steps": True}, "steps: expected a number"),
        ({"base": "m", "flip": 1}, "flip: expected true or false"),
        ({"base": "m", "learning_rate": float("nan")}, "learning_rate: expected a number, found nan"),
        ({"base": "m", "form": "constnt"}, r"form: expected one of cached, constant, full.*did you mean constant\?"),
        ({"base": "m", "data": [1]}, "data: expected a list of strings"),
        ({"base": "m", "resolution": 500}, "the nearest is 496"),
        ({"base": "m", "bucket_step": 12}, "bucket_step: expected a multiple of 8"),
        ({"base": "m", "name": "../x"}, "name: expected a plain file name"),
        ({"base": "m", "name": "x."}, "name: expected a plain file name"),
        ({"base": "m", "name": "CON"}, "name: expected a plain file name.*device on Windows"),
        ({"base": "m", "name": "nul.v2"}, "name: expected a plain file name.*device on Windows"),
        ({"base": "m", "sample_prompts": ["a"] * 65}, "sample_prompts: expected at most 64, found 65"),
        ({"base": "m", "sample_prompts": ["\ud800"]}, "sample_prompts: expected text"),
        ({"base": "m", "name": "None"}, "name: expected a plain file name.*found 'None', a value of another kind"),
        ({"base": "m", "name": "a\x7fb"}, "name: expected a plain file name"),
        ({"base": "m", "name": "\u202egnp.safe"}, "name: expected a plain file name"),
        ({"base": "m", "name": "\u753b" * 67}, "name: .* of at most 200 bytes"),
        ({"base": "m", "name": "caf\udce9"}, r"name: expected text, found 'caf\\udce9', which UTF-8 cannot hold"),
        ({"base": "m", "licence": "\ud800"}, "licence: expected text"),
        ({"base": "m", "caption": "a cat"}, "choose form full"),
        ({"base": "m", "device": "gpu"}, "device: expected auto, cpu"),
        ([1], "expected fields with values"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(ConfigProblem, match=message):
        TrainConfig.from_mapping(values)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("c.yaml", "a: 1", "expected a configuration in .toml or .json"),
        ("c.json", "{", "expected JSON, found a mistake"),
        ("c.json", "[]", "expected fields with values, found list"),
        ("c.json", '{"base": "m", "stps": 1}', r"c\.json: 'stps' is no field"),
        ("c.json", '{"base": "m", "steps": 0}', r"c\.json: steps: expected"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        TrainConfig.read(tmp_path / name)
    with pytest.raises(FileProblem, match="none.json: cannot be read"):
        TrainConfig.read(tmp_path / "none.json")


def test_toml_on_python_310_says_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    (tmp_path / "c.toml").write_text('base = "m"')
    with pytest.raises(FileProblem, match="tomli.*as .json"):
        TrainConfig.read(tmp_path / "c.toml")


def test_every_field_can_be_shown():
    kinds = kinds_of(TrainConfig)
    assert {one.name for one in fields_of(TrainConfig)} == set(kinds)
    for one in dataclasses.fields(TrainConfig):
        about = one.metadata
        assert about["help"]
        if kinds[one.name] in (int, float):
            assert about["min"] <= one.default <= about["max"]
        if "choices" in about:
            assert one.default in about["choices"]


def test_only_fields_that_change_the_numbers_bind_a_resumed_run():
    config = TrainConfig(base="m")
    free = config.with_changes(steps=5, name="other", output="o", sample_every=1, checkpoint_every=9, device="cpu")
    assert config.differences(free) == {}
    bound = config.with_changes(seed=1, batch_size=8)
    assert config.differences(bound) == {"seed": (0, 1), "batch_size": (4, 8)}
    assert config.differences(config.with_changes(validate_every=0)) == {}
    assert config.differences(config.with_changes(held_out_share=0.0)) == {"held_out_share": (0.05, 0.0)}


def test_published_configurations_hold_no_paths():
    config = TrainConfig(base="/home/me/models/sd.safetensors", data=("C:\\Users\\me\\cats\\", "d"), output="/x/runs/a")
    public = config.public_dict()
    assert (public["base"], public["data"], public["output"]) == ("sd.safetensors", ["cats", "d"], "a")
    assert TrainConfig.from_mapping(public).steps == config.steps
