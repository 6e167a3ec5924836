"""What a model file knows about itself."""

from __future__ import annotations

import json
import shutil

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
from indomain_guidance.training.command_line.inspect import inspect, inspect_text
from indomain_guidance.training.domain import trainee as parts
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.domain.finished import write_domain_model, write_low_rank
from indomain_guidance.training.engine.checkpoints import checkpoint_path, save_checkpoint
from indomain_guidance.training.mini_world.assets import domain_unets_dir, weights_dir
from indomain_guidance.training.prior.opening import open_mini_world

SHIPPED = domain_unets_dir() / "mini-handwriting.safetensors"


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
    path = write_domain_model(
        tmp_path / "file.safetensors",
        trainee.weights(),
        trainee.config,
        base,
        config=config(),
        steps=12,
        dataset_size=34,
        dataset_hash="abcd",
        ema=0.99,
        resolution=64,
        null_text_error={"block": 0.25},
    )
    weights, metadata = read_domain_file(path, latent_format="mini_world")
    assert all(torch.equal(weights[key], value.half()) for key, value in trainee.weights().items())
    about = inspect(path)
    assert about["kind"] == "domain model" and about["domain_name"] == "porcelain" and about["form"] == "cached"
    assert (about["steps"], about["ema"], about["resolution"], about["licence"]) == (12, 0.99, 64, "CC0-1.0")
    assert (about["dataset_size"], about["dataset_hash"]) == (34, "abcd") and about["null_text_error"] == {
        "block": 0.25
    }
    assert about["prior_hash"] == base.prior_hash and about["null_context"] == base.null_context.to_dict()
    assert about["architecture"] == metadata.config.to_dict() and about["prediction_type"] == "epsilon"
    count = sum(value.numel() for value in weights.values())
    assert about["file"]["parameters"] == about["parameters"]["unet"] == count
    assert about["file"]["numbers"] == {"F16": about["file"]["parameters"]}
    assert about["training"] == config().public_dict() and "secret" not in json.dumps(read_metadata(path))
    json.dumps(about)
    text = inspect_text(path)
    for fact in ("porcelain", "cached", "steps:             12", base.prior_hash, "CC0-1.0", "worst 0.250 in block"):
        assert fact in text
    assert max(map(len, text.splitlines())) < 2000


def test_inspects_the_shipped_files_and_checkpoints(tiny_checkpoint):
    shipped = inspect(domain_unets_dir() / "mini-handwriting.safetensors")
    assert (shipped["kind"], shipped["form"], shipped["trained"]) == ("domain model", "cached", True)
    prior = inspect(weights_dir() / "prior_unet.safetensors")
    assert prior["kind"] == "UNet" and prior["architecture"]["context_dim"] == 128
    for family, name in (("sd1", "Stable Diffusion 1.x"), ("sdxl", "Stable Diffusion XL")):
        made = tiny_checkpoint(family)
        about = inspect(made.path)
        assert (about["kind"], about["family"], about["form"]) == ("checkpoint", name, "full")
        assert set(about["parameters"]) == {"unet", "autoencoder", *made.text_encoders}
        assert about["parameters"]["unet"] == sum(p.numel() for p in made.unet.parameters())
        assert name in inspect_text(made.path)


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
    about = inspect(path)
    assert (about["kind"], about["step"], about["name"]) == ("training checkpoint", 7, "porcelain")
    assert about["file"]["parameters"] == 6 and about["training"]["learning_rate"] == 1e-5
    assert "step:              7" in inspect_text(path)
    adaptation = {name: value for name, value in state.items() if name not in ("dataset", "prior")}
    about = inspect(save_checkpoint(tmp_path / "step-000008.ckpt", adaptation))
    assert (about["kind"], about["dataset"], about["prior_hash"]) == ("training checkpoint", None, None)
    for read in (read_state_dict, read_generator):  # where a model is expected
        with pytest.raises(FileProblem, match="found the checkpoint of a run of this project; use the model that"):
            read(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileProblem, match="step-000007.ckpt"):
        inspect(path)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_lora_tells_its_layers(base, dora, tmp_path):
    layers = "*.attn1.to_q middle_block.0.in_layers.2"
    trainee = parts.start_model(base, "full", "low_rank", additions={"rank": 3, "layers": layers, "dora": dora})
    path = write_low_rank(tmp_path / "lora.safetensors", trainee, base, config=config(form="full", train="low_rank"))
    about = inspect(path)
    assert (about["kind"], about["layers"], about["ranks"], about["dora"]) == ("LoRA", 7, [3], dora)
    assert about["kinds"] == {"linear": 6, "convolution": 1} and about["text_layers"] is None
    assert about["prior_hash"] == base.prior_hash and about["training"]["train"] == "low_rank"
    text = inspect_text(path)
    for fact in ("linear 6, convolution 1", f"dora:              {'yes' if dora else 'no'}", base.prior_hash):
        assert fact in text
    foreign = {
        "lora_te_text_model_a.lora_down.weight": torch.ones(2, 8),
        "lora_unet_b.lora_down.weight": torch.ones(()),
    }
    about = inspect(write_safetensors(tmp_path / "foreign.safetensors", foreign))
    assert (about["layers"], about["text_layers"], about["ranks"], about["prior_hash"]) == (2, 1, [2], None)


