"""Latents on disk: keyed by all they depend on, whole or encoded again, and shared between processes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem
from indomain_guidance.training.data.latent_cache import LatentCache, default_cache_folder
from safetensors.torch import load_file, save_file

CONTENT = hashlib.sha256(b"an image").hexdigest()


def latents(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, 8, generator=generator), torch.rand(4, 6, 8, generator=generator)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_round_trip_is_exact_and_other_caches_see_it(tmp_path):
    cache = LatentCache(tmp_path, "vae")
    key = cache.key(CONTENT, (48, 64))
    assert cache.get(key) is None and not cache.has(key)
    assert same(cache.put(key, *latents()), latents())
    assert cache.has(key) and same(cache.get(key), latents())
    assert same(LatentCache(tmp_path, "vae").get(key), latents())
    assert LatentCache(tmp_path, "another vae").get(key) is None
    assert list((cache.folder / "unfinished").iterdir()) == []


def test_key_tells_everything_apart(tmp_path):
    cache = LatentCache(tmp_path, "vae")
    keys = {
        cache.key(CONTENT, (48, 64)),
        cache.key(CONTENT[::-1], (48, 64)),
        cache.key(CONTENT, (64, 48)),
        cache.key(CONTENT, (48, 64), (0, 1)),
        cache.key(CONTENT, (48, 64), (1, 0)),
        cache.key(CONTENT, (48, 64), (0, 0), True),
        LatentCache(tmp_path, "other").key(CONTENT, (48, 64)),
    }
    assert len(keys) == 7
    assert cache.key(CONTENT, (48, 64)) == LatentCache(tmp_path / "elsewhere", "vae").key(CONTENT, (48, 64))


def damage_torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(bytes(data))


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_rubbish(path: Path) -> None:
    path.write_bytes(os.urandom(500))


def damage_foreign(path: Path) -> None:
    save_file({"mean": latents()[0], "std": latents()[1]}, path)


def damage_swapped(path: Path) -> None:
    other = LatentCache(path.parent, "vae")
    key = other.key("0" * 64, (48, 64))
    other.put(key, *latents(5))
    path.write_bytes(other.path(key).read_bytes())


@pytest.mark.parametrize(
    "damage", [damage_torn, damage_bit, damage_empty, damage_rubbish, damage_foreign, damage_swapped]
)
def test_damaged_entries_are_reported_and_made_again(tmp_path, damage):
    warnings: list[str] = []
    cache = LatentCache(tmp_path, "vae", warn=warnings.append)
    key = cache.key(CONTENT, (48, 64))
    cache.put(key, *latents())
    damage(cache.path(key))
    assert cache.get(key) is None
    assert len(warnings) == 1 and str(cache.path(key)) in warnings[0] and "encoded again" in warnings[0]
    cache.put(key, *latents())
    assert same(cache.get(key), latents()) and len(warnings) == 1


@pytest.mark.parametrize("links", [True, False])
def test_the_first_entry_stays(tmp_path, monkeypatch, links):
    """Two processes that encoded one image in different batches must go on with the same numbers."""
    cache = LatentCache(tmp_path, "vae")
    key = cache.key(CONTENT, (48, 64))
    cache.put(key, *latents(1))
    if links:
        assert same(cache.put(key, *latents(2)), latents(1))
    else:

        def no_links(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", no_links)
        assert same(cache.put(key, *latents(2)), latents(2))
        assert same(cache.get(key), latents(2))


def test_views_of_a_batch_are_stored_alone(tmp_path):
    cache = LatentCache(tmp_path, "vae")
    both = torch.stack(latents())
    key = cache.key(CONTENT, (48, 64))
    mean, _ = cache.put(key, both[0], both[1])
    assert mean.untyped_storage().nbytes() == mean.numel() * 4
    assert set(load_file(cache.path(key))) == {"mean", "std", "digest"}


def test_leavings_of_killed_processes_go_after_a_day(tmp_path):
    cache = LatentCache(tmp_path, "vae")
    old, new = cache.folder / "unfinished" / "old", cache.folder / "unfinished" / "new"
    old.write_bytes(b"half"), new.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    LatentCache(tmp_path, "vae")
    assert not old.exists() and new.exists()


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    cache = LatentCache(tmp_path, "vae")

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FileProblem, match="No space left on device.*set cache to another folder"):
        cache.put(cache.key(CONTENT, (48, 64)), *latents())
    monkeypatch.undo()
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileProblem, match="could not be made a latent cache"):
        LatentCache(tmp_path / "file", "vae")


def test_default_folder():
    assert default_cache_folder({"INDOMAIN_CACHE": "/x"}) == Path("/x").absolute() / "latents"
    assert default_cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x").absolute() / "indomain-guidance" / "latents"
    assert default_cache_folder({}).parts[-3:] == (".cache", "indomain-guidance", "latents")


def test_no_home_to_keep_latents_in(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(FileProblem, match="set cache, or INDOMAIN_CACHE"):
        default_cache_folder({})


WRITER = """
import hashlib, importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("bootstrap", sys.argv[1])
bootstrap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bootstrap)
bootstrap.register()
from indomain_guidance.training.data.latent_cache import LatentCache

torch.set_num_threads(1)
who, warned = int(sys.argv[3]), []
cache = LatentCache(sys.argv[2], "vae", warn=warned.append)
print("ready", flush=True)
sys.stdin.readline()
seen = hashlib.sha256()
for turn in range(60):
    for number in range(12):
        key = cache.key(hashlib.sha256(bytes([turn, number])).hexdigest(), (8, 8))
        found = cache.get(key)
        if found is None:
            noise = torch.Generator().manual_seed(1000 * who + 12 * turn + number)
            mean = torch.randn(4, 4, 4, generator=noise)
            found = cache.put(key, mean, mean.abs())
        seen.update(found[0].numpy().tobytes() + found[1].numpy().tobytes())
print(seen.hexdigest(), len(warned))
"""


@pytest.mark.slow
def test_two_processes_write_the_same_entries_at_once(tmp_path):
    """Each would store different numbers; both must end with the same ones, never half a file, and leave no rubbish."""
    bootstrap = Path(__file__).resolve().parents[3] / "training" / "bootstrap.py"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(bootstrap), str(tmp_path), str(who)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for who in (1, 2)
    ]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n", "ready\n"]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    ends = [writer.communicate(timeout=120)[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert ends[0] == ends[1] and ends[0][1] == "0"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 60 * 12 and all(path.suffix == ".safetensors" for path in files)
