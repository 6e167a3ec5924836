"""Our LoRA files in diffusers: its pipelines load them and predict what our UNet does; needs diffusers and peft."""

from __future__ import annotations

import json

import pytest
import torch
from indomain_guidance.guidance.files import add_lora, read_lora, read_metadata, read_state_dict
from indomain_guidance.guidance.networks.low_rank import NAMED_LAYERS, matching_layers
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.tests.guidance.files import diffusers_pipelines as theirs
from indomain_guidance.tests.guidance.files.lora_cases import CONFIGS, GOLDEN, base, inputs, write_lora

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.slow


def ours(family: str, path, strength: float = 1.0) -> torch.Tensor:
    config = CONFIGS[family]
    unet = UNet(config).eval()
    unet.load_state_dict(add_lora(base(config).state_dict(), read_lora(path)[0], config, strength))
    with torch.no_grad():
        return unet(**inputs(config))


@pytest.mark.parametrize("layers", NAMED_LAYERS)
@pytest.mark.parametrize("family", CONFIGS)
def test_predictions_are_equal(family, layers, tmp_path, record_property):
    path = write_lora(tmp_path / "lora.safetensors", family, layers)
    pipe = theirs.with_lora(family, path)
    assert len(theirs.names(pipe)) == len(matching_layers(base(CONFIGS[family]), layers))
    for strength in (1.0, 0.5):
        pipe.set_adapters(theirs.ADAPTER, strength)
        got, expected = theirs.output(pipe, family), ours(family, path, strength)
        record_property(f"largest difference at {strength:g}", float((got - expected).abs().max()))
        assert torch.allclose(got, expected, atol=1e-5)
    pipe.disable_lora()
    assert not torch.allclose(theirs.output(pipe, family), ours(family, path), atol=1e-2)


def test_pictures_are_those_of_the_merged_weights(tmp_path):
    """The whole pipeline with guidance, against one whose UNet is ours with the LoRA in it."""
    path, config = write_lora(tmp_path / "lora.safetensors", "sd1"), CONFIGS["sd1"]
    merged = add_lora(base(config).state_dict(), read_lora(path)[0], config)
    given = inputs(config)
    options = {
        "prompt_embeds": given["context"][:1],
        "negative_prompt_embeds": given["context"][1:],
        "latents": given["x"][:1],
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "return_dict": False,
        "height": 64,
        "width": 64,
    }
    pipes = (theirs.with_lora("sd1", path), theirs.pipeline("sd1", merged), theirs.pipeline("sd1"))
    loaded, expected, before = (pipe(**options)[0] for pipe in pipes)
    assert torch.allclose(loaded, expected, atol=1e-4) and not torch.allclose(before, expected, atol=0.1)


def test_diffusers_overlooks_the_sizes_of_dora(tmp_path, caplog):
    """Why the settings say so: if this fails, diffusers has learnt to read them, and their help should say that."""
    path = write_lora(tmp_path / "lora.safetensors", "sd1", dora=True)
    pipe = theirs.with_lora("sd1", path)
    assert not any("magnitude" in key for key in pipe.unet.state_dict())
    assert not torch.allclose(theirs.output(pipe, "sd1"), ours("sd1", path), atol=1e-2)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_golden_is_what_diffusers_makes_now(family, tmp_path):
    pipe = theirs.with_lora(family, write_lora(tmp_path / "lora.safetensors", family))
    assert theirs.names(pipe) == json.loads(read_metadata(GOLDEN)[family])
    assert torch.allclose(theirs.output(pipe, family), read_state_dict(GOLDEN)[family], atol=1e-5)
