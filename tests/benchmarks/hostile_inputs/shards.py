"""Tar shards: headers that lie with a right sum, extended headers, sparse files, links, and damage of every byte."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from .case import Reader, Silent, damaged_bytes, write_bytes

BLOCK = 512
# (place, length) of a header's fields; those of numbers among them.
FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "gid": (116, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "typeflag": (156, 1),
    "linkname": (157, 100),
    "magic": (257, 8),
    "uname": (265, 32),
    "gname": (297, 32),
    "devmajor": (329, 8),
    "devminor": (337, 8),
    "prefix": (345, 155),
}
NUMBERS = ("mode", "uid", "gid", "size", "mtime", "devmajor", "devminor")
GNU_SPARSE, IS_EXTENDED, REAL_SIZE = 386, 482, 483


def base256(value: int, length: int = 12) -> bytes:
    """A number as GNU tar writes those that octal digits cannot hold."""
    first = b"\x80" if value >= 0 else b"\xff"
    return first + (value % 256 ** (length - 1)).to_bytes(length - 1, "big")


NASTY_NUMBERS = {
    "nothing": b"\0" * 12,
    "spaces": b" " * 12,
    "no digits": b"abcdefghijk\0",
    "eights": b"88888888888\0",
    "minus one": b"-1\0\0\0\0\0\0\0\0\0\0",
    "plus": b"+7\0\0\0\0\0\0\0\0\0\0",
    "underscore": b"1_0\0\0\0\0\0\0\0\0\0",
    "most in octal": b"77777777777\0",
    "no end": b"777777777777",
    "no ASCII": b"\xc0\xc1\xfe\xfd" * 3,
    "hex": b"0x1f\0\0\0\0\0\0\0\0",
    "-1 in base 256": base256(-1),
    "-512 in base 256": base256(-512),
    "-1,024 in base 256": base256(-1024),
    "-2 ** 63 in base 256": base256(-(2**63)),
    "2 ** 62 in base 256": base256(2**62),
    "2 ** 63 in base 256": base256(2**63),
    "most in base 256": b"\x80" + b"\xff" * 11,
    "least in base 256": b"\xff" + b"\0" * 11,
    "2 ** 40": base256(2**40),
    "unknown mark": b"\x81" + b"\x01" * 11,
    "one": b"00000000001\0",
    "zero": b"00000000000\0",
    "block": b"00000001000\0",
}
TYPES = [bytes([code]) for code in range(256)]


def summed(header: bytes) -> bytes:
    """A header with the right sum in it."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def with_field(header: bytes, field: str, value: bytes) -> bytes:
    start, length = FIELDS[field]
    return summed(header[:start] + value[:length].ljust(length, b"\0") + header[start + length :])


def picture(colour: str, side: int = 24) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "PNG")
    return out.getvalue()


def shard(format_: int, prefix: str = "", count: int = 3) -> bytes:
    """A good tar of so many pictures and a text beside each."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as file:
        for number in range(count):
            for ending, data in (
                (".png", picture(("red", "green", "blue")[number % 3], 24 + number)),
                (".txt", b"a picture"),
            ):
                member = tarfile.TarInfo(f"{prefix}{number:04d}{ending}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return out.getvalue()


def header_places(data: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        return [member.offset for member in file]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def header(path: str = "x.png", size: int | bytes = 0, type_: bytes = b"0", **fields: bytes) -> bytes:
    """One header by hand. size: a number, or the field's bytes."""
    member = tarfile.TarInfo(path)
    made = member.tobuf(tarfile.GNU_FORMAT)
    made = with_field(made, "size", b"%011o\0" % size if isinstance(size, int) else size)
    made = with_field(made, "typeflag", type_)
    for field, value in fields.items():
        made = with_field(made, field, value)
    return made


def pax(records: bytes, size: int | bytes | None = None, type_: bytes = b"x") -> bytes:
    """An extended header with these records."""
    return header("PaxHeaders/x", len(records) if size is None else size, type_) + padded(records)


