"""Load Domain UNet: every file a user may pick by mistake is refused in one sentence that names it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch


def module(name: str):
    return importlib.import_module(f"indomain_guidance.{name}")


@pytest.fixture
def folders(comfyui, tmp_path, monkeypatch):
    """Empty model folders of this test's own, registered as the pack registers them."""
    domain_unets = module("nodes.comfy_internals.models.folders").DOMAIN_UNETS
    folder_paths = importlib.import_module("folder_paths")
    own = tmp_path / "models" / "domain_unets"
    diffusion = tmp_path / "models" / "diffusion_models"
    own.mkdir(parents=True), diffusion.mkdir()
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(domain_unets, "shipped", tmp_path / "shipped")
    extensions = folder_paths.supported_pt_extensions
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(
        folder_paths,
        "folder_names_and_paths",
        {**folder_paths.folder_names_and_paths, "diffusion_models": ([str(diffusion)], extensions)},
    )
    domain_unets.register()
    return own


@pytest.fixture
def node(comfyui):
    return module("nodes.loaders").LoadDomainUNet


@pytest.fixture
def domain(comfyui):
    """(weights, config) of a random text-free UNet."""
    unet = module("guidance.networks.unet")
    config = unet.UNetConfig(
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=(1,),
        transformer_depth=(1,),
        transformer_depth_middle=1,
        transformer_depth_output=(1, 1),
        context_dim=16,
        num_heads=4,
        null_text="cached",
        null_tokens=3,
    )
    return unet.UNet(config).state_dict(), config


def write(path: Path, weights, config, **fields) -> Path:
    files = module("guidance.files")
    metadata = files.DomainMetadata(config, **{"latent_format": "sd15", "prediction_type": "epsilon", **fields})
    return files.write_safetensors(path, weights, metadata.to_strings())


def refusal(node, name: str, *words: str) -> str:
    """Load a file through the node; its error, after checking that it is one sentence that holds all words."""
    with pytest.raises(module("guidance.files").FileProblem) as caught:
        node.execute(name, "default")
    message = str(caught.value)
    for word in words:
        assert word in message, f"'{word}' is not in: {message}"
    assert "\n" not in message and message.endswith(".") and len(message) < 500
    return message


def test_a_good_file_loads(folders, node, domain):
    write(folders / "good.safetensors", *domain)
    (model,) = node.execute("good.safetensors", "default").result
    assert model.model.indomain_domain.form == "cached"
    assert "good.safetensors" in node.INPUT_TYPES()["required"]["unet_name"][1]["options"]


def test_empty_folder_says_where_to_put_files(folders, node):
    assert node.INPUT_TYPES()["required"]["unet_name"][1]["options"] == []
    for name in ("", "anything.safetensors"):
        refusal(node, name, str(folders), ".safetensors", "Text-Free UNet")


