"""The report on a folder that holds one of everything."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from indomain_guidance.training.data import sources
from indomain_guidance.training.data.check import check_data
from indomain_guidance.training.data.problems import DataProblem
from indomain_guidance.training.data.remarks import MASK, remarks
from PIL import Image, PngImagePlugin


def picture(seed: int, height: int = 80, width: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    picture(0).save(root / "good.png")
    picture(1, 60, 120).save(root / "deep" / "wide.jpg")
    picture(2, 30, 40).save(root / "small.png")
    picture(3, 60, 61).save(root / "enlarged.png")
    data = (root / "good.png").read_bytes()
    (root / "copy.png").write_bytes(data)
    (root / "broken.png").write_bytes(data[: len(data) // 2])
    (root / "damaged.png").write_bytes(data[:200] + b"\0\1\2\3" * 8 + data[232:])
    (root / "empty.jpg").write_bytes(b"")
    note = PngImagePlugin.PngInfo()
    note.add_text("comment", "the same pixels in another file")
    picture(0).save(root / "same.png", pnginfo=note)
    clear = picture(4).convert("RGBA")
    clear.putalpha(100)
    clear.save(root / "clear.png")
    exif = Image.Exif()
    exif[274] = 6
    picture(5, 80, 160).save(root / "turned.jpg", exif=exif)
    Image.fromarray(np.random.default_rng(6).integers(0, 65536, (80, 80), dtype=np.uint16)).save(root / "deep.png")
    picture(7).convert("CMYK").save(root / "print.jpg")
    picture(8).save(root / "moving.gif", save_all=True, append_images=[picture(9)])
    (root / "notes.txt").write_text("x")
    (root / "shard.tar").write_text("no tar")
    return root


def test_everything_is_found_and_nothing_is_touched(folder):
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}
    calls = []
    report = check_data(
        [str(folder)],
        resolution=64,
        bucket_step=8,
        min_side=40,
        workers=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()} == before
    assert (report.total, report.ok, report.bad) == (14, 10, 4)
    assert calls == [(number, 14) for number in range(1, 15)]
    assert set(report.faults["corrupt"]) == {"broken.png", "damaged.png", "empty.jpg"}
    assert set(report.faults["too_small"]) == {"small.png"} and "40 x 30" in report.faults["too_small"]["small.png"]
    assert report.upscaled == ["enlarged.png"]
    assert report.same_file == [["copy.png", "good.png"]]
    assert report.facts == {"alpha": ["clear.png"], "rotated": ["turned.jpg"]}
    assert report.formats == {"PNG": 7, "JPEG": 3, "GIF": 1}
    assert sum(report.buckets.values()) == report.ok and report.buckets["48x80"] == report.buckets["80x48"] == 1
    assert report.ignored == {".txt": 1} and list(report.places) == [str(folder / "shard.tar")]
    assert json.loads(json.dumps(report.to_dict()))["bad"] == 4
    text = report.to_text()
    assert text.startswith(f"14 images in {folder}: 10 can be used, 4 cannot.")
    for name in ("broken.png", "damaged.png", "empty.jpg", "small.png", "copy.png = good.png", "shard.tar", "80x48"):
        assert name in text, name


def test_long_lists_are_cut_in_the_text_only(tmp_path):
    for number in range(15):
        (tmp_path / f"{number:02d}.png").write_bytes(b"bad %d" % number)
    report = check_data([tmp_path])
    assert len(report.faults["corrupt"]) == 15 and report.ok == 0
    assert "09.png" in report.to_text() and "10.png" not in report.to_text() and "... and 5 more" in report.to_text()


def test_many_copies_are_one_short_line(tmp_path):
    picture(0).save(tmp_path / "0.png")
    for number in range(1, 9):
        (tmp_path / f"{number}.png").write_bytes((tmp_path / "0.png").read_bytes())
    report = check_data([tmp_path], resolution=64)
    assert len(report.same_file) == 1 and len(report.same_file[0]) == 9
    assert "groups of equal files (1):\n  0.png = 1.png = 2.png = 3.png and 5 more\n" in report.to_text()


def test_no_images_and_no_folder(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    report = check_data([tmp_path])
    assert report.total == report.ok == 0 and "found none, only other files (1 .heic)" in report.to_text()
    with pytest.raises(DataProblem, match="found nothing there"):
        check_data([tmp_path / "gone"])


def test_a_stop_says_so(folder):
    asked = []
    report = check_data([folder], should_stop=lambda: bool(asked), progress=lambda done, total: asked.append(done))
    assert report.stopped and report.total == 1 and "Stopped before" in report.to_text()
    report = check_data([folder], should_stop=lambda: True)  # while the folder is still searched
    assert report.stopped and report.total == 0 and "Stopped before" in report.to_text()


def test_a_stop_does_not_wait_for_a_picture_that_takes_long(folder, monkeypatch):
    """A drive that does not answer, for one."""
    answered = threading.Event()
    monkeypatch.setattr(sources.ImageEntry, "read", lambda entry: answered.wait(30))
    calls = []
    try:
        report = check_data([folder], workers=1, should_stop=lambda: calls.append(1) or len(calls) > 2)
        assert report.stopped and report.total == 0 and not answered.is_set()
    finally:
        answered.set()


def test_what_is_left_out_and_cut_away_is_told_as_by_a_run(tmp_path):
    picture(0, 60, 300).save(tmp_path / "pano.png")
    picture(1, 64, 64).save(tmp_path / "good.png")
    picture(2, 64, 64).save(tmp_path / "good_mask.png")
    others = "a.heic b.HEIC c.cr2 good.txt good.caption good.npz film.mp4 more.tar.gz more.zip"
    for name in others.split():
        (tmp_path / name).write_bytes(b"x")
    report = check_data([tmp_path], resolution=64, bucket_step=8)
    assert report.ok == 2 and report.cropped == {"pano.png": pytest.approx(1 - 80 / 48 / 5, abs=1e-4)}
    said = remarks(report.ignored, report.cropped, report.ok)
    assert all(text in report.to_text() for text in said) and [text.partition(":")[0] for text in said] == [
        "left out",
        "1 of 2 images lose more than a third to cropping",
    ]
    for told in (
        "2 .heic",
        "1 .cr2",
        "1 .caption, 1 .cr2",
        "1 .npz",
        "1 .txt",
        f"1 {MASK}",
        "1 .mp4",
        "1 .gz",
        "1 .zip",
    ):
        assert told in said[0]
    assert f"pano.png {report.cropped['pano.png']:.0%}" in said[1]
    assert remarks({}, {}, 3) == []
