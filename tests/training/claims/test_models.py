"""Models: names, stops of one run, adapters, strengths, and the production trainer behind them."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.files import read_state_dict
from indomain_guidance.training.claims.keeping import trained_weights
from indomain_guidance.training.claims.models import Models
from indomain_guidance.training.claims.points import ModelSpec
from indomain_guidance.training.engine.run import Result
from indomain_guidance.training.mini_world import assets

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world():
    return assets.load_mini_world()


def test_lengths_of_one_run_share_it_and_everything_else_does_not(world, tmp_path):
    models = Models(tmp_path, world)
    specs = [
        ModelSpec("full", "handwriting", 100),
        ModelSpec("full", "handwriting", 300),
        ModelSpec("full", "handwriting", 100, "a digit"),
        ModelSpec("full", "narrow", 100),
        ModelSpec("full", "handwriting", 100, seed=1),
        ModelSpec("low_rank", "handwriting", 100),
        ModelSpec("domain", "handwriting", 100),
    ]
    assert len({spec.run_name for spec in specs}) == len(specs) - 1 and specs[0].run_name == specs[1].run_name
    assert len({str(models.facts(spec)) for spec in specs}) == len(specs) - 1
    assert models.file(ModelSpec("shipped", "narrow")).is_file()
    assert Models(tmp_path, world, batch=8).facts(specs[0]) != models.facts(specs[0])


def test_a_stop_of_a_longer_run_is_the_shorter_run(world, tmp_path):
    """Trained to 1 and on to 2 steps, and to 2 at once: the same bits; and back to 1 after 2 as well."""
    stops, straight = (Models(tmp_path / name, world, images=8, batch=2) for name in ("stops", "straight"))
    short, long = ModelSpec("low_rank", "narrow", 1, "a digit"), ModelSpec("low_rank", "narrow", 2, "a digit")
    first, second = (read_state_dict(stops.file(spec)) for spec in (short, long))
    at_once, back = (read_state_dict(straight.file(spec)) for spec in (long, short))
    assert first.keys() == second.keys() == at_once.keys()
    assert all(torch.equal(second[key], at_once[key]) for key in second)
    assert all(torch.equal(first[key], back[key]) for key in first)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = world.encode_text(["a digit"])
    with torch.no_grad():
        before, after = world.prior(x, 5.0, context=context), stops.denoiser(long)(x, 5.0, context=context)
    assert not torch.equal(before, after)
    assert float((before - after).abs().max()) < 0.5  # two steps of an adapter move the prior a little


def test_wanted_stops_are_kept_in_passing(world, tmp_path):
    one, two = (ModelSpec("low_rank", "narrow", steps, "a digit") for steps in (1, 2))
    others = [
        ModelSpec("shipped", "narrow"),
        ModelSpec("low_rank", "narrow", 1),
        ModelSpec("full", "narrow", 1, "a digit"),
    ]
    models = Models(tmp_path, world, images=8, batch=2, wanted=[two, one, two, *others])
    models.file(two)
    assert sorted(path.stem.rpartition("-")[2] for path in tmp_path.glob("*.safetensors")) == ["1", "2"]
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name.endswith("-to-1")] == []


def test_an_interrupted_training_says_so_and_leaves_no_model(tmp_path):
    def stopped(place, step):
        return Result("stopped", 1, None, place)

    with pytest.raises(KeyboardInterrupt, match="stopped at step 1"):
        trained_weights(tmp_path, "run", 3, stopped)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_strength_goes_from_the_prior_to_the_trained_model_and_on(world, tmp_path, kind):
    models, spec = Models(tmp_path, world, images=8, batch=2), ModelSpec(kind, "narrow", 2, "a digit")
    prior, trained = world.prior.unet.state_dict(), models.prior_with(spec)
    assert any(not torch.equal(prior[key], trained[key]) for key in prior)
    if kind == "full":
        written = read_state_dict(models.file(spec))
        for key in prior:
            torch.testing.assert_close(trained[key], written[key].float(), atol=1e-6, rtol=1e-6)
    for strength in (0.0, 0.5, 1.5):
        dialled = models.prior_with(spec, strength)
        for key, weight in prior.items():
            torch.testing.assert_close(dialled[key], weight + strength * (trained[key] - weight), atol=1e-6, rtol=1e-5)