def test_missing_file(folders, node, domain):
    write(folders / "good.safetensors", *domain)
    refusal(node, "gone.safetensors", "gone.safetensors", str(folders))


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "sub/../../../secret.safetensors"])
def test_names_outside_the_folders_are_not_files(folders, node, domain, name):
    write(folders.parent.parent / "secret.safetensors", *domain)
    write(folders / "good.safetensors", *domain)
    refusal(node, name, name)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_file(folders, node, domain, keep):
    path = write(folders / "cut.safetensors", *domain)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refusal(node, "cut.safetensors", "cut.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(folders, node, domain, value):
    weights = {key: tensor.clone() for key, tensor in domain[0].items()}
    weights["out.2.bias"][1] = value
    write(folders / "diverged.safetensors", weights, domain[1])
    refusal(node, "diverged.safetensors", "diverged.safetensors", "out.2.bias", "finite")


def test_not_finite_in_a_full_unet(comfyui, tiny, folders, node, monkeypatch):
    class TinySD15(comfyui.supported_models.SD15):
        unet_config = {**comfyui.supported_models.SD15.unet_config, "context_dim": 24, "model_channels": 32}

    monkeypatch.setattr(comfyui.supported_models, "models", [TinySD15])
    weights = {key: tensor.clone() for key, tensor in tiny.prior().model.diffusion_model.state_dict().items()}
    comfyui.utils.save_torch_file(weights, str(folders / "fine.safetensors"))
    weights["out.2.bias"][0] = float("nan")
    comfyui.utils.save_torch_file(weights, str(folders / "full.safetensors"))
    assert node.execute("fine.safetensors", "default").result
    refusal(node, "full.safetensors", "full.safetensors", "out.2.bias")


@pytest.mark.parametrize(
    "keys, found",
    [
        (("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "quant_conv.weight"), "autoencoder"),
        (("lora_unet_input_blocks_1.lora_up.weight", "lora_unet_input_blocks_1.lora_down.weight"), "LoRA"),
        (("input_blocks.0.0.weight", "input_hint_block.0.weight", "zero_convs.0.0.weight"), "ControlNet"),
        (("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"), "Flux"),
        (("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"), "diffusers"),
        (("text_model.embeddings.token_embedding.weight",), "text"),
    ],
)
def test_files_of_other_kinds(folders, node, keys, found):
    files = module("guidance.files")
    files.write_safetensors(folders / "other.safetensors", {key: torch.zeros(4, 4, 3, 3) for key in keys})
    refusal(node, "other.safetensors", "other.safetensors", "UNet", found)


def test_a_family_without_a_name(folders, node, domain):
    """A UNet of unusual size that does not say which latent space it works in."""
    write(folders / "odd.safetensors", *domain, latent_format=None)
    refusal(node, "odd.safetensors", "odd.safetensors", "latent space", "32 channels")


def test_unknown_latent_space(folders, node, domain):
    write(folders / "new.safetensors", *domain, latent_format="flux")
    refusal(node, "new.safetensors", "new.safetensors", "flux", "sd15")


def test_latent_space_that_its_architecture_contradicts(comfyui, folders, node, domain, monkeypatch):
    class TinySDXL(comfyui.supported_models.SDXL):
        unet_config = {"context_dim": 16, "model_channels": 32}

    monkeypatch.setattr(comfyui.supported_models, "models", [TinySDXL])
    write(folders / "mixed.safetensors", *domain, latent_format="sd15")
    refusal(node, "mixed.safetensors", "mixed.safetensors", "sd15", "SDXL")


def test_prediction_type_that_comfyui_lacks(folders, node, domain):
    write(folders / "x0.safetensors", *domain, prediction_type="sample")
    refusal(node, "x0.safetensors", "x0.safetensors", "sample", "epsilon")


def test_newer_format(folders, node, domain):
    files = module("guidance.files")
    strings = files.DomainMetadata(domain[1], latent_format="sd15").to_strings()
    files.write_safetensors(folders / "newer.safetensors", domain[0], {**strings, "version": "7"})
    refusal(node, "newer.safetensors", "newer.safetensors", "7")


def test_weights_missing(folders, node, domain):
    weights = dict(domain[0])
    del weights["middle_block.1.transformer_blocks.0.ff.net.2.weight"]
    write(folders / "part.safetensors", weights, domain[1])
    refusal(node, "part.safetensors", "part.safetensors", "found missing", "ff.net.2.weight")


# ---- the folder itself ----------------------------------------------------------------------------------------


def test_folder_lists_models_only_and_keeps_a_users_own_paths(comfyui, folders, domain, tmp_path, monkeypatch):
    domain_unets, folder_paths = (
        module("nodes.comfy_internals.models.folders").DOMAIN_UNETS,
        importlib.import_module("folder_paths"),
    )
    elsewhere, shipped = tmp_path / "elsewhere", tmp_path / "shipped"
    for folder, name in ((elsewhere, "mine"), (shipped, "mini"), (folders, "own")):
        write(folder / f"{name}.safetensors", *domain)
        (folder / "notes.txt").write_text("not a model")
    # As extra_model_paths.yaml leaves it: a path, and no extensions, which means every file.
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "domain_unets", ([str(elsewhere)], set()))
    domain_unets.register()
    domain_unets.register()  # twice changes nothing
    paths, _ = folder_paths.folder_names_and_paths["domain_unets"]
    assert paths == [str(elsewhere), str(folders), str(shipped)]
    assert sorted(domain_unets.listed()) == ["mine.safetensors", "mini.safetensors", "own.safetensors"]
    assert domain_unets.own() == elsewhere


def test_domain_folder_comes_before_diffusion_models(comfyui, folders, domain):
    loading, domain_unets = (
        module("nodes.comfy_internals.models.loading"),
        module("nodes.comfy_internals.models.folders").DOMAIN_UNETS,
    )
    write(folders / "same.safetensors", *domain, domain_name="from domain_unets")
    write(folders.parent / "diffusion_models" / "same.safetensors", *domain, domain_name="from diffusion_models")
    write(folders.parent / "diffusion_models" / "only.safetensors", *domain)
    assert domain_unets.listed() == ["same.safetensors", "only.safetensors"]
    info = loading.load_domain_unet(str(domain_unets.find("same.safetensors"))).model.indomain_domain
    assert info.name == "from domain_unets" and info.metadata.latent_format == "sd15"


def test_unknown_weight_dtype_is_refused(folders, node):
    with pytest.raises(ValueError, match="weight_dtype to be one of .*fp8_e4m3fn.*found 'int3'"):
        node.execute("any.safetensors", "int3")


def test_a_replaced_file_is_loaded_again(folders, node, domain):
    path = write(folders / "again.safetensors", *domain)
    before = node.fingerprint_inputs("again.safetensors", "default")
    assert before == node.fingerprint_inputs("again.safetensors", "default")
    write(path, *domain, steps=500)
    assert node.fingerprint_inputs("again.safetensors", "default") != before
    assert node.fingerprint_inputs("gone.safetensors", "default") == "missing"
    json.dumps(before)  # ComfyUI puts it into its cache key
