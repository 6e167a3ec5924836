"""Checkpoints: whole, torn, altered, foreign; which is used and which are kept."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import threading
import zipfile

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem
from indomain_guidance.training.engine import checkpoints
from indomain_guidance.training.engine import lock as run_lock
from indomain_guidance.training.engine.checkpoints import (
    CheckpointProblem,
    checkpoint_path,
    different_facts,
    find_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    machine_facts,
    prune_checkpoints,
    save_checkpoint,
)
from indomain_guidance.training.engine.lock import locked


def state(step=1):
    return {
        "step": step,
        "config": {"base": "m"},
        "facts": {},
        "weights": {"a": torch.arange(40000.0) + step, "b": torch.ones(3, dtype=torch.float16)},
        "average": None,
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "scaler": None,
    }


def save(run, *steps):
    return [save_checkpoint(checkpoint_path(run, step), state(step)) for step in steps]


def test_a_state_comes_back(tmp_path):
    (path,) = save(tmp_path, 250)
    assert path == tmp_path / "checkpoints" / "step-000250.ckpt"
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"]["a"], state(250)["weights"]["a"])
    assert loaded["weights"]["b"].dtype == torch.float16
    assert loaded["optimizer"]["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.99)}]
    assert torch.load(path, weights_only=True)["step"] == 250  # plain torch reads it too
    assert os.listdir(path.parent) == [path.name]


def test_a_state_comes_back_from_a_folder_whose_name_utf_8_cannot_hold(tmp_path):
    run = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        run.mkdir()
    except OSError:
        pytest.skip("this system has no such names")
    (path,) = save(run, 3)
    assert torch.equal(load_checkpoint(path)["weights"]["a"], state(3)["weights"]["a"])
    path.write_bytes(torn(path.read_bytes()))
    with pytest.raises(CheckpointProblem, match="cut off"):
        load_checkpoint(path)


def torn(data):
    return data[: len(data) * 2 // 3]


def altered(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage, message",
    [
        (torn, "cut off while it was written"),
        (altered, "damaged since"),
        (lambda data: b"", "another file or one cut off"),
        (lambda data: data[:-1], "cut off"),
        (lambda data: b"PK" + b"x" * 5000, "another file"),
    ],
)
def test_the_one_before_a_damaged_checkpoint_is_used_and_both_are_named(tmp_path, damage, message):
    good, bad = save(tmp_path, 10, 20)
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(CheckpointProblem, match=message):
        load_checkpoint(bad)
    said = []
    path, loaded = latest_checkpoint(tmp_path, said.append)
    assert path == good and loaded["step"] == 10
    assert len(said) == 1 and str(bad) in said[0] and message in said[0]


def test_foreign_checkpoints_are_named(tmp_path):
    (good,) = save(tmp_path, 10)
    other = checkpoint_path(tmp_path, 30)
    torch.save({"state_dict": {"a": torch.ones(2)}}, other)
    partial = save_checkpoint(checkpoint_path(tmp_path, 50), {"step": 50})
    wrong = save_checkpoint(checkpoint_path(tmp_path, 60), {**state(60), "format": "something"})
    said = []
    assert latest_checkpoint(tmp_path, said.append)[0] == good
    assert [name for text in said for name in (wrong, partial, other) if str(name) in text] == [wrong, partial, other]
    assert "something else" in said[0] and "another config" in said[1]


def test_none_is_passed_over_that_may_be_good(tmp_path, monkeypatch):
    """Going on from the one before would replace it."""
    _, last = save(tmp_path, 10, 20)
    for problem in (OSError(5, "Input/output error"), MemoryError(), OSError(12, "Cannot allocate memory")):

        def broken(*args, problem=problem, **options):
            raise problem

        with monkeypatch.context() as patched, pytest.raises(CheckpointProblem, match="000020.ckpt: cannot be read"):
            patched.setattr(mmap, "mmap", broken)
            latest_checkpoint(tmp_path)
    assert latest_checkpoint(tmp_path)[0] == last
    save_checkpoint(last, {**state(20), "version": 2})
    with pytest.raises(CheckpointProblem, match="version 1, found 2"):
        latest_checkpoint(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path):
    (tmp_path / "checkpoints").write_bytes(b"a file")
    with pytest.raises(CheckpointProblem, match="cannot be listed"):
        find_checkpoints(tmp_path)


def test_a_problem_of_the_device_is_no_full_disk(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        save(tmp_path, 1)
    assert find_checkpoints(tmp_path) == []


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_checkpoint(checkpoint_path(tmp_path, 1), {**state(), "scaler": Evil()})
    with pytest.raises(CheckpointProblem, match="cannot be read"):
        load_checkpoint(path)
    assert not (tmp_path / "evil").exists()


def repacked(path, change):
    """The checkpoint with its instructions changed and its digest right, as anybody can make it."""
    records = {}
    with zipfile.ZipFile(io.BytesIO(path.read_bytes()[: -checkpoints.TRAILER])) as archive:
        for name in archive.namelist():
            records[name] = archive.read(name)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    data = made.getvalue()
    path.write_bytes(data + checkpoints.MARK + hashlib.sha256(data).digest())
    return path


@pytest.mark.parametrize(
    "pickle, reason",
    [
        (b"\x80\x02cbuiltins\nbytearray\nI400000000\n\x85R.", "builtins.bytearray"),  # weights_only makes 400 MB of it
        (b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "posix.system"),
        (b"\x80\x02" + b"]" * 2_000_000 + b".", "steps"),
    ],
)
def test_a_checkpoint_passes_the_same_checks_as_other_torch_files(tmp_path, pickle, reason):
    (path,) = save(tmp_path, 1)
    assert load_checkpoint(repacked(path, lambda data: data))["step"] == 1
    with pytest.raises(checkpoints.DamagedCheckpoint, match=f"cannot be read as a checkpoint .*{reason}"):
        load_checkpoint(repacked(path, lambda data: pickle))


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"step": "1"}, "step"),
        ({"step": -1}, "step"),
        ({"step": True}, "step"),
        ({"config": ["base"]}, "config"),
        ({"facts": None}, "facts"),
        ({"weights": 3}, "weights"),
        ({"average": "x"}, "average"),
        ({"optimizer": []}, "optimizer"),
        ({"weights": {"a": None}}, "weights"),
        ({"weights": {"a": torch.ones(2), "b": "x"}}, "weights"),
        ({"facts": {"threads": 2}}, "facts"),
    ],
)
def test_a_state_of_other_types_is_no_checkpoint(tmp_path, changes, name):
    path = save_checkpoint(checkpoint_path(tmp_path, 1), {**state(), **changes})
    with pytest.raises(checkpoints.DamagedCheckpoint, match=f"found none or another {name} in it"):
        load_checkpoint(path)


@pytest.mark.parametrize("version", [2, "1", True, torch.zeros(3), None])
def test_another_version_is_told(tmp_path, version):
    path = save_checkpoint(checkpoint_path(tmp_path, 1), {**state(), "version": version})
    with pytest.raises(CheckpointProblem, match="expected a checkpoint of version 1, found"):
        load_checkpoint(path)


def test_none_and_missing(tmp_path):
    assert latest_checkpoint(tmp_path) is None and find_checkpoints(tmp_path / "nowhere") == []
    with pytest.raises(CheckpointProblem, match="No such file"):
        load_checkpoint(tmp_path / "x.ckpt")


def test_the_last_are_kept_and_later_ones_of_others_left_alone(tmp_path):
    save(tmp_path, 10, 20, 30, 40, 900)
    prune_checkpoints(tmp_path, 40, 2)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [30, 40, 900]


def test_facts_that_change_are_named():
    facts = machine_facts("cpu", 2)
    assert facts["torch"] == torch.__version__ and facts["processes"] == "2" and facts["device"] == "cpu"
    assert different_facts(facts, dict(facts)) == ""
    assert different_facts({**facts, "threads": "64"}, facts) == f"threads 64 -> {facts['threads']}"
    assert len(different_facts({"threads": "x" * 100_000}, {})) <= 200


def test_one_run_at_a_time_in_a_folder(tmp_path):
    """flock is per open file, so a second opening in this process stands for another process."""
    said = []

    def second():
        try:
            with locked(tmp_path / "run"):
                said.append("entered")
        except FileProblem as problem:
            said.append(str(problem))

    with locked(tmp_path / "run"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    second()
    assert "another process is training" in said[0] and said[1] == "entered"


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as posix does")
def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    import resource

    (before,) = save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(FileProblem, match="step-000002.ckpt: could not be written .*free some space"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(before.parent) == [before.name] and load_checkpoint(before)["step"] == 1


def test_a_folder_that_was_made_for_a_lock_goes_with_it_and_others_stay(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine" / "b"):
        pass
    with locked(tmp_path / "mine"):
        pass
    assert os.listdir(tmp_path / "mine") == [".lock"]
    with locked(tmp_path / "kept" / "b"):
        (tmp_path / "kept" / "b" / "file").touch()
    assert sorted(os.listdir(tmp_path / "kept" / "b")) == [".lock", "file"]
    with pytest.raises(FileProblem, match="another with output"), locked(tmp_path / "kept" / "b" / "file"):
        pass
    with pytest.raises(FileProblem, match="another with output"), locked(tmp_path / "a\0b"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="where open files cannot be removed nobody can be between")
def test_a_lock_whose_file_was_taken_away_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Who opens the lock's file just before its holder removes the folder holds the lock of a file that is gone."""
    real, tries = run_lock._lock, []

    def lock(handle):
        real(handle)
        tries.append(handle)
        if len(tries) == 1:
            (tmp_path / "run" / ".lock").unlink()
            (tmp_path / "run").rmdir()

    monkeypatch.setattr(run_lock, "_lock", lock)
    with locked(tmp_path / "run"):
        assert len(tries) == 2 and (tmp_path / "run" / ".lock").exists()
    assert os.listdir(tmp_path) == []
