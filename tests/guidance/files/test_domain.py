"""Domain model files: what is written comes back, and what does not fit is refused in one sentence."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.files import (
    DomainMetadata,
    FileProblem,
    model_file,
    prior_content_hash,
    read_domain_file,
    read_metadata,
    safetensors_file,
    write_domain_file,
    write_safetensors,
)
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.guidance.null_text import NullContext, build_cached, build_constant
from indomain_guidance.guidance.probes import Probes

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    transformer_depth=(1, 1),
    transformer_depth_middle=1,
    transformer_depth_output=(1, 1, 1, 1),
    context_dim=768,
    num_heads=8,
)
CONTEXT = NullContext(torch.ones(1, 3, 768), {"layer": "-1"})


@pytest.fixture
def prior(randomise):
    return randomise(UNet(SMALL)).state_dict()


def described(config, **changes):
    values = dict(
        latent_format="mini_world",
        prediction_type="v_prediction",
        zero_snr=True,
        null_text_error={"a.b": 0.125},
        null_context=CONTEXT.to_dict(),
        prior_hash="ab" * 32,
        domain_name="porcelain",
        dataset_size=8000,
        dataset_hash="cd" * 32,
        steps=5000,
        ema=0.999,
        resolution=64,
        licence="Apache-2.0",
        extra={"note": "x"},
    )
    return DomainMetadata(config, **values | changes)


def forms(prior):
    probes = Probes(torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]))
    constant, constant_config, _ = build_constant(prior, SMALL, CONTEXT, probes)
    return {
        "none": (dict(prior), SMALL),
        "cached": build_cached(prior, SMALL, CONTEXT),
        "constant": (constant, constant_config),
    }


@pytest.mark.parametrize("form", ["none", "cached", "constant"])
def test_round_trip(form, prior, tmp_path):
    state_dict, config = forms(prior)[form]
    metadata = described(config)
    path = write_domain_file(tmp_path / "a.safetensors", state_dict, metadata)
    read, found = read_domain_file(path, latent_format="mini_world")
    assert found == metadata and found.null_text == form
    assert read.keys() == state_dict.keys() and all(torch.equal(read[key], state_dict[key]) for key in read)
    strings = read_metadata(path)
    assert strings["format"] == "indomain_guidance.domain_unet" and strings["version"] == "1"
    assert json.loads(strings["config"])["null_text"] == form
    assert strings["modelspec.title"] == "porcelain" and strings["modelspec.license"] == "Apache-2.0"
    assert strings["modelspec.prediction_type"] == "v" and strings["modelspec.resolution"] == "64x64"


def test_unset_fields_stay_unset(prior, tmp_path):
    metadata = DomainMetadata(SMALL)
    path = write_domain_file(tmp_path / "a.safetensors", prior, metadata)
    assert read_domain_file(path)[1] == metadata
    assert not {"ema", "dataset_size", "prior_hash"} & read_metadata(path).keys()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_full_unets_without_metadata(prefix, suffix, prior, tmp_path):
    tensors = {f"{prefix}{key}": tensor for key, tensor in prior.items()}
    tensors["first_stage_model.encoder.conv_in.weight"] = torch.full((1,), float("nan"))  # not the UNet's business
    tensors |= {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    path = tmp_path / f"tuned{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        write_safetensors(path, tensors)
    read, found = read_domain_file(path)
    assert found == DomainMetadata(SMALL, prediction_type="v_prediction", zero_snr=True, domain_name="tuned")
    assert read.keys() == prior.keys() and all(torch.equal(read[key], prior[key]) for key in read)


@pytest.mark.parametrize(
    "config, latent_format",
    [
        (dict(context_dim=768, num_heads=8), "sd15"),
        (dict(context_dim=1024, num_head_channels=64, num_heads=-1, use_linear_in_transformer=True), "sd15"),
        (dict(context_dim=2048, num_head_channels=64, num_heads=-1, use_linear_in_transformer=True), "sdxl"),
    ],
)
def test_published_families_name_their_latent_space(config, latent_format, tmp_path):
    config = replace(
        SMALL,
        model_channels=320,
        channel_mult=(1,),
        num_res_blocks=(1,),
        transformer_depth=(1,),
        transformer_depth_output=(1, 1),
        transformer_depth_middle=-1,
        **config,
    )
    path = write_safetensors(tmp_path / "a.safetensors", UNet(config).half().state_dict())
    _, found = read_domain_file(path, latent_format=latent_format)
    assert (found.config, found.latent_format, found.prediction_type) == (config, latent_format, None)
    other = {"sd15": "sdxl", "sdxl": "sd15"}[latent_format]
    with pytest.raises(FileProblem, match=f"for the latent space '{other}', found one for '{latent_format}'"):
        read_domain_file(path, latent_format=other)


def test_refusals_when_reading(prior, tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = described(SMALL).to_strings()
    broken = {**prior, "out.2.bias": torch.tensor([0.0, float("nan"), 0.0, 0.0])}
    cached, cached_config = forms(prior)["cached"]

    def hostile(**changes):
        return json.dumps(SMALL.to_dict() | changes)

    cases = [
        (prior, {**metadata, "version": "2"}, "expected version 1 .* found '2'; update"),
        (prior, {**metadata, "config": "{"}, "the metadata field config cannot be read"),
        (prior, {**metadata, "config": "[]"}, "the metadata field config cannot be read"),
        (prior, {**metadata, "config": '{"model_channels": 32}'}, "the metadata field config cannot be read"),
        (prior, {key: text for key, text in metadata.items() if key != "config"}, "field config, found none"),
        (prior, {**metadata, "steps": "many"}, "the metadata field steps cannot be read"),
        (prior, {**metadata, "zero_snr": "perhaps"}, "the metadata field zero_snr cannot be read"),
        (prior, {**metadata, "null_text_error": '{"a": null}'}, "the metadata field null_text_error cannot be read"),
        (prior, {**metadata, "null_text_error": '{"a": NaN}'}, "null_text_error cannot be read .NaN"),
        (
            prior,
            {**metadata, "null_text_error": '{"a": 1e999}'},
            "null_text_error cannot be read .a number that no float",
        ),
        (prior, {**metadata, "null_text_error": '{"a": [1]}'}, "null_text_error cannot be read"),
        (prior, {**metadata, "null_text_error": '["a"]'}, "null_text_error cannot be read"),
        (prior, {**metadata, "null_context": '[["a", 1]]'}, "null_context cannot be read .expected texts"),
        (prior, {**metadata, "null_context": '{"a": {"b": 1}}'}, "null_context cannot be read"),
        (prior, {**metadata, "config": "[" * 100_000}, "config cannot be read .*more than 64 lists"),
        (prior, {**metadata, "config": hostile(model_channels=10**309)}, "config cannot be read .*310 digits"),
        (prior, {**metadata, "config": '{"model_channels": 1, "model_channels": 2}'}, "config cannot be read .*twice"),
        (prior, {**metadata, "steps": "9" * 310}, "steps cannot be read .*310 digits"),
        (prior, {**metadata, "steps": "-1"}, "steps cannot be read .*whole number"),
        (prior, {**metadata, "steps": "1.5"}, "steps cannot be read .*whole number"),
        (prior, {**metadata, "dataset_size": "true"}, "dataset_size cannot be read .*whole number"),
        (prior, {**metadata, "ema": "1e999"}, "ema cannot be read"),
        (prior, {**metadata, "ema": "2"}, "ema cannot be read .*from 0 to 1"),
        (prior, {**metadata, "resolution": "0"}, "resolution cannot be read .*from 1 to 65536"),
        (prior, {**metadata, "resolution": "1000000000000"}, "resolution cannot be read .*from 1 to 65536"),
        (prior, {**metadata, "prediction_type": "flow"}, "expected a prediction type out of"),
        (prior, described(cached_config).to_strings(), "says text-free form 'cached', its weights are of form 'none'"),
        (
            cached,
            described(replace(cached_config, null_tokens=5)).to_strings(),
            r"null_k of the shape \[5, 32\], found \[3, 32\]",
        ),
        (prior, {**metadata, "config": hostile(model_channels=33)}, "cannot be built"),
        (prior, {**metadata, "config": hostile(model_channels=0)}, "model_channels must be a whole number from 1"),
        (prior, {**metadata, "config": hostile(transformer_depth_middle=10**12)}, "cannot be built"),
        (
            prior,
            {
                **metadata,
                "config": hostile(
                    channel_mult=[1] * 9999,
                    num_res_blocks=[0] * 9999,
                    transformer_depth=[],
                    transformer_depth_output=[0] * 9999,
                ),
            },
            "cannot be built .it has 10000 blocks, in a file of ",
        ),
        ({**prior, "scaled_fp8": torch.zeros(2)}, {}, "UNet alone, scaled fp8; use the same model in fp16"),
        ({"synthesis.b4.const": torch.zeros(2, 4, 4)}, {}, "found a StyleGAN2 generator; load it with Load Generator"),
        ({"a": torch.zeros(1)}, {"format": "indomain_guidance.generator"}, "found a StyleGAN2 generator; load it with"),
        (prior, {**metadata, "config": hostile(channel_mult=[1, 10**6])}, "expected .* of the shape"),
        (prior, {**metadata, "config": hostile(num_heads="8")}, "config cannot be read"),
        (prior, {**metadata, "config": hostile(channel_mult=7)}, "config cannot be read"),
        ({**prior, "input_blocks.0.0.weight": torch.zeros(())}, {}, "cannot be read from its weights"),
        (broken, metadata, "expected finite weights.* in 1 of the 4 numbers of out.2.bias"),
        (
            {k: v for k, v in prior.items() if k != "out.2.bias"},
            metadata,
            "found missing out.2.bias; the file is damaged",
        ),
        ({"double_blocks.0.x": torch.zeros(1)}, {}, "found a Flux model"),
        (UNet(replace(SMALL, context_dim=96)).state_dict(), {}, "of no published family"),
    ]
    for state_dict, strings, message in cases:
        write_safetensors(path, state_dict, strings)
        with pytest.raises(FileProblem, match=message) as caught:
            read_domain_file(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    write_safetensors(path, prior, metadata)
    with pytest.raises(FileProblem, match="for the latent space 'sdxl', found one for 'mini_world'"):
        read_domain_file(path, latent_format="sdxl")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileProblem, match="truncated"):
        read_domain_file(path)
    with pytest.raises(FileProblem, match="found nothing at this path"):
        read_domain_file(tmp_path / "absent.safetensors")


def test_what_does_not_fit_is_refused_before_its_tensors_are_made(prior, tmp_path, monkeypatch):
    """Tensors without numbers cost the file nothing, and memory a kilobyte each; so do blocks of a configuration."""
    path, metadata = tmp_path / "a.safetensors", described(SMALL).to_strings()
    many = {f"input_blocks.{number}.x": torch.empty(0) for number in range(1500)}
    deep = json.dumps(SMALL.to_dict() | {"transformer_depth_middle": 1400})
    for change, message in (
        ({}, "found unexpected input_blocks.0.x, .* and 1497 more"),
        ({"config": deep}, "it has 1410 blocks, in a file of 1"),
    ):
        write_safetensors(path, {**prior, **many}, {**metadata, **change})
        with monkeypatch.context() as patched:
            patched.setattr(model_file, "read_safetensors", None)  # not to be reached
            with pytest.raises(FileProblem, match=message):
                read_domain_file(path)
    monkeypatch.setattr(safetensors_file, "MOST_TENSORS", 1000)
    with pytest.raises(FileProblem, match="at most 1000 tensors, found 1786"):
        read_domain_file(path)


def test_refusals_when_writing(prior, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileProblem, match="expected finite weights"):
        write_domain_file(path, {**prior, "out.2.bias": torch.full((4,), float("inf"))}, described(SMALL))
    with pytest.raises(FileProblem, match="missing"):
        write_domain_file(path, prior, described(replace(SMALL, null_text="cached")))
    with pytest.raises(FileProblem, match="ends in .safetensors"):
        write_domain_file(tmp_path / "a.ckpt", prior, described(SMALL))
    with pytest.raises(ValueError, match="'prior_hash' is a field of the format"):
        write_domain_file(path, prior, described(SMALL, extra={"prior_hash": "x"}))
    with pytest.raises(ValueError, match="prediction type"):
        described(SMALL, prediction_type="flow")
    assert not path.exists()


def test_prior_content_hash(prior):
    """Over sorted key, shape and fp16 bytes, computed here with numpy."""
    oracle = hashlib.sha256()
    for key in sorted(prior):
        values = prior[key].numpy().astype("<f2")
        oracle.update(f"{key}\n{','.join(map(str, values.shape))}\n".encode() + values.tobytes())
    expected = oracle.hexdigest()
    assert prior_content_hash(prior) == expected
    checkpoint = {f"model.diffusion_model.{key}": tensor.half() for key, tensor in reversed(prior.items())}
    assert prior_content_hash({**checkpoint, "first_stage_model.x": torch.zeros(1)}) == expected
    changed = {**prior, "out.2.bias": prior["out.2.bias"] + 0.01}
    assert prior_content_hash(changed) != expected
    with pytest.raises(ValueError, match="found keys such as encoder.x"):
        prior_content_hash({"encoder.x": torch.zeros(1)})
    asked: list[int] = []

    def cancel() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        prior_content_hash(prior, cancel)
    assert len(asked) == 3
