"""What a critic thinks of a fixed picture: the same prompt is known again, another word is noticed."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.training.adaptation.adapt import open_generator
from indomain_guidance.training.adaptation.config import AdaptConfig
from indomain_guidance.training.adaptation.critic import latent_encoder, make_objective, open_critic
from indomain_guidance.training.adaptation.opinion import check_opinion, describe_terms, fixed_picture, opinion
from indomain_guidance.training.engine.settings import ConfigProblem
from indomain_guidance.training.prior.opening import open_prior


@pytest.fixture(scope="module")
def judge():
    """(objective, its opinion) of the mini world on a prompt."""
    prior, generator = open_prior("mini_world"), open_generator("mini_world").generator

    def ask(prompt):
        config = AdaptConfig(generator="mini_world", base="mini_world", prompt=prompt, t_max=900, precision="fp32")
        encode = latent_encoder(prior, 64)
        objective = make_objective(config, open_critic(config, prior, 64, "cpu"), encode, "cpu")
        return objective, opinion(objective, encode, generator, "cpu")

    with torch.inference_mode(False):
        yield ask


def test_another_word_is_noticed_and_the_same_prompt_known_again(judge):
    objective, before = judge("a red seven on a yellow background")
    state = {"origin": before, "terms": describe_terms(objective.critic.guidance)}
    assert check_opinion(*judge("a red seven on a yellow background"), state, "c.ckpt") == []
    moved = {name: tensor * (1 + 1e-4) for name, tensor in before.items()}
    told = check_opinion(objective, moved, state, "c.ckpt")
    assert len(told) == len(before) and all("differ by 1.0e-04" in text for text in told)
    for prompt in ("a red six on a yellow background", "red seven on a yellow background", "a blue three"):
        with pytest.raises(ConfigProblem, match="c.ckpt: expected a run with the same .* whose term 1 at timestep 10"):
            check_opinion(*judge(prompt), state, "c.ckpt")


def test_the_fixed_picture_is_one(tiny_adaptation):
    picture = fixed_picture(tiny_adaptation.tiny_generator(), "cpu")
    assert picture.shape == (1, 3, 16, 16) and float(picture.min()) == -1.0 and float(picture.max()) == 1.0
    tall = tiny_adaptation.tiny_generator(first_size=(4, 2))
    assert fixed_picture(tall, "cpu").shape == (1, 3, 16, 8)
