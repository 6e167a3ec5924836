"""From a published family's checkpoint to pictures with nothing but the command line, in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.files import read_domain_file
from indomain_guidance.training.command_line import main as command_line
from indomain_guidance.training.domain import trainee as parts
from indomain_guidance.training.mini_world.pictures import export_pictures
from PIL import Image

pytestmark = pytest.mark.slow


def indomain(*arguments: object) -> list[dict]:
    """The JSON objects that a command prints, after it succeeded."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command_line.main([*map(str, arguments), "--json"])
    assert status == 0, err.getvalue()
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("family, form", [("sd1", "constant"), ("sdxl", "cached")])
def test_train_inspect_sample_convert(family, form, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tiny_checkpoint(family).path
    export_pictures(Path("images"), count=6)
    settings = {
        "base": str(checkpoint),
        "data": ["images"],
        "name": "porcelain",
        "form": form,
        "resolution": 64,
        "steps": 2,
        "batch_size": 2,
        "sample_steps": 2,
        "sample_count": 1,
        "cache": "cache",
        "export_to": "models/domain_unets",
        "licence": "CC0-1.0",
        "device": "cpu",
    }
    Path("porcelain.json").write_text(json.dumps(settings), encoding="utf-8")
    *events, result = indomain("train", "--config", "porcelain.json", "--steps", 3)
    assert result["status"] == "finished" and result["step"] == 3
    assert [one["step"] for one in events if one["event"] == "step"] == [1, 2, 3]
    exported = tmp_path / "models" / "domain_unets" / "porcelain.safetensors"
    assert result["path"] == str(exported)
    (weights, metadata), (kept, noted) = map(read_domain_file, (exported, "runs/porcelain/porcelain.safetensors"))
    assert metadata == noted and all(torch.equal(weights[key], kept[key]) for key in weights | kept)

    (about,) = indomain("inspect", exported)
    assert (about["domain_name"], about["form"], about["steps"], about["licence"]) == ("porcelain", form, 3, "CC0-1.0")
    assert about["training"]["steps"] == 3 and about["training"]["base"] == checkpoint.name  # no folders in files

    drawn = indomain("sample", exported, "--base", checkpoint, "--steps", 2, "--count", 1, "-o", "out", "--height", 96)
    again = indomain("sample", "runs/porcelain", "--steps", 2, "--count", 1, "-o", "again", "--height", 96)
    with Image.open(drawn[0]["path"]) as one, Image.open(again[0]["path"]) as other:
        assert one.size == (64, 96) and one.tobytes() == other.tobytes()

    (converted,) = indomain("convert", exported, "wide.safetensors", "--file-dtype", "fp32")
    assert converted["file"]["numbers"].keys() == {"F32"} and converted["steps"] == 3
    assert read_domain_file("wide.safetensors")[1] == read_domain_file(exported)[1]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_another_prior_is_noted_and_another_family_refused(tiny_checkpoint, tmp_path, capsys):
    sd1, sdxl = tiny_checkpoint("sd1").path, tiny_checkpoint("sdxl").path
    free = tmp_path / "free.safetensors"
    assert command_line.main(["convert", str(sd1), str(free), "--form", "cached"]) == 0
    assert command_line.main(["sample", str(free), "--base", str(sdxl), "-o", str(tmp_path)]) == 1
    assert "sdxl" in capsys.readouterr().err
    assert command_line.main(["sample", str(free), "-o", str(tmp_path)]) == 2
    assert "--base" in capsys.readouterr().err
    assert command_line.main(["sample", "mini-handwriting", "--base", str(sd1), "-o", str(tmp_path)]) == 1
    assert "mini_world" in capsys.readouterr().err


def test_sizes_that_nobody_gives_are_the_priors_own(tiny_checkpoint, tmp_path, monkeypatch):
    """1024 px for SDXL: what constants are measured at, and pictures of a file that states no resolution."""
    sdxl, free, asked = tiny_checkpoint("sdxl").path, tmp_path / "free.safetensors", []

    def start_model(base, form, *, resolution, **more):
        asked.append(resolution)
        return parts.start_model(base, "cached")

    class Artist:
        def __init__(self, prior, weights, metadata, **_):
            self.prior, self.metadata = prior, metadata

        def draw(self, prompts, seeds, settings, *_):
            asked.append((settings.height, settings.width))
            return iter(())

    monkeypatch.setattr("indomain_guidance.training.command_line.convert.start_model", start_model)
    monkeypatch.setattr("indomain_guidance.training.command_line.sample.Artist", Artist)
    indomain("convert", sdxl, free, "--form", "constant")
    indomain("convert", sdxl, free, "--form", "constant", "--resolution", 512, "--overwrite")
    indomain("convert", "mini_world", tmp_path / "mini.safetensors", "--form", "constant")
    indomain("sample", free, "--base", sdxl)
    indomain("sample", free, "--base", sdxl, "--width", 512)
    indomain("sample", "mini-handwriting")
    assert asked == [1024, 512, 64, (1024, 1024), (512, 512), (64, 64)]
