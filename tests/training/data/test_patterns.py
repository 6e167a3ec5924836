"""Patterns of paths: as glob reads them, but lazily, bounded and stoppable; names as other systems write them."""

from __future__ import annotations

import os
import unicodedata
from glob import glob
from itertools import islice
from pathlib import Path

import pytest
from indomain_guidance.training.data import patterns as module
from indomain_guidance.training.data.patterns import expanded
from indomain_guidance.training.data.problems import Cancelled, DataProblem
from indomain_guidance.training.data.sources import search
from indomain_guidance.training.data.walking import Watch


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "a*",
        "*/*.png",
        "**/*.png",
        "**",
        "a/**/*.png",
        "?/[0-9].png",
        "*/../*.png",
        "b/2.*",
        "*.png",
        "**/c/*",
        ".*",
        "a/*/x.png",
    ],
)
def test_wildcards_are_read_as_by_glob(tmp_path, pattern):
    for name in ("1.png", "a/1.png", "a/c/x.png", "a/c/d/y.png", "b/2.png", ".hidden/3.png", ".dot.png", "b/.z.png"):
        touch(tmp_path / name)
    expected = {os.path.normpath(one) for one in glob(str(tmp_path / pattern), recursive=True)}
    assert {os.path.normpath(one) for one in expanded(str(tmp_path / pattern))} == expected and expected


@pytest.mark.parametrize(
    "pattern", ["x{0..9999999}.tar", "x{0..999999999999999999}.tar", "{0..999}{0..999}", "{1..9}" * 40, "{a,b}" * 2000]
)
def test_too_many_names_are_refused_before_any_is_made(tmp_path, pattern):
    with pytest.raises(DataProblem, match=r"expected a pattern of at most 100,000 names, found one of"):
        next(expanded(str(tmp_path / pattern)))


def test_names_are_made_one_by_one_and_can_be_left(tmp_path):
    made = expanded(str(tmp_path / "{0..99999}.tar"))
    assert [one.name for one in islice(made, 2)] == ["0.tar", "1.tar"]
    asked = []
    with pytest.raises(Cancelled):
        list(expanded(str(tmp_path / "{0..99999}.tar"), Watch(lambda: asked.append(1) or len(asked) > 2)))
    assert len(asked) == 3


def test_patterns_that_go_round_in_circles_end(tmp_path, monkeypatch):
    for number in range(20):
        touch(tmp_path / f"{number}" / "a.png")
    os.symlink(tmp_path, tmp_path / "3" / "back")
    for pattern in ("*/../" * 12 + "*/a.png", "*/back/" * 12 + "*/a.png", "**/" * 12 + "a.png"):
        watch = Watch()
        assert len(search([str(tmp_path / pattern)], watch).entries) == 20
        assert watch.looked < 20_000
    monkeypatch.setattr(module, "MOST_NAMES", 10)
    with pytest.raises(DataProblem, match="at most 10 names"):
        list(expanded(str(tmp_path / "*")))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "an empty path"),
        ("x" * 70_000, "at most 65,536 characters"),
        ("\0", "found nothing there"),
        ("~\0/x", "found nothing there"),
        ("~\ud800", "found nothing there"),
        ("a\ud800b/{1,2}*", "fits the pattern"),
        ("y" * 300, "found nothing there"),
        ("{0..99999999999999999999999}", "found nothing there"),
        ("C:\\Users\\me\\pictures", "as Windows writes it"),
    ],
)
def test_texts_that_are_no_paths_are_refused_in_a_sentence(tmp_path, monkeypatch, text, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataProblem, match=reason) as caught:
        search([text])
    assert len(str(caught.value)) <= 500 and str(caught.value).isprintable()


@pytest.mark.skipif(os.name == "nt", reason="backslashes are ordinary there")
def test_names_as_other_systems_write_them(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    touch(tmp_path / apart / "Café Kö" / "1.png")
    for name in (composed, f"{composed}\\Café Kö", f"{composed}/{unicodedata.normalize('NFD', 'Café Kö')}/1.png"):
        assert len(search([str(tmp_path / name)]).entries) == 1, name
    touch(tmp_path / "odd\\name" / "2.png")
    assert len(search([str(tmp_path / "odd\\name")]).entries) == 1
    for name in ("Odd\\name", "odd\\name ", "odd\\name."):
        with pytest.raises(DataProblem, match=r"found nothing there, but .*odd\\name; write it so"):
            search([str(tmp_path / name)])


def test_a_link_to_nothing_says_so(tmp_path):
    os.symlink(tmp_path / "drive", tmp_path / "pictures")
    with pytest.raises(DataProblem, match="a link to nothing; connect the drive"):
        search([str(tmp_path / "pictures")])
