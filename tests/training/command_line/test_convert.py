"""Domain files from checkpoints and from each other, generator files from pickles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, read_domain_file, read_generator
from indomain_guidance.training.command_line.convert import convert
from indomain_guidance.training.command_line.inspect import inspect, inspect_text
from indomain_guidance.training.domain import trainee as parts
from indomain_guidance.training.mini_world.assets import domain_unets_dir
from indomain_guidance.training.prior.opening import open_checkpoint

SHIPPED = domain_unets_dir() / "mini-handwriting.safetensors"


GENERATORS = Path(__file__).resolve().parents[2] / "guidance" / "files" / "golden"


@pytest.mark.slow
@pytest.mark.parametrize("form", parts.FORMS)
def test_converts_a_checkpoint_to_every_form(form, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("sd1").path
    path = convert(source, tmp_path / "new.safetensors", form=form, resolution=64, name="fresh")
    weights, metadata = read_domain_file(path, latent_format="sd15")
    base = open_checkpoint(source)
    assert metadata.prior_hash == base.prior_hash and metadata.steps == 0 and metadata.domain_name == "fresh"
    assert metadata.null_text == form.replace("full", "none")
    assert bool(metadata.null_text_error) == (form == "constant")
    if form == "full":
        assert weights.keys() == base.unet.keys() and all(torch.equal(weights[key], base.unet[key]) for key in weights)
    else:
        again = convert(path, tmp_path / "wide.safetensors", file_dtype="fp32")
        wide, same = read_domain_file(again)
        assert {value.dtype for value in wide.values()} == {torch.float32}
        assert all(torch.equal(value, weights[key].float()) for key, value in wide.items())
        assert same == metadata
        with pytest.raises(FileProblem, match="expected a full checkpoint to make the form full from"):
            convert(path, tmp_path / "back.safetensors", form="full")


def test_converts_the_mini_world_and_never_onto_its_source(tmp_path):
    path = convert("mini_world", tmp_path / "mini.safetensors", form="cached", file_dtype="bf16")
    assert read_domain_file(path)[1].latent_format == "mini_world"
    with pytest.raises(FileProblem, match="expected another file to write"):
        convert(path, path)
    with pytest.raises(ValueError, match="Expected form to be one of"):
        convert("mini_world", tmp_path / "x.safetensors", form="none")
    for resolution in (-64, 0, 8, 100):
        with pytest.raises(ValueError, match=f"resolution: expected a .*, found {resolution}"):
            convert("mini_world", tmp_path / "x.safetensors", form="constant", resolution=resolution)
    with pytest.raises(ValueError, match="number format to be one of"):
        convert(path, tmp_path / "x.safetensors", file_dtype="int8")
    with pytest.raises(FileProblem, match="expected a name that ends in .safetensors"):
        convert(path, tmp_path / "x.ckpt")


@pytest.mark.parametrize("name", ["stylegan2_ada", "stylegan3"])
def test_converts_and_inspects_generators(name, tmp_path):
    source = GENERATORS / f"{name}.pkl"
    path = convert(source, tmp_path / "cats.safetensors", name="cats")
    exact, read = read_generator(source).generator.state_dict(), read_generator(path)
    assert all(torch.equal(value, exact[key]) for key, value in read.generator.state_dict().items())
    before, after = inspect(source), inspect(path)
    assert (before["kind"], before["name"]) == ("generator", name)
    assert (after["kind"], after["name"]) == ("generator", "cats")
    for key in ("source_format", "source_sha256", "architecture", "resolution"):
        assert before[key] == after[key]
    assert after["source_format"] == "NVIDIA pickle" and after["architecture"]["channels"] == [6, 6, 4]
    assert after["file"]["parameters"] == before["file"]["parameters"] == sum(value.numel() for value in exact.values())
    assert "half precision" in before["notes"][0] and "F32" in after["file"]["numbers"]
    assert "kind:              generator" in inspect_text(source) and "sha256" in inspect_text(path)
    half = convert(path, tmp_path / "half.safetensors", file_dtype="fp16")
    assert inspect(half)["file"]["numbers"] == {"F16": after["file"]["parameters"]}
    with pytest.raises(FileProblem, match="found a generator"):
        convert(source, tmp_path / "x.safetensors", form="cached")
    with pytest.raises(FileProblem, match="expected another file to write"):
        convert(path, path)


def test_convert_changes_numbers_and_never_overwrites_unasked(run, tmp_path):
    target = tmp_path / "wide.safetensors"
    status, out, err = run("convert", SHIPPED, target, "--file-dtype", "fp32")
    assert status == 0 and out.strip() == str(target), err
    wide, narrow = read_domain_file(target)[0], read_domain_file(SHIPPED)[0]
    assert all(wide[key].dtype is torch.float32 and torch.equal(wide[key], narrow[key].float()) for key in narrow)
    before = target.read_bytes()
    status, _, err = run("convert", SHIPPED, target)
    assert status == 1 and "--overwrite" in err and target.read_bytes() == before
    status, out, _ = run("convert", "mini_world", target, "--form", "cached", "--overwrite", "--json")
    about = json.loads(out)
    assert status == 0 and about["form"] == "cached" and about["trained"] is False
    status, _, err = run("convert", SHIPPED, target, "--form", "constant", "--overwrite")
    assert status == 1 and "constant" in err