def record(key: str, value: str | bytes) -> bytes:
    value = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    body = b" " + key.encode() + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def by_hand() -> dict[str, bytes]:
    """Name -> tar; each begins with a good picture and mostly ends with one."""
    end, data = bytes(2 * BLOCK), picture("white")
    good = header("good.png", len(data)) + padded(data)
    last = header("last.png", len(data)) + padded(data) + end
    found: dict[str, bytes] = {}
    for field in NUMBERS:
        for name, value in NASTY_NUMBERS.items():
            length = FIELDS[field][1]
            # Of base 256 the end counts, of digits the beginning.
            number = value[:1] + value[13 - length :] if value[:1] in b"\x80\xff" else value[:length]
            whole = with_field(header("x.png", len(data)), field, number) + padded(data) + last
            found[f"{field}: {name}"], found[f"{field} of the first: {name}"] = good + whole, whole
    for code in TYPES:
        if code not in (b"0", b"\0"):
            found[f"type {code!r}"] = good + header("x.png", len(data), code) + padded(data) + last
    sparse = with_field(header("x.png", 0, b"S"), "name", b"x.png")
    maps = {
        "map of nothing": bytes(96),
        "map of letters": b"z" * 96,
        "backwards": b"00000000010\0" * 8,
        "huge": (b"00000000000\0" + b"77777777777\0") * 4,
        "negative": (base256(-512) + base256(-512)) * 4,
    }
    for name, table in maps.items():
        for extended in (b"\0", b"\1"):
            block = sparse[:GNU_SPARSE] + table + extended + base256(2**62) + sparse[495:]
            found[f"sparse: {name}, extended {extended[0]}"] = good + summed(block) + b"\1" * BLOCK * 3 + last
    values = {
        "size": ("-1", "-512", "99999999999999999999", "1e3", "x", "", "0.5", "9" * 5000),
        "mtime": ("nan", "inf", "1e400", "x"),
        "path": ("", "/", "..", "a" * 100_000, "\ud800.png", "\x00.png", "../../x.png", "x.png/", "\u202egnp.x"),
        "uid": ("-1", "x", "9" * 5000),
        "linkpath": ("/etc/passwd",),
        "hdrcharset": ("BINARY", "x", "idna"),
        "GNU.sparse.map": ("", "0", "0,-512", "x", "-1,-1,-1,-1", "0,1" + ",0,1" * 10_000),
        "GNU.sparse.size": ("-1", "x", "9" * 30),
        "GNU.sparse.major": ("1", "x"),
        "GNU.sparse.realsize": ("9" * 30, "x"),
        "GNU.sparse.name": ("", "\x00"),
        "GNU.sparse.offset": ("-1", "x"),
        "GNU.sparse.numbytes": ("-1", "9" * 30),
        "comment": ("x" * 100_000,),
        "SCHILY.xattr.x": ("y",),
        "": ("x",),
    }
    for key, texts in values.items():
        for text in texts:
            for type_ in (b"x", b"g"):
                extra = record("GNU.sparse.minor", "0") if key == "GNU.sparse.major" else b""
                whole = pax(record(key, text) + extra, type_=type_) + header("x.png", len(data)) + padded(data)
                found[f"pax {type_.decode()} {key} = {text[:12]!r}"] = good + whole + last
                found[f"first pax {type_.decode()} {key} = {text[:12]!r}"] = whole + last
    raw = {
        "no length": b" size=1\n",
        "length 0": b"0 size=1\n",
        "too long": b"999999 size=1\n",
        "too short": b"3 size=1\n",
        "no end": b"10 size=1",
        "no equals": b"9 size 1\n",
        "5,000 digits": b"9" * 5000 + b" size=1\n",
        "negative": b"-9 size=1\n",
        "nul bytes": bytes(100),
        "no UTF-8": record("path", b"\xff\xfe.png"),
        "many": record("size", "9") * 20_000,
        "length of letters": b"aa size=1\n",
        "plus": b"+9 size=1\n",
        "many keys": b"".join(record(f"k{n}", "") for n in range(20_000)),
    }
    for name, records in raw.items():
        found[f"pax records: {name}"] = good + pax(records) + header("x.png", len(data)) + padded(data) + last
        found[f"first pax records: {name}"] = pax(records) + header("x.png", len(data)) + padded(data) + last
    for name, size in {
        "-512": base256(-512),
        "2 ** 62": base256(2**62),
        "letters": b"letters",
        "most": b"77777777777\0",
    }.items():
        for type_ in (b"x", b"g", b"L", b"K", b"S", b"D", b"V", b"5", b"2"):
            whole = header("././@LongLink", size, type_) + padded(data) + last
            named = f"size {name} in type {type_.decode()}"
            found[named], found[f"first {named}"] = good + whole, whole
    chain = pax(record("comment", "x"))
    names = header("././@LongLink", 200, b"L") + padded(b"n" * 200)
    found |= {
        "5,000 extended headers": good + chain * 5_000 + last,
        "5,000 long names": good + names * 5_000 + last,
        "20,000 empty members": good + b"".join(header(f"{n}.png") for n in range(20_000)) + last,
        "20,000 of one name": good + header("x.png") * 20_000 + last,
        "long name of a megabyte": good
        + header("././@LongLink", 2**20, b"L")
        + padded(b"n" * 2**20)
        + header("x")
        + last,
        "a name of dots": good + header("../../../../tmp/evil.png", len(data)) + padded(data) + last,
        "an absolute name": good + header("/tmp/evil.png", len(data)) + padded(data) + last,
        "a device's name": good + header("nul.png", len(data)) + padded(data) + last,
        "an escape in a name": good + header("\x1b[31m.png", len(data)) + padded(data[:100]) + last,
        "no UTF-8 in a name": good + header("x.png", 100, name=b"\xff\xfe\xed\xa0\x80.png") + padded(data[:100]) + last,
        "link to a file": good + header("x.png", 0, b"2", linkname=b"/etc/passwd") + last,
        "hard link to itself": good + header("x.png", 0, b"1", linkname=b"x.png") + last,
        "a tar in a tar": good + header("x.tar", len(good + last)) + padded(good + last) + last,
        "no end": good + header("x.png", len(data)) + padded(data),
        "cut in a header": good + last[:100],
        "cut in a picture": good + last[: BLOCK + 20],
        "nothing": b"",
        "zeros": bytes(10_240),
        "one zero": b"\0",
        "end alone": end,
        "one block of zeros": bytes(BLOCK),
        "a text": b"not a tar" * 1000,
        "zip": b"PK\x03\x04" + bytes(1000),
        "gzip": b"\x1f\x8b\x08" + bytes(1000),
        "bzip2": b"BZh9" + bytes(1000),
        "xz": b"\xfd7zXZ\0" + bytes(1000),
        "noise": random.Random(0).randbytes(20_000),
        "goes on behind its end": good + end + last,
        "one zero block within": good + bytes(BLOCK) + last,
        "a byte too many": good + b"\0" + last,
    }
    return found


