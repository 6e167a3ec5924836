"""Folders as users have them, and tar shards as WebDataset writes them."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from indomain_guidance.training.data.images import decode
from indomain_guidance.training.data.problems import BadImage, DataProblem
from indomain_guidance.training.data.sources import find_images, image_entries, search
from PIL import Image


def picture(seed: int = 0, height: int = 6, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def content(seed: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, kind)
    return file.getvalue()


def put(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or content())
    return path


def shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def names(*data) -> list[str]:
    return [entry.name for entry in find_images([str(one) for one in data])]


def test_folders_are_searched_deeply_sorted_and_without_rubbish(tmp_path):
    for name in ("b.JPG", "a/2.png", "a/10.png", "a/c/x.webp", "z.tiff", "y.gif", "w.bmp", "v.jpeg", "u.tif"):
        put(tmp_path / name)
    for name in (".hidden.png", ".git/x.png", "__MACOSX/._b.JPG", "._b.JPG", "notes.txt", "photo.heic", "photo2.heic"):
        put(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    deep = ["a/10.png", "a/2.png", "a/c/x.webp"]
    assert names(tmp_path) == [*deep, "b.JPG", "u.tif", "v.jpeg", "w.bmp", "y.gif", "z.tiff"]
    assert search([tmp_path]).ignored == {".heic": 2, ".txt": 1}
    assert names(tmp_path / "b.JPG") == ["b.JPG"]


def test_runs_below_a_folder_are_left_out_and_counted(tmp_path):
    put(tmp_path / "1.png"), put(tmp_path / "runs/notes/2.png"), put(tmp_path / "plain/config.json", b"{}")
    put(tmp_path / "plain/3.png")
    of_the_run = ("config.json", "log.jsonl", "loss.png", "samples/step-000000.png", "samples/rows/a.png")
    for name in (*of_the_run, "images-1/4.png"):
        put(tmp_path / "runs/porcelain" / name)
    found = search([tmp_path])
    assert [entry.name for entry in found.entries] == ["1.png", "plain/3.png", "runs/notes/2.png"]
    assert found.ignored == {".json": 1, "folders of runs": 1}
    # Who names a place inside a run means it, as the node does with the images that it keeps there.
    assert names(tmp_path / "runs/porcelain/images-1") == ["4.png"]


def test_a_place_named_twice_counts_once(tmp_path):
    put(tmp_path / "a/1.png"), put(tmp_path / "2.png")
    assert names(tmp_path, tmp_path / "a", tmp_path / "2.png") == ["2.png", "a/1.png"]


def test_symbolic_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path / "set/1.png"), put(tmp_path / "elsewhere/deep/2.png")
    try:
        os.symlink(tmp_path / "set", tmp_path / "set" / "again", target_is_directory=True)
        os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "more", target_is_directory=True)
        os.symlink(tmp_path / "set", tmp_path / "elsewhere" / "deep" / "back", target_is_directory=True)
        os.symlink(tmp_path / "set" / "1.png", tmp_path / "set" / "same.png")
        os.symlink("itself.png", tmp_path / "set" / "itself.png")
        os.symlink(tmp_path / "gone.png", tmp_path / "set" / "broken.png")
    except OSError:
        pytest.skip("this system makes no symbolic links")
    assert names(tmp_path / "set") == ["1.png", "more/deep/2.png"]


def test_links_to_nothing_are_told(tmp_path):
    """Images of a drive that is not there, or that git-annex has not fetched."""
    put(tmp_path / "set/1.png")
    try:
        for name in ("2.png", "3.PNG", "more.tar", "notes.txt", "folder"):
            os.symlink(tmp_path / "drive" / name, tmp_path / "set" / name)
        os.symlink("4.png", tmp_path / "set" / "4.png")
    except OSError:
        pytest.skip("this system makes no symbolic links")
    found = search([tmp_path / "set"])
    assert [entry.name for entry in found.entries] == ["1.png"] and found.ignored == {".txt": 1}
    told = {Path(name).name: reason for name, reason in found.skipped}
    assert told.pop("4.png").startswith("cannot be read (")
    nothing = "is a link to nothing; connect the drive or fetch the file that it stands for"
    assert told == dict.fromkeys(["2.png", "3.PNG", "more.tar", "folder"], nothing)
    (tmp_path / "set" / "1.png").unlink()
    with pytest.raises(DataProblem, match=r"could not be read \(5\): .*2.png is a link to nothing"):
        find_images([tmp_path / "set"])


def test_folders_that_cannot_be_read_are_reported(tmp_path, monkeypatch):
    put(tmp_path / "1.png"), put(tmp_path / "closed/2.png")
    scandir = os.scandir

    def refusing(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    found = search([tmp_path])
    assert [entry.name for entry in found.entries] == ["1.png"]
    assert found.skipped == [(str(tmp_path / "closed"), "cannot be read (Permission denied); check its permissions")]


def test_shards(tmp_path):
    members = {
        "0001.jpg": content(1, "JPEG"),
        "0001.json": b"{}",
        "0001.txt": b"a caption",
        "0002.png": content(2),
        "0002.mask.png": content(3),
        "0002.jpg": content(4, "JPEG"),
        "sub/0001.webp": content(5, "WEBP"),
        "trip.day1.png": content(6),
        "trip.day2.png": content(7),
        "__MACOSX/0009.png": content(),
        ".hidden.png": content(),
        "empty.png": b"",
    }
    path = shard(tmp_path / "data" / "one.tar", members)
    put(tmp_path / "data" / "a.png")
    found = search([tmp_path / "data"])
    expected = ["0001.jpg", "0002.jpg", "sub/0001.webp", "trip.day1.png", "trip.day2.png", "empty.png"]
    assert [entry.name for entry in found.entries] == ["a.png", *(f"one.tar!{name}" for name in expected)]
    assert [entry.read() for entry in found.entries[1:]] == [members[name] for name in expected]
    assert found.ignored == {".json": 1, ".txt": 1, "of samples with another image": 2}
    assert names(path) == [f"{path}!{name}" for name in expected]


def test_members_of_odd_names_and_of_one_name(tmp_path):
    """Packed from beside the folder their names begin with ".."; a tar that was updated has a name twice."""
    members = {"../pics/1.png": content(1), "./2.png": content(2), "../.hidden/3.png": content(3)}
    path = shard(tmp_path / "one.tar", members)
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("./2.png")
        info.size = len(content(4))
        archive.addfile(info, io.BytesIO(content(4)))
    found = search([path])
    assert [entry.name for entry in found.entries] == [f"{path}!../pics/1.png", f"{path}!./2.png"]
    assert [entry.read() for entry in found.entries] == [content(1), content(4)]
    assert found.ignored == {"replaced by a later one of their name": 1}


def test_braces_and_patterns(tmp_path):
    for number in range(12):
        shard(tmp_path / f"shard-{number:04d}.tar", {f"{number}.png": content(number)})
    for one, of in (
        ("shard-{0008..0011}.tar", [8, 9, 10, 11]),
        ("shard-000{2,5}.tar", [2, 5]),
        ("shard-{0011..0009}.tar", [11, 10, 9]),
        ("shard-001*.tar", [10, 11]),
        ("shard-00{0..1}{1,0}.tar", [1, 0, 11, 10]),
    ):
        found = find_images([str(tmp_path / one)])
        assert [entry.name.rpartition("!")[2] for entry in found] == [f"{number}.png" for number in of], one
    put(tmp_path / "odd{0..3}.tar.d" / "x.png")
    assert len(find_images([str(tmp_path / "odd{0..3}.tar.d")])) == 1
    with pytest.raises(DataProblem, match=r"shard-0012\.tar: expected a folder"):
        find_images([str(tmp_path / "shard-{0011..0012}.tar")])
    with pytest.raises(DataProblem, match="fits the pattern"):
        find_images([str(tmp_path / "nothing-*.tar")])


def test_damaged_shards(tmp_path):
    members = {f"{number}.png": content(number) * 20 for number in range(6)}
    whole = shard(tmp_path / "whole.tar", members).read_bytes()
    (tmp_path / "whole.tar").unlink()
    third = whole.index(b"3.png")
    cut = put(tmp_path / "cut.tar", whole[: third + 700])  # in the middle of the fourth image
    entries = find_images([str(cut)])
    assert [entry.read() for entry in entries[:3]] == list(members.values())[:3]
    (told,) = search([cut]).skipped
    assert len(entries) == 3 and told[0] == str(cut) and "cut off within the last of its 4 members" in told[1]
    cut.write_bytes(whole[: third - 700])  # since it was looked for
    with pytest.raises(BadImage) as caught:
        entries[2].read()
    assert caught.value.kind == "corrupt"
    other = put(tmp_path / "other" / "no.tar", b"this is no tar" * 100)
    put(tmp_path / "other" / "1.png")
    assert [name for name, _ in search([tmp_path / "other"]).skipped] == [str(other)]
    with pytest.raises(DataProblem, match="no.tar is no uncompressed tar of images but another file"):
        find_images([str(other)])
    packed = shard(tmp_path / "packed.tar.gz", members, "w:gz")
    with pytest.raises(DataProblem, match="unpack it first"):
        find_images([str(packed)])
    packed.rename(tmp_path / "renamed.tar")
    with pytest.raises(DataProblem, match="renamed.tar is no uncompressed tar of images but a file packed with gzip"):
        find_images([str(tmp_path / "renamed.tar")])


def test_a_shard_that_lacks_members_is_never_taken_for_a_whole_one(tmp_path):
    members = {f"{number}.png": content(number) for number in range(6)}
    path = shard(tmp_path / "a.tar", members)
    whole = path.read_bytes()
    assert search([path]).skipped == []
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive]
        end = archive.offset
    third = headers[2]
    for data, count, reason in (
        (whole[: third + 7] + bytes([whole[third + 7] ^ 1]) + whole[third + 8 :], 2, "damaged or cut off after 2"),
        (whole[:third], 2, "ends after 2 members without an end mark"),
        (whole[: third + 300], 2, "damaged or cut off after 2"),
        (whole[: headers[3] - 100], 3, "cut off within the last of its 3"),
        (whole[:end], 6, "ends after 6 members without an end mark"),
        (whole + whole, 6, "goes on behind the end mark after 6 members"),
    ):
        put(path, data)
        found = search([path])
        assert len(found.entries) == count and [name for name, _ in found.skipped] == [str(path)]
        assert reason in found.skipped[0][1]
    # What is behind the last header of other kinds of tar is an end mark, too.
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(path, "w", format=kind) as archive:
            folder = tarfile.TarInfo("sub")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            info = tarfile.TarInfo(f"sub/{'long' * 22}.png" if kind == tarfile.USTAR_FORMAT else f"{'long' * 40}.png")
            info.size = 700
            archive.addfile(info, io.BytesIO(content(1) + bytes(700)))
        assert search([path]).skipped == [] and len(search([path]).entries) == 1


def test_nothing_found_says_what_was_there(tmp_path):
    put(tmp_path / "a.heic"), put(tmp_path / "b.heic"), put(tmp_path / "c.txt")
    with pytest.raises(DataProblem, match=r"expected images .*found none, only other files \(2 \.heic, 1 \.txt\)"):
        find_images([str(tmp_path)])
    put(tmp_path / "packed" / "shards.tar.gz")
    with pytest.raises(DataProblem, match=r"only other files \(1 \.gz\).* Unpack archives first\."):
        find_images([str(tmp_path / "packed")])
    with pytest.raises(DataProblem, match="found nothing there"):
        find_images([str(tmp_path / "missing")])
    with pytest.raises(DataProblem, match="a path as Windows writes it" if os.name == "posix" else "nothing there"):
        find_images(["//server-of-no-such-name/pictures"])
    with pytest.raises(DataProblem, match="found the address of a server; download what lies there first"):
        find_images(["https://example.org/pictures"])
    with pytest.raises(DataProblem, match="data: expected images"):
        find_images([])
    with pytest.raises(DataProblem, match="found an empty path"):
        find_images([""])
    with pytest.raises(DataProblem, match="~nobody-of-that-name/x: expected .* found nothing there"):
        find_images(["~nobody-of-that-name/x"])


def test_the_home_folder_is_found_and_a_folder_named_after_it_too(tmp_path, monkeypatch):
    put(tmp_path / "pictures" / "a.png"), put(tmp_path / "~here" / "b.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert names("~/pictures") == ["a.png"] and names("~here") == ["b.png"]


def test_entries_of_vanished_files(tmp_path):
    path = put(tmp_path / "a.png")
    (entry,) = find_images([str(tmp_path)])
    assert entry.size == len(content()) and entry.stamp() is not None
    path.unlink()
    assert entry.stamp() is None
    with pytest.raises(BadImage) as caught:
        entry.read()
    assert caught.value.kind == "unreadable"


def test_images_in_memory_are_shared_and_read_as_files():
    values = np.asarray(picture(3))
    batch = torch.tensor(values).float().div(255).expand(2, -1, -1, -1)
    entries = image_entries([batch, batch[0]])
    assert len(entries) == 3 and entries[0].pixels.data_ptr() == batch.data_ptr()
    assert len({entry.name for entry in entries}) == 3
    for entry in entries:
        assert np.array_equal(np.asarray(decode(entry.read())), values)
    clear = torch.zeros(1, 2, 2, 4)
    clear[0, 0, 0, 3] = 1.0
    pixels = np.asarray(decode(image_entries(clear)[0].read()))
    assert pixels[0, 0].max() == 0 and pixels[1, 1].min() == 255
    with pytest.raises(BadImage, match="NaN"):
        image_entries(torch.full((1, 2, 2, 3), float("nan")))[0].read()
    for bad in (torch.zeros(2, 3, 8, 8), torch.zeros(5), torch.zeros(1, 0, 4, 3)):
        with pytest.raises(DataProblem, match="found a tensor of shape"):
            image_entries(bad)
    with pytest.raises(DataProblem, match="found an empty batch"):
        image_entries(torch.zeros(0, 4, 4, 3))
