"""Text-Free UNet: the file and MODEL it makes, against the prior they come from."""

from __future__ import annotations

import copy
import importlib
import json
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow

SIGMAS = torch.tensor([9.0, 0.7])
CONTEXT = 24
FORMS = ("cached", "constant")


def module(name: str):
    return importlib.import_module(f"indomain_guidance.{name}")


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def clip(comfyui):
    """A CLIP of the priors' text width, with random weights."""
    text, mini_world = module("guidance.networks.text_encoder"), module("nodes.comfy_internals.models.mini_world")
    config = text.TextEncoderConfig(width=CONTEXT, layers=2, heads=4, mlp_width=48)
    torch.manual_seed(4)
    weights = text.TextEncoder(config).state_dict()
    weights = {key: value + 0.3 * torch.randn_like(value) for key, value in weights.items()}
    table = "text_model.embeddings.token_embedding.weight"
    weights[table] = weights[table][:2]
    return mini_world.build_clip(weights, {"config": json.dumps(config.to_dict()), "token_ids": "[49406]"})


@pytest.fixture
def make(comfyui, tmp_path, monkeypatch):
    """Runs the node, writing into a folder of this test's own."""
    domain_unets = module("nodes.comfy_internals.models.folders").DOMAIN_UNETS
    folder_paths = importlib.import_module("folder_paths")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(domain_unets, "shipped", tmp_path / "shipped")
    domain_unets.register()
    node = module("nodes.text_free").TextFreeUNet

    def run(model, clip, form, filename="made", file_dtype="fp32", probe_size=64):
        with torch.inference_mode():
            out = node.execute(model, clip, form, filename, file_dtype, probe_size)
        path = tmp_path / "domain_unets" / f"{filename.removesuffix('.safetensors')}.safetensors"
        return SimpleNamespace(model=out.result[0], report=out.result[1], ui=out.ui.as_dict(), path=path)

    run.folder = tmp_path / "domain_unets"
    return run


@torch.inference_mode()
def core_eps(comfyui, model, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
    comfyui.model_management.load_models_gpu([model])
    x0 = model.model.apply_model(x, SIGMAS, c_crossattn=context, transformer_options={})
    return (x - x0) / SIGMAS[:, None, None, None]


@torch.inference_mode()
def empty_prompt(clip) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize("")).expand(2, -1, -1)


def noisy() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 4


def test_cached_is_the_prior_on_the_empty_prompt(comfyui, tiny, clip, make):
    prior, x = tiny.prior(), noisy()
    made = make(prior, clip, "cached")
    expected = core_eps(comfyui, prior, x, empty_prompt(clip))
    assert error(core_eps(comfyui, made.model, x), expected) < 1e-5
    assert error(core_eps(comfyui, prior, x, torch.randn(2, 9, CONTEXT)), expected) > 1e-3


def test_cached_freezes_the_layer_that_clip_skip_chose(comfyui, tiny, clip, make):
    prior, x, skipped = tiny.prior(), noisy(), clip.clone()
    skipped.clip_layer(-2)
    made = make(prior, skipped, "cached")
    result = core_eps(comfyui, made.model, x)
    assert error(result, core_eps(comfyui, prior, x, empty_prompt(skipped))) < 1e-5
    assert error(result, core_eps(comfyui, prior, x, empty_prompt(clip))) > 1e-4
    assert module("guidance.files").read_domain_file(made.path)[1].null_context["layer"] == "-2"


