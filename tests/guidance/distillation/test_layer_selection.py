"""Layer selection on a real StyleGAN2 of small size."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.distillation.critic import Critic
from indomain_guidance.guidance.distillation.directional import Directional
from indomain_guidance.guidance.distillation.layer_selection import rank_layers, select_layers
from indomain_guidance.guidance.distillation.methods import make_method
from indomain_guidance.guidance.distillation.objective import Objective
from indomain_guidance.guidance.distillation.sds import SDS
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.networks.stylegan2 import random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig


@pytest.fixture(scope="module")
def generator():
    config = GeneratorConfig(resolution=16, z_dim=8, w_dim=8, mapping_layers=2, channels=(8, 8, 8))
    return random_generator(config, 0)


@pytest.fixture
def critic(gaussian, schedule, mean):
    return Critic.cfg(gaussian, mean(0, 0, 0, 0), mean(1, -1, 0, 2), 7.5, schedule=schedule, source=mean(0, 1, 0, 0))


def latents(generator):
    return generator.map(torch.randn(1, 8, generator=torch.Generator().manual_seed(1)))


def select(generator, objective, encode, k, seed=3, **options):
    randomness = torch.Generator().manual_seed(seed)
    return select_layers(
        generator, latents(generator), objective, encode, k, step=0, steps=10, randomness=randomness, **options
    )


def test_scores_are_the_size_of_one_descent_step(generator, critic, encode):
    objective = Objective(critic, SDS(), latent_clamp=1.0, image_quantile=0.95)

    def gradient(images):
        randomness = torch.Generator().manual_seed(3)
        return objective.image_gradient(images, None, encode, step=0, steps=10, generator=randomness)[0]

    ws = latents(generator)
    scores = rank_layers(generator.synthesize, ws, gradient)
    moved = ws.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([moved], lr=0.01)
    images = generator.synthesize(moved)
    objective.backward(images, None, encode, step=0, steps=10, generator=torch.Generator().manual_seed(3))
    optimizer.step()
    torch.testing.assert_close(scores, (moved - ws).abs().mean((0, 2)).detach(), rtol=1e-3, atol=1e-8)
    generator.zero_grad(set_to_none=True)
    assert scores.shape == (generator.num_ws,) and float(scores.min()) > 0


def test_the_layers_of_the_styles_that_move_most_are_chosen(generator, critic, encode):
    objective = Objective(critic, SDS(), [Directional()])  # which takes no part: no frozen image is needed
    convolutions = tuple(name for name in generator.style_layers if "torgb" not in name)

    def gradient(images):
        randomness = torch.Generator().manual_seed(3)
        return objective.image_gradient(images, None, encode, step=0, steps=10, generator=randomness, regularize=False)[
            0
        ]

    scores = rank_layers(generator.synthesize, latents(generator), gradient)
    ranked = sorted(convolutions, key=lambda name: -float(scores[generator.ws_index[name]]))
    for k in (1, 2, 3):
        assert set(select(generator, objective, encode, k)) == set(ranked[:k])
    assert select(generator, objective, encode, 99) == convolutions
    with_colours = select(generator, objective, encode, 1, among=generator.style_layers)
    assert len({generator.ws_index[name] for name in with_colours}) == 1
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_only_layers_with_something_to_train_are_ranked(generator, critic, encode):
    """Whichever moves most: one of which nothing learns would take a place, or all of them, for nothing."""
    objective = Objective(critic, SDS())
    convolutions = [name for name in generator.style_layers if "torgb" not in name]
    for still in convolutions:
        own = generator.synthesis.get_submodule(still)
        own.requires_grad_(False)
        try:
            for k in (1, 2, len(convolutions) - 1, 99):
                chosen = select(generator, objective, encode, k)
                assert still not in chosen and len(chosen) == min(k, len(convolutions) - 1)
        finally:
            own.requires_grad_(True)
    with pytest.raises(GuidanceError, match="layers to choose from, got one of which no layer learns"):
        select(generator, objective, encode, 1, among=["mapping.fc0"])


def test_given_timesteps_are_shared_and_comparing_methods_get_their_frozen_image(generator, critic, encode):
    objective = Objective(critic, make_method("dds", critic))
    t = torch.tensor([250])
    assert len(select(generator, objective, encode, 2, t=t, frozen=generator)) == 2
    with pytest.raises(GuidanceError, match="frozen generator's images"):
        select(generator, objective, encode, 2, t=t)
    with pytest.raises(GuidanceError, match="at least 1 layer"):
        select(generator, objective, encode, 0)
