"""`indomain bake` and `resume` of a baking, in this process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from indomain_guidance.training.baking.config import BakeConfig
from indomain_guidance.training.command_line import runs
from indomain_guidance.training.command_line.parser import GROUP_TITLES
from indomain_guidance.training.engine.run import Result
from indomain_guidance.training.mini_world.first_runs import FIRST_BAKING

BASIC = ("bake", "-b", "mini_world", "--domain", "mini-handwriting")


@pytest.fixture
def started(monkeypatch):
    """What `bake` is asked for, without baking: each call's configuration and keywords."""
    calls = []

    def bake(config, **keywords):
        calls.append((config, keywords))
        return Result("dry_run", 0, None, config.run_folder)

    monkeypatch.setattr(runs, "bake", bake)
    return calls


def test_help_has_every_field_in_its_group(run):
    status, told, _ = run("bake", "--help")
    titles = [GROUP_TITLES[name] for name in BakeConfig.groups]
    places = [told.index(f"\n{title}:\n") for title in titles]
    assert status == 0 and places == sorted(places)
    for one in dataclasses.fields(BakeConfig):
        assert f"--{one.name.replace('_', '-')} " in told.replace("\n", " ").replace(",", " ")
    assert "(default pictures own)" in " ".join(told.split())


def test_a_first_baking_is_that_of_the_mini_world(run, started):
    assert run("bake", "--config", "mini_world", "--data", "digits", "--steps", "7")[0] == 0
    config = started[0][0]
    assert {name: getattr(config, name) for name in FIRST_BAKING} == {**FIRST_BAKING, "steps": 7}


def test_settings_of_a_file_and_options_together(run, started, tmp_path):
    file = tmp_path / "bake.toml"
    file.write_text("base = 'mini_world'\ndomain = 'mini-handwriting'\nstates = ['own']\nrank = 4\n", encoding="utf-8")
    assert run("bake", "--config", file, "--rank", "8", "--terms", "terms.toml")[0] == 0
    config = started[0][0]
    assert (config.states, config.rank, config.domain) == (("own",), 8, "mini-handwriting")
    assert config.terms == str(Path("terms.toml").absolute())


@pytest.mark.parametrize(
    "options, words",
    [
        (BASIC, "expected --data FOLDER, pictures to noise, or --states own alone"),
        (("bake", "-d", "x", "--domain", "mini-handwriting"), "expected --base"),
        (("bake", "-b", "mini_world", "-d", "x"), "expected a domain model or a file of terms, found neither"),
        ((*BASIC, "-d", "x", "--domain-weight", "nan"), "domain_weight: expected a number, found nan"),
        ((*BASIC, "-d", "x", "--domain-weight=-inf"), "domain_weight: expected a number from -100.0 to 100.0"),
        ((*BASIC, "-d", "x", "--states", "dreams"), "states: expected some of pictures, own, trajectories"),
        ((*BASIC, "-d", "x", "--domain-wait", "2"), "did you mean --domain-weight?"),
    ],
)
def test_a_command_that_makes_no_sense_is_one_sentence(options, words, run, started):
    status, out, err = run(*options)
    assert status == 2 and words in err and out == "" and not started


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400"])
def test_a_weight_that_is_not_finite_in_json(number, run, started, tmp_path):
    file = tmp_path / "bake.json"
    file.write_text(f'{{"base": "mini_world", "data": ["x"], "domain": "x", "domain_weight": {number}}}')
    status, _, err = run("bake", "--config", file)
    assert status == 2 and "bake.json" in err and not started


@pytest.mark.parametrize(
    "options, needed",
    [
        (("--random-prompts", "0"), False),
        ((), True),
        (("--random-prompts", "0", "--prompt-list", "a cat"), True),
        (("--random-prompts", "0", "--prompt-file", "prompts.txt"), True),
        (("--random-prompts", "0", "--terms", "terms.toml"), True),
        (("--random-prompts", "0", "--sample-prompts", "a cat"), True),
    ],
)
def test_comfyuis_tokenizer_is_used_where_a_prompt_may_need_it(options, needed, run, started, monkeypatch):
    monkeypatch.setattr(runs, "comfyui_tokenizer", lambda: "/tokenizer")
    assert run(*BASIC, "-d", "x", *options)[0] == 0
    assert started[0][0].tokenizer == ("/tokenizer" if needed else "")


def test_resume_goes_on_with_a_baking(run, started, tmp_path):
    BakeConfig(base="mini_world", domain="mini-handwriting", states=("own",)).write_json(tmp_path / "config.json")
    assert run("resume", tmp_path, "--steps", "9")[0] == 0
    config, keywords = started[0]
    assert (config.kind, config.steps, config.output) == ("baking", 9, str(tmp_path))
    assert keywords["resume"] == "auto"
    (tmp_path / "prompts.txt").write_text("a red seven")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["prompt_file"] = str(tmp_path / "gone.txt")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    status, _, err = run("resume", tmp_path)
    assert status == 2 and "prompt_file: expected the file that the run began with" in err
    assert run("resume", tmp_path, "--prompt-file", tmp_path / "prompts.txt")[0] == 0


def test_a_baking_from_the_command_line(run, tmp_path):
    """Two steps on the mini world: events as JSON lines, and a LoRA that inspect knows."""
    words = ["--states", "own", "--own-count", "2", "--own-steps", "2", "--resolution", "64", "--random-prompts", "2"]
    more = ["--steps", "2", "--warmup", "0", "--batch-size", "2", "--sample-every", "0", "--rank", "2"]
    status, out, err = run(*BASIC, *words, *more, "-o", tmp_path / "run", "-n", "mine", "--json", "--quiet")
    assert status == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["kind"] == "baking" and "matched at 2 prompts" in events[0]["estimate"]
    assert events[-1]["event"] == "result" and events[-1]["path"] == str(tmp_path / "run" / "mine.safetensors")
    status, out, _ = run("inspect", tmp_path / "run")
    assert status == 0 and "LoRA" in out and "kind baking" in out
    status, out, _ = run("bake", "--config", tmp_path / "run" / "config.json", "--dry-run", "-n", "other")
    assert status == 0 and "starts in" in out