class Shards(Reader):
    """A damaged shard beside a good one and a picture, which have to be used whatever it is."""

    name = "shards"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        self.originals = [shard(one) for one in formats]
        self.originals += [shard(one, f"long/{'n' * 120}/") for one in formats[1:]]
        self.images = 3
        self.whole = [(".tar", data) for data in self.originals[::2]]
        self.places = [header_places(data) for data in self.originals]
        self.data = folder / "data"
        self.data.mkdir()
        (self.data / "good.tar").write_bytes(shard(tarfile.USTAR_FORMAT, "good-"))
        (self.data / "good.png").write_bytes(picture("yellow"))
        self.path = self.data / "hostile.tar"
        self.by_hand = {name: write_bytes(data) for name, data in by_hand().items()} | _holes()

    def ending(self, name: str, dice: random.Random) -> str:
        return ".tar"

    def place(self, path: Path) -> Path:
        return path.replace(self.path)

    def warm(self) -> None:
        warm_decoding()
        super().warm()

    def damage(self, dice: random.Random) -> tuple[str, Path]:
        which = dice.randrange(len(self.originals))
        data, what, path = self.originals[which], dice.random(), self.folder / "hostile.tar"
        if what < 0.5:
            kind, data = damaged_bytes(data, dice, edge=2 * BLOCK)
            path.write_bytes(data)
            return f"raw: {kind}", path
        made, kinds = bytearray(data), []
        for _ in range(dice.choice((1, 1, 2, 3))):
            at = dice.choice(self.places[which])
            field = dice.choice(list(FIELDS))
            start, length = FIELDS[field]
            old = bytes(made[at : at + BLOCK])
            if field in NUMBERS and dice.random() < 0.7:
                name, value = dice.choice(list(NASTY_NUMBERS.items()))
            elif dice.random() < 0.5:
                name, value = "noise", dice.randbytes(length)
            else:
                name, value = "another type", b""
                field, (_start, length) = "typeflag", FIELDS["typeflag"]
                value = dice.choice(TYPES)
            kinds.append(f"{field}: {name}")
            made[at : at + BLOCK] = with_field(old, field, value)
        if dice.random() < 0.2:
            del made[dice.randrange(len(made)) :]
            kinds.append("truncated")
        path.write_bytes(bytes(made))
        return ", ".join(kinds), path

    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        from indomain_guidance.training.data.check import check_data
        from indomain_guidance.training.data.sources import search

        way = dice.random()
        if way < 0.2:  # named by itself, where it may be all there is
            report = check_data([str(path)], workers=1)
            return [report.nothing] if report.nothing else _said(report, path)
        if way < 0.5:
            return self._trained_on(path)
        if way < 0.6:
            entries = search([str(path)]).entries
            return [] if all(entry.stamp() for entry in entries) else ["an entry without a stamp"]
        report = check_data([str(self.data)], workers=1)
        if report.ok < 4:
            raise Silent(f"only {report.ok} of the 4 good pictures beside it were used")
        said = _said(report, path)
        # A name that lost its ending is told among the other files.
        told = said or set(report.ignored) - {".txt"}
        if kind.startswith("raw") and report.total < 4 + self.images and not told:
            raise Silent(f"{4 + self.images - report.total} of its pictures are gone")
        return said

    def _trained_on(self, path: Path) -> Sequence[str]:
        """Read as a run reads its images, with an encoder of nothing."""
        said: list[str] = []
        dataset = opened(self.folder, [str(self.data)], said)
        if len(dataset) < 4:
            raise Silent(f"only {len(dataset)} of the 4 good pictures beside it were used")
        return said + [f"{name}: {reason}" for name, reason in dataset.skipped]


