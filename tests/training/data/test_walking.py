"""Walks through folders: where they may go, that they end, and that they can be ended."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from indomain_guidance.training.data.problems import Cancelled, DataProblem
from indomain_guidance.training.data.sources import fingerprint, search
from indomain_guidance.training.data.walking import Watch, walk


def touch(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_links_out_of_the_allowed_folders_are_left_out_and_counted(tmp_path):
    touch(tmp_path / "in/1.png"), touch(tmp_path / "in/deep/2.png"), touch(tmp_path / "out/3.png")
    touch(tmp_path / "inside out/4.png"), touch(tmp_path / "allowed/5.png")
    os.symlink(tmp_path / "out", tmp_path / "in" / "folder")
    os.symlink(tmp_path / "out" / "3.png", tmp_path / "in" / "file.png")
    os.symlink(tmp_path / "out" / "nothing.png", tmp_path / "in" / "nothing.png")
    os.symlink(tmp_path / "in" / "1.png", tmp_path / "in" / "same.png")
    os.symlink(tmp_path / "allowed", tmp_path / "in" / "allowed")
    os.symlink("/", tmp_path / "in" / "root")
    bounds = Watch(within=[tmp_path / "in", tmp_path / "allowed"])
    found = search([tmp_path / "in"], bounds)
    assert [entry.name for entry in found.entries] == ["1.png", "allowed/5.png", "deep/2.png"]
    assert found.ignored == {"links that leave the allowed folders": 4} and not found.skipped
    # What a pattern says leads no further, and tells nothing of what lies there.
    refused = set()
    for place in ("out", "out/nowhere", "in/../out/3.png", "inside out", "in/folder", "in/file.png"):
        with pytest.raises(DataProblem) as caught:
            search([str(tmp_path / place)], bounds)
        refused.add(str(caught.value).replace(str(tmp_path / place), "PLACE"))
    assert len(refused) == 1 and "found one outside" in refused.pop()
    touch(tmp_path / "out" / "more" / "7.png")
    told = set()
    for place in ("in/Folder/more", "in/Folder/MORE", "in/Folder\\more", "in/x\\..\\folder\\more", "in/nowhere"):
        with pytest.raises(DataProblem) as caught:
            search([str(tmp_path / place)], bounds)
        told.add(str(caught.value).replace(str(tmp_path / place), "PLACE"))
    assert len(told) == 1 and "found nothing there; check" in told.pop()
    for pattern in ("out/*.png", "out/*.gif", "in/../out/*", "in/folder/*", "o*t/3.png", "o*t/4.png", "in/../**/3.png"):
        with pytest.raises(DataProblem) as caught:
            search([str(tmp_path / pattern)], bounds)
        told.add(str(caught.value).replace(str(tmp_path / pattern), "PATTERN"))
    assert len(told) == 1


def test_the_systems_own_folders_are_not_walked(tmp_path):
    if not os.path.isdir("/proc/self"):
        pytest.skip("this system has no /proc")
    os.symlink("/proc/self", tmp_path / "self")
    os.symlink("/dev", tmp_path / "dev")
    touch(tmp_path / "1.png")
    watch = Watch()
    assert search([tmp_path], watch).ignored == {"folders of the system": 2} and watch.looked < 10
    assert search(["/proc/self"]).ignored == {"folders of the system": 1}


def test_a_walk_can_be_stopped_and_has_an_end(tmp_path):
    for number in range(300):
        touch(tmp_path / f"{number // 100}" / f"{number}.png")
    asked = []
    with pytest.raises(Cancelled):
        search([tmp_path], Watch(lambda: asked.append(1) or len(asked) > 2))
    assert len(asked) == 3
    with pytest.raises(Cancelled):
        fingerprint([tmp_path], Watch(lambda: True))
    with pytest.raises(DataProblem, match="at most 200 files and folders to look at"):
        search([tmp_path], Watch(most=200))


def test_a_walk_goes_in_the_order_of_names(tmp_path):
    names = ["a/1", "a/b/2", "a/b.3", "c"]
    for name in names:
        touch(tmp_path / name)
    steps = ["/".join(step.parts) for step in walk(tmp_path, Watch())]
    assert sorted(steps) == sorted(names) and steps[0] == "c"


def test_the_fingerprint_changes_with_every_change(tmp_path):
    one, other = touch(tmp_path / "set/1.png", b"one"), touch(tmp_path / "set/deep/2.png", b"two")
    data = [tmp_path / "set"]
    seen = {fingerprint(data)}
    assert seen == {fingerprint(data)} and len(fingerprint(data)) == 64

    def new() -> bool:
        before = len(seen)
        seen.add(fingerprint(data))
        return len(seen) == before + 1

    touch(tmp_path / "set/3.png")
    assert new()
    other.rename(tmp_path / "set/deep/4.png")
    assert new()
    # Another file of equal size and time in the old one's place.
    status = one.stat()
    touch(tmp_path / "new", b"eno")
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(tmp_path / "new", one)
    assert one.stat().st_mtime_ns == status.st_mtime_ns and new()
    shutil.rmtree(tmp_path / "set/deep")
    assert new()
    # What search does not see does not count.
    touch(tmp_path / "set/.hidden/5.png"), touch(tmp_path / "elsewhere/6.png")
    assert not new()
    assert fingerprint([str(tmp_path / "set/*.png")]) != fingerprint([str(tmp_path / "set/1.png")])


def test_names_of_several_lines_are_told_in_one(tmp_path):
    touch(tmp_path / "a\n\x1b[31mb.png"), touch(tmp_path / "c\nd.tar", b"no tar")
    found = search([tmp_path])
    assert [entry.name for entry in found.entries] == ["a\\n\\x1b[31mb.png"] and found.entries[0].read() == b"x"
    assert [name for name, _ in found.skipped] == [f"{tmp_path}/c\\nd.tar"]


def test_names_that_windows_and_macs_write_are_pictures_too(tmp_path):
    """Capital letters, spaces and dots at the end, names that are no UTF-8, and the rarer endings of JPEG and AVIF."""
    names = ["A.PNG", "a.png", "b.png ", "c.jpg.", "d.jpe", "e.JFIF", "f.avif", os.fsdecode(b"\xff.png"), "e\u0301.png"]
    for name in names:
        touch(tmp_path / name)
    found = search([tmp_path])
    assert len(found.entries) == len(names) and not found.ignored and not found.skipped
    assert all(entry.name.isprintable() and entry.read() == b"x" for entry in found.entries)
    assert len(fingerprint([tmp_path])) == 64
