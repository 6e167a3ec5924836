"""Real files of every kind that folders hold, written by Pillow: each becomes the picture a viewer would show."""

from __future__ import annotations

import ast
import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from indomain_guidance.training.data import decoding
from indomain_guidance.training.data.buckets import cover
from indomain_guidance.training.data.images import crop_to, decode, probe, to_tensor
from indomain_guidance.training.data.problems import BadImage
from PIL import Image, ImageCms, ImageFile, ImageOps


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pattern(height: int = 24, width: int = 40) -> Image.Image:
    """A picture without any symmetry, in blocks so that JPEG keeps it."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (200, 30, 30)
    pixels[: height // 2, width // 2 :] = (30, 200, 30)
    pixels[height // 2 :, width // 2 :] = (30, 30, 200)
    pixels[: height // 4, : width // 4] = (250, 250, 120)
    return Image.fromarray(pixels)


def apart(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference in grey levels; different sizes are infinitely far apart."""
    if one.size != other.size or one.mode != "RGB":
        return float("inf")
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


# Where the stored row 0 and column 0 are shown, from the EXIF standard, as array operations.
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    exact = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    data = encoded(pattern(), kind, exif=exif, **exact.get(kind, {}))
    shown = SHOWN[orientation](np.asarray(pattern()))
    picture, facts = decode(data), probe(data)
    assert apart(picture, Image.fromarray(np.ascontiguousarray(shown))) < (4.0 if kind == "JPEG" else 1e-9)
    assert (facts.width, facts.height) == picture.size
    assert facts.rotated is (orientation != 1)
    assert picture.size == ((24, 40) if orientation >= 5 else (40, 24))


def test_damaged_exif_does_not_lose_the_picture():
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(pattern(), "JPEG", exif=exif)
    start = data.index(b"Exif\0\0") + 6
    broken = data[:start] + b"XX" + data[start + 2 :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode(broken).size == (40, 24)


def test_transparency_of_all_kinds_is_laid_over_white():
    half = pattern().convert("RGBA")
    half.putalpha(128)
    expected = np.rint(np.asarray(pattern(), float) * 128 / 255 + 255 * (127 / 255))
    assert np.abs(np.asarray(decode(encoded(half, "PNG")), float) - expected).max() <= 1

    grey = Image.new("LA", (4, 3), (0, 0))
    assert np.asarray(decode(encoded(grey, "PNG"))).min() == 255

    # A palette with one clear entry (PNG and GIF), and with a table of transparencies (PNG).
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    palette.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        pixels = np.asarray(decode(encoded(palette, kind, transparency=0)))
        assert tuple(pixels[0, 0]) == (255, 255, 255) and tuple(pixels[1, 1]) == (200, 100, 50)
    table = np.asarray(decode(encoded(palette, "PNG", transparency=b"\x00\x80")))
    assert tuple(table[0, 0]) == (255, 255, 255) and abs(int(table[1, 1, 0]) - 227) <= 1

    # One colour declared clear in an image without alpha.
    keyed = encoded(pattern(), "PNG", transparency=(200, 30, 30))
    assert tuple(np.asarray(decode(keyed))[-1, 0]) == (255, 255, 255)
    assert tuple(np.asarray(decode(keyed))[-1, -1]) == (30, 30, 200)
    for data in (encoded(half, "PNG"), encoded(palette, "PNG", transparency=b"\x00\x80"), keyed):
        assert probe(data).alpha
    assert not probe(encoded(pattern(), "PNG")).alpha


def test_sixteen_bit_grey_keeps_its_whole_range():
    values = np.linspace(0, 65535, 64 * 4).astype(np.uint16).reshape(16, 16)
    expected = np.rint(values / 257.0)
    for kind in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(values), kind)
        pixels = np.asarray(decode(data), float)
        assert np.abs(pixels - expected[..., None]).max() == 0, kind
    floats = encoded(Image.fromarray((values / 65535.0).astype(np.float32)), "TIFF")
    assert np.abs(np.asarray(decode(floats), float) - expected[..., None]).max() <= 1
    integers = encoded(Image.fromarray(values.astype(np.int32)), "TIFF")
    assert np.abs(np.asarray(decode(integers), float) - expected[..., None]).max() == 0
    bad = (values / 65535.0).astype(np.float32)
    bad[0, 0] = np.nan
    with pytest.raises(BadImage, match="NaN"):
        decode(encoded(Image.fromarray(bad), "TIFF"))


