"""``mini-world check`` on a few pictures: what it prints is consistent, in parts, and goes on where it stopped."""

import json

import pytest
import torch
from indomain_guidance.training.mini_world import prompts, render
from indomain_guidance.training.mini_world.recipe import __main__ as command
from indomain_guidance.training.mini_world.recipe import quality, report

FIELDS = {"name", "value", "unit", "target", "better", "samples", "seed"}


@pytest.fixture
def check(monkeypatch, capsys):
    """Runs the command at one scale on 20 prompts and returns its lines by name."""
    monkeypatch.setattr(report, "SCALES", (2.0,))
    monkeypatch.setattr(quality, "VALIDITY_PICTURES", 70)
    monkeypatch.setattr(render, "HELD_OUT_ROWS", slice(8000, 8070))

    def run(*arguments: str) -> dict[str, dict]:
        assert command.main(["check", "--samples", "20", "--seed", "3", *arguments]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert all(line.keys() >= FIELDS and line["seed"] == 3 and line["samples"] >= 1 for line in lines)
        named = {line["name"].removeprefix("mini_world/"): line for line in lines}
        assert len(named) == len(lines)
        return named

    return run


def test_every_colour_is_reported_by_itself_by_both_judges_and_sampling_is_not_repeated(check, tmp_path, monkeypatch):
    found = check("--part", "prior", "--keep", str(tmp_path))
    assert found["prior_digit_accuracy"]["target"] == 0.97
    for prefix in ("", "held_out_judge/"):
        for head in ("ink", "ground"):
            name = f"{prefix}prior_{head}_accuracy"
            colours = {key.split("/")[-1]: line for key, line in found.items() if key.startswith(f"{name}/")}
            worst = colours.pop("worst")
            assert colours.keys() <= set(render.COLOUR_NAMES) and len(colours) >= 6
            assert all(line["target"] == 0.95 and line["better"] == "higher" for line in [worst, *colours.values()])
            assert sum(line["samples"] for line in colours.values()) == 20
            right = sum(line["value"] * line["samples"] for line in colours.values())
            assert right == pytest.approx(20 * found[name]["value"], abs=1e-3)
            assert worst["value"] == min(line["value"] for line in colours.values())
            assert worst["samples"] == colours[worst["colour"]]["samples"]

    monkeypatch.setattr(prompts, "sample", None)  # nothing is left to sample
    assert check("--part", "prior", "--keep", str(tmp_path)) == found


def test_kept_pictures_are_those_of_the_same_scale_prompts_and_seed(tmp_path, monkeypatch):
    drawn = []

    def sample_prompts(world, guidance, prompts, *, seed, progress):
        drawn.append(seed)
        return torch.full((1,), float(len(drawn))), 2.0

    monkeypatch.setattr(report, "sample_prompts", sample_prompts)
    first = report.WeightsReport(10, 0, tmp_path)
    asked = [first.sample(first.prompts, scale, "prior") for scale in (2.0, 2.0, 3.0)]
    other = report.WeightsReport(10, 1, tmp_path)
    asked.append(other.sample(other.prompts, 3.0, "prior"))
    assert [int(pictures) for pictures in asked] == [1, 1, 2, 3] and drawn == [0, 0, 1]


def test_parts_say_how_many_pictures_they_measured(check):
    found = check("--part", "judges", "--part", "autoencoder")
    assert found["psnr_rendered"]["target"] == 26.0 and found["accuracy_lost_handwritten_digit"]["target"] == 0.01
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
        line = found[f"{domain}_ceiling_over_floor"]
        floor, ceiling = (found[f"{domain}_{name}"]["value"] for name in ("floor", "ceiling"))
        assert line["value"] == pytest.approx(ceiling / floor, rel=1e-3) and line["target"] == 20.0
        assert found[f"{domain}_autoencoder_floor_over_prior"]["target"] == 0.05


def test_the_generator_is_measured_digit_by_digit(check):
    found = check("--part", "generator")
    assert found["generator_distance"]["training_rows"] > 0 and found["generator_distance"]["samples"] == 70
    shares = [found[f"generator_share/{digit}"]["value"] for digit in range(10)]
    assert sum(shares) == pytest.approx(1.0, abs=1e-3)
    assert all(0 <= found[f"generator_recall/{digit}"]["training_rows"] <= 1 for digit in range(10))


def test_colours_are_counted_by_what_was_asked_for():
    pairs = torch.tensor([[0, 1], [0, 2], [3, 1], [3, 1]])
    asked = prompts.Prompts(torch.zeros(4, dtype=torch.long), pairs, ("",) * 4)
    named = {"ink": torch.tensor([0, 3, 3, 3]), "ground": torch.tensor([1, 2, 0, 0])}
    names = render.COLOUR_NAMES
    assert quality.accuracies_by_colour(named, asked) == {
        "ink": {names[0]: (0.5, 2), names[3]: (1.0, 2)},
        "ground": {names[1]: (pytest.approx(1 / 3), 3), names[2]: (1.0, 1)},
    }


@pytest.mark.parametrize(
    "arguments", [["check", "--samples", "9"], ["check", "--part", "colours"], ["make", "--steps", "9"]]
)
def test_impossible_arguments_are_refused_before_anything_runs(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err


def test_the_best_scale_is_the_one_whose_worst_reading_is_best_and_the_others_are_told(check, monkeypatch):
    # Digits suffer at the low scale, one ink at the high one.
    readings = {1.5: (0.90, 0.99), 2.0: (0.98, 0.96), 3.0: (0.999, 0.90)}

    def obedience(self, prefix, scale):
        digit, red = readings[scale]
        colours = {"ink": {"red": (red, 5), "blue": (1.0, 15)}, "ground": {"white": (1.0, 20)}}
        return {"digit": digit, "ink": (red * 5 + 15) / 20, "ground": 1.0, "by_colour": colours}

    monkeypatch.setattr(report, "SCALES", tuple(readings))
    monkeypatch.setattr(report.WeightsReport, "obedience", obedience)
    found = check("--part", "prior")
    assert found["prior_best_scale"]["value"] == 2.0 and found["prior_digit_accuracy"]["value"] == 0.98
    assert found["prior_ink_accuracy/worst"]["value"] == 0.96 and found["prior_ink_accuracy/worst"]["colour"] == "red"
    other = found["held_out_judge/prior_at_cfg_3.0_ink_accuracy/worst"]
    assert (
        other["value"] == 0.9 and other["target"] is None and found["prior_at_cfg_1.5_digit_accuracy"]["value"] == 0.9
    )
