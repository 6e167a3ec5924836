"""The one command from nothing: every stage with a handful of steps, then again without training anything."""

from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.files import (
    FileProblem,
    prior_content_hash,
    read_domain_file,
    read_metadata,
    read_state_dict,
)
from indomain_guidance.training.mini_world import assets, render
from indomain_guidance.training.mini_world.prompts import cfg_of, draw_prompts, sample_prompts
from indomain_guidance.training.mini_world.recipe import __main__ as command
from indomain_guidance.training.mini_world.recipe import stages as recipe
from indomain_guidance.training.mini_world.recipe import (
    train_autoencoder,
    train_classifier,
    train_domain,
    train_generator,
    train_prior,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The recipe with two steps a stage and little data, and an empty folder in the place of the shipped weights."""
    for module in (train_autoencoder, train_classifier, train_prior, train_domain):
        monkeypatch.setattr(module, "LOOP", replace(module.LOOP, steps=2))
        if hasattr(module, "BATCH"):
            monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(train_classifier, "HELD_OUT_LOOP", replace(train_classifier.HELD_OUT_LOOP, steps=2))
    for name, value in (("PER_KIND", 1), ("CAPTIONS_A_BATCH", 2)):
        monkeypatch.setattr(train_prior, name, value)
    for name in ("SMALL_LOOP", "LOOP"):
        monkeypatch.setattr(train_generator, name, replace(getattr(train_generator, name), steps=2, batch=4))
    some = train_prior.kinds()[::28]
    monkeypatch.setattr(train_prior, "kinds", lambda: some)
    monkeypatch.setattr(render, "TRAIN_ROWS", slice(0, 100))
    monkeypatch.setattr(train_domain, "BLOCKS", 2)
    monkeypatch.setattr(recipe, "STATISTICS_IMAGES", 64)
    monkeypatch.setattr(assets, "weights_dir", lambda: tmp_path / "shipped")
    return tmp_path


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): (read_metadata(path), read_state_dict(path))
        for path in folder.rglob("*.safetensors")
    }


def test_one_command_makes_the_world_from_nothing_and_again_without_training(tiny, monkeypatch, capsys):
    arguments = ["make", "--work", str(tiny / "work")]
    assert command.main(arguments) == 0
    first = contents(tiny / "shipped")
    assert first.keys() == {
        "autoencoder.safetensors",
        "classifier.safetensors",
        "classifier_held_out.safetensors",
        "prior_unet.safetensors",
        "text_encoder.safetensors",
        "domain_unets/mini-handwriting.safetensors",
        "domain_unets/mini-narrow-handwriting.safetensors",
        "generators/mini-handwriting.safetensors",
    }
    assert len(capsys.readouterr().out.splitlines()) == len(first)
    assert all(metadata.get("steps", "2") == "2" for metadata, _ in first.values())

    # What was made fits together and runs.
    world, prompts = assets.load_mini_world(), draw_prompts(4, render.colour_pairs())
    pictures, _ = sample_prompts(world, cfg_of(world, 2.0), prompts, steps=2)
    assert pictures.shape == (4, 3, 64, 64) and bool(pictures.isfinite().all())
    judges = [assets.load_classifier(held_out) for held_out in (False, True)]
    assert not torch.equal(judges[0].feature.weight, judges[1].feature.weight)
    for name in train_domain.FILE_NAMES.values():
        _, metadata = read_domain_file(assets.domain_unets_dir() / f"{name}.safetensors", latent_format="mini_world")
        assert metadata.prior_hash == prior_content_hash(assets.load_prior()[0])
        assert (metadata.steps, metadata.dataset_size) == (2, 100)

    assert first["generators/mini-handwriting.safetensors"][0]["dataset_size"] == "100"
    assert assets.load_generator().config == train_generator.CONFIG

    # Once more: nothing is trained, no latents are encoded again, and the same files come out.
    def must_not_run(*_, **__):
        raise AssertionError("what was finished was made again")

    for optimizer in (torch.optim.AdamW, torch.optim.Adam):
        monkeypatch.setattr(optimizer, "step", must_not_run)
    monkeypatch.setattr(train_prior, "encode_latents", must_not_run)
    assert command.main(arguments) == 0
    again = contents(tiny / "shipped")
    for name, (metadata, tensors) in first.items():
        assert again[name][0] == metadata, name
        assert all(torch.equal(again[name][1][key], tensors[key]) for key in tensors), name


def test_a_stopped_run_leaves_the_shipped_world_alone(tiny, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_prior, "train", stop)
    assert command.main(["make", "--work", str(tiny / "work")]) == 130
    assert "run it again to continue" in capsys.readouterr().err
    assert not (tiny / "shipped").exists()
    assert (tiny / "work" / "weights" / "autoencoder.safetensors").exists()


def test_another_seed_in_the_same_folder_is_refused_in_one_sentence(tiny, capsys):
    train_classifier.train(tiny / "work")
    with pytest.raises(FileProblem, match="seed 5, found 4; use another working folder"):
        train_classifier.train(tiny / "work", seed=1)
    (tiny / "work" / "autoencoder.ckpt").write_bytes(b"torn")
    assert command.main(["make", "--work", str(tiny / "work")]) == 1
    assert "autoencoder.ckpt: expected a file of this recipe" in capsys.readouterr().err


def test_latents_of_another_autoencoder_or_other_pictures_are_made_again(tiny):
    torch.manual_seed(0)
    first, second = (train_autoencoder.Autoencoder(train_autoencoder.CONFIG).eval() for _ in range(2))
    images = torch.randn(2, 3, 64, 64)
    get = lambda model, drawn: train_prior.cached_latents(tiny, "some", model, 1, lambda _: images, drawn)  # noqa: E731
    kept = get(first, "seed 0")
    assert torch.equal(train_prior.cached_latents(tiny, "some", first, 1, None, "seed 0"), kept)
    assert not torch.equal(get(second, "seed 0"), kept)
    with pytest.raises(TypeError):  # asked for other pictures, it draws
        train_prior.cached_latents(tiny, "some", second, 1, None, "seed 1")
