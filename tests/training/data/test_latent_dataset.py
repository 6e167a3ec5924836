"""Folders of real files to latents: against encoding each image by hand, across runs, processes, stops and damage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from indomain_guidance.training.data import latent_store
from indomain_guidance.training.data import preparing as module
from indomain_guidance.training.data.buckets import cover
from indomain_guidance.training.data.content_index import ContentIndex
from indomain_guidance.training.data.images import crop_to, decode, to_tensor
from indomain_guidance.training.data.latent_cache import LatentCache
from indomain_guidance.training.data.latent_dataset import LatentDataset
from indomain_guidance.training.data.preparing import Callbacks, open_dataset
from indomain_guidance.training.data.problems import CachingStopped, DataProblem
from indomain_guidance.training.data.settings import DataSettings
from indomain_guidance.training.data.sources import find_images, image_entries
from indomain_guidance.training.prior.opening import open_mini_world
from PIL import Image, ImageOps

SPREAD = 0.25


class Encoder:
    """A linear autoencoder's half: mean colour and brightness of 8x8 blocks, constant spread. Counts its images."""

    def __init__(self) -> None:
        self.images = 0
        self.batches: list[int] = []

    def __call__(self, images):
        assert images.dtype == torch.float32 and images.min() >= -1 and images.max() <= 1
        self.images += len(images)
        self.batches.append(len(images))
        pooled = F.avg_pool2d(images, 8)
        mean = torch.cat([pooled, pooled.mean(1, keepdim=True)], 1)
        return mean, torch.full_like(mean, SPREAD)


