"""The benchmark of interruptions runs, notices what it is for, and prints what it promises."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BOOTSTRAP = HERE.parents[1] / "training" / "bootstrap.py"


def measured(*arguments: str) -> dict[str, dict]:
    command = [sys.executable, str(BOOTSTRAP), str(HERE / "bench_faults.py"), "--tiny", "--seed", "3", *arguments]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    return {line["name"].removeprefix("tiny/"): line for line in map(json.loads, result.stdout.splitlines())}


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits():
    lines = measured("--part", "kills")
    assert lines["kills/adapt/kills"]["value"] == 1
    different = lines["kills/adapt/not_the_same_bits"]
    assert different["value"] == 0 == different["target"]


@pytest.mark.server
def test_interrupted_prompts_all_come_to_an_end(comfyui_path):
    lines = measured("--part", "interrupts")
    ends = ("success", "interrupted", "deleted", "error", "refused")
    assert sum(lines[f"interrupts/{end}"]["value"] for end in ends) == 12 == lines["interrupts/prompts"]["value"]
    assert lines["interrupts/lost"]["value"] == 0 == lines["interrupts/ended_otherwise_than_they_should"]["value"]
    assert lines["interrupts/answers_at_the_end"]["value"] == 1
    assert lines["interrupts/memory_after_warm_up"]["value"] > 100


# ---- what the benchmark would notice


@pytest.fixture
def bench():
    """Imports modules of the benchmarks by name."""
    sys.modules["indomain_bootstrap"].register_folder(HERE)
    return lambda name: importlib.import_module(f"{HERE.name}.{name}")


@pytest.mark.slow
def test_a_run_that_ended_otherwise_or_left_something_is_told(bench, tmp_path):
    from indomain_guidance.tests.training import tiny_run
    from indomain_guidance.training.domain.train import train

    runs = bench("killed_runs")
    tiny_run.draw_images(tmp_path / "images", count=3, sizes=((64, 64),))
    found = []
    for name, changes in (("one", {}), ("same", {}), ("other", {"seed": 1})):
        config = tiny_run.tiny_config(tmp_path, steps=1, sample_every=0, held_out_share=0.0, **changes)
        config = config.with_changes(output=str(tmp_path / name / "run"))
        train(config, base=tiny_run.tiny_base())
        found.append(runs.bits(tmp_path / name / "run"))
    assert runs.compare(found[0], found[1]) == []
    assert {"weights", "average", "optimizer", "file", "losses"} <= set(runs.compare(found[0], found[2]))
    (tmp_path / "same" / "run" / "checkpoints" / f".step-000001.ckpt.{'0' * 32}.tmp").write_bytes(b"x")
    assert runs.compare(found[0], runs.bits(tmp_path / "same" / "run")) == ["checkpoints", "unfinished files"]


class Client:
    """Answers as a server would whose prompts end as `ends` says, one after the other; "lost" ones are nowhere."""

    def __init__(self, ends: list[str]) -> None:
        self.ends, self.left = ends, {}

    def post(self, path: str, body: dict) -> bytes:
        if path != "/prompt":
            return b""
        name = str(len(self.left))
        self.left[name] = self.ends[len(self.left)]
        return json.dumps({"prompt_id": name}).encode()

    def interrupt(self) -> None:
        pass

    def queue(self) -> dict:
        return {"queue_running": [], "queue_pending": []}

    def history(self, name: str) -> dict | None:
        end = self.left[name]
        if end == "lost":
            return None
        messages = [["execution_interrupted", {}]] if end == "interrupted" else []
        return {"status": {"status_str": "success" if end == "success" else "error", "messages": messages}}


def test_lost_prompts_and_wrong_ends_are_told(bench, tmp_path, monkeypatch):
    from types import SimpleNamespace

    prompts = bench("interrupted_prompts")
    monkeypatch.setattr(prompts, "LOST_AFTER_S", 0.05)
    monkeypatch.setattr(prompts, "KINDS", {"sampling": 1})
    client = Client(["success", "interrupted", "lost", "error", "success"])
    server = SimpleNamespace(client=client, base=tmp_path, alive=lambda: True)
    disturber = prompts.Disturber(server, random.Random(2))
    monkeypatch.setattr(disturber, "_disturb", lambda: None)
    disturber.run(5)
    assert disturber.ends == {"success": 2, "interrupted": 1, "lost": 1, "error": 1}
    assert sorted(text[:22] for text in disturber.wrong) == ["sampling ended as erro", "sampling ended as lost"]


def test_every_prompt_is_made_of_nodes_and_inputs_that_the_shipped_workflows_have(bench):
    prompts = bench("interrupted_prompts")
    shipped: dict[str, set] = {}
    for path in prompts.WORKFLOWS.glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8")).values():
            shipped.setdefault(node["class_type"], set()).update(node["inputs"])
    for number in range(200):
        dice = random.Random(number)
        for kind, make in prompts.MAKERS.items():
            for node in make(dice).values() if kind != "mistake" else ():
                assert set(node["inputs"]) <= shipped[node["class_type"]], (kind, node)
