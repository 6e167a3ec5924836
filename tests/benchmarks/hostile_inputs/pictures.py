"""Pictures: every format that is read, damaged; others under their names; and small files of enormous pictures."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageCms, PngImagePlugin, features

from .case import Reader, Silent, damaged_bytes, write_bytes
from .shards import opened, warm_decoding

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Noise in a mode; the same at every call."""
    dice = random.Random(1)
    count = size[0] * size[1] * {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}.get(mode, 3)
    if mode in ("L", "RGB", "RGBA", "CMYK", "LA"):
        return Image.frombytes(mode, size, dice.randbytes(count))
    return Image.frombytes("RGB", size, dice.randbytes(count)).convert("L").convert(mode)


def saved(image: Image.Image, format_: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.copy().save(out, format_, **options)  # Pillow leaves options of one format in the image
    return out.getvalue()


def originals() -> dict[str, bytes]:
    """Good files of every kind, by name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[274], exif[270] = 6, "x" * 200
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 300, zip=True)
    text.add_itxt("c", "d" * 300, zip=True)

    def animated(format_: str) -> bytes:
        one = picture(size=(24, 24))
        return saved(one, format_, save_all=True, append_images=[one.rotate(90)])

    rgb = picture()
    made = {
        "jpeg": saved(rgb, "JPEG", exif=exif, icc_profile=profile),
        "jpeg progressive": saved(rgb, "JPEG", progressive=True),
        "jpeg grey": saved(picture("L"), "JPEG"),
        "jpeg cmyk": saved(picture("CMYK"), "JPEG"),
        "mpo": animated("MPO"),
        "png": saved(rgb, "PNG", pnginfo=text, icc_profile=profile, exif=exif),
        "png alpha": saved(picture("RGBA"), "PNG"),
        "png 1 bit": saved(picture("1"), "PNG"),
        "png palette": saved(rgb.quantize(16), "PNG", transparency=0),
        "png 16 bit": saved(picture("L").convert("I").point(lambda v: v * 257).convert("I;16"), "PNG"),
        "apng": animated("PNG"),
        "webp": saved(rgb, "WEBP", exif=exif, icc_profile=profile),
        "webp lossless": saved(picture("RGBA"), "WEBP", lossless=True),
        "webp animated": animated("WEBP"),
        "bmp": saved(rgb, "BMP"),
        "bmp 8 bit": saved(rgb.quantize(200), "BMP"),
        "bmp 1 bit": saved(picture("1"), "BMP"),
        "tiff": saved(rgb, "TIFF"),
        "tiff deflate": saved(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "tiff lzw": saved(rgb, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": saved(rgb, "TIFF", compression="jpeg"),
        "tiff packbits": saved(picture("L"), "TIFF", compression="packbits"),
        "tiff g4": saved(picture("1"), "TIFF", compression="group4"),
        "tiff float": saved(picture("L").convert("F"), "TIFF"),
        "tiff cmyk": saved(picture("CMYK"), "TIFF"),
        "tiff pages": animated("TIFF"),
        "gif": saved(rgb, "GIF"),
        "gif animated": animated("GIF"),
    }
    if features.check("avif"):
        made["avif"] = saved(rgb, "AVIF")
    return made


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int,
    height: int,
    depth: int,
    colour: int,
    rows: bytes | None = None,
    before: bytes = b"",
    interlaced: int = 0,
) -> bytes:
    """A PNG of zeros with a header by hand. before: chunks before the picture's own."""
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    if rows is None:
        packer, rows = zlib.compressobj(9), b""
        line, left = bytes(1 + (width * bits + 7) // 8), height
        many = line * max(1, 2**20 // len(line))
        while left:
            count = min(left, len(many) // len(line))
            rows += packer.compress(many[: count * len(line)])
            left -= count
        rows += packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bomb(size: int) -> bytes:
    """So many zeros, packed."""
    packer, out = zlib.compressobj(9), b""
    for _ in range(size // 2**20):
        out += packer.compress(bytes(2**20))
    return out + packer.flush()


def tiff(entries: Sequence[tuple[int, int, int, int]], rest: bytes = b"", next_: int = 0) -> bytes:
    """A little-endian TIFF of one directory: (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", next_) + rest


def tiff_of(width: int, height: int, bits: int, samples: int, data: bytes, compression: int = 8, **more: int) -> bytes:
    place = 8 + 2 + 12 * 9 + 4
    return tiff(
        [
            (256, 4, 1, width),
            (257, 4, 1, height),
            (258, 3, 1, bits),
            (259, 3, 1, compression),
            (262, 3, 1, 1),
            (273, 4, 1, place),
            (277, 3, 1, samples),
            (278, 4, 1, more.get("rows", height)),
            (279, 4, 1, len(data)),
        ],
        data,
    )


def bombs() -> dict[str, Callable[[], bytes]]:
    """Small files of large pictures or much work, made when they are wanted."""
    eps = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%touch /tmp/evil) (w) file\n"
        b"showpage\n%%EOF\n"
    )
    wide = saved(Image.new("L", (65500, 2700)), "JPEG")
    small = saved(Image.new("L", (8, 8)), "JPEG")
    frame = b"!\xf9\x04\0\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0"
    gif = b"GIF89a%s\x80\0\0\0\0\0\xff\xff\xff"
    deep = chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    return {
        "1 bit, 13,377 squared": lambda: png(13377, 13377, 1, 0),
        "1 bit, 13,378 squared": lambda: png(13378, 13378, 1, 0),
        "16 bit grey, 6,000 squared": lambda: png(6000, 6000, 16, 0),
        "16 bit RGBA, 5,000 squared": lambda: png(5000, 5000, 16, 6),
        "8 bit RGBA, 6,000 squared": lambda: png(6000, 6000, 8, 6),
        "palette, 10,000 squared": lambda: png(10_000, 10_000, 8, 3, before=chunk(b"PLTE", bytes(768))),
        "interlaced, 8,000 squared": lambda: png(8000, 8000, 1, 0, interlaced=1),
        "1 px wide, 100,000,000 high": lambda: png(1, 100_000_000, 1, 0, rows=b""),
        "100,000,000 px wide, 1 high": lambda: png(100_000_000, 1, 1, 0),
        "1 x 178,956,970": lambda: png(1, 178_956_970, 1, 0, rows=b"x"),
        "2 ** 31 - 1 squared": lambda: png(2**31 - 1, 2**31 - 1, 1, 0, rows=b"x"),
        "no pixels": lambda: png(0, 0, 8, 0, rows=b"x"),
        "more rows than the header says": lambda: png(64, 64, 8, 2, rows=bomb(2**29)),
        "text of 512 MB": lambda: png(64, 64, 8, 2, before=chunk(b"zTXt", b"a\0\0" + bomb(2**29))),
        "international text of 512 MB": lambda: png(64, 64, 8, 2, before=chunk(b"iTXt", b"a\0\1\0\0\0" + bomb(2**29))),
        "profile of 512 MB": lambda: png(64, 64, 8, 2, before=chunk(b"iCCP", b"a\0\0" + bomb(2**29))),
        "profile of 30 MB": lambda: png(64, 64, 8, 2, before=chunk(b"iCCP", b"a\0\0" + bomb(30 * 2**20))),
        "100,000 texts": lambda: png(64, 64, 8, 2, before=chunk(b"tEXt", b"a\0b") * 100_000),
        "2 ** 31 frames": lambda: png(64, 64, 8, 2, before=deep),
        "100,000 chunks": lambda: png(64, 64, 8, 2, before=chunk(b"abCd", b"") * 100_000),
        "jpeg, 65,500 x 2,700": lambda: wide,
        "jpeg that says 65,500 squared": lambda: small[:163] + small[163:].replace(b"\0\x08" * 2, b"\xff\xdc" * 2, 1),
        "progressive jpeg of 5,000 scans": lambda: _scans(5000),
        "jpeg of 20,000 comments": lambda: small[:2] + (b"\xff\xfe\0\2" * 20_000) + small[2:],
        "gif, 65,535 squared": lambda: gif % struct.pack("<HH", 65535, 65535) + frame + b";",
        "gif, 12,000 squared, 300 frames": lambda: gif % struct.pack("<HH", 12_000, 12_000) + frame * 300 + b";",
        "gif of 100,000 frames": lambda: gif % struct.pack("<HH", 8, 8) + frame * 100_000 + b";",
        "gif of 100,000 comments": lambda: gif % struct.pack("<HH", 8, 8) + b"!\xfe\1x\0" * 100_000 + frame + b";",
        "bmp, 13,000 squared, run lengths": lambda: _bmp(13_000, 13_000, 8, 1),
        "bmp, 2 ** 31 high": lambda: _bmp(1, 2**31 - 1, 1, 0),
        "bmp, -13,000 high": lambda: _bmp(13_000, -13_000, 8, 1),
        "bmp of 64 bits": lambda: _bmp(10, 10, 64, 0),
        "tiff, 13,000 squared, 1 bit": lambda: tiff_of(13_000, 13_000, 1, 1, bomb(22 * 2**20)),
        "tiff, 6,000 squared, float": lambda: tiff_of(6_000, 6_000, 32, 1, bomb(138 * 2**20)),
        "tiff, 13,000 squared, 16 bit": lambda: tiff_of(13_000, 13_000, 16, 1, bomb(324 * 2**20)),
        "tiff that says 60,000 squared": lambda: tiff_of(60_000, 60_000, 8, 1, b"x"),
        "tiff of 2 ** 32 strips": lambda: tiff(
            [(256, 4, 1, 8), (257, 4, 1, 8), (273, 4, 2**32 - 1, 8), (279, 4, 2**32 - 1, 8)]
        ),
        "tiff whose directory is the next": lambda: tiff([(256, 4, 1, 8), (257, 4, 1, 8)], next_=8),
        "tiff of no bits": lambda: tiff_of(8, 8, 0, 1, b"x"),
        "tiff of 65,535 samples": lambda: tiff_of(8, 8, 8, 65535, b"x"),
        "tiff with a tag of 2 GB": lambda: tiff([(256, 4, 1, 8), (257, 4, 1, 8), (700, 1, 2**31 - 1, 8)]),
        "big tiff": lambda: b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + b"\xff" * 200,
        "webp, 16,383 squared": lambda: b"RIFF\x1a\0\0\0WEBPVP8L\r\0\0\0/\xfe\xff\xff\x0f\0\0\0\0\0\0\0\0",
        "webp lossless, 10,000 squared": lambda: saved(
            Image.new("RGB", (10_000, 10_000)), "WEBP", lossless=True, method=0, quality=0
        ),
        "eps": lambda: eps,
        "eps with a preview": lambda: (
            b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, len(eps), 0, 0, 0, 0, 65535) + eps
        ),
        "eps behind a picture": lambda: saved(picture(), "PNG") + eps,
        **{
            name: _other(name)
            for name in (
                "PDF",
                "PSD",
                "ICO",
                "ICNS",
                "TGA",
                "PPM",
                "PCX",
                "SGI",
                "DDS",
                "JPEG2000",
                "IM",
                "SPIDER",
                "XBM",
                "BLP",
                "MSP",
            )
        },
        "svg": lambda: b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><svg>&a;</svg>",
        "wmf": lambda: b"\xd7\xcd\xc6\x9a" + bytes(100),
        "fits": lambda: b"SIMPLE  =                    T" + b" " * 2850,
        "ppm of 13,000 squared": lambda: b"P4\n13000 13000\n",
        "xpm": lambda: b"/* XPM */\n" + b"x" * 1000,
        "mpeg": lambda: b"\0\0\1\xb3" + bytes(100),
        "fli": lambda: bytes(4) + b"\x11\xaf" + bytes(200),
        "nothing": lambda: b"",
        "zeros": lambda: bytes(1000),
        "web page": lambda: b"<!DOCTYPE html><html>404</html>",
        "a text": lambda: b"x" * 1000,
        "png without anything": lambda: b"\x89PNG\r\n\x1a\n",
        "gzip": lambda: b"\x1f\x8b" + bytes(100),
        "python": lambda: b"import os\nos.system('touch /tmp/evil')\n",
        "heic": lambda: b"\0\0\0\x18ftypheic" + bytes(500),
        "avif without anything": lambda: b"\0\0\0\x18ftypavif\0\0\0\0avifmif1" + bytes(100),
    }


def _other(format_: str) -> Callable[[], bytes]:
    """A good file of a format that is not meant, under a picture's name."""
    if format_ == "PSD":
        numbers = struct.pack(">HIIHH", 3, 13_000, 13_000, 8, 3)
        return lambda: b"8BPS\0\1" + bytes(6) + numbers + bytes(12) + b"\0\1" + bytes(100)
    mode = {"XBM": "1", "MSP": "1", "SPIDER": "F", "BLP": "P"}.get(format_, "RGB")
    image = picture(mode, (32, 32)) if mode != "P" else picture(size=(32, 32)).quantize(8)
    return lambda: saved(image, format_)


def _scans(count: int) -> bytes:
    """A progressive JPEG of 4,000 px that goes over the same coefficients again and again."""
    data = saved(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


def _bmp(width: int, height: int, bits: int, compression: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    colours = bytes(4 * 2 ** min(bits, 8)) if bits <= 8 else b""
    body = (b"\xff\1" * 100 + b"\0\0") * 1000 + b"\0\1"
    return b"BM" + struct.pack("<IHHI", 54 + len(colours) + len(body), 0, 0, 54 + len(colours)) + info + colours + body


class Pictures(Reader):
    """A picture in a folder, looked at as check-data does or as a run does."""

    name = "pictures"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.originals = originals()
        self.whole = [(".png", data) for data in self.originals.values()]
        self.data = folder / "data"
        self.data.mkdir()
        self.by_hand = {name: self._writer(make) for name, make in bombs().items()}

    def _writer(self, make: Callable[[], bytes]) -> Callable[[Path], None]:
        return lambda path: write_bytes(make())(path)

    def ending(self, name: str, dice: random.Random) -> str:
        return dice.choice(SUFFIXES)

    def place(self, path: Path) -> Path:
        for old in self.data.iterdir():
            old.unlink()
        return path.replace(self.data / path.name)

    def damage(self, dice: random.Random) -> tuple[str, Path]:
        name = dice.choice(list(self.originals))
        kind, data = damaged_bytes(self.originals[name], dice, edge=600)
        if name.startswith(("png", "apng")) and dice.random() < 0.5:
            data = _with_sums(data)
        path = self.folder / f"hostile{dice.choice(SUFFIXES)}"
        path.write_bytes(data)
        return f"{name}: {kind}", path

    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        from indomain_guidance.training.data.check import check_data

        if dice.random() < 0.4:
            said: list[str] = []
            dataset = opened(self.folder, [str(self.data)], said)
            return said + [f"{name}: {reason}" for name, reason in dataset.skipped]
        report = check_data([str(self.data)], workers=1)
        if report.nothing:
            return [report.nothing]
        faults = {name: reason for found in report.faults.values() for name, reason in found.items()}
        if not faults and report.ok != 1:
            raise Silent(f"it counts neither as good nor as bad: {report.to_text()[:200]}")
        return [f"{name}: {reason}" for name, reason in faults.items()]

    def warm(self) -> None:
        warm_decoding()
        super().warm()


def _with_sums(data: bytes) -> bytes:
    """A PNG whose chunks have right sums again, as far as they can be followed."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        length = int.from_bytes(out[at : at + 4], "big")
        if at + 12 + length > len(out):
            break
        out[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(out[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(out)
