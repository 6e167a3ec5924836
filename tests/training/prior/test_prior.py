"""A prior's latents, vector conditioning, prompts, and what it was made for."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem
from indomain_guidance.training.prior.opening import open_checkpoint, open_mini_world
from indomain_guidance.training.prior.prior import ImageSize


@pytest.fixture(scope="module")
def mini():
    return open_mini_world()


def test_sizes_of_any_number_of_images_take_no_memory(tiny_checkpoint):
    """Random crops make hundreds of thousands of different ones."""
    base = open_checkpoint(tiny_checkpoint("sdxl").path)

    def held():
        gc.collect()
        return sum(type(one) is torch.Tensor for one in gc.get_objects())

    before = held()
    for top in range(100):
        base.conditioning([ImageSize((600, 400), (top, 5), (64, 32))] * 2)
    assert held() == before


def test_the_vae_id_depends_on_weights_formats_and_scale(mini):
    same = replace(mini)
    assert same.vae_id == mini.vae_id
    assert replace(mini, latent_scale=mini.latent_scale * 2).vae_id != mini.vae_id
    changed = open_mini_world()
    with torch.no_grad():
        next(changed.autoencoder.parameters())[0, 0, 0, 0] += 1e-3
    assert changed.vae_id != mini.vae_id


def test_refuses_prompts_without_a_tokenizer(tiny_checkpoint, tmp_path):
    made = tiny_checkpoint("sd1")
    base = open_checkpoint(made.path)
    assert base.encode_text(["", ""]).context.shape == (2, 77, 768)
    with pytest.raises(ValueError, match="expected a tokenizer to encode the prompt 'a cat'"):
        base.encode_text(["", "a cat"])
    with pytest.raises(FileProblem, match="vocab.json: expected CLIP's tokenizer file"):
        open_checkpoint(made.path, tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="Expected prediction to be one of"):
        open_checkpoint(made.path, prediction="flow")


def test_it_says_what_images_it_was_made_for(mini, tiny_run):
    wide = replace(mini.config, context_dim=1024)
    second = replace(mini, latent_format="sd15", config=wide)
    sizes = [
        one.native_resolution
        for one in (
            mini,
            replace(mini, latent_format="sd15"),
            second,
            replace(second, prediction_type="v_prediction"),
            replace(mini, latent_format="sdxl"),
            tiny_run.tiny_base(),
        )
    ]
    assert sizes == [64, 512, 512, 768, 1024, None]


def test_the_autoencoder_moves_and_comes_back(mini, monkeypatch):
    devices = []
    monkeypatch.setattr(mini.autoencoder, "to", devices.append)
    with mini.autoencoder_on("cuda"):
        assert devices == ["cuda"]
    assert devices == ["cuda", torch.device("cpu")]
