"""Headers of tar files against Python's own reader, and damaged: nothing hangs, misleads or goes unnamed."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from indomain_guidance.training.data.problems import Cancelled
from indomain_guidance.training.data.shards import NoShard, members
from indomain_guidance.training.data.sources import search
from indomain_guidance.training.data.walking import Watch

BLOCK = 512


def header(
    name: bytes = b"a.png", size: bytes = b"00000000005\0", kind: bytes = b"0", magic: bytes = b"ustar\x0000"
) -> bytes:
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[124:136], block[156:157], block[257:265] = size, kind, magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def base256(number: int) -> bytes:
    return (number % 256**12).to_bytes(12, "big") if number < 0 else b"\x80" + number.to_bytes(11, "big")


FIRST = header(b"first.png") + padded(b"12345")
END = bytes(2 * BLOCK)


def written(path: Path, kind: int) -> Path:
    """A tar with everything that tars hold."""
    random = np.random.default_rng(kind)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, size in (("a.png", 700), ("ü/b.jpg", 0), ("long" * 24 + ".png", 512), ("deep/" * 30 + "c.png", 3)):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = size, 1.5 if kind == tarfile.PAX_FORMAT else 1
            archive.addfile(info, io.BytesIO(random.bytes(size)))
        if kind != tarfile.USTAR_FORMAT:
            info = tarfile.TarInfo("longer" * 50 + "/d.png")
            info.size = 9
            archive.addfile(info, io.BytesIO(random.bytes(9)))
        for name, of in (
            ("folder", tarfile.DIRTYPE),
            ("link", tarfile.SYMTYPE),
            ("hard", tarfile.LNKTYPE),
            ("pipe", tarfile.FIFOTYPE),
            ("device", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = of, "a.png"
            archive.addfile(info)
        info = tarfile.TarInfo("last.png")
        info.size = 30
        archive.addfile(info, io.BytesIO(random.bytes(30)))
    return path


KINDS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_files_are_where_pythons_reader_finds_them(tmp_path, kind):
    path = written(tmp_path / "a.tar", kind)
    with tarfile.open(path) as archive:
        expected = [(one.name, one.offset_data, one.size) for one in archive if one.isreg()]
    found, fault = members(path, Watch())
    found = [one for one in found if not one.note]
    assert [(one.name, one.offset, one.size) for one in found] == expected and fault == ""
    assert len(found) == (5 if kind == tarfile.USTAR_FORMAT else 6)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_headers_never_give_what_python_would_not(tmp_path, kind):
    """Random bytes changed: members lie inside the file, and sound is only what Python reads alike."""
    whole = written(tmp_path / "a.tar", kind).read_bytes()
    random = np.random.default_rng(17)
    path, sound, damaged = tmp_path / "b.tar", 0, 0
    for _ in range(150):
        data = bytearray(whole)
        for place in random.integers(0, len(whole), random.integers(1, 4)):
            data[place] = random.integers(0, 256)
        if random.random() < 0.3:
            data = data[: random.integers(1, len(data))]
        path.write_bytes(data)
        try:
            found, fault = members(path, Watch())
        except NoShard:
            damaged += 1
            continue
        assert all(one.offset >= 0 and one.size >= 0 and one.offset + one.size <= len(data) for one in found)
        damaged += bool(fault)
        if not fault:
            sound += 1
            with tarfile.open(path) as archive:
                expected = [(one.name, one.offset_data, one.size) for one in archive if one.isreg()]
            assert [(one.name, one.offset, one.size) for one in found if not one.note] == expected
    assert sound > 10 and damaged > 20


def pax(records: bytes) -> bytes:
    return header(b"x", b"%011o\0" % len(records), b"x") + padded(records)


@pytest.mark.parametrize(
    "data, count, reason",
    [
        (header(size=base256(-512)) + END, 1, "damaged or cut off"),
        (header(size=base256(-(2**80))) + END, 1, "damaged or cut off"),
        (header(size=base256(2**80)) + END, 2, "cut off within the last of its 2"),
        (header(size=base256(2**62)) + END, 2, "cut off within the last"),
        (header(size=b"-0000000012\0") + END, 1, "damaged or cut off"),
        (header(size=b"twelve bytes") + END, 1, "damaged or cut off"),
        (header(size=b"99999999999\0") + END, 1, "damaged or cut off"),
        (header(b"././@LongLink", b"77777777777\0", b"L") + END, 1, "damaged or cut off"),
        (header(b"././@LongLink", base256(2**15), b"L") + END, 1, "damaged or cut off"),
        (header(b"././@LongLink", b"00000000005\0", b"L") + padded(b"x.png") + END, 1, "damaged or cut off"),
        (header(b"x", b"77777777777\0", b"x") + END, 1, "damaged or cut off"),
        (header(b"x", b"77777777777\0", b"g") + END, 1, "damaged or cut off"),
        (pax(b"nonsense") + header() + END, 1, "damaged or cut off"),
        (pax(b"0 a=b\n") + header() + END, 1, "damaged or cut off"),
        (pax(b"99999 path=b\n") + header() + END, 1, "damaged or cut off"),
        (pax(b"18446744073709551616999999999 a=b\n") + header() + END, 1, "damaged or cut off"),
        (pax(b"14 size=-5120\n") + header() + END, 1, "damaged or cut off"),
        (pax(b"12 size=1e9\n") + header() + END, 1, "damaged or cut off"),
        (pax(b"29 size=99999999999999999999\n") + header() + END, 2, "cut off within the last of its 2"),
        (header(kind=b"S")[:482] + b"\1" + bytes(29) + END, 1, "damaged or cut off"),
    ],
)
def test_every_kind_of_damage_names_the_shard_and_the_rest_is_used(tmp_path, data, count, reason):
    (tmp_path / "bad.tar").write_bytes(FIRST + data)
    (tmp_path / "good.tar").write_bytes(FIRST + END)
    found = search([tmp_path])
    assert [entry.name for entry in found.entries] == ["bad.tar!first.png", "good.tar!first.png"]
    assert [entry.read() for entry in found.entries] == [b"12345"] * 2
    ((place, told),) = found.skipped
    assert place == str(tmp_path / "bad.tar") and reason in told and f"{count} member" in told
    # Named by itself it is told in the same words.
    assert search([tmp_path / "bad.tar"]).skipped == found.skipped


def test_what_is_no_plain_file_is_not_read_but_counted(tmp_path):
    sparse = header(b"sparse.png", kind=b"S", magic=b"ustar  \0") + padded(b"12345")
    extended = bytearray(header(b"extended.png", kind=b"S", magic=b"ustar  \0"))
    extended[482] = 1
    extended[148:156] = b" " * 8
    extended[148:156] = b"%06o\0 " % sum(extended)
    map_ = bytes(504) + b"\1" + bytes(7) + bytes(504) + b"\0" + bytes(7)
    new_sparse = pax(b"22 GNU.sparse.major=1\n") + header(b"new.png") + padded(b"12345")
    link = header(b"link.png", b"00000000777\0", b"2")  # a link's size says nothing
    label = header(b"volume", b"00000000003\0", b"V") + padded(b"abc")
    comment = header(b"pax_global_header", b"%011o\0" % 13, b"g") + padded(b"13 comment=a\n")
    odd = header(b"odd.png", kind=b"Z") + padded(b"12345") + header(b"odd.txt", kind=b"Z") + padded(b"12345")
    hard, folder = header(b"hard.png", b"00000000777\0", b"1"), header(b"folder.png", kind=b"5")
    parts = sparse, bytes(extended), map_, padded(b"12345"), new_sparse, link, label, hard, folder, odd, FIRST, END
    data = comment + b"".join(parts)
    (tmp_path / "a.tar").write_bytes(data)
    found, fault = members(tmp_path / "a.tar", Watch())
    plain = [(one.name, data[one.offset :][: one.size]) for one in found if not one.note]
    assert plain == [("first.png", b"12345")] and fault == ""
    found = search([tmp_path])
    assert [entry.name for entry in found.entries] == ["a.tar!first.png"] and not found.skipped
    assert found.ignored == {
        "sparse files in shards": 3,
        "links in shards": 2,
        "files of an unknown kind in shards": 1,
        ".txt": 1,
    }


@pytest.mark.parametrize("data", [END, bytes(BLOCK), bytes(20 * BLOCK), header(b"pax", b"0" * 11 + b"\0", b"g") + END])
def test_a_shard_of_nothing_is_told(tmp_path, data):
    """As a download that was given its full size and never filled leaves it."""
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.tar").write_bytes(FIRST + END)
    found = search([tmp_path])
    assert len(found.entries) == 1
    assert [place for place, told in found.skipped if "nothing" in told] == [str(tmp_path / "a.tar")]


def test_names_and_sizes_in_pax_headers_and_names_that_are_no_utf8(tmp_path):
    data = pax(b"14 path=b.png\n" + b"9 size=3\n") + header(b"a.png") + padded(b"123") + header(b"\xff.png")
    (tmp_path / "a.tar").write_bytes(data + padded(b"12345") + END)
    found, fault = members(tmp_path / "a.tar", Watch())
    assert [(one.name, one.size) for one in found] == [("b.png", 3), ("\udcff.png", 5)] and fault == ""
    entries = search([tmp_path / "a.tar"]).entries
    assert entries[1].name.endswith("!\\udcff.png") and entries[1].name.isprintable()


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "an empty file"),
        (b"\x1f\x8b" + bytes(range(200)) * 9, "a file packed with gzip"),
        (b"PK\x03\x04" + b"x" * 600, "a file packed with zip"),
        (b"this is no tar" * 100, "another file"),
        (b"short", "another file"),
    ],
)
def test_what_is_no_shard(tmp_path, data, reason):
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.tar").write_bytes(FIRST + END)
    for found in (search([tmp_path]), search([tmp_path / "{a,b}.tar"])):
        assert len(found.entries) == 1 and len(found.skipped) == 1
        place, told = found.skipped[0]
        assert place == str(tmp_path / "a.tar") and reason in told


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_in_a_shards_place_is_not_waited_for(tmp_path):
    (tmp_path / "a.tar").write_bytes(FIRST + END)
    (entry,) = search([tmp_path]).entries
    os.mkfifo(tmp_path / "b.tar"), os.mkfifo(tmp_path / "c.png")
    assert search([tmp_path]).ignored == {"pipes and devices": 2}
    (tmp_path / "a.tar").unlink()
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(Exception, match="is a pipe"):
        entry.read()


def test_a_long_shard_can_be_left(tmp_path):
    (tmp_path / "a.tar").write_bytes(header(size=b"00000000000\0") * 5000 + END)
    asked = []
    with pytest.raises(Cancelled):
        members(tmp_path / "a.tar", Watch(lambda: asked.append(1) or len(asked) > 3))
    assert len(asked) == 4
