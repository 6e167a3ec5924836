"""The baking benchmark runs, times only what computes the same, and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BOOTSTRAP = HERE.parents[1] / "training" / "bootstrap.py"


@pytest.mark.slow
def test_every_part_runs_and_keeps_its_promises():
    command = [sys.executable, str(BOOTSTRAP), str(HERE / "bench_baking.py"), "--tiny", "--seed", "7"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {line["name"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert found["tiny/verify/merged_over_module"]["value"] < 1e-4
    assert [found[f"tiny/verify/samples/{name}"]["value"] for name in ("plain", "baked", "guidance")] == [2, 2, 3]
    targets = {
        "sampling/tiny/8x8/baked_over_plain": 1.0,
        "sampling/tiny/8x8/baked_over_guidance": 0.70,
        "training/tiny/8x8/baking_over_training": 2.2,
    }
    for name, target in targets.items():
        assert found[f"tiny/{name}"]["target"] == target and found[f"tiny/{name}"]["value"] > 0
    assert found["tiny/counts/tiny/baking"]["value"] > 0
