"""Hostile picture files: none starts a program, takes memory or time out of proportion or meets a wrong plugin."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from indomain_guidance.training.data import containers, decoding, stripping
from indomain_guidance.training.data.containers import FORMATS, contents
from indomain_guidance.training.data.images import decode, probe
from indomain_guidance.training.data.problems import BadImage
from PIL import Image, features


def encoded(kind: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, kind, **options)
    return file.getvalue()


def picture(height: int = 24, width: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def with_segment(data: bytes, marker: bytes, body: bytes) -> bytes:
    return data[:2] + b"\xff" + marker + struct.pack(">H", len(body) + 2) + body + data[2:]


def directory(entries, tail: bytes = b"", order: str = "<") -> bytes:
    """A TIFF directory of (tag, kind, count, value or offset)."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(entries))
    return head + b"".join(struct.pack(f"{order}HHII", *one) for one in entries) + bytes(4) + tail


BOMB = directory([(1000 + number, 7, 2**16, 8) for number in range(2000)], bytes(2**16))  # 131 MB from 90 kB
GRAY_8 = [
    (256, 4, 1, 8),
    (257, 4, 1, 8),
    (258, 3, 1, 8),
    (259, 3, 1, 1),
    (262, 3, 1, 1),
    (273, 4, 1, 8),
    (277, 3, 1, 1),
    (278, 4, 1, 8),
    (279, 4, 1, 64),
]

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 moveto showpage\n%%EOF\n"
FOREIGN = {
    "PostScript": POSTSCRIPT,
    "PostScript with a preview": b"\xc5\xd0\xd3\xc6"
    + struct.pack("<7I", 32, len(POSTSCRIPT), 0, 0, 0, 0, 0)
    + POSTSCRIPT,
    "PDF": b"%PDF-1.4\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "XPM": b"/* XPM */\nstatic char *x[] = {",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG XL": b"\xff\x0a" + bytes(40),
    "Photoshop": b"8BPS\0\1" + bytes(40),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(40),
    "GRIB": b"GRIB\0\0\0\1" + bytes(40),
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "MPEG": b"\0\0\1\xb3" + bytes(60),
    "FITS": b"SIMPLE  =                    T" + b" " * 2880,
    "script": b"#!/bin/sh\ntouch x\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_formats_that_are_not_meant_never_reach_pillow(name, monkeypatch):
    """Some of its plugins start a program."""
    monkeypatch.setattr(decoding, "_plugin", lambda *args: pytest.fail("Pillow was asked"))
    for read in (probe, decode):
        with pytest.raises(BadImage) as caught:
            read(FOREIGN[name])
        assert caught.value.kind == "corrupt"
    assert contents(FOREIGN[name]).kind == ""


@pytest.mark.parametrize("kind", Image.SAVE or FORMATS)
def test_whatever_pillow_writes_is_read_only_where_it_is_meant(kind):
    try:
        data = encoded(kind)
    except Exception:
        pytest.skip("this Pillow does not write it")
    known = contents(data).kind
    assert known in ("", "BMP") or kind in FORMATS or kind in ("MPO", "APNG"), kind
    if kind in FORMATS and kind != "PPM":
        assert known == kind and decode(data).size == (40, 24)


def test_a_file_is_known_by_what_it_holds_not_by_its_name():
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"):
        assert contents(encoded(kind)).kind == kind
    if "avif" in features.modules and features.check("avif"):
        data = encoded("AVIF", picture(), quality=100, subsampling="4:4:4")
        assert contents(data).kind == "AVIF" and probe(data).format == "AVIF" and decode(data).size == (40, 24)
    with pytest.raises(BadImage, match=r"of another kind \(HEIC\)"):
        decode(FOREIGN["HEIC"])
    with pytest.raises(BadImage, match=r"\(Targa\), whatever its name says; save it as PNG"):
        decode(encoded("TGA"))
    for data in (b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n"):
        with pytest.raises(BadImage, match="download the picture itself"):
            decode(data)


def test_a_format_that_this_pillow_lacks_is_named(monkeypatch):
    monkeypatch.setattr(decoding, "_readable", lambda: frozenset({"PNG"}))
    with pytest.raises(BadImage, match="is WEBP, which the installed Pillow cannot read"):
        probe(encoded("WEBP"))


def bombs() -> dict[str, bytes]:
    png, jpeg = encoded("PNG"), encoded("JPEG")
    zeros = zlib.compress(bytes(8 * 2**20), 9)
    return {
        "texts": with_chunks(png, *[chunk(b"zTXt", b"k\0\0" + zeros)] * 100),
        "international texts": with_chunks(png, *[chunk(b"iTXt", b"k\0\1\0\0\0" + zeros[:4000])] * 100),
        "a text named as EXIF": with_chunks(png, chunk(b"zTXt", b"Raw profile type exif\0\0" + zeros)),
        "a profile": with_chunks(png, chunk(b"iCCP", b"k\0\0" + zeros)),
        "EXIF of a PNG": with_chunks(png, chunk(b"eXIf", BOMB)),
        "frames of a PNG": with_chunks(png, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
        "EXIF of a JPEG": with_segment(jpeg, b"\xe1", b"Exif\0\0" + BOMB[:65000]),
        "previews of a JPEG": with_segment(jpeg, b"\xe2", b"MPF\0" + BOMB[:65000]),
        "EXIF behind padding": jpeg[:2] + b"\xff" * 9 + with_segment(jpeg, b"\xe1", b"Exif\0\0" + BOMB[:65000])[2:],
        "EXIF behind rubbish": with_segment(jpeg[:20] + b"rubbish" + jpeg[20:], b"\xe1", b"Exif\0\0" + BOMB[:65000]),
        "comments of a GIF": gif(b"!\xfe" + (b"\xff" + b"c" * 255) * 1000 + b"\0"),
        "frames of a GIF": gif() + (b",\0\0\0\0\1\0\1\0\0\2\2D\1\0") * 20_000 + b";",
    }


def gif(before: bytes = b"") -> bytes:
    data = encoded("GIF", Image.new("P", (40, 24), 1))
    start = 13 + (3 << ((data[10] & 7) + 1))
    return data[:start] + before + data[start:-1] + (b"" if before == b"" else b";")


@pytest.mark.parametrize("name", list(bombs()))
def test_what_a_file_carries_beside_its_picture_is_cut_away(name):
    data = bombs()[name]
    inside = contents(data)
    assert len(inside.data) < 4000 and decode(data).size == (40, 24)


@pytest.mark.parametrize(
    "data, reason",
    [
        (directory([*GRAY_8, *((1000 + number, 7, 2**16, 8) for number in range(2000))], bytes(2**16)), "notes beside"),
        (directory([*GRAY_8, *((1000 + number, 3, 2**15, 8) for number in range(20))], bytes(2**16)), "notes beside"),
        (
            directory(
                [*GRAY_8, (34665, 4, 1, 8), *((1000 + number, 5, 2**13, 8) for number in range(80))], bytes(2**16)
            ),
            "notes beside",
        ),
        (
            directory(
                [(tag, kind, count, 34925 if tag == 259 else value) for tag, kind, count, value in GRAY_8], bytes(64)
            ),
            "TIFF compression 34925",
        ),
        (directory([*GRAY_8, (322, 4, 1, 65536), (323, 4, 1, 65536)], bytes(64)), "tiles of 65536 x 65536"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + BOMB, "notes beside"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + b"II*\0" * 100, "EXIF blocks"),
    ],
)
def test_directories_that_stand_for_more_than_there_is_are_refused_before_they_are_read(monkeypatch, data, reason):
    monkeypatch.setattr(decoding, "_plugin", lambda *args: pytest.fail("Pillow was asked"))
    with pytest.raises(BadImage, match=reason):
        decode(data)


def progressive(scans: int) -> bytes:
    data = encoded("JPEG", picture(80, 80), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


def test_passes_of_a_jpeg_are_counted_and_too_many_are_refused(monkeypatch):
    assert contents(encoded("JPEG")).scans == 1 and contents(progressive(40)).scans == 40
    # A preview's passes are not the picture's, nor is what follows the end.
    assert contents(with_segment(progressive(12), b"\xe1", b"Exif\0\0" + progressive(12)) + progressive(12)).scans == 12
    assert decode(progressive(40)).size == (80, 80)
    monkeypatch.setattr(stripping, "MOST_SCANNED", 6400 * 39)
    with pytest.raises(BadImage, match="40 passes over 6,400 pixels") as caught:
        decode(progressive(40))
    assert caught.value.kind == "too large"
    monkeypatch.setattr(stripping, "MOST_SCANNED", 1)
    assert decode(progressive(16)).size == (80, 80)


def test_files_of_countless_pieces_are_refused(monkeypatch):
    for name in ("MOST_PIECES", "MOST_SUB_BLOCKS"):
        monkeypatch.setattr(stripping, name, 50)
    for data in (
        with_chunks(encoded("PNG"), *[chunk(b"aaAa", b"")] * 60),
        encoded("JPEG")[:2] + b"\xff\xfe\0\2" * 60 + encoded("JPEG")[2:],
        gif(b"!\xfe" + b"\1c" * 60 + b"\0"),
    ):
        with pytest.raises(BadImage, match="more than 50"):
            contents(data)
    monkeypatch.setattr(containers, "MOST_RLE", 1000)
    packed = bytearray(encoded("BMP", Image.new("P", (64, 64))))
    packed[30] = 1
    with pytest.raises(BadImage, match="packed BMP of more than 1,000 bytes"):
        decode(bytes(packed))


def test_orientation_of_a_png_from_every_place_it_may_stand_in():
    exif = Image.Exif()
    exif[274] = 6
    block = exif.tobytes()[6:]
    text = b"\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n"
    for one in (
        chunk(b"eXIf", block),
        chunk(b"tEXt", b"Raw profile type exif\0" + text),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
        chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b'<x tiff:Orientation="6"/>')),
    ):
        data = with_chunks(encoded("PNG"), one)
        assert probe(data).rotated and decode(data).size == (24, 40)
        late = encoded("PNG")[:-12] + one + encoded("PNG")[-12:]
        assert probe(late).rotated and decode(late).size == (24, 40)


@pytest.mark.filterwarnings("ignore")
def test_random_damage_is_always_a_sentence():
    random, kinds = np.random.default_rng(3), ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
    whole = [encoded(kind) for kind in kinds]
    whole += [encoded("JPEG", progressive=True), encoded("TIFF", compression="tiff_lzw")]
    for number in range(400):
        data = bytearray(whole[number % len(whole)])
        for _ in range(random.integers(1, 5)):
            data[random.integers(0, min(len(data), 200 if number % 3 else len(data)))] = random.integers(0, 256)
        for read in (probe, decode):
            try:
                read(bytes(data))
            except BadImage as error:
                assert str(error) and str(error).isprintable() and len(str(error)) <= 500
