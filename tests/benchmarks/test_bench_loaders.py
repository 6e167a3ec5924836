"""The loaders' benchmark runs, notices what it is for, and prints what it promises."""

from __future__ import annotations

import importlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BOOTSTRAP = HERE.parents[1] / "training" / "bootstrap.py"
FAULTS = ("ran_anything", "without_a_sentence", "over_10_s", "over_500_MB")


@pytest.mark.slow
def test_it_prints_what_it_promises():
    parts = [option for part in ("attacks", "settings", "logs", "total", "speed") for option in ("--part", part)]
    command = [sys.executable, str(BOOTSTRAP), str(HERE / "bench_loaders.py"), "--tiny", "--seed", "3", *parts]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = {line["name"].removeprefix("tiny/"): line for line in map(json.loads, result.stdout.splitlines())}
    for name in ("attacks/not_refused_for_their_reason", "attacks/events_of_running_code"):
        assert lines[name]["value"] == 0 == lines[name]["target"] and lines[name]["samples"] > 15, lines[name]
    for reader in ("settings", "logs"):
        assert lines[f"{reader}/inputs"]["value"] == 8
        for fault in FAULTS:
            found = lines[f"{reader}/{fault}"]
            assert found["value"] == 0 == found["target"], result.stderr[-3000:]
    assert lines["total/inputs"]["value"] == 16 and lines["total/refused"]["value"] > 0.3
    assert lines["speed/pickle"]["value"] > 0


# ---- what the benchmark would notice


@pytest.fixture
def bench():
    """Imports modules of the benchmarks by name."""
    bootstrap = sys.modules["indomain_bootstrap"]
    bootstrap.register_folder(HERE)
    return lambda name: importlib.import_module(f"{HERE.name}.{name}")


READERS = {
    "models": ("Generators", "DomainFiles", "Loras", "Bases"),
    "checkpoints": ("RunCheckpoints",),
    "shards": ("Shards",),
    "pictures": ("Pictures",),
    "settings": ("Settings",),
    "indices": ("ContentIndices", "CachedLatents", "Logs"),
}


@pytest.mark.slow
@pytest.mark.parametrize("module, name", [(module, name) for module, names in READERS.items() for name in names])
def test_each_reader_is_without_fault_on_its_first_inputs(bench, module, name, tmp_path):
    worker, out = bench("hostile_inputs.worker"), io.StringIO()
    reader = getattr(bench(f"hostile_inputs.{module}"), name)(tmp_path)
    assert reader.name in bench("bench_loaders").SHARES
    worker.run(reader, 3, range(6), tmp_path / "kept", out)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    ends = [line for line in lines if "case" in line]
    assert len(ends) == 6 and {line["outcome"] for line in ends} <= {"read", "refused"}
    assert not [line["faults"] for line in ends if "faults" in line]


@pytest.fixture
def judged(bench, tmp_path, monkeypatch):
    """What the worker says of one input that is read by a function of (path)."""
    case, worker = bench("hostile_inputs.case"), bench("hostile_inputs.worker")

    def run(read) -> dict:
        class One(case.Reader):
            name = "one"

            def damage(self, dice):
                (self.folder / "input.bin").write_bytes(b"x")
                return "made", self.folder / "input.bin"

            def read(self, kind, path, dice):
                return read(path) or []

        out = io.StringIO()
        worker.run(One(tmp_path), 5, range(1), tmp_path / "kept", out)
        return json.loads(out.getvalue().splitlines()[-1])

    return run


def test_an_input_that_is_read_or_refused_by_name_has_no_fault(judged, tmp_path):
    from indomain_guidance.guidance.errors import Problem

    def refuse(path):
        raise Problem(f"{path}: expected more, found x; make it again.")

    assert judged(lambda path: None)["outcome"] == "read" and judged(refuse)["outcome"] == "refused"
    assert "faults" not in judged(refuse) and not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    "fault, read",
    [
        ("ran", lambda path: exec("1")),
        ("ran", lambda path: subprocess.run([sys.executable, "-c", ""]) and None),
        ("ran", lambda path: Path(path.parent.parent, "elsewhere").write_text("x") and None),
        ("said", lambda path: [][0]),
        ("said", lambda path: ["expected more, found nothing in some file; make it again."]),
        ("said", lambda path: [f"{path}: a \x1b[31mred\x1b[0m word that moves a terminal"]),
        ("said", lambda path: [f"{path}: {'long ' * 200}"]),
        ("said", lambda path: [f"{path}:"]),
    ],
)
def test_each_fault_is_told_and_its_input_kept(judged, tmp_path, fault, read):
    result = judged(read)
    assert list(result["faults"]) == [fault]
    assert (tmp_path / "kept" / "one-5-0.bin").read_bytes() == b"x"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process start its peak of memory anew")
def test_memory_beyond_the_files_size_is_a_fault(judged, bench, monkeypatch):
    monkeypatch.setattr(bench("hostile_inputs.worker"), "MOST_BYTES", 50e6)
    result = judged(lambda path: [bytearray(b"x") * 100_000_000, None][1])
    assert list(result["faults"]) == ["large"] and 90e6 < result["over"] < 200e6


def test_time_beyond_the_limit_is_a_fault(judged, bench, monkeypatch):
    monkeypatch.setattr(bench("hostile_inputs.worker"), "MOST_SECONDS", 0.0)
    assert list(judged(lambda path: sum(range(10**6)) and None)["faults"]) == ["slow"]


def test_a_process_that_dies_or_hangs_is_named_by_its_input_and_the_next_goes_on(bench, monkeypatch, capsys):
    loaders, worker = bench("bench_loaders"), bench("hostile_inputs.worker")
    monkeypatch.setattr(worker, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(loaders, "MOST_WALL_S", 1.0)
    code = """
import json, os, sys, time
for number in range(int(sys.argv[1]), 6):
    print(json.dumps({"begun": number, "kind": "made"}), flush=True)
    if number == 1: os._exit(7)
    if number == 3: time.sleep(60)
    print(json.dumps({"case": number, "outcome": "read", "seconds": 0, "over": 0}), flush=True)
print(json.dumps({"done": True}), flush=True)
"""
    monkeypatch.setattr(
        loaders.BENCHMARK.__class__,
        "child_command",
        lambda self, report, plan, what, reader, first, end: [sys.executable, "-c", code, first],
    )
    tally = loaders.read_all(None, loaders.TINY, "logs")
    assert tally.outcomes == {"read": 4, "ended": 2} and tally.faults == {"said": 1, "slow": 1}
    told = capsys.readouterr().err
    assert "logs 1 (made): no sentence" in told and "logs 3 (made): over 10 s: did not end" in told


def test_an_input_follows_from_its_number_alone(bench, tmp_path):
    settings = bench("hostile_inputs.settings")

    def made(numbers) -> list:
        reader = settings.Settings(tmp_path)
        return [reader.write(n, random.Random(f"0 settings {n}"))[1].read_bytes() for n in numbers]

    assert made([301, 303, 305])[2] == made([305])[0] != made([307])[0]


def test_the_files_that_are_damaged_are_the_same_though_safetensors_writes_metadata_in_any_order(bench, tmp_path):
    made = [bench("hostile_inputs.models").DomainFiles(tmp_path).originals[".safetensors"] for _ in range(3)]
    assert made[0] == made[1] == made[2] and len(made[0]) == 3
