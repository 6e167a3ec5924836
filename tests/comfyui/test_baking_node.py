"""Bake Domain LoRA inside ComfyUI's process, under inference mode as ComfyUI runs nodes."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow


def module(name: str):
    return importlib.import_module(f"indomain_guidance.{name}")


@pytest.fixture
def world(comfyui, tmp_path, monkeypatch):
    """ComfyUI's folders in a folder of this test's own."""
    folder_paths = importlib.import_module("folder_paths")
    kinds = {name: ([str(tmp_path / "models" / name)], {".safetensors"}) for name in ("loras", "diffusion_models")}
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    names = {**folder_paths.folder_names_and_paths, **kinds}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", names)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for kind in ("input", "output", "temp", "user"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return SimpleNamespace(
        tmp=tmp_path, nodes=module("nodes.baking"), baking=module("nodes.comfy_internals.runs.baking")
    )


@pytest.fixture(scope="module")
def mini(comfyui):
    """(MODEL, CLIP, VAE) of the mini world, and its shipped domain model, loaded under inference mode."""
    loading, assets = module("nodes.comfy_internals.models.loading"), module("training.mini_world.assets")
    with torch.inference_mode():
        domain = loading.load_domain_unet(str(assets.domain_unets_dir() / "mini-handwriting.safetensors"))
        return (*loading.load_mini_world(), domain)


@pytest.fixture
def pictures():
    with torch.inference_mode():
        return torch.rand(4, 64, 64, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bake(world, mini, pictures):
    """Runs the node on the mini world: a few steps, few pictures, no previews unless asked."""

    def run(**inputs):
        plain = {"held_out_share": 0.0, "validate_every": 0, "warmup": 0, "own_count": 2, "own_steps": 2}
        options = {**plain, "random_prompts": 3, **inputs.pop("options", {})}
        model, clip, vae, domain = mini
        values = {
            "name": "made",
            "model": model,
            "clip": clip,
            "vae": vae,
            "domain": domain,
            "image_folder": "",
            "domain_weight": 1.5,
            "domain_start": 0.0,
            "domain_end": 1.0,
            "steps": 3,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "rank": 2,
            "resolution": 64,
            "sample_every": 0,
            "seed": 0,
            "resume": "auto",
            "images": [pictures],
            "options": options,
            **inputs,
        }
        lists = {name: value if name == "images" else [value] for name, value in values.items() if value is not None}
        with torch.inference_mode():
            out = world.nodes.BakeDomainLoRA.execute(**lists)
        made, lora, samples, loss, path = out.result
        return SimpleNamespace(model=made, lora=lora, samples=samples, loss=loss, path=path, ui=out.ui)

    return run


@torch.inference_mode()
def predicted(comfyui, model):
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0])
    comfyui.model_management.load_models_gpu([model])
    context = torch.randn(1, 77, 128, generator=torch.Generator().manual_seed(2))
    return model.model.apply_model(x, sigma, c_crossattn=context, transformer_options={})


def test_it_writes_a_lora_that_cores_loader_puts_on_the_prior(comfyui, bake, mini, world):
    made = bake(sample_every=3, options={"sample_count": 1, "sample_steps": 2, "sample_prompts": ("a red seven",)})
    assert made.path == str(world.tmp / "models" / "loras" / "made.safetensors") and made.ui["text"] == (made.path,)
    assert made.samples.ndim == 4 and made.samples.std() > 0.01 and made.loss.ndim == 4
    file = comfyui.utils.load_torch_file(made.path)
    assert all(torch.equal(made.lora[key], value) for key, value in file.items()) and len(file) == len(made.lora)
    loaded, _ = comfyui.sd.load_lora_for_models(mini[0], None, file, 1.0, 0.0)
    plain, baked = predicted(comfyui, mini[0]), predicted(comfyui, made.model)
    assert torch.equal(baked, predicted(comfyui, loaded)) and not torch.allclose(baked, plain, atol=1e-3)
    # The prior itself is as it was.
    assert not mini[0].patches


def test_cancel_saves_and_the_next_run_ends_with_the_same_bits(comfyui, bake, world, cancelled_at):
    whole = bake(name="whole", steps=6)
    with cancelled_at(2, of=6), pytest.raises(comfyui.model_management.InterruptProcessingException):
        bake(name="parts", steps=6)
    assert not (world.tmp / "models" / "loras" / "parts.safetensors").exists()
    parts = bake(name="parts", steps=6, resume="continue")
    assert all(torch.equal(parts.lora[key], value) for key, value in whole.lora.items())


def test_terms_of_the_graph_are_baked_too(bake, mini, world):
    terms, schedules = module("guidance.terms"), module("guidance.schedules")
    model, clip, _, domain = mini
    with torch.inference_mode():
        cond = clip.encode_from_tokens_scheduled(clip.tokenize("a red seven"))
    style = terms.Term("style", None, cond, schedules.Interval(0.5, 0.0, 0.5))
    with_domain = terms.Term("domain", domain, None, 1.5)
    alone = bake(name="alone", domain=None, terms=(with_domain,))
    plain = bake(name="plain")
    both = bake(name="both", terms=(style,))
    assert all(torch.equal(alone.lora[key], value) for key, value in plain.lora.items())
    assert any(not torch.equal(both.lora[key], value) for key, value in plain.lora.items())


def test_a_patched_domain_model_is_exported_with_its_patches(comfyui, mini, world):
    domain = mini[3].clone()
    key = "diffusion_model.out.2.bias"
    domain.add_patches({key: ("diff", (torch.ones(4),))}, 1.0)
    with torch.inference_mode(False):
        weights, metadata = world.baking.model_of(domain)
        plain, same = world.baking.model_of(mini[3])
    assert metadata == same and weights.keys() == plain.keys()
    torch.testing.assert_close(weights["out.2.bias"].float(), plain["out.2.bias"].float() + 1.0, rtol=0, atol=2e-3)


def test_all_weights_are_a_model_and_no_lora(bake, world):
    made = bake(steps=1, learning_rate=1e-4, options={"train": "all"})
    assert made.path == str(world.tmp / "models" / "diffusion_models" / "made.safetensors")
    assert type(made.lora).__name__ == "ExecutionBlocker"


def test_what_cannot_work_is_one_sentence_before_a_prompt_is_encoded(bake, mini, world, monkeypatch):
    monkeypatch.setattr(world.baking, "encode_prompts", lambda *given: pytest.fail("encoded"))
    terms = module("guidance.terms")
    cond = [[torch.zeros(1, 77, 128), {"mask": torch.ones(1, 8, 8)}]]
    shaped = terms.Term("x", None, None, 1.0, shaping=module("guidance.orthogonal").Orthogonal(("control",)))
    for inputs, words in (
        ({"domain": None}, "Bake Domain LoRA: expected a domain model or terms, found neither"),
        ({"images": None}, "Bake Domain LoRA: expected images to train on, found none"),
        ({"image_folder": "nowhere", "images": None}, "Bake Domain LoRA: expected a folder of images, found nothing"),
        ({"domain": mini[0], "options": {"layers": "*.norm1"}}, "linear layers or convolutions of the network, found"),
        ({"terms": (terms.Term("x", None, cond, 1.0),)}, "term 'x' with the plain text .* found one with mask"),
        ({"terms": (shaped,)}, "terms: expected terms that need no prompt, found 'x'"),
        ({"domain_weight": float("nan")}, "expected domain_weight to be a finite number"),
        ({"options": {"loud": 1}}, "options: expected what In-Domain Bake Options gives"),
        ({"terms": (terms.Term("domain", None, None, 1.0),)}, "different names, got 'domain' twice"),
        ({"terms": (terms.Term("x", None, None, 1.0, "y"),)}, "'x' refers to 'y', which is none of: base, domain, x"),
        ({"model": mini[3]}, "Bake Domain LoRA: expected a model that takes text, found the text-free model"),
    ):
        with pytest.raises(ValueError, match=words):
            bake(**inputs)
    assert not (world.tmp / "models" / "loras").exists()


def test_a_domain_model_of_another_prior_is_refused(bake, mini, world, monkeypatch):
    weights, metadata = world.baking.model_of(mini[3])
    other = weights, dataclasses.replace(metadata, prior_hash="0" * 64)
    monkeypatch.setattr(world.baking, "model_of", lambda model: other)
    with pytest.raises(ValueError, match="The domain model: expected a domain model of the prior the connected"):
        bake()


def test_every_field_of_the_configuration_has_one_place(world):
    config, nodes = module("training.baking.config").BakeConfig, world.nodes
    options = nodes.options_of_baking()
    places = [*nodes.ON_THE_NODE, *nodes.DECIDED_HERE, *options]
    assert sorted(places) == sorted(field.name for field in dataclasses.fields(config))
    assert set(nodes.USUAL_OPTIONS.split()) <= set(options)


def test_default_options_are_the_commands_own(world):
    config = module("training.baking.config").BakeConfig
    schema = world.nodes.BakeDomainOptions.define_schema()
    values = {entry.id: entry.default for entry in schema.inputs}
    given = world.nodes.BakeDomainOptions.execute(**values).result[0]
    made = config.from_mapping({"base": "mini_world", "domain": "x", **given})
    assert made == config(base="mini_world", domain="x")
    assert Path(made.run_folder).name == "domain_lora"