@pytest.mark.parametrize(
    "full, brightest", [(1.0, 1.002), (1.0, 1.4), (255.0, 255.0), (255.0, 260.0), (65535.0, 65600.0), (255.0, 3.0)]
)
def test_floats_a_little_above_their_range_do_not_widen_it(full, brightest):
    """As interpolation leaves them; one such pixel makes the others black. The last is a dark picture of 0..255."""
    ramp = np.linspace(0, min(full, brightest), 256).reshape(16, 16).astype(np.float32)
    ramp[-1, -1] = brightest
    pixels = np.asarray(decode(encoded(Image.fromarray(ramp), "TIFF")), float)[..., 0]
    assert np.abs(pixels - np.clip(ramp, 0, full) * 255.0 / full).max() <= 1


def png(depth: int, colour: int, height: int, width: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG of raw rows, for kinds that Pillow reads but does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_sixteen_bit_colour():
    values = np.random.default_rng(0).integers(0, 65536, (3, 5, 3)).astype(">u2")
    data = png(16, 2, 3, 5, b"".join(b"\0" + row.tobytes() for row in values))
    assert np.abs(np.asarray(decode(data), float) - values.astype(float) / 257.0).max() <= 1.0


def test_sixteen_bit_grey_with_a_clear_value():
    clear = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 513)
    clear += struct.pack(">I", zlib.crc32(clear[4:]))
    data = png(16, 0, 1, 2, b"\0" + struct.pack(">HH", 513, 514), clear)
    assert [tuple(pixel) for pixel in np.asarray(decode(data))[0]] == [(255, 255, 255), (2, 2, 2)]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile(kind):
    data = encoded(pattern(32, 48).convert("CMYK"), kind)
    assert apart(decode(data), pattern(32, 48)) < 6


def test_profiles_are_applied():
    """A profile that swaps red and blue must swap them in the picture, opaque or not; an sRGB one changes nothing."""
    standard = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = standard.replace(b"rXYZ", b"tmpX", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmpX", b"bXYZ", 1)
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "Swap".encode("utf-16-be"))
    swapped = swapped.replace(b"sRGB", b"Swap")
    plain = decode(encoded(pattern(), "PNG", icc_profile=standard))
    other = encoded(pattern(), "PNG", icc_profile=swapped)
    assert apart(plain, pattern()) == 0.0
    turned = Image.fromarray(np.asarray(pattern())[..., ::-1].copy())
    assert apart(decode(other), turned) < 2
    clear = pattern().convert("RGBA")
    clear.putalpha(255)
    assert apart(decode(encoded(clear, "PNG", icc_profile=swapped)), turned) < 2
    # Rubbish in place of a profile is no reason to lose the picture.
    assert apart(decode(encoded(pattern(), "PNG", icc_profile=b"rubbish" * 40)), pattern()) == 0.0


def test_other_modes_and_first_frames():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(np.asarray(decode(encoded(ramp, "PNG")))[..., 1], np.asarray(ramp))
    bits = ramp.convert("1", dither=Image.Dither.NONE)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(decode(encoded(bits, kind)))[..., 0], np.asarray(bits) * np.uint8(255))
    assert apart(decode(encoded(pattern(), "BMP")), pattern()) == 0.0
    second = Image.new("RGB", (40, 24), (1, 2, 3))
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encoded(pattern(), kind, save_all=True, append_images=[second], **options)
        assert apart(decode(data), pattern()) < 1, kind


