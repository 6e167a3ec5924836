"""The rasterised fonts: pinned versions, and archives that are read, refused or missing."""

import io
import json
import tarfile

import numpy as np
import pytest
from indomain_guidance.training.mini_world import render
from indomain_guidance.training.mini_world.recipe import glyphs


def test_the_recipe_fetches_the_versions_that_the_shipped_raster_was_made_of():
    with np.load(render.DATA / "glyphs.npz") as data:
        shipped = [f"@fontsource/{name}@{version}" for name, version in zip(data["names"], data["versions"])]
        assert set(data["licences"].tolist()) <= glyphs.ALLOWED_LICENCES.keys()
    assert [glyphs.package_of(family) for family in glyphs.FAMILIES] == shipped
    listed = (render.DATA / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert not [package for package in shipped if package.split("/")[1].replace("@", " ") not in listed]


@pytest.fixture(scope="module")
def font_bytes():
    """A font that is at hand everywhere: the one inside Pillow."""
    from PIL import ImageFont

    return ImageFont.load_default(20).font_bytes


def archive(path, licence, font, name="lato-latin-400-normal.woff"):
    with tarfile.open(path, "w:gz") as file:
        about = json.dumps({"license": licence}).encode()
        for member, content in (("package/package.json", about), (f"package/files/{name}", font)):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_digits_fill_their_cells_alike(font_bytes):
    for digit in range(10):
        mask = glyphs.rasterise_digit(font_bytes, digit)
        rows, columns = (np.flatnonzero(mask.max(axis)) for axis in (1, 0))
        extent = [int(np.ptp(side)) + 1 for side in (rows, columns)]
        assert mask.shape == (64, 64) and mask.max() == 255 and max(extent) in (59, 60)
        for side in (rows, columns):
            assert abs(int(side[0]) + int(side[-1]) - 63) <= 2  # centred


def test_building_writes_what_the_world_reads_and_refuses_other_licences(tmp_path, monkeypatch, font_bytes):
    licence = {"lato": "OFL-1.1", "roboto": "OFL-1.1"}
    fetch = lambda family, folder: archive(folder / f"{family}.tgz", licence[family], font_bytes)  # noqa: E731
    monkeypatch.setattr(glyphs, "fetch", fetch)
    said = []
    glyphs.build(tmp_path / "glyphs.npz", ["lato", "roboto"], said.append)
    with np.load(tmp_path / "glyphs.npz") as data:
        assert data["masks"].shape == (2, 10, 64, 64) and data["masks"].dtype == np.uint8
        assert data["names"].tolist() == ["lato", "roboto"] and data["versions"].tolist() == ["5.3.0", "5.3.0"]
        assert np.array_equal(data["masks"][0, 7], glyphs.rasterise_digit(font_bytes, 7))
    assert said == ["@fontsource/lato@5.3.0 (OFL-1.1)", "@fontsource/roboto@5.3.0 (OFL-1.1)"]

    before = (tmp_path / "glyphs.npz").read_bytes()
    licence["roboto"] = "proprietary"
    with pytest.raises(ValueError, match="roboto@5.3.0: expected a licence of OFL-1.1"):
        glyphs.build(tmp_path / "glyphs.npz", ["lato", "roboto"], said.append)
    assert (tmp_path / "glyphs.npz").read_bytes() == before


def test_a_package_without_the_font_and_a_machine_without_npm_are_told_so(tmp_path, monkeypatch, font_bytes):
    with pytest.raises(ValueError, match="latin-400-normal.woff in a.tgz"):
        glyphs.read_package(archive(tmp_path / "a.tgz", "OFL-1.1", font_bytes, "lato-latin-700-normal.woff"))
    monkeypatch.setattr(glyphs.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="install Node.js"):
        glyphs.fetch("lato", tmp_path)