def test_constant_reports_the_error_of_every_block(comfyui, tiny, clip, make):
    prior = tiny.prior()
    made = make(prior, clip, "constant")
    _, metadata = module("guidance.files").read_domain_file(made.path)
    blocks = [n for n, m in prior.model.diffusion_model.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert set(metadata.null_text_error) == set(blocks) and all(0 < e < 1.5 for e in metadata.null_text_error.values())
    for block, value in metadata.null_text_error.items():
        assert f"{block}: {value:.3f}" in made.report
    x = noisy()
    assert 0 < error(core_eps(comfyui, made.model, x), core_eps(comfyui, prior, x, empty_prompt(clip))) < 0.5
    assert made.ui == {"text": (made.report,)}


def test_constant_error_is_measured_on_probes_that_were_not_used(comfyui, tiny, clip, make, monkeypatch):
    export, seeds = module("nodes.comfy_internals.models.export"), []
    collect = export.collect_probes

    def spy(*args, **kwargs):
        seeds.append(kwargs["seed"])
        return collect(*args, **kwargs)

    monkeypatch.setattr(export, "collect_probes", spy)
    make(tiny.prior(), clip, "constant")
    assert seeds == [0, 1]


def test_constants_are_measured_at_the_priors_own_size_unless_told(comfyui, make, monkeypatch):
    export, shapes = module("nodes.comfy_internals.models.export"), []
    collect = export.collect_probes

    def spy(denoiser, context, shape, **options):
        shapes.append(shape)
        return collect(denoiser, context, shape, **options)

    monkeypatch.setattr(export, "collect_probes", spy)
    prior, clip, _ = module("nodes.comfy_internals.models.loading").load_mini_world()
    for size, side in ((0, 8), (128, 16)):
        make(prior, clip, "constant", filename=f"made_{size}", probe_size=size)
        assert set(shapes) == {(1, 4, side, side)}
        shapes.clear()
    with pytest.raises(ValueError, match="expected a probe_size of 0 or at least 64, found 8"):
        make(prior, clip, "constant", probe_size=8)


@pytest.mark.parametrize("form", FORMS)
def test_file_describes_what_it_is(comfyui, tiny, clip, make, form):
    files = module("guidance.files")
    prior = tiny.prior(prediction="V_PREDICTION", zero_snr=True)
    made = make(prior, clip, form, filename="sub/name.safetensors")
    assert made.path.is_file()
    weights, metadata = files.read_domain_file(made.path)
    assert (metadata.null_text, metadata.latent_format, metadata.steps) == (form, "sd15", 0)
    assert (metadata.prediction_type, metadata.zero_snr) == ("v_prediction", True)
    assert metadata.prior_hash == files.prior_content_hash(prior.model.diffusion_model.state_dict())
    assert metadata.null_context["tokens"] == 77 and metadata.null_context["width"] == CONTEXT
    assert metadata.config.null_text == form and metadata.config.num_heads == 8
    assert not any("attn2.to_k" in key for key in weights)
    assert made.model.model.indomain_domain.metadata == metadata
    assert f"form: {form}" in made.report and str(made.path) in made.report


def test_the_mini_worlds_prior_keeps_its_latent_space(comfyui, make):
    prior, clip, _ = module("nodes.comfy_internals.models.loading").load_mini_world()
    made = make(prior, clip, "cached", file_dtype="fp16")
    assert module("guidance.files").read_domain_file(made.path)[1].latent_format == "mini_world"
    x, context = noisy(), empty_prompt(clip)
    expected = core_eps(comfyui, prior, x, context)
    assert error(core_eps(comfyui, made.model, x), expected) < 2e-3, "text-free, and the prior on the empty prompt"


@pytest.mark.parametrize("form", FORMS)
def test_lora_on_the_model_is_baked_in(comfyui, tiny, clip, make, form):
    prior, x = tiny.prior(), noisy()
    patched = tiny.lora(prior, seed=8, strength=0.7, contains="attn")
    result = core_eps(comfyui, make(patched, clip, form, "patched").model, x)
    tolerance = {"cached": 1e-5, "constant": 0.5}[form]
    with_lora, without = (core_eps(comfyui, model, x, empty_prompt(clip)) for model in (patched, prior))
    assert error(with_lora, without) > 0.05
    assert error(result, with_lora) < tolerance
    assert error(result, with_lora) < 0.7 * error(result, without)
    # Baking leaves the MODEL as it was.
    assert error(core_eps(comfyui, prior, x, empty_prompt(clip)), without) < 1e-6


def test_lora_is_baked_in_whether_or_not_the_model_is_loaded(comfyui, tiny, clip, make):
    files = module("guidance.files")
    patched = tiny.lora(tiny.prior(), seed=8)
    comfyui.model_management.unload_all_models()
    before = files.read_domain_file(make(patched, clip, "cached", "a").path)[0]
    comfyui.model_management.load_models_gpu([patched])
    after = files.read_domain_file(make(patched, clip, "cached", "b").path)[0]
    for key, weight in before.items():
        assert error(after[key], weight) < 1e-6


@pytest.mark.parametrize("dtype, tolerance", [("fp8_e4m3fn", 2e-3), ("fp16", 2e-3)])
def test_small_number_formats_are_read_back(comfyui, tiny, clip, make, dtype, tolerance):
    """An fp8 prior becomes an fp16 file that says exactly what the fp8 prior says."""
    loading = module("nodes.comfy_internals.models.loading")
    unet = module("guidance.networks.unet_config")
    weights = dict(tiny.prior().model.diffusion_model.state_dict())
    prior = loading.build_unet_model(
        weights,
        unet.unet_config_from_state_dict(weights, num_heads=8),
        info=None,
        latent_format="sd15",
        source="prior",
        prediction_type="epsilon",
        weight_dtype=dtype,
    )
    x = noisy()
    made = make(prior, clip, "cached", file_dtype="fp16")
    stored = module("guidance.files").read_state_dict(made.path)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert error(core_eps(comfyui, made.model, x), core_eps(comfyui, prior, x, empty_prompt(clip))) < tolerance


def test_scaled_fp8_weights_are_multiplied_out(comfyui, tiny, clip, make):
    """Core's scaled fp8 layers keep weight / scale; the file must hold the product."""
    if not hasattr(comfyui.ops, "scaled_fp8_ops"):
        pytest.skip("this ComfyUI keeps scaled fp8 weights in tensors of their own kind")
    prior = tiny.prior()
    sampled = prior.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q
    ops = comfyui.ops.scaled_fp8_ops(override_dtype=torch.float8_e4m3fn)
    scaled = ops.Linear(sampled.in_features, sampled.out_features, bias=False)
    scaled.scale_weight = torch.nn.Parameter(torch.tensor(0.125), requires_grad=False)
    scaled.weight = torch.nn.Parameter((sampled.weight / 0.125).to(torch.float8_e4m3fn), requires_grad=False)
    expected = scaled.weight.float() * 0.125
    prior.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q = scaled
    weights, _ = module("guidance.files").read_domain_file(make(prior, clip, "cached").path)
    assert error(weights["middle_block.1.transformer_blocks.0.attn1.to_q.weight"], expected) < 1e-6
    assert not any("scale_weight" in key for key in weights)


def test_sampling_patch_on_the_model_is_what_the_file_says(comfyui, tiny, clip, make):
    files = module("guidance.files")
    advanced = importlib.import_module("comfy_extras.nodes_model_advanced")
    (patched,) = advanced.ModelSamplingDiscrete().patch(tiny.prior(), "v_prediction", True)
    _, metadata = files.read_domain_file(make(patched, clip, "cached").path)
    assert (metadata.prediction_type, metadata.zero_snr) == ("v_prediction", True)


# ---- refusals -------------------------------------------------------------------------------------------------


def test_sampling_that_a_file_cannot_describe_is_refused(comfyui, tiny, clip, make):
    advanced = importlib.import_module("comfy_extras.nodes_model_advanced")
    for patched in (
        advanced.ModelSamplingDiscrete().patch(tiny.prior(), "x0", False)[0],
        advanced.ModelSamplingContinuousEDM().patch(tiny.prior(), "v_prediction", 120.0, 0.002)[0],
        advanced.ModelSamplingSD3().patch(tiny.prior(), 3.0)[0],
    ):
        with pytest.raises(ValueError, match="noise schedule.*found"):
            make(patched, clip, "cached")
    assert not list(make.folder.glob("*"))


def test_text_free_models_and_other_architectures_are_refused(comfyui, tiny, clip, make):
    made = make(tiny.prior(), clip, "cached")
    with pytest.raises(ValueError, match="takes text.*'made'"):
        make(made.model, clip, "cached", "again")
    other = tiny.prior().clone()
    other.model = copy.copy(other.model)
    other.model._modules = {**other.model._modules, "diffusion_model": torch.nn.Linear(1, 1)}
    with pytest.raises(ValueError, match="Stable Diffusion UNet.*found Linear"):
        module("nodes.comfy_internals.models.export").exported_config(other)


def test_a_text_encoder_of_another_width_is_refused(comfyui, tiny, clip, make):
    with pytest.raises(ValueError, match="width 16.*24"):
        make(tiny.prior(context_dim=16), clip, "cached")
    assert not make.folder.exists() or not list(make.folder.glob("*"))


def test_inpainting_priors_have_a_cached_form_only(comfyui, tiny, clip, make):
    prior = tiny.prior(in_channels=9)
    with pytest.raises(ValueError, match="inpainting.*'cached'"):
        make(prior, clip, "constant")
    assert make(prior, clip, "cached").model.model.model_config.unet_config["in_channels"] == 9


OUTSIDE = [
    "",
    "  ",
    ".safetensors",
    "../outside",
    "a/../../outside",
    "/etc/outside",
    "folder/",
    "..",
    "con",
    "sub/NUL.txt",
    "C:\\outside",
    "C:outside",
    "\\\\server\\share\\outside",
    "a\\..\\..\\outside",
    "outside\0",
    "out\nside",
    "out\ud800side",
    "\u202eedistuo",
    "True",
    "None",
    "x" * 201,
    "trailing. ",
    "a//outside",
]


@pytest.mark.parametrize("filename", OUTSIDE)
def test_names_that_leave_the_folder_are_refused(comfyui, tiny, clip, make, filename):
    with pytest.raises(ValueError, match="file name inside"):
        make(tiny.prior(), clip, "cached", filename)
    assert not list(make.folder.parent.rglob("outside*"))


def test_untrained_files_are_replaced_and_trained_ones_are_not(comfyui, tiny, clip, make):
    from dataclasses import replace

    files = module("guidance.files")
    first = make(tiny.prior(), clip, "cached")
    make(tiny.prior(seed=1), clip, "cached")
    weights, metadata = files.read_domain_file(first.path)
    files.write_domain_file(first.path, weights, replace(metadata, steps=100))
    kept = first.path.read_bytes()
    with pytest.raises(ValueError, match="made.safetensors.*trained.*another file name"):
        make(tiny.prior(), clip, "cached")
    assert first.path.read_bytes() == kept
    (make.folder / "foreign.safetensors").write_bytes(b"somebody's work")
    with pytest.raises(ValueError, match="foreign.safetensors"):
        make(tiny.prior(), clip, "cached", "foreign")
