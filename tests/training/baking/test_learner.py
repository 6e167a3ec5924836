"""One step of a baking against its formula: the squared distance to the guidance, each latent at its own prompt."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.networks.low_rank import low_rank_layers, without_additions
from indomain_guidance.guidance.schedules import Constant
from indomain_guidance.training.baking.learner import BakeLearner
from indomain_guidance.training.baking.prompts import EncodedTexts
from indomain_guidance.training.baking.states import States
from indomain_guidance.training.baking.teacher import Teacher
from indomain_guidance.training.baking.terms import BakedTerm
from indomain_guidance.training.domain.losses import min_snr_weight
from indomain_guidance.training.domain.trainee import start_model
from indomain_guidance.training.engine.processes import OneProcess

from .conftest import PROMPTS, unet_of


@pytest.fixture
def learner(settings, base, domain, latents):
    """learner(**changes): before its first step, with additions that already say something."""

    def make(**changes):
        config = settings(states=("pictures",), batch_size=6, empty_share=0.3, **changes)
        trainee = start_model(
            base, "full", config.train, additions=config.additions, gradient_checkpointing=config.gradient_checkpointing
        )
        generator = torch.Generator().manual_seed(4)
        for layer in low_rank_layers(trainee.unet).values():
            torch.nn.init.normal_(layer.lora_up, std=0.02, generator=generator)
        before = trainee.unet if config.train == "low_rank" else unet_of(base)
        teacher = Teacher(base, before, [BakedTerm("domain", Constant(1.5), domain)])
        states = States(config, base, EncodedTexts.of(base, PROMPTS), latents, {}, PROMPTS)
        return BakeLearner(config, trainee, teacher, states, OneProcess("cpu"))

    return make


@pytest.mark.parametrize("changes", [{}, {"min_snr_gamma": 2.0}, {"train": "all"}], ids=str)
def test_the_loss_of_a_step_and_its_gradients(changes, learner, base, domain):
    ours = learner(**changes)
    found = ours.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in ours.parameters.items()}
    ours.optimizer.zero_grad()
    expected, texts, places = torch.zeros(()), ours.states.texts, []
    batches = ours.states.batches(0)
    for batch in batches:
        prompted = texts.context[batch.places]
        with torch.no_grad(), without_additions(ours.trainee.unet):
            empty = texts.context[[0] * len(batch.places)]
            target = ours.teacher.target(
                batch.noisy, batch.timesteps, {"context": empty}, {"context": prompted}, batch.sizes
            )
        output = ours.trainee.unet(batch.noisy, batch.timesteps, context=prompted)
        weight = min_snr_weight("epsilon", base.schedule.alphas_cumprod[batch.timesteps], ours.config.min_snr_gamma)
        expected = expected + (weight * (output - target).square().mean((1, 2, 3))).sum() / 6
        places += batch.places.tolist()
    expected.backward()
    assert 0 in places and len(set(places)) > 1
    assert float(found) == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in ours.parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients(learner):
    """The guidance's passes leave the additions out; the passes that are computed again must not."""
    found = []
    for checkpointing in (False, True):
        ours = learner(gradient_checkpointing=checkpointing)
        ours.backward()
        found.append({name: parameter.grad for name, parameter in ours.parameters.items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-7)
    assert any(gradient.any() for name, gradient in found[0].items() if "lora_down" in name)


def test_a_step_of_two_shapes_is_one_loss(learner, monkeypatch):
    """Its mean over latents is that of both shapes together, whatever the batches' own sizes."""
    ours = learner()
    (whole,) = ours.states.batches(0)
    together = float(ours.backward())
    monkeypatch.setattr(ours.states, "batches", lambda step: [*whole.split(4)])
    assert float(ours.backward()) == pytest.approx(together, rel=1e-5)
