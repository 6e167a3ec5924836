"""A prior as one file: what is read is what was written, and text is looked up."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem
from indomain_guidance.guidance.files.tensors import write_safetensors
from indomain_guidance.training.prior.base import open_mini_world
from indomain_guidance.training.prior.exported_base import ExportedBase


@pytest.fixture(scope="module")
def mini():
    return open_mini_world()


@pytest.fixture
def exported(mini):
    prompts = ["a red seven", "a blue three on a white background"]
    texts = {prompt: (mini.encode_text([prompt]).context, None) for prompt in prompts}
    return ExportedBase(
        unet=mini.unet,
        config=mini.config,
        prediction_type="epsilon",
        zero_snr=False,
        latent_format="mini_world",
        latent_scale=mini.latent_scale,
        autoencoder=mini.autoencoder.state_dict(),
        null_context=mini.null_context,
        prompts=texts,
        name="the mini world",
    )


def test_the_file_gives_back_every_bit(exported, mini, tmp_path):
    read = ExportedBase.read(exported.write(tmp_path / "base.safetensors"))
    for ours, theirs in ((exported.unet, read.unet), (exported.autoencoder, read.autoencoder)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert read.config == mini.config and read.latent_scale == mini.latent_scale and read.name == "the mini world"
    assert read.null_context.to_dict() == mini.null_context.to_dict()
    assert list(read.prompts) == list(exported.prompts)


def test_an_opened_export_is_the_base_it_came_from(exported, mini, tmp_path):
    base = ExportedBase.read(exported.write(tmp_path / "base.safetensors")).open()
    assert base.prior_hash == mini.prior_hash and base.vae_id == mini.vae_id
    assert (base.prediction_type, base.zero_snr, base.latent_format) == ("epsilon", False, "mini_world")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for ours, theirs in zip(base.encode(images), mini.encode(images)):
        assert torch.equal(ours, theirs)


def test_prompts_are_those_that_were_encoded(exported, mini):
    base = exported.open()
    prompts = ["a blue three on a white background", "", "a red seven"]
    assert torch.equal(base.encode_text(prompts).context, mini.encode_text(prompts).context)
    with pytest.raises(ValueError, match="'a dog'.*sample_prompts"):
        base.encode_text(["a dog"])


def test_prompts_of_several_lengths_fit_in_one_batch(exported):
    short, long = torch.randn(1, 77, 128), torch.randn(1, 154, 128)
    from dataclasses import replace

    base = replace(exported, prompts={"short": (short, None), "long": (long, None)}).open()
    context = base.encode_text(["short", "long"]).context
    assert torch.equal(context, torch.cat([short.repeat(1, 2, 1), long]))


def test_other_files_are_refused(exported, tmp_path):
    path = write_safetensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {"format": "else"})
    with pytest.raises(FileProblem, match="other.safetensors: expected an exported prior"):
        ExportedBase.read(path)
    write_safetensors(path, {"x": torch.zeros(1)}, {"format": "indomain_exported_base", "prompts": "[]"})
    with pytest.raises(FileProblem, match="parts missing"):
        ExportedBase.read(path)
