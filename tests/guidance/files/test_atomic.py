"""Atomic writing: the old file or the new one, never half of one, and no rubbish."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, write_safetensors
from indomain_guidance.guidance.files.atomic import clear_unfinished, replacing, write_text

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)}


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = write_safetensors(tmp_path / "a.safetensors", TENSORS)
    before = path.read_bytes()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(FileProblem, match="could not be written.*No space left"):
        write_safetensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(ValueError, match="metadata must be strings"):
        write_safetensors(path, TENSORS, {"steps": 3})


def test_an_impossible_path_has_its_sentence(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.safetensors", tmp_path / ("a" * 300 + ".safetensors")):
        with pytest.raises(FileProblem, match="a.safetensors: could not be written") as caught:
            write_safetensors(path, TENSORS)
        assert "\n" not in str(caught.value)


def test_the_file_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), rename(*paths)))
    write_safetensors(tmp_path / "a.safetensors", TENSORS)
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_written_file_is_as_readable_as_the_users_other_files(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    written = write_safetensors(tmp_path / "weights.safetensors", {"a": torch.zeros(2)})
    assert written.stat().st_mode == plain.stat().st_mode


def test_a_drive_that_refuses_permissions_can_be_written(tmp_path, monkeypatch):
    def refused(path, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    write_text(tmp_path / "config.json", "{}")
    write_safetensors(tmp_path / "a.safetensors", TENSORS)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "config.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileProblem, match="could not be written"), replacing(path / "below"):
        pass


def test_only_half_written_files_of_ours_are_cleared(tmp_path):
    ours, other = tmp_path / f".step-000001.ckpt.{'0af' * 10}12.tmp", tmp_path / ".notes.tmp"
    ours.touch()
    other.touch()
    clear_unfinished(tmp_path, "step-000002.ckpt")
    assert ours.exists()
    clear_unfinished(tmp_path, "step-000001.ckpt")
    assert os.listdir(tmp_path) == [other.name]
    ours.touch()
    for folder in (tmp_path, tmp_path / "nowhere"):
        clear_unfinished(folder)
    assert os.listdir(tmp_path) == [other.name]


@pytest.mark.skipif(os.name != "posix", reason="folders are flushed on posix only")
def test_a_folder_that_cannot_be_flushed_is_no_failure(tmp_path, monkeypatch):
    real = os.fsync

    def without_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", without_folders)
    write_text(tmp_path / "a.txt", "caf\u00e9")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "caf\u00e9"
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    assert (tmp_path / "a.safetensors").exists()
