"""The loaders' benchmark runs, and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BOOTSTRAP = HERE.parents[1] / "training" / "bootstrap.py"


@pytest.mark.slow
def test_nothing_runs_and_everything_is_refused():
    command = [sys.executable, str(BOOTSTRAP), str(HERE / "bench_loaders.py"), "--tiny", "--seed", "3"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = {line["name"].removeprefix("tiny/"): line for line in map(json.loads, result.stdout.splitlines())}
    for name in ("attacks/not_refused_for_their_reason", "attacks/events_of_running_code", "fuzz/crashes",
                 "fuzz/errors_that_are_no_refusal", "fuzz/events_of_running_code", "others/crashes",
                 "others/errors_that_are_no_refusal", "others/events_of_running_code"):  # fmt: skip
        assert lines[name]["value"] == 0 == lines[name]["target"] and lines[name]["samples"] >= 2, lines[name]
    assert lines["fuzz/cases"]["value"] == 60 and lines["others/cases"]["value"] == 40
    assert lines["attacks/slowest"]["samples"] > 130
    assert lines["fuzz/memory_growth"]["value"] < 64 and lines["speed/pickle"]["value"] > 0