def test_inspect_refuses_other_files(tmp_path):
    path = write_safetensors(tmp_path / "other.safetensors", {"text_model.embeddings.a": torch.zeros(1)})
    with pytest.raises(FileProblem, match="found a text encoder"):
        inspect(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FileProblem, match="truncated|damaged"):
        inspect(path)
    with pytest.raises(FileProblem, match="found nothing at this path"):
        inspect(tmp_path / "absent.safetensors")


def test_inspect_tells_what_the_file_says(run, tmp_path):
    status, out, _ = run("inspect", SHIPPED, "--json")
    about = json.loads(out)
    assert status == 0 and about["kind"] == "domain model" and about["form"] == "cached" and about["steps"] == 700
    assert about["file"]["parameters"] == sum(tensor.numel() for tensor in read_domain_file(SHIPPED)[0].values())
    status, out, _ = run("inspect", SHIPPED)
    assert status == 0 and "mini-handwriting" in out and "700" in out
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(SHIPPED.read_bytes()[:1000])
    status, out, err = run("inspect", broken)
    assert status == 1 and out == "" and "broken.safetensors" in err and "Traceback" not in err


def test_inspect_takes_every_name_that_sample_convert_and_resume_take(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = {"mini-handwriting": "domain model", "mini_world": "generator", str(SHIPPED): "domain model"}
    for name, kind in kinds.items():
        status, out, err = run("inspect", name, "--json")
        assert status == 0 and json.loads(out)["kind"] == kind, err
    folder = tmp_path / "run"
    folder.mkdir()
    TrainConfig(base="mini_world", name="mine").write_json(folder / "config.json")
    status, _, err = run("inspect", folder)
    assert status == 1 and "mine.safetensors: expected the run's finished model, found none; go on with" in err
    state = {
        "step": 3,
        "config": {"name": "mine"},
        "prior": "p",
        "dataset": {},
        "facts": {},
        "optimizer": {},
        "scaler": None,
        "weights": {"a": torch.ones(2)},
        "average": None,
    }
    save_checkpoint(checkpoint_path(folder, 3), state)
    status, out, _ = run("inspect", folder, "--json")
    assert status == 0 and (json.loads(out)["kind"], json.loads(out)["step"]) == ("training checkpoint", 3)
    shutil.copyfile(SHIPPED, folder / "mine.safetensors")
    status, out, _ = run("inspect", folder, "--json")
    assert status == 0 and json.loads(out)["file"]["path"] == str(folder / "mine.safetensors")
    for source in ("mini-handwriting", folder, f"'{folder}'", folder.as_uri()):
        target = tmp_path / "wide.safetensors"
        status, out, err = run("convert", source, target, "--file-dtype", "fp32", "--overwrite")
        assert status == 0 and read_domain_file(target)[1].steps == 700, err
    (tmp_path / "empty").mkdir()
    status, _, err = run("inspect", tmp_path / "empty")
    assert status == 1 and "expected a model's file or a run's folder, found no config.json in it" in err
    (tmp_path / "link.safetensors").symlink_to("gone")
    status, _, err = run("inspect", tmp_path / "link.safetensors")
    assert status == 1 and "found a link to gone, where no file is" in err
