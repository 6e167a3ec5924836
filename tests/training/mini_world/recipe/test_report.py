"""``mini-world check`` on a few pictures: what it prints is consistent, in parts."""

import json

import pytest
from indomain_guidance.training.mini_world import render
from indomain_guidance.training.mini_world.recipe import __main__ as command
from indomain_guidance.training.mini_world.recipe import quality, report

pytestmark = pytest.mark.slow

FIELDS = {"name", "value", "samples"}


@pytest.fixture
def check(monkeypatch, capsys):
    """Runs the command at one scale on 20 prompts and returns its lines by name."""
    monkeypatch.setattr(report, "SCALES", (2.0,))
    monkeypatch.setattr(quality, "VALIDITY_PICTURES", 70)
    monkeypatch.setattr(render, "HELD_OUT_ROWS", slice(8000, 8070))

    def run(*arguments: str) -> dict[str, dict]:
        assert command.main(["check", "--samples", "20", "--seed", "3", *arguments]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert all(line.keys() >= FIELDS and line["samples"] >= 1 for line in lines)
        named = {line["name"].removeprefix("mini_world/"): line for line in lines}
        assert len(named) == len(lines)
        return named

    return run


def test_the_colour_that_is_right_least_often_is_reported_by_itself_by_both_judges(check):
    found = check("--part", "prior")
    for judge_name in ("", "held_out_judge/"):
        for head in ("ink", "ground"):
            line = found[f"{judge_name}prior_at_cfg_2.0_{head}_accuracy"]
            worst = found[f"{judge_name}prior_at_cfg_2.0_{head}_accuracy/worst"]
            assert worst["colour"] in render.COLOUR_NAMES and 1 <= worst["samples"] < 20
            assert worst["value"] <= line["value"] and line["samples"] == 20


def test_parts_say_how_many_pictures_they_measured(check):
    found = check("--part", "judges", "--part", "autoencoder")
    assert found["psnr_rendered"]["value"] > 26.0 and found["accuracy_lost_handwritten_digit"]["value"] < 0.1
    assert {line["samples"] for line in found.values()} == {20}
    assert all(
        f"{judge}accuracy_{kind}_{head}" in found
        for judge in ("", "held_out_judge/")
        for kind in ("rendered", "handwritten")
        for head in ("digit", "ink", "ground", "world")
    )
    pictures = quality.unseen_pictures(100, trained=False)
    assert (len(pictures["rendered"]), len(pictures["handwritten"])) == (100, 70)  # there are no more rows


def test_domains_are_compared_with_floors_and_ceiling(check):
    found = check("--part", "domains", "--samples", "10")
    for domain in ("handwriting", "narrow"):
        floor, ceiling, own = (found[f"{domain}_{name}"]["value"] for name in ("floor", "ceiling", "autoencoder_floor"))
        assert ceiling > 5 * floor and own < 0.2 * found[f"{domain}_prior_distance"]["value"]


def test_the_generator_is_measured_digit_by_digit(check):
    found = check("--part", "generator")
    assert found["generator_distance"]["training_rows"] > 0 and found["generator_distance"]["samples"] == 70
    shares = [found[f"generator_share/{digit}"]["value"] for digit in range(10)]
    assert sum(shares) == pytest.approx(1.0, abs=1e-3)
    assert all(0 <= found[f"generator_recall/{digit}"]["training_rows"] <= 1 for digit in range(10))


@pytest.mark.parametrize(
    "arguments", [["check", "--samples", "9"], ["check", "--part", "colours"], ["make", "--steps", "9"]]
)
def test_impossible_arguments_are_refused_before_anything_runs(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err
