"""Finished files, conversions, and what a file knows about itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.files import (
    FileProblem,
    read_domain_file,
    read_generator,
    read_metadata,
    read_state_dict,
    write_safetensors,
)
from indomain_guidance.training.domain import export
from indomain_guidance.training.domain import trainee as parts
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.checkpoints import save_checkpoint
from indomain_guidance.training.mini_world.assets import domain_unets_dir, weights_dir
from indomain_guidance.training.prior.opening import open_checkpoint, open_mini_world


@pytest.fixture(scope="module")
def base():
    return open_mini_world()


@pytest.fixture(scope="module")
def trainee(base):
    return parts.start_model(base, "cached")


def config(**changes):
    return TrainConfig(
        base="/secret/place/prior.safetensors",
        data=("/secret/pictures",),
        name="porcelain",
        resolution=64,
        licence="CC0-1.0",
        **changes,
    )


def test_a_domain_model_knows_everything_about_itself(base, trainee, tmp_path):
    path = export.write_domain_model(
        tmp_path / "file.safetensors",
        trainee.weights(),
        trainee.config,
        base,
        config=config(),
        steps=12,
        dataset_size=34,
        dataset_hash="abcd",
        ema=0.99,
        null_text_error={"block": 0.25},
    )
    weights, metadata = read_domain_file(path, latent_format="mini_world")
    assert all(torch.equal(weights[key], value.half()) for key, value in trainee.weights().items())
    about = export.inspect(path)
    assert about["kind"] == "domain model" and about["name"] == "porcelain" and about["form"] == "cached"
    assert (about["steps"], about["ema"], about["resolution"], about["licence"]) == (12, 0.99, 64, "CC0-1.0")
    assert about["dataset"] == {"images": 34, "sha256": "abcd"} and about["null_text_error"] == {"block": 0.25}
    assert about["prior_sha256"] == base.prior_hash and about["null_context"] == base.null_context.to_dict()
    assert about["architecture"] == metadata.config.to_dict() and about["prediction_type"] == "epsilon"
    count = sum(value.numel() for value in weights.values())
    assert about["file"]["parameters"] == about["parameters"]["unet"] == count
    assert about["file"]["numbers"] == {"F16": about["file"]["parameters"]}
    assert about["training"] == config().public_dict() and "secret" not in json.dumps(read_metadata(path))
    json.dumps(about)
    text = export.inspect_text(path)
    for fact in ("porcelain", "cached", "steps:             12", base.prior_hash, "CC0-1.0", "worst 0.250 in block"):
        assert fact in text
    assert max(map(len, text.splitlines())) < 2000


def test_a_file_takes_the_settings_of_any_folder(base, trainee, tmp_path):
    """The name of an image folder that is not UTF-8 would be found out only after the last step."""
    settings = config().with_changes(data=("/secret/caf\udce9", "/secret/\u78c1\u5668"))
    path = export.write_domain_model(
        tmp_path / "m.safetensors", trainee.weights(), trainee.config, base, config=settings
    )
    assert json.loads(read_metadata(path)["training"]) == settings.public_dict()
    low_rank = parts.start_model(base, "full", "low_rank", rank=1)
    path = export.write_low_rank(tmp_path / "l.safetensors", low_rank, base, config=settings)
    assert json.loads(read_metadata(path)["training"]) == settings.public_dict()


def test_fp16_that_overflows_is_refused(base, trainee, tmp_path):
    weights = trainee.weights()
    weights["out.2.bias"] = torch.full((4,), 1e6)
    for file_dtype, fits in (("fp16", False), ("bf16", True), ("fp32", True)):
        path = tmp_path / f"{file_dtype}.safetensors"
        if fits:
            export.write_domain_model(path, weights, trainee.config, base, file_dtype=file_dtype)
            continue
        with pytest.raises(FileProblem, match="up to 65504, the largest number of fp16, found 1000000 in out.2.bias"):
            export.write_domain_model(path, weights, trainee.config, base, file_dtype=file_dtype)
        assert not path.exists()
    weights["out.2.bias"] = torch.full((4,), torch.nan)
    with pytest.raises(FileProblem, match="expected finite weights"):
        export.write_domain_model(tmp_path / "nan.safetensors", weights, trainee.config, base)


@pytest.mark.parametrize("form", parts.FORMS)
def test_converts_a_checkpoint_to_every_form(form, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("sd1").path
    path = export.convert(source, tmp_path / "new.safetensors", form=form, resolution=64, name="fresh")
    weights, metadata = read_domain_file(path, latent_format="sd15")
    base = open_checkpoint(source)
    assert metadata.prior_hash == base.prior_hash and metadata.steps == 0 and metadata.domain_name == "fresh"
    assert metadata.null_text == form.replace("full", "none")
    assert bool(metadata.null_text_error) == (form == "constant")
    if form == "full":
        assert weights.keys() == base.unet.keys() and all(torch.equal(weights[key], base.unet[key]) for key in weights)
    else:
        again = export.convert(path, tmp_path / "wide.safetensors", file_dtype="fp32")
        wide, same = read_domain_file(again)
        assert {value.dtype for value in wide.values()} == {torch.float32}
        assert all(torch.equal(value, weights[key].float()) for key, value in wide.items())
        assert same == metadata
        with pytest.raises(FileProblem, match="expected a full checkpoint to make the form full from"):
            export.convert(path, tmp_path / "back.safetensors", form="full")


def test_converts_the_mini_world_and_never_onto_its_source(tmp_path):
    path = export.convert("mini_world", tmp_path / "mini.safetensors", form="cached", file_dtype="bf16")
    assert read_domain_file(path)[1].latent_format == "mini_world"
    with pytest.raises(FileProblem, match="expected another file to write"):
        export.convert(path, path)
    with pytest.raises(ValueError, match="Expected form to be one of"):
        export.convert(path, tmp_path / "x.safetensors", form="none")
    for resolution in (-64, 0, 8, 100):
        with pytest.raises(ValueError, match=f"multiple of 8 pixels from 64 on, found {resolution}"):
            export.convert("mini_world", tmp_path / "x.safetensors", form="constant", resolution=resolution)
    with pytest.raises(ValueError, match="number format to be one of"):
        export.convert(path, tmp_path / "x.safetensors", file_dtype="int8")
    with pytest.raises(FileProblem, match="expected a name that ends in .safetensors"):
        export.convert(path, tmp_path / "x.ckpt")


def test_inspects_the_shipped_files_and_checkpoints(tiny_checkpoint):
    shipped = export.inspect(domain_unets_dir() / "mini-handwriting.safetensors")
    assert (shipped["kind"], shipped["form"], shipped["trained"]) == ("domain model", "cached", True)
    prior = export.inspect(weights_dir() / "prior_unet.safetensors")
    assert prior["kind"] == "UNet" and prior["architecture"]["context_dim"] == 128
    for family, name in (("sd1", "Stable Diffusion 1.x"), ("sdxl", "Stable Diffusion XL")):
        made = tiny_checkpoint(family)
        about = export.inspect(made.path)
        assert (about["kind"], about["family"], about["form"]) == ("checkpoint", name, "full")
        assert set(about["parameters"]) == {"unet", "autoencoder", *made.text_encoders}
        assert about["parameters"]["unet"] == sum(p.numel() for p in made.unet.parameters())
        assert name in export.inspect_text(made.path)


def test_inspects_the_checkpoint_of_a_run(tmp_path):
    state = {
        "step": 7,
        "config": config().to_dict(),
        "dataset": {"hash": "ab", "images": 3},
        "prior": "cd",
        "facts": {"torch": "2.6"},
        "weights": {"a": torch.zeros(2, 3)},
        "average": None,
        "optimizer": {},
        "scaler": None,
    }
    path = save_checkpoint(tmp_path / "step-000007.ckpt", state)
    about = export.inspect(path)
    assert (about["kind"], about["step"], about["name"]) == ("training checkpoint", 7, "porcelain")
    assert about["file"]["parameters"] == 6 and about["training"]["learning_rate"] == 1e-5
    assert "step:              7" in export.inspect_text(path)
    for read in (read_state_dict, read_generator):  # where a model is expected
        with pytest.raises(FileProblem, match="found the checkpoint of a run of this project; use the model that"):
            read(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileProblem, match="step-000007.ckpt"):
        export.inspect(path)


GENERATORS = Path(__file__).resolve().parents[2] / "guidance" / "files" / "golden"


@pytest.mark.parametrize("name", ["stylegan2_ada", "stylegan3"])
def test_converts_and_inspects_generators(name, tmp_path):
    source = GENERATORS / f"{name}.pkl"
    path = export.convert(source, tmp_path / "cats.safetensors", name="cats")
    exact, read = read_generator(source).generator.state_dict(), read_generator(path)
    assert all(torch.equal(value, exact[key]) for key, value in read.generator.state_dict().items())
    before, after = export.inspect(source), export.inspect(path)
    assert (before["kind"], before["name"]) == ("generator", name)
    assert (after["kind"], after["name"]) == ("generator", "cats")
    for key in ("source", "architecture", "resolution"):
        assert before[key] == after[key]
    assert after["source"]["format"] == "NVIDIA pickle" and after["architecture"]["channels"] == [6, 6, 4]
    assert after["file"]["parameters"] == before["file"]["parameters"] == sum(value.numel() for value in exact.values())
    assert "half precision" in before["notes"][0] and "F32" in after["file"]["numbers"]
    assert "kind:              generator" in export.inspect_text(source) and "sha256" in export.inspect_text(path)
    half = export.convert(path, tmp_path / "half.safetensors", file_dtype="fp16")
    assert export.inspect(half)["file"]["numbers"] == {"F16": after["file"]["parameters"]}
    with pytest.raises(FileProblem, match="found a generator"):
        export.convert(source, tmp_path / "x.safetensors", form="cached")
    with pytest.raises(FileProblem, match="expected another file to write"):
        export.convert(path, path)


def test_inspect_refuses_other_files(tmp_path):
    path = write_safetensors(tmp_path / "other.safetensors", {"text_model.embeddings.a": torch.zeros(1)})
    with pytest.raises(FileProblem, match="found a text encoder"):
        export.inspect(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FileProblem, match="truncated|damaged"):
        export.inspect(path)
    with pytest.raises(FileProblem, match="found nothing at this path"):
        export.inspect(tmp_path / "absent.safetensors")
