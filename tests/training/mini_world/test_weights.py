"""The shipped weights are what their data sheet says, on samples small enough for every test run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance import presets
from indomain_guidance.guidance.files import (
    FileProblem,
    prior_content_hash,
    read_domain_file,
    read_metadata,
    read_state_dict,
    write_safetensors,
)
from indomain_guidance.guidance.schedules import Interval
from indomain_guidance.training.mini_world import assets, render
from indomain_guidance.training.mini_world.prompts import cfg_of, draw_prompts, sample_prompts
from indomain_guidance.training.mini_world.recipe import quality

pytestmark = pytest.mark.slow

# The generator is called as the domain model of the same pictures, in another folder.
FILES = sorted(assets.weights_dir().rglob("*.safetensors"))


@pytest.fixture(scope="module")
def world():
    return assets.load_mini_world()


@pytest.fixture(scope="module")
def judge_model():
    return assets.load_classifier()


def test_the_files_are_half_precision_and_30_mb_together():
    assert {file.stem for file in FILES} == {
        "autoencoder",
        "classifier",
        "classifier_held_out",
        "prior_unet",
        "text_encoder",
        "mini-handwriting",
        "mini-narrow-handwriting",
    }
    assert assets.generators_dir().joinpath("mini-handwriting.safetensors").stat().st_size <= 6_000_000
    assert sum(file.stat().st_size for file in FILES) <= 30_000_000
    for file in FILES:
        tensors = read_state_dict(file)
        assert all(tensor.dtype == torch.float16 and bool(tensor.isfinite().all()) for tensor in tensors.values()), file
        assert sum(tensor.numel() for tensor in tensors.values()) <= 3_500_000, file


@pytest.mark.parametrize("name", ["mini-handwriting", "mini-narrow-handwriting"])
def test_domain_files_say_where_they_come_from(name):
    path = assets.domain_unets_dir() / f"{name}.safetensors"
    state_dict, metadata = read_domain_file(path, latent_format="mini_world")
    prior, _ = assets.load_prior()
    assert metadata.prior_hash == prior_content_hash(prior)
    assert metadata.null_text == "cached" and metadata.dataset_size == 8000 and metadata.steps > 0
    assert not any("to_k" in key and "attn2" in key for key in state_dict)


def test_the_autoencoder_keeps_digits_of_both_worlds(judge_model):
    autoencoder, _ = assets.load_autoencoder()
    found = quality.autoencoder_quality(autoencoder, judge_model, count=100)
    assert min(found["psnr_rendered"], found["psnr_handwritten"]) >= 26.0
    for world_name in ("rendered", "handwritten"):
        assert found[f"accuracy_{world_name}_digit"] >= 0.95
        assert all(found[f"accuracy_{world_name}_{colour}"] >= 0.99 for colour in ("ink", "ground"))
        assert found[f"accuracy_lost_{world_name}_digit"] <= 0.02


def test_latents_have_unit_deviation_and_decode_to_their_image(world):
    images = render.rendered(64, torch.Generator().manual_seed(0), held_out=True).images
    latents = world.autoencoder.encode(images)[0] * world.scale
    assert float(latents.std()) == pytest.approx(1.0, abs=0.1)
    assert quality.psnr(world.decode(latents), images) > 26.0


def test_the_prior_draws_what_the_prompt_says(world, judge_model):
    prompts = draw_prompts(60, render.colour_pairs(), seed=1)
    pictures, samples = sample_prompts(world, cfg_of(world, 2.0), prompts, seed=1)
    score = quality.score(judge_model, pictures, prompts)
    assert samples == 2.0
    assert score["digit"] >= 0.9 and score["ink"] >= 0.9 and score["ground"] >= 0.9
    assert score["in_domain"] <= 0.15


def test_multi_guidance_writes_by_hand_what_the_prompt_says(world, judge_model):
    """The claim of arXiv 2312.08195 in small: nearer to it than the prior, and it obeys, unlike the domain model."""
    prompts = draw_prompts(40, render.domain_pairs("handwriting"), seed=2)
    domain = world.domain("mini-handwriting")
    weights = Interval(1.5, 0.0, 1.0), 3.0
    guided = lambda uncond, cond: presets.in_domain(world.prior, domain, uncond, cond, *weights)  # noqa: E731
    alone = lambda uncond, cond: presets.domain_guidance(world.prior, domain, uncond, scale=1.0)  # noqa: E731
    scores = {
        name: quality.score(judge_model, sample_prompts(world, of, prompts, seed=2)[0], prompts)
        for name, of in (("prior", cfg_of(world, 2.0)), ("domain", alone), ("guided", guided))
    }
    assert scores["guided"]["distance"] < 0.5 * scores["prior"]["distance"]
    assert scores["guided"]["in_domain"] > scores["prior"]["in_domain"] + 0.4
    assert scores["guided"]["digit"] > scores["domain"]["digit"] + 0.4


def test_a_domain_model_takes_no_text(world):
    domain = world.domain("mini-handwriting")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    told = domain(x, 1.0, context=world.encode_text(["a red seven", "a blue two"]))
    assert torch.equal(told, domain(x, 1.0))


def test_the_generator_draws_every_digit_by_hand_in_grey(judge_model):
    found = quality.generator_quality(assets.load_generator(), judge_model, count=600)
    pictures = quality.generated(assets.load_generator(), 10)
    assert torch.equal(pictures, pictures[:, :1].expand(-1, 3, -1, -1))
    shares, diversity = ([found[f"{name}/{digit}"][0] for digit in range(10)] for name in ("share", "diversity"))
    assert found["in_domain"][0] >= 0.95 and min(shares) >= 0.04 and max(shares) <= 0.2
    assert found["distance"][0] <= 15 and min(diversity) >= 0.7


def test_files_that_lack_or_break_something_are_named(tmp_path, monkeypatch):
    shipped = assets.weights_dir()
    monkeypatch.setattr(assets, "weights_dir", lambda: tmp_path)
    weights, metadata = (read(shipped / "text_encoder.safetensors") for read in (read_state_dict, read_metadata))
    del metadata["token_ids"]
    write_safetensors(tmp_path / "text_encoder.safetensors", weights, metadata)
    with pytest.raises(FileProblem, match="text_encoder.safetensors: .* with token_ids in its metadata"):
        assets.load_text_encoder()
    with pytest.raises(FileProblem, match="classifier.safetensors"):
        assets.load_classifier()


def test_loading_the_weights_needs_neither_the_recipe_nor_anything_else_of_training():
    names = ("assets", "classifier", "distances", "first_runs", "pictures", "prompts", "render", "tokens")
    code = (
        "import importlib, importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('bootstrap', sys.argv[1])\n"
        "bootstrap = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(bootstrap)\n"
        "bootstrap.register()\n"
        f"for name in {names}:\n"
        "    importlib.import_module('indomain_guidance.training.mini_world.' + name)\n"
        "print(*sorted(name for name in sys.modules if name.startswith('indomain_guidance.training.')))"
    )
    bootstrap = Path(__file__).resolve().parents[3] / "training" / "bootstrap.py"
    found = subprocess.run([sys.executable, "-c", code, str(bootstrap)], capture_output=True, text=True, check=True)
    room = "indomain_guidance.training.mini_world"
    assert set(found.stdout.split()) == {room, *(f"{room}.{name}" for name in names)}