KINDS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("BMP", {}),
    ("GIF", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("kind, options", KINDS)
def test_truncated_files_are_named_even_where_pillow_was_told_to_ignore_it(monkeypatch, kind, options, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    data = encoded(noise, kind, **options)
    assert apart(decode(data), noise) < 80
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(BadImage) as caught:
            decode(data[: int(len(data) * share)])
        assert caught.value.kind == "corrupt", share
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def test_the_switch_for_truncated_files_comes_back_after_many_threads(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(pattern(96, 96), "JPEG")
    results = []

    def work():
        for cut in (data, data[: len(data) // 2]):
            try:
                results.append(decode(cut).size)
            except BadImage as error:
                results.append(error.kind)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, results)) == ["(96, 96)"] * 8 + ["corrupt"] * 8
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True and decoding._strict_users == 0


def test_files_that_are_no_images():
    whole = encoded(pattern(96, 96), "PNG")
    middle = len(whole) // 2
    damaged = whole[:middle] + b"\xff" * 8 + whole[middle + 8 :]
    for data, kind in (
        (b"", "empty"),
        (b"hello", "corrupt"),
        (b"<html></html>", "corrupt"),
        (whole[:20], "corrupt"),
        (damaged, "corrupt"),
    ):
        with pytest.raises(BadImage) as caught:
            decode(data)
        assert caught.value.kind == kind, data[:20]
        assert "\n" not in str(caught.value)


def test_huge_pictures_are_refused_before_decoding(monkeypatch):
    # 200,000 x 200,000 pixels declared; decoding would need 120 GB.
    data = png(8, 2, 200_000, 200_000, b"\0\0\0\0")
    for limit in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for read in (probe, decode):
            with pytest.raises(BadImage) as caught:
                read(data)
            assert caught.value.kind == "too large"


def test_a_limit_that_other_code_sets_in_pillow_refuses_nothing_and_warns_of_nothing(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for height, width in ((5, 8), (24, 40)):  # where Pillow itself would warn, and refuse
            for kind in ("PNG", "JPEG", "BMP", "GIF"):  # those for TIFF and WEBP ask by themselves
                data = encoded(pattern(height, width), kind)
                monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
                assert decode(data).size == (width, height), kind
                monkeypatch.undo()


def test_no_picture_is_opened_in_any_format_that_pillow_happens_to_know():
    """Some of its formats start other programs, so each call says which it means."""
    root = Path(__file__).resolve().parents[3]
    calls = [
        (path, node)
        for folder in ("guidance", "training", "nodes")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert calls
    assert [path for path, node in calls if "formats" not in [one.arg for one in node.keywords]] == []


def test_to_tensor_is_exact():
    tensor = to_tensor(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB"))
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor.min() == -1.0 and tensor.max() == 1.0
    back = ((tensor[0].reshape(-1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(back, torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize(
    "original, size", [((100, 200), (64, 64)), ((31, 47), (64, 96)), ((64, 64), (64, 64)), ((3, 999), (64, 128))]
)
def test_cover_covers_and_keeps_the_ratio(original, size):
    height, width = cover(original, size)
    assert height >= size[0] and width >= size[1]
    assert height == size[0] or width == size[1]
    scale = max(size[0] / original[0], size[1] / original[1])
    assert abs(height - original[0] * scale) <= 0.5 + 1e-9 and abs(width - original[1] * scale) <= 0.5 + 1e-9


def test_crop_to_equals_resizing_all_and_cutting():
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (90, 160, 3), dtype=np.uint8))
    scaled = cover((90, 160), (64, 64))
    everything = noise.resize(scaled[::-1], Image.Resampling.LANCZOS)
    for left in (0, 13, scaled[1] - 64):
        oracle = everything.crop((left, 0, left + 64, 64))
        # Inside; at the cut's border Lanczos has no neighbours to look at.
        inner = (slice(4, -4), slice(4, -4))
        got = np.asarray(crop_to(noise, (90, 160), (64, 64), (0, left)), float)[inner]
        assert np.abs(got - np.asarray(oracle, float)[inner]).mean() < 1.5
    plain = crop_to(noise, (90, 160), (64, 64), (0, 5))
    assert apart(crop_to(noise, (90, 160), (64, 64), (0, 5), flipped=True), ImageOps.mirror(plain)) == 0.0
    assert apart(crop_to(noise, (90, 160), (90, 160), (0, 0)), noise) == 0.0


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_small_and_look_the_same(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    smooth = pattern(12, 20).resize((2000, 1200), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95, exif=exif)
    facts = probe(data)
    original = (facts.height, facts.width)
    scaled = cover(original, (64, 64))
    small, whole = decode(data, at_least=scaled), decode(data)
    assert small.size != whole.size and small.height >= 2 * scaled[0] and small.width >= 2 * scaled[1]
    assert apart(crop_to(small, original, (64, 64), (1, 1)), crop_to(whole, original, (64, 64), (1, 1))) < 1.0
