"""The benchmark runs, compares like with like, and prints what it promises; its statistics are right."""

from __future__ import annotations

import importlib
import importlib.util
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BOOTSTRAP = HERE.parents[1] / "training" / "bootstrap.py"
PROMISED = {"name", "value", "unit", "target", "better", "samples", "seed"}


@pytest.fixture(scope="module")
def reporting():
    bootstrap = sys.modules.get("indomain_bootstrap") or _load("indomain_bootstrap", BOOTSTRAP)
    if HERE.name not in sys.modules:
        bootstrap.register_folder(HERE)
    return importlib.import_module(f"{HERE.name}.reporting")


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bench(*arguments: str) -> list[dict]:
    command = [sys.executable, str(BOOTSTRAP), str(HERE / "bench_sampling.py"), "--tiny", *arguments]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    # Every line of standard output is a result; a word printed by a library would fail here.
    return [json.loads(line) for line in result.stdout.splitlines()]


def checked(lines: list[dict]) -> dict[str, dict]:
    for line in lines:
        assert line.keys() >= PROMISED
        assert isinstance(line["value"], float) and isinstance(line["unit"], str)
        assert line["better"] in ("lower", "higher") and line["samples"] >= 1 and line["seed"] == 7
        assert line["target"] is None or isinstance(line["target"], float)
        if "interval" in line:
            low, high = line["interval"]
            assert low <= line["value"] <= high
    named = {line["name"].removeprefix("tiny/"): line for line in lines}
    assert len(named) == len(lines)
    return named


@pytest.mark.slow
def test_measures_and_prints_json_lines(comfyui_path):
    # The benchmark itself refuses to time contestants whose results differ, so success says that they agree.
    parts = [option for part in ("samples", "guider", "sd15", "sdxl") for option in ("--part", part)]
    found = checked(bench("--seed", "7", *parts))
    targets = {name: line["target"] for name, line in found.items() if not name.startswith("samples_per_step/")}
    assert targets == {
        "guider/over_calc_cond_batch": 2.0,
        "guider/over_dual_cfg": 1.05,
        "guider/in_domain_over_dual_cfg": None,
        "in_domain_step/sd15_cpu_fp32/8x8": None,
        "unet_forward/sd15/8x8/constant": 0.97,
        "unet_forward/sd15/8x8/cached": None,
        "unet_forward/sdxl_blocks/8x8/constant": 0.97,
        "unet_forward/sdxl_blocks/8x8/cached": None,
    }
    prefix = "samples_per_step/"
    counts = {name.removeprefix(prefix): line["value"] for name, line in found.items() if name.startswith(prefix)}
    assert counts["cfg"] == 2 and counts["cfg/scale_1"] == 1
    assert counts["in_domain"] == 3 and counts["in_domain/domain_weight_0"] == counts["in_domain/control_weight_0"] == 2
    assert counts["in_domain/weights_sum_to_1"] == 2  # the base's coefficient is 0
    assert 2 < counts["in_domain/domain_interval_0.2_0.8"] < 3
    assert counts["dual_cfg"] == 3 and counts["dual_cfg/equal_scales"] == 2


@pytest.mark.slow
def test_measures_in_processes_of_their_own(comfyui_path):
    found = checked(bench("--seed", "7", "--part", "import", "--part", "memory"))
    assert {"import/pack", "import/library"} < found.keys()
    assert 0 < found["import/pack"]["value"] < 30
    assert found["memory/sd15_forward/full"]["value"] > 0


def test_contestants_that_differ_are_refused(reporting):
    import torch

    check_equal = importlib.import_module(f"{HERE.name}.bench_sampling").check_equal
    x = torch.linspace(-1, 1, 8)
    check_equal({"a": x, "b": x + 1e-6}, 1e-4, "test")
    with pytest.raises(RuntimeError, match="'b'"):
        check_equal({"a": x, "b": x + 1e-3}, 1e-4, "test")
    with pytest.raises(RuntimeError):
        check_equal({"a": x, "b": x * float("nan")}, 1e-4, "test")


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 12, 20, 24, 40])
def test_interval_covers_the_median(reporting, n):
    low, high = (int(v) for v in reporting.median_interval(list(range(n))))
    assert low + high == n - 1

    def missed(rank: int) -> float:
        """Exact probability that the median lies outside of the order statistics `rank` from either end."""
        outside = sum(1 for signs in itertools.product((0, 1), repeat=n) if not rank < sum(signs) < n - rank)
        return outside / 2**n

    if n > 12:  # by enumeration only where there is time; beyond, the tabled ranks of the sign test
        assert low == {20: 5, 24: 6, 40: 13}[n]
    elif n < 6:
        assert low == 0
    else:
        assert missed(low) <= 0.05 < missed(low + 1)


def test_rounds_are_interleaved_and_budgets_end_them(reporting):
    calls: list[str] = []
    contestants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = reporting.interleave(contestants, 4)
    assert times.rounds == 4 and all(len(seconds) == 4 for seconds in times.seconds.values())
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[1:] == ["abc", "bca", "cab", "abc"]  # after one to warm up
    assert reporting.interleave(contestants, 50, budget_s=0.0, least=3).rounds == 3


def test_report_says_what_json_can_hold(reporting):
    stream = io.StringIO()
    report = reporting.Report(stream, seed=3)
    report.median("a/b", [3.0, 1.0, 2.0], "ratio", target=0.5, full_s=0.123456, device="cpu")
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line == {
        "name": "a/b",
        "value": 2.0,
        "unit": "ratio",
        "target": 0.5,
        "better": "lower",
        "samples": 3,
        "seed": 3,
        "interval": [1.0, 3.0],
        "full_s": 0.12346,
        "device": "cpu",
    }
    with pytest.raises(ValueError, match="finite"):
        report.line("a", float("nan"), "s", samples=1)
    with pytest.raises(ValueError, match="better"):
        report.line("a", 1.0, "s", samples=1, better="smaller")


def test_peak_memory_sees_an_allocation(reporting):
    before = reporting.peak_memory()
    held = bytearray(before + 64 * 2**20 - _resident())
    held[::4096] = b"x" * len(held[::4096])
    assert reporting.peak_memory() - before > 32 * 2**20


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss
