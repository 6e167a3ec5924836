"""The adapter: what a step draws, what it shows, what it calls its tensors."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.training.adaptation.adapter import Adapter, check_generator, generator_hash
from indomain_guidance.training.adaptation.critic import make_objective
from indomain_guidance.training.adaptation.layers import describe_trained, learning_names, trained_names
from indomain_guidance.training.engine.settings import ConfigProblem


@pytest.fixture
def adapter(tiny_adaptation, tmp_path):
    """An adapter against the critic of nothing; fields of its configuration can be replaced."""

    def make(generator=None, encode=tiny_adaptation.shrink, **changes):
        config = tiny_adaptation.tiny_config(tmp_path, **changes)
        objective = make_objective(config, tiny_adaptation.tiny_critic(), encode, "cpu")
        return Adapter(config, generator or tiny_adaptation.tiny_generator(), objective, encode)

    return make


def test_what_a_step_draws_depends_on_its_number_alone(adapter):
    one, two = adapter(), adapter(batch_size=3)
    for _ in range(2):
        one.take_step()
    one_z, two_z = one._latents("latents", 2)[0], two._latents("latents", 3)[0]
    assert not torch.equal(one_z, two_z[:2])  # another step
    two.step = 2
    assert torch.equal(one_z, two._latents("latents", 3)[0][:2])  # each sample has its own key
    again = adapter()
    again.step = 2
    first, second = one._draws(), again._draws()
    assert torch.equal(first.t, second.t) and torch.equal(first.noise["sds"], second.noise["sds"])
    again.step = 3
    assert not torch.equal(first.noise["sds"], again._draws().noise["sds"])


def test_terms_of_one_noise_share_it_and_others_do_not(adapter):
    shared = adapter(directional=1.0)
    noise = shared._share(shared._draws()).noise
    assert noise["sds"] is noise["directional"]
    apart = adapter(directional=1.0, mode="sgf")
    noise = apart._share(apart._draws()).noise
    assert not torch.equal(noise["sds"], noise["directional"])


def test_what_is_shown_is_the_average_and_leaves_the_weights_alone(adapter):
    one = adapter(ema=0.9, train="all", freeze_bias=False)
    for _ in range(3):
        one.take_step()
    before = {name: value.clone() for name, value in one.generator.state_dict().items()}
    with one.shown() as generator:
        for name, value in generator.named_parameters():
            assert torch.equal(value, one.average.average[name])
        assert torch.allclose(generator.mapping.w_avg, generator.mean_style())
        assert not torch.equal(generator.synthesis.b4.const, before["synthesis.b4.const"])
    assert all(torch.equal(value, before[name]) for name, value in one.generator.state_dict().items())
    with pytest.raises(RuntimeError, match="broken off"), one.shown():
        raise RuntimeError("broken off")
    assert all(torch.equal(value, before[name]) for name, value in one.generator.state_dict().items())


def test_the_mean_style_is_the_files_own_while_the_mapping_stays(adapter, tiny_adaptation):
    source = tiny_adaptation.tiny_generator()
    source.mapping.w_avg += 1.0  # no mean of its styles
    for layers, stays in ((1, True), (0, False)):
        one = adapter(source, train="all", layers=layers)
        one.take_step()
        with one.shown() as generator:
            assert torch.equal(generator.mapping.w_avg, source.mapping.w_avg) == stays


def test_the_learning_rate_follows_its_schedule(adapter):
    one = adapter(steps=4, schedule="linear", warmup=2, learning_rate=0.01)
    assert [round(one.take_step().rate, 6) for _ in range(4)] == [0.005, 0.01, 0.01, 0.005]


def test_gradients_are_clipped(adapter):
    one, two, used = adapter(clip=1e-3), adapter(), []
    one.optimizer.register_step_pre_hook(lambda *_: used.extend(value.grad.norm() for value in one.parameters.values()))
    assert one.take_step().gradient_norm == pytest.approx(two.take_step().gradient_norm)  # as it was before
    assert float(torch.stack(used).norm()) == pytest.approx(1e-3, rel=1e-3)
    assert all(value.grad is None for value in one.parameters.values())  # they need not outlive the step


def test_what_learns_is_counted(tiny_adaptation):
    generator = tiny_adaptation.tiny_generator()
    text = describe_trained(generator, trained_names(generator, "released", True), 3)
    assert text.startswith("trains 12 of 42 tensors, ")
    assert "those of the 3 styles that matter most" in text


def test_layer_selection_names_no_tensor_that_it_cannot_choose(tiny_adaptation):
    generator = tiny_adaptation.tiny_generator()
    names = trained_names(generator, "all", False)
    able = learning_names(generator, names, 2)
    assert "synthesis.b4.const" not in able and "synthesis.b8.conv1.weight" in able
    assert describe_trained(generator, names, 2).startswith(f"trains {len(able)} of 42 tensors")


def test_a_generator_is_known_by_its_weights_and_architecture(tiny_adaptation):
    one = tiny_adaptation.tiny_generator()
    assert generator_hash(one) == generator_hash(tiny_adaptation.tiny_generator())
    assert generator_hash(one) != generator_hash(tiny_adaptation.tiny_generator(1))
    assert generator_hash(one) != generator_hash(tiny_adaptation.tiny_generator(conv_clamp=256.0))


@pytest.mark.parametrize(
    "changes, world, told",
    [
        ({"batch_size": 3}, 2, "a multiple of the 2 processes"),
        ({"method": "vsd"}, 2, "trains nothing of its own for 2 processes, found vsd"),
        ({"label": 1}, 1, "an unconditional one"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_adaptation, tmp_path, changes, world, told):
    with pytest.raises(ConfigProblem, match=told):
        check_generator(tiny_adaptation.tiny_config(tmp_path, **changes), tiny_adaptation.tiny_generator(), world)
    without = tiny_adaptation.tiny_generator(use_noise=False)
    with pytest.raises(ConfigProblem, match="noise: expected a generator with noise inputs"):
        check_generator(tiny_adaptation.tiny_config(tmp_path, noise="random"), without)
    tall = tiny_adaptation.tiny_generator(first_size=(4, 2))
    with pytest.raises(ConfigProblem, match="generator: expected one of square images, .* found 8 x 16 px"):
        check_generator(tiny_adaptation.tiny_config(tmp_path), tall)