def save(path: Path, seed: int, height: int = 40, width: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


SHAPES = [(40, 60), (60, 40), (50, 50), (40, 44), (20, 25), (32, 32), (30, 90), (64, 128)]


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(16):
        save(tmp_path / "images" / f"{number % 3}" / f"{number:02d}.png", number, *SHAPES[number % len(SHAPES)])
    return tmp_path / "images"


def prepare(folder, cache_folder, encoder=None, vae="vae", **options) -> LatentDataset:
    """`preparing.prepare` with whatever of settings, callbacks and other options is given."""

    def taken(kind, **more):
        return kind(**more, **{f.name: options.pop(f.name) for f in dataclasses.fields(kind) if f.name in options})

    options.setdefault("warn", lambda text: pytest.fail(text))
    cache = LatentCache(cache_folder, vae, warn=options["warn"])
    entries = find_images([str(folder)]) if isinstance(folder, (str, Path)) else folder
    settings, callbacks = taken(DataSettings, resolution=32, bucket_step=8), taken(Callbacks)
    return module.prepare(entries, encoder or Encoder(), cache, settings, callbacks, workers=2, **options)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_image_equals_encoding_it_by_hand(folder, tmp_path):
    data = prepare(folder, tmp_path / "cache", posterior="mean")
    assert len(data) == 16 and data.skipped == []
    for index in range(16):
        image = decode((folder / data.name_of(index)).read_bytes())
        sample = data.draw(index, draw(0))
        scaled = cover((image.height, image.width), sample.size)
        centre = ((scaled[0] - sample.size[0]) // 2, (scaled[1] - sample.size[1]) // 2)
        pixels = to_tensor(crop_to(image, (image.height, image.width), sample.size, centre))
        # A batch of one and a batch of eight may differ in the last bit.
        assert torch.allclose(sample.latent, Encoder()(pixels[None])[0][0], atol=1e-6)
        assert sample.original == (image.height, image.width) and sample.crop == centre
        assert data.size_of(index) == (sample.original, centre)
        assert data.content_of(index) == hashlib.sha256((folder / data.name_of(index)).read_bytes()).hexdigest()
        assert sample.latent.shape == (4, sample.size[0] // 8, sample.size[1] // 8)
        assert torch.equal(data.mean(index), sample.latent) and torch.equal(
            data.draw(index, draw(1)).latent, sample.latent
        )
    assert sorted(index for group in data.groups.values() for index in group) == list(range(16))
    assert all(data.draw(index, draw(0)).size == size for size, group in data.groups.items() for index in group)
    # Of the eight shapes only 20 x 25 is smaller than its bucket.
    assert data.notes[-1] == "2 of 16 images are smaller than the resolution and were enlarged."


def test_large_pictures_are_encoded_fewer_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_store, "BATCH_AREA", 512)  # the smallest shapes here have 1024 pixels
    encoder = Encoder()
    few = prepare(folder, tmp_path / "few", encoder, batch=4)
    assert encoder.images == 16 and max(encoder.batches) <= 2
    many = prepare(folder, tmp_path / "many", batch=16)
    for index in range(16):
        assert torch.allclose(few.mean(index), many.mean(index), atol=1e-6)


def test_images_are_encoded_once_for_all_runs(folder, tmp_path):
    first, second, third = Encoder(), Encoder(), Encoder()
    one = prepare(folder, tmp_path / "cache", first, batch=3)
    assert first.images == 16 and max(first.batches) == 3 and len(first.batches) <= 16 // 3 + len(one.groups)
    # Other names, other places, other order: the content counts.
    moved = tmp_path / "moved"
    for number, path in enumerate(sorted(folder.rglob("*.png"), reverse=True)):
        shutil.copy(path, moved.joinpath(f"{number}.png") if moved.mkdir(exist_ok=True) is None else moved)
    two = prepare(moved, tmp_path / "cache", second)
    assert second.images == 0
    assert one.content_hash == two.content_hash and one.groups == two.groups
    assert all(torch.equal(one.draw(i, draw(i)).latent, two.draw(i, draw(i)).latent) for i in range(16))
    # One image more, another VAE, another size: only what is new.
    save(moved / "new.png", 99)
    assert len(prepare(moved, tmp_path / "cache", third)) == 17 and third.images == 1
    prepare(moved, tmp_path / "cache", third, vae="other")
    assert third.images == 1 + 17


def test_an_edited_image_is_encoded_again_and_a_known_one_not_even_read(folder, tmp_path, monkeypatch):
    for path in folder.rglob("*.png"):
        os.utime(path, (1e9, 1e9))  # long ago, so that the index trusts it
    prepare(folder, tmp_path / "cache")
    changed = sorted(folder.rglob("*.png"))[0]
    save(changed, 1234)
    read, entries = [], find_images([str(folder)])
    original = type(entries[0]).read
    monkeypatch.setattr(type(entries[0]), "read", lambda self: (read.append(self.name), original(self))[1])
    encoder = Encoder()
    data = prepare(entries, tmp_path / "cache", encoder)
    assert encoder.images == 1 and set(read) == {entry.name for entry in entries if entry.path == changed}
    index = [data.name_of(i) for i in range(16)].index(read[0])
    assert torch.equal(data.mean(index), prepare([e for e in entries if e.path == changed], tmp_path / "new").mean(0))


def test_randomness_comes_from_the_generator_alone(folder, tmp_path):
    data = prepare(folder, tmp_path / "cache", flip=True, random_crops=3)
    torch.manual_seed(0)
    one = [data.draw(i, draw(7)).latent for i in range(16)]
    torch.manual_seed(1)
    np.random.seed(5)
    again = prepare(folder, tmp_path / "cache", flip=True, random_crops=3, memory_limit=0)
    assert all(torch.equal(again.draw(i, draw(7)).latent, one[i]) for i in reversed(range(16)))
    assert not torch.equal(data.draw(0, draw(8)).latent, one[0])


def test_posterior_sampling_has_the_vaes_spread(folder, tmp_path):
    data = prepare(folder, tmp_path / "cache")
    generator = draw(0)
    draws = torch.stack([data.draw(0, generator).latent for _ in range(2000)])
    assert torch.allclose(draws.mean(0), data.mean(0), atol=5 * SPREAD / 2000**0.5)
    assert abs(float(draws.std()) - float((data.mean(0).var(correction=0) + SPREAD**2) ** 0.5)) < 0.01
    assert abs(float((draws - data.mean(0)).std()) - SPREAD) < 0.005


def test_flips_and_crops(folder, tmp_path):
    encoder = Encoder()
    data = prepare(folder, tmp_path / "cache", encoder, flip=True, random_crops=3, posterior="mean")
    for index in range(16):
        original, _ = data.size_of(index)
        image = decode((folder / data.name_of(index)).read_bytes())
        both = [image, ImageOps.mirror(image)]  # mirrored first, then cut where the sample says
        seen, mirrored = set(), []
        for seed in range(80):
            sample = data.draw(index, draw(seed))
            scaled = cover(original, sample.size)
            assert all(0 <= place <= most - side for place, most, side in zip(sample.crop, scaled, sample.size))
            cuts = [to_tensor(crop_to(one, original, sample.size, sample.crop)) for one in both]
            errors = [float((Encoder()(cut[None])[0][0] - sample.latent).abs().max()) for cut in cuts]
            assert min(errors) < 0.01 < max(errors)  # scaling a mirrored image may round to the next of 256 values
            mirrored.append(errors[1] < errors[0])
            seen.add((mirrored[-1], sample.crop))
        assert 0.25 < np.mean(mirrored) < 0.75
        # An image of the shape's own ratio has one place only; else at most three, each of them mirrored, too.
        assert len(seen) == 2 if scaled == sample.size else 2 <= len(seen) <= 6
    assert len({data.draw(i, draw(s)).crop for i in range(16) for s in range(20)}) > 5
    again = Encoder()
    prepare(folder, tmp_path / "cache", again, flip=True, random_crops=3)
    assert again.images == 0


def test_bad_images_are_skipped_and_counted(folder, tmp_path):
    whole = (folder / "0" / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cut copy.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"not an image")
    save(folder / "small.png", 50, 10, 30)
    calls = []
    data = prepare(folder, tmp_path / "cache", min_side=16, progress=lambda done, total: calls.append((done, total)))
    assert len(data) == 16
    reasons = dict(data.skipped)
    assert set(reasons) == {"cut.png", "cut copy.png", "empty.jpg", "text.jpg", "small.png"}
    assert "cut off" in reasons["cut.png"] and "empty" in reasons["empty.jpg"]
    assert "30 x 10 pixels, less than min_side 16" in reasons["small.png"]
    assert calls[-1] == (16, 16) and [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert (folder / "cut.png").exists()


def test_nothing_usable_is_one_sentence(tmp_path):
    with pytest.raises(DataProblem, match="found none; name a folder"):
        prepare([], tmp_path / "cache")
    (tmp_path / "bad").mkdir()
    for number in range(3):
        (tmp_path / "bad" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(DataProblem, match=r"found none usable among 3, the first: 0\.png is not an image") as caught:
        prepare(tmp_path / "bad", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    whole = save(tmp_path / "cut" / "a.png", 1).read_bytes()
    (tmp_path / "cut" / "a.png").write_bytes(whole[:-200])
    with pytest.raises(DataProblem, match="is damaged or cut off"):
        prepare(tmp_path / "cut", tmp_path / "cache")


def test_same_names_in_two_folders_and_copies_of_one_image(tmp_path):
    save(tmp_path / "a" / "x.png", 1), save(tmp_path / "b" / "x.png", 2), save(tmp_path / "b" / "y.png", 1)
    (tmp_path / "a" / "z.png").write_bytes(b"bad")
    save(tmp_path / "b" / "z.png", 3)
    encoder = Encoder()
    data = prepare(find_images([str(tmp_path / "a"), str(tmp_path / "b")]), tmp_path / "cache", encoder)
    assert len(data) == 4 and encoder.images == 3 and len(data.skipped) == 1
    means = [data.mean(i).numpy().tobytes() for i in range(4)]
    assert len(set(means)) == 3


def test_a_stop_keeps_what_is_encoded(folder, tmp_path):
    encoder, after = Encoder(), Encoder()
    with pytest.raises(CachingStopped) as caught:
        prepare(folder, tmp_path / "cache", encoder, batch=2, should_stop=lambda: encoder.images >= 6)
    assert encoder.images == 6 and caught.value.done == 6 and caught.value.total == 16
    assert len(prepare(folder, tmp_path / "cache", after)) == 16 and after.images == 10
    with pytest.raises(CachingStopped):
        prepare(folder, tmp_path / "elsewhere", after, should_stop=lambda: True)


@pytest.mark.parametrize("limit", [0, 2000, None])
def test_damage_is_healed_at_the_start_and_while_training(folder, tmp_path, limit):
    warnings: list[str] = []
    encoder = Encoder()
    data = prepare(folder, tmp_path / "cache", encoder, memory_limit=limit)
    expected = [data.mean(i) for i in range(16)]
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    files[3].write_bytes(files[3].read_bytes()[:-7])
    data = prepare(folder, tmp_path / "cache", encoder, memory_limit=limit, warn=warnings.append)
    assert all(torch.allclose(data.mean(i), expected[i], atol=1e-6) for i in range(16))
    assert encoder.images == 17 and "damaged" in warnings[0]
    # Somebody empties the cache under a running training.
    shutil.rmtree(tmp_path / "cache")
    assert all(torch.allclose(data.mean(i), expected[i], atol=1e-6) for i in range(16))
    assert encoder.images - 17 in {0: [16], 2000: [12, 13], None: [0]}[limit]  # an image takes 480 or 512 bytes


def test_split_depends_on_content_only(tmp_path):
    entries = image_entries(torch.rand(200, 8, 8, 3, generator=draw(0)))
    data = prepare(entries, tmp_path / "cache")
    train, held = data.split(0.2)
    assert len(train) + len(held) == 200 and 20 <= len(held) <= 60
    contents = {d.mean(i).numpy().tobytes() for d in (train,) for i in range(len(d))}
    assert not contents & {held.mean(i).numpy().tobytes() for i in range(len(held))}
    held_names = {held.name_of(i) for i in range(len(held))}
    fewer = prepare(entries[:120], tmp_path / "cache")
    _, part = fewer.split(0.2)
    assert {part.name_of(i) for i in range(len(part))} == held_names & {entry.name for entry in entries[:120]}
    assert len(data.split(0.2, most=5)[1]) == 5 and len(data.split(0.0)[1]) == 0 and len(data.split(1e-9)[1]) == 1
    few, none = prepare(entries[:3], tmp_path / "cache").split(0.5, most=256)
    assert len(few) >= 1 and len(few) + len(none) == 3
    assert train.content_hash != data.content_hash
    # Copies of one image never lie on both sides.
    copies = image_entries(torch.stack([entry.pixels for entry in entries[:40]]), "copy")
    twins = prepare(entries[:40] + copies, tmp_path / "cache")
    train, held = twins.split(0.3)
    assert len(held) % 2 == 0 and len(train) % 2 == 0 and len(held) > 0
    with pytest.raises(ValueError, match="share"):
        data.split(1.0)


def test_latents_can_be_trained_on_even_when_made_in_inference_mode(tmp_path):
    with torch.inference_mode():
        batch = torch.rand(4, 32, 32, 3)
        weight = torch.rand(4, 3, 8, 8)

        def encode(images):
            with torch.inference_mode():
                mean = F.conv2d(images, weight, stride=8)
                return mean, torch.ones_like(mean)

        data = prepare(image_entries(batch), tmp_path / "cache", encode)
    trained = torch.nn.Parameter(torch.ones(4, 1, 1))
    (data.draw(0, draw(0)).latent * trained).sum().backward()
    (data.mean(1) * trained).sum().backward()
    assert trained.grad is not None


def test_a_vae_that_overflows_is_named(tmp_path):
    def encode(images):
        mean = F.avg_pool2d(images, 8)
        return mean * float("inf"), mean

    with pytest.raises(DataProblem, match="found NaN or infinity from the VAE"):
        prepare(image_entries(torch.rand(1, 32, 32, 3)), tmp_path / "cache", encode)


def test_exchanged_files_of_equal_length_and_time_are_noticed(tmp_path):
    paths = [tmp_path / "images" / f"{name}.bmp" for name in "ab"]
    for seed, path in enumerate(paths):
        os.utime(save(path, seed, 32, 32), (1e9, 1e9))  # as an archive sets it
    before = prepare(tmp_path / "images", tmp_path / "cache")
    paths[0].rename(tmp_path / "c.bmp"), paths[1].rename(paths[0]), (tmp_path / "c.bmp").rename(paths[1])
    after = prepare(tmp_path / "images", tmp_path / "cache")
    assert paths[0].stat().st_mtime == 1e9 and before.content_hash == after.content_hash
    assert [before.name_of(i) for i in range(2)] == [after.name_of(i) for i in (1, 0)]


@pytest.fixture(scope="module")
def mini_world():
    return open_mini_world()


def test_latents_depend_on_the_image_alone(tmp_path, mini_world):
    """Bit for bit, whatever was cached before, with the mini world's autoencoder."""
    for number in range(11):
        save(tmp_path / "images" / f"{number:02d}.png", number, 64, 64)

    def latents(cache, wanted="*.png", **options):
        folder = tmp_path / f"images of {cache}"
        shutil.rmtree(folder, ignore_errors=True), folder.mkdir()
        for path in (tmp_path / "images").glob(wanted):
            shutil.copy(path, folder)
        settings = DataSettings(resolution=64, data=(str(folder),), cache=str(tmp_path / cache), **options)
        silent = Callbacks(warn=lambda text: None)
        data = open_dataset(settings, mini_world, None, silent, workers=1, memory_limit=0)
        return data, {data.name_of(i): data.draw(i, draw(3)).latent for i in range(len(data))}

    data, expected = latents("one")
    latents("two", "0[3-7].png")  # another run has cached some, in a batch of its own
    for _, found in (latents("two"), latents("three", caching_batch=5), latents("four", "0[12].png")):
        assert found and all(torch.equal(latent, expected[name]) for name, latent in found.items())
    shutil.rmtree(tmp_path / "one")  # and when images are encoded while training
    assert all(torch.equal(data.draw(i, draw(3)).latent, expected[data.name_of(i)]) for i in range(11))
    shutil.rmtree(tmp_path / "one"), shutil.rmtree(tmp_path / "images of one")
    with pytest.raises(DataProblem, match=r"\.png: expected the image of before, which was there when"):
        data.mean(0)


def test_places_that_cannot_be_read_to_their_end_are_said(tmp_path, mini_world):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(4):
            archive.add(save(tmp_path / f"{number}.png", number, 64, 64), f"{number}.png")
            end = archive.offset
    os.truncate(tmp_path / "a.tar", end - 12000)  # in the fourth image
    warnings: list[str] = []
    settings = DataSettings(resolution=64, data=(str(tmp_path / "a.tar"),), cache=str(tmp_path / "c"))
    data = open_dataset(settings, mini_world, None, Callbacks(warn=warnings.append), workers=1)
    assert len(data) == 3 and data.skipped == []
    assert len(warnings) == 1
    assert "1 folders, shards or links could not be read to their end:" in warnings[0]
    assert "a.tar is cut off within the last of its 4 members" in warnings[0]


def test_open_dataset_on_the_mini_world(tmp_path):
    """The whole way with a real autoencoder: configuration, folder and IMAGE batch, against the autoencoder itself."""
    save(tmp_path / "images" / "a.png", 1, 64, 64)
    folders = {"data": (str(tmp_path / "images"),), "cache": str(tmp_path / "cache")}
    settings = DataSettings(resolution=64, **folders)
    base = open_mini_world()
    batch = torch.rand(3, 64, 64, 3, generator=draw(0)).mul(255).round().div(255)
    data = open_dataset(settings, base, batch, workers=1)
    assert len(data) == 4 and list(data.groups) == [(64, 64)] and data.notes == []
    names = [data.name_of(i) for i in range(4)]
    assert set(names) == {"a.png", "image 1", "image 2", "image 3"}
    mean, std = base.encode(batch[1:2].permute(0, 3, 1, 2) * 2 - 1)
    index = names.index("image 2")
    assert torch.allclose(data.mean(index), mean[0], atol=1e-4)
    noise = torch.randn(mean[0].shape, generator=draw(3))
    assert torch.allclose(data.draw(index, draw(3)).latent, mean[0] + std[0] * noise, atol=1e-4)


RUN = """
import importlib.util, json, sys, time, torch
spec = importlib.util.spec_from_file_location("bootstrap", sys.argv[1])
bootstrap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bootstrap)
bootstrap.register()
import hashlib
from indomain_guidance.training.data.settings import DataSettings
from indomain_guidance.training.data.sources import find_images
from indomain_guidance.training.data.latent_cache import LatentCache
from indomain_guidance.training.data.preparing import prepare

torch.set_num_threads(1)
who = int(sys.argv[4])
encoded = 0

def encode(images):
    global encoded
    encoded += len(images)
    time.sleep(0.01 * len(images))
    pooled = torch.nn.functional.avg_pool2d(images, 8)
    return pooled + 1e-7 * who, pooled.abs()

entries = find_images([sys.argv[2]])
for turns in (1, 2):
    print("ready", flush=True)
    sys.stdin.readline()
    encoded = 0
    cache = LatentCache(f"{sys.argv[3]}{turns}", "vae")
    options = dict(batch=4, turn=who % turns, turns=turns, workers=2)
    data = prepare(entries, encode, cache, DataSettings(resolution=32, buckets=False), **options)
    digest = hashlib.sha256()
    for index in range(len(data)):
        digest.update(data.draw(index, torch.Generator().manual_seed(index)).latent.numpy().tobytes())
    print(json.dumps([len(data), encoded, digest.hexdigest()]), flush=True)
"""


@pytest.mark.slow
def test_two_processes_prepare_the_same_images_at_once(tmp_path):
    """Two runs (turns 1), then two ranks of one run (turns 2): equal latents in both, and ranks share the work."""
    for number in range(60):
        os.utime(save(tmp_path / "images" / f"{number}.png", number, 32, 32), (1e9, 1e9))
    bootstrap = Path(__file__).resolve().parents[3] / "training" / "bootstrap.py"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(bootstrap), str(tmp_path / "images"), str(tmp_path / "cache"), str(who)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for who in (0, 1)
    ]
    for turns in (1, 2):
        assert [run.stdout.readline() for run in runs] == ["ready\n", "ready\n"]
        for run in runs:
            run.stdin.write("go\n")
            run.stdin.flush()
        ends = [json.loads(run.stdout.readline()) for run in runs]
        assert ends[0][0] == ends[1][0] == 60 and ends[0][2] == ends[1][2]
        encoded = [end[1] for end in ends]
        # As ranks they encode twice only what both had begun when they met.
        assert 60 <= sum(encoded) <= {1: 120, 2: 60 + 4 * 12}[turns]
        files = [path for path in (tmp_path / f"cache{turns}").rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".jsonl", ".safetensors"}
        assert sum(path.suffix == ".safetensors" for path in files) == 60
        index = ContentIndex(tmp_path / f"cache{turns}" / "content-index.jsonl")
        assert all(index.look_up(entry) for entry in find_images([str(tmp_path / "images")]))
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
