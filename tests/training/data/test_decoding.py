"""Decoding within a bound of memory: what pictures take is known beforehand, and tiles change nothing."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from indomain_guidance.training.data import decoding
from indomain_guidance.training.data.buckets import cover
from indomain_guidance.training.data.check import check_data
from indomain_guidance.training.data.decoding import Decoding
from indomain_guidance.training.data.images import crop_to, decode, decoded
from indomain_guidance.training.data.latent_cache import LatentCache
from indomain_guidance.training.data.preparing import prepare
from indomain_guidance.training.data.problems import BadImage
from indomain_guidance.training.data.settings import DataSettings
from indomain_guidance.training.data.sources import find_images
from PIL import Image


def png(depth: int, colour: int, height: int, width: int) -> bytes:
    """The beginning of a PNG of any size, from which what it will take is known."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def encoded(kind: str, height: int = 90, width: int = 160, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, data, at_most",
    [
        ("1 bit", png(1, 0, 13377, 13377), 190e6),
        ("16 bits", png(16, 0, 6000, 6000), 90e6),
        ("RGBA", png(8, 6, 6000, 6000), 160e6),
        ("16 bits RGBA", png(16, 6, 6000, 6000), 160e6),
    ],
)
def test_what_bombs_of_usual_sizes_will_take(name, data, at_most):
    assert at_most / 1.2 < Decoding(data, (512, 512)).need < at_most <= decoding.MOST_DECODING


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", [png(8, 2, 13377, 13377), png(8, 0, 1, 100_000_000), png(8, 0, 100_000_000, 1)])
def test_what_alone_would_take_more_is_refused_by_name_and_counted(tmp_path, data):
    (tmp_path / "bomb.png").write_bytes(data)
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    report = check_data([tmp_path], resolution=64)
    assert report.ok == 1 and list(report.faults["too_large"]) == ["bomb.png"]
    assert (
        "pixels, which take" in report.faults["too_large"]["bomb.png"]
        and "more than 400; scale it down" in report.to_text()
    )
    entries = find_images([tmp_path])
    encode = lambda pixels: (pixels[:, :, ::8, ::8],) * 2  # noqa: E731
    dataset = prepare(
        entries, encode, LatentCache(tmp_path / "cache", "vae"), DataSettings(resolution=64, buckets=False)
    )
    assert [name for name, _ in dataset.skipped] == ["bomb.png"] and "(1 too large)" in dataset.notes[0]
    assert decoding.DECODING.held == 0


def test_memory_is_given_back_whatever_happens():
    data = encoded("PNG")
    with decoded(data):
        assert decoding.DECODING.held > 90 * 160 * 4
        with pytest.raises(ZeroDivisionError), decoded(data):
            raise ZeroDivisionError
        assert decoding.DECODING.held > 0
    for bad in (data[:-200], data[:60] + b"\xff" * 9 + data[69:]):
        with pytest.raises(BadImage):
            decode(bad)
    assert decoding.DECODING.held == 0


@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"progressive": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
        ("GIF", {"mode": "P"}),
        ("PNG", {"mode": "RGBA"}),
        ("PNG", {"mode": "LA"}),
        ("PNG", {"mode": "1"}),
    ],
)
def test_tiles_make_the_same_picture_whatever_their_size(monkeypatch, kind, options):
    exif = Image.Exif()
    results = []
    for turned in (1, 5, 8):
        exif[274] = turned
        more = {"exif": exif} if kind in ("PNG", "WEBP", "JPEG", "TIFF") else {}
        data = encoded(kind, 90, 161, **options, **more)
        whole, small = decode(data), decode(data, (20, 20))
        for tile in (7, 161, 1000):
            monkeypatch.setattr(decoding, "TILE", tile)
            assert np.array_equal(np.asarray(decode(data)), np.asarray(whole))
            assert np.array_equal(np.asarray(decode(data, (20, 20))), np.asarray(small))
        monkeypatch.undo()
        assert np.array_equal(np.asarray(whole.reduce(2)), np.asarray(small)) or kind == "JPEG"
        results.append(whole.tobytes())
    assert len(set(results)) == (3 if kind in ("PNG", "WEBP", "JPEG", "TIFF") else 1)


def test_large_pictures_are_made_small_while_they_are_converted_and_look_the_same(monkeypatch):
    ramp = np.linspace(0, 255, 800 * 1200 * 3).reshape(800, 1200, 3)
    smooth = Image.fromarray(ramp.astype(np.uint8))
    file = io.BytesIO()
    smooth.save(file, "PNG")
    size = cover((800, 1200), (64, 64))
    small, whole = decode(file.getvalue(), size), decode(file.getvalue())
    assert small.size == (200, 134) and whole.size == (1200, 800)
    cut = [np.asarray(crop_to(one, (800, 1200), (64, 64), (0, 16)), float) for one in (small, whole)]
    assert np.abs(cut[0] - cut[1]).mean() < 1.0
    # With too little memory for twice the size it becomes smaller still, and never smaller than what is needed.
    monkeypatch.setattr(decoding, "MOST_DECODING", 4 * 960_000 + 6_000_000)
    monkeypatch.setattr(decoding, "TILE", 1000)
    assert decode(file.getvalue(), (400, 600)).size == (1200, 800)
    monkeypatch.setattr(decoding, "MOST_DECODING", Decoding(file.getvalue(), (400, 600)).need - 1)
    assert decode(file.getvalue(), (400, 600)).size == (600, 400)