def warm_decoding() -> None:
    """Import all of Pillow's formats, also those that are not meant, and what gives back memory of large pictures."""
    from indomain_guidance.training.data.images import decode

    Image.init()
    out = io.BytesIO()
    Image.new("L", (7000, 7000)).save(out, "PNG")
    decode(out.getvalue())


def opened(folder: Path, data: list[str], said: list[str]):
    """The data set that a run would train on, its pictures made smaller instead of encoded."""
    from types import SimpleNamespace

    import torch
    from indomain_guidance.training.data.preparing import Callbacks, open_dataset
    from indomain_guidance.training.data.settings import DataSettings

    def encode(images):
        small = torch.nn.functional.avg_pool2d(images, 8)
        return small, torch.zeros_like(small)

    class Encoder:
        def parameters(self):
            return iter([torch.zeros(1)])

    base = SimpleNamespace(encode=encode, vae_id="nothing", autoencoder=Encoder())
    settings = DataSettings(data=tuple(data), resolution=64, buckets=False, cache=str(folder / "cache"))
    return open_dataset(settings, base, None, Callbacks(warn=said.append), workers=1)


def _said(report, path: Path) -> list[str]:
    """All that a report says about a file or what is in it."""
    found = [report.places, *report.faults.values()]
    return [f"{name}: {reason}" for faults in found for name, reason in faults.items()]


def _holes() -> dict[str, Callable[[Path], None]]:
    """Archives that are large holes: members that are really as large as they say."""
    data = picture("white")
    good = header("good.png", len(data)) + padded(data)

    def make(block: bytes, size: int) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.write_bytes(good + block)
            with open(path, "r+b") as file:
                file.truncate(len(good) + len(block) + size)

        return write

    size = 2**30
    return {
        "a picture of a gigabyte of nothing": make(header("x.png", size), size + 2 * BLOCK),
        "an extended header of a gigabyte": make(header("x", size, b"x"), size + 2 * BLOCK),
        "a global header of a gigabyte": make(header("x", size, b"g"), size + 2 * BLOCK),
        "a name of a gigabyte": make(header("././@LongLink", size, b"L"), size + 2 * BLOCK),
        "a gigabyte behind the end": make(bytes(2 * BLOCK), size),
    }
