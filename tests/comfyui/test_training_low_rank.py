"""LoRA files of the trainer, loaded by ComfyUI: its patched weights are the merged ones."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from indomain_guidance.guidance.files import add_lora, lora_tensors, read_lora, read_metadata
from indomain_guidance.guidance.networks.low_rank import add_low_rank, low_rank_layers, merged_weights
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.tests.tiny_checkpoints import randomise, unet_config
from indomain_guidance.training.command_line.inspect import inspect
from indomain_guidance.training.domain import trainee as parts
from indomain_guidance.training.domain.finished import write_low_rank
from indomain_guidance.training.mini_world.assets import load_mini_world
from indomain_guidance.training.prior.opening import open_checkpoint

CORE_FAMILIES = {"sd1": "SD15", "sd2": "SD20", "sdxl": "SDXL"}


def changed(unet: torch.nn.Module) -> None:
    """Additions as after some steps."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in low_rank_layers(unet).values():
            layer.lora_up.copy_(torch.randn(layer.lora_up.shape, generator=generator) * 0.2)
            if layer.dora_scale is not None:
                layer.dora_scale.mul_(1 + 0.3 * torch.rand(layer.dora_scale.shape, generator=generator))


def core_model(tiny, family: str, config: UNetConfig):
    """Core's MODEL of that architecture."""
    return tiny.prior(
        family=CORE_FAMILIES[family],
        model_channels=config.model_channels,
        context_dim=config.context_dim,
        transformer_depth=list(config.transformer_depth),
        transformer_depth_middle=config.transformer_depth_middle,
        transformer_depth_output=list(config.transformer_depth_output),
        adm_in_channels=config.adm_in_channels,
        use_linear_in_transformer=config.use_linear_in_transformer,
        **({} if config.adm_in_channels is None else {"num_classes": "sequential"}),
        **({"num_heads": config.num_heads} if config.num_heads > 0 else {"num_head_channels": 64}),
    )


@pytest.fixture(scope="module", params=[*CORE_FAMILIES, "mini_world"])
def models(request, comfyui):
    """(core's MODEL, our UNet of the same weights)."""
    family = request.param
    if family == "mini_world":
        loading = importlib.import_module("indomain_guidance.nodes.comfy_internals.models.loading")
        return loading.load_mini_world_prior(), load_mini_world().prior.unet.float()
    from indomain_guidance.tests.comfyui.conftest import Tiny

    unet = randomise(UNet(unet_config(family)), 0)
    model = core_model(Tiny(comfyui), family, unet.config)
    model.model.diffusion_model.load_state_dict(unet.state_dict())
    return model, unet


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_core_patches_equal_merged_weights(models, dora, comfyui, caplog):
    model, base = models
    before = {key: value.clone() for key, value in base.state_dict().items()}
    for layers in ("attention", "linear", "convolution", "all"):
        unet = copy.deepcopy(base)
        add_low_rank(unet, 4, layers=layers, scale=0.75, dora=dora)
        changed(unet)
        lora, full = lora_tensors(unet, base.config), merged_weights(unet)
        for strength in (1.0, 0.5):
            patched, _ = comfyui.sd.load_lora_for_models(model, None, dict(lora), strength, 0.0)
            own = add_lora(before, lora, base.config, strength)
            assert set(patched.patches) == {f"diffusion_model.{name}.weight" for name in low_rank_layers(unet)}
            assert "not loaded" not in caplog.text.lower()
            for key, patches in patched.patches.items():
                name = key.removeprefix("diffusion_model.")
                weight = comfyui.lora.calculate_weight(patches, before[name].clone(), key)
                expected = full[name] if strength == 1 else before[name] + strength * (full[name] - before[name])
                assert torch.allclose(weight, expected, atol=1e-5), (layers, key)
                assert torch.allclose(weight, own[name], atol=1e-5), (layers, key)
                assert not torch.allclose(weight, before[name], atol=1e-3), (layers, key)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_file_of_a_run_says_what_it_is(dora, tiny_checkpoint, tmp_path):
    base = open_checkpoint(tiny_checkpoint("sd1").path, prediction="epsilon")
    additions = {"rank": 40, "layers": "all", "scale": 0.5, "dora": dora}
    trainee = parts.start_model(base, "full", "low_rank", additions=additions)
    changed(trainee.unet)
    path = write_low_rank(tmp_path / "lora.safetensors", trainee, base, steps=7, dataset_size=3, file_dtype="fp32")
    metadata, expected = read_metadata(path), trainee.weights()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_steps"]) == ("40", "40.0", "7")
    assert metadata["prior_hash"] == base.prior_hash and metadata["ss_base_model_version"] == "sd_v1"
    own = add_lora(base.unet, read_lora(path)[0], base.config)
    for key, value in expected.items():
        assert torch.allclose(own[key].float(), value, atol=1e-3), key  # in the fp16 of the checkpoint
    about = inspect(path)
    assert (about["kind"], about["layers"]) == ("LoRA", len(low_rank_layers(trainee.unet)))
    assert about["ranks"] == [4, 32, 40]  # those of the narrowest layers are their own


def test_only_what_fits_the_prior_is_a_lora(tiny_checkpoint, tmp_path):
    base = open_checkpoint(tiny_checkpoint("sd1").path)
    free = parts.start_model(base, "cached", "low_rank")
    with pytest.raises(ValueError, match="expected a model of form full trained with low_rank, got form cached"):
        write_low_rank(tmp_path / "x.safetensors", free, base)
    assert not list(tmp_path.iterdir())
