"""The training benchmark runs, lets only equals race, and prints what it promises."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BOOTSTRAP = HERE.parents[1] / "training" / "bootstrap.py"
PROMISED = {"name", "value", "unit", "target", "better", "samples", "seed"}
needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="compares with diffusers, which only this benchmark needs"
)


@pytest.fixture(scope="module")
def models():
    spec = importlib.util.spec_from_file_location("indomain_bootstrap", BOOTSTRAP)
    bootstrap = sys.modules.get("indomain_bootstrap") or importlib.util.module_from_spec(spec)
    if not hasattr(bootstrap, "register_folder"):
        spec.loader.exec_module(bootstrap)
    if HERE.name not in sys.modules:
        bootstrap.register_folder(HERE)
    return importlib.import_module(f"{HERE.name}.training_models")


def bench(*arguments: str) -> dict[str, dict]:
    command = [sys.executable, str(BOOTSTRAP), str(HERE / "bench_training.py"), "--tiny", "--seed", "7", *arguments]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]  # standard output holds results alone
    for line in lines:
        assert line.keys() >= PROMISED and line["seed"] == 7 and line["samples"] >= 1
        if "interval" in line:
            low, high = line["interval"]
            assert low <= line["value"] <= high
    named = {line["name"].removeprefix("tiny/"): line for line in lines}
    assert len(named) == len(lines)
    return named


@needs_diffusers
@pytest.mark.slow
def test_both_sides_do_the_same_work_and_race():
    found = bench("--part", "verify", "--part", "step")
    for shape in ("sd15", "sdxl"):
        assert found[f"verify/{shape}/output_difference"]["value"] < 1e-5
        assert found[f"verify/{shape}/gradient_difference"]["value"] < 1e-4
        steps = {name: line for name, line in found.items() if name.startswith(f"step/{shape}/8x8/")}
        targets = {name.rpartition("/")[2]: line["target"] for name, line in steps.items()}
        assert targets == {
            "constant": {"sd15": 0.95, "sdxl": 0.90}[shape],
            "cached": None,
            "full": None,
            "constant_over_fused_optimizer": None,
        }
        assert all(line["value"] > 0 and line["ours_s"] > 0 < line["diffusers_s"] for line in steps.values())
        assert steps[f"step/{shape}/8x8/constant"]["parameters_share"] < 1
        assert steps[f"step/{shape}/8x8/full"]["parameters_share"] == 1
        memory = {name.rpartition("/")[2] for name in found if name.startswith(f"memory/{shape}/")}
        assert memory == {"diffusers", "diffusers_fused_optimizer", "constant", "cached", "full"}


@pytest.mark.slow
def test_extras_are_measured_without_diffusers():
    found = bench("--part", "extras")
    assert {name.rpartition("/")[2] for name in found} == {"ema", "checkpoint", "buckets"}
    saved = found["extras/sd15/checkpoint"]
    assert saved["value"] > 0 and saved["size_gb"] > 0 and saved["share_of_training"] > 0
    assert found["extras/sd15/buckets"]["shapes"] >= 3


@needs_diffusers
@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_unequal_weights_or_work_are_noticed(models, shape):
    import torch

    bench_training = importlib.import_module(f"{HERE.name}.bench_training")
    tiny = models.TINY_SHAPES[shape]
    ours, theirs = models.Ours(tiny, "full", 8, 2, 0), models.Diffusers(tiny, 8, 2, 0)
    assert ours.parameters == theirs.parameters == models.expected_parameters(tiny, "full")
    assert abs(ours.loss() - theirs.loss()) < 1e-4
    with torch.no_grad():
        next(theirs.unet.mid_block.parameters()).mul_(1.5)
    assert abs(ours.loss() - theirs.loss()) > 1e-4
    with pytest.raises(RuntimeError, match="parameters"):
        bench_training.check_parameters(shape, "full", ours.parameters, ours.parameters - 1)


@needs_diffusers
def test_the_same_first_steps_lower_both_losses_alike(models):
    import torch

    tiny = models.TINY_SHAPES["sd15"]
    torch.manual_seed(0)
    for contestant in (models.Ours(tiny, "full", 8, 2, 0), models.Diffusers(tiny, 8, 2, 0)):
        before = contestant.loss()
        for _ in range(8):
            contestant.step()
        assert contestant.loss() < before - 1e-3


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
@pytest.mark.parametrize("form", ["full", "constant", "cached"])
def test_parameters_are_counted_by_an_independent_rule(models, shape, form):
    tiny = models.TINY_SHAPES[shape]
    found = sum(one.numel() for one in models.unet_of(tiny, form, 0).parameters())
    assert found == models.expected_parameters(tiny, form)


def test_narrow_shapes_keep_the_shares_of_the_full_models(models):
    """Parameters that `constant` removes, against the counts of the full-size models (design: 5.1 % and 21 %)."""
    for shape, removed in (("sd15", 0.051), ("sdxl", 0.2126)):
        counts = [models.expected_parameters(models.SHAPES[shape], form) for form in ("full", "constant")]
        assert 1 - counts[1] / counts[0] == pytest.approx(removed, rel=0.06)
