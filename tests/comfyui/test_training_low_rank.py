"""LoRA files of the trainer, loaded by ComfyUI: its patched weights are the merged ones."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.files import read_metadata, read_state_dict
from indomain_guidance.guidance.networks.low_rank import low_rank_layers
from indomain_guidance.training.command_line.inspect import inspect
from indomain_guidance.training.domain import trainee as parts
from indomain_guidance.training.domain.finished import write_low_rank
from indomain_guidance.training.prior.opening import open_checkpoint


def trained(base, rank):
    """A low-rank trainee whose additions are no longer zero."""
    trainee = parts.start_model(base, "full", "low_rank", additions={"rank": rank})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainee.named_trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return trainee


@pytest.mark.parametrize("family, core_family", [("sd1", "SD15"), ("sd2", "SD20"), ("sdxl", "SDXL")])
def test_core_patches_equal_merged_weights(family, core_family, comfyui, tiny, tiny_checkpoint, tmp_path):
    base = open_checkpoint(tiny_checkpoint(family).path, prediction="epsilon")
    trainee = trained(base, 4)
    path = tmp_path / "lora.safetensors"
    write_low_rank(path, trainee, base, steps=7, dataset_size=3, file_dtype="fp32")
    config = base.config
    model = tiny.prior(
        family=core_family,
        model_channels=config.model_channels,
        context_dim=config.context_dim,
        transformer_depth=list(config.transformer_depth),
        transformer_depth_middle=config.transformer_depth_middle,
        transformer_depth_output=list(config.transformer_depth_output),
        adm_in_channels=config.adm_in_channels,
        use_linear_in_transformer=config.use_linear_in_transformer,
        **({} if config.adm_in_channels is None else {"num_classes": "sequential"}),
        **({"num_heads": 8} if config.num_heads > 0 else {"num_head_channels": 64}),
    )
    model.model.diffusion_model.load_state_dict({key: value.float() for key, value in base.unet.items()})
    lora = read_state_dict(path)
    patched, _ = comfyui.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0.0)
    expected = trainee.weights()
    weights = model.model.state_dict()
    touched = set(patched.patches)
    assert touched == {f"diffusion_model.{name}.weight" for name in low_rank_layers(trainee.unet)}
    assert 3 * len(touched) == len(lora)
    for key in touched:
        weight = weights[key].clone()
        weight = comfyui.lora.calculate_weight(patched.patches[key], weight, key)
        own = expected[key.removeprefix("diffusion_model.")]
        assert torch.allclose(weight, own, atol=1e-5), key
        assert not torch.allclose(own, base.unet[key.removeprefix("diffusion_model.")].float(), atol=1e-3)
    metadata = read_metadata(path)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_steps"]) == ("4", "4.0", "7")
    about = inspect(path)
    assert (about["kind"], about["ranks"], about["layers"]) == ("LoRA", [4], len(touched))


def test_only_what_fits_the_prior_is_a_lora(tiny_checkpoint, tmp_path):
    base = open_checkpoint(tiny_checkpoint("sd1").path)
    free = parts.start_model(base, "cached", "low_rank")
    with pytest.raises(ValueError, match="expected a model of form full trained with low_rank, got form cached"):
        write_low_rank(tmp_path / "x.safetensors", free, base)
    assert not list(tmp_path.iterdir())
