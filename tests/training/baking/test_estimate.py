"""The estimate of a baking against what the same steps really take on the mini world."""

from __future__ import annotations

import weakref

import pytest
import torch
from indomain_guidance.guidance.schedules import Constant
from indomain_guidance.training.baking import estimate as module
from indomain_guidance.training.baking.config import BakeConfig
from indomain_guidance.training.baking.estimate import estimate_baking
from indomain_guidance.training.baking.learner import BakeLearner
from indomain_guidance.training.baking.prompts import EncodedTexts
from indomain_guidance.training.baking.states import OwnSamples, States
from indomain_guidance.training.baking.teacher import Teacher
from indomain_guidance.training.baking.terms import BakedTerm
from indomain_guidance.training.domain.trainee import start_model
from indomain_guidance.training.engine.processes import OneProcess
from indomain_guidance.training.prior.opening import open_mini_world
from indomain_guidance.training.prior.prior import ImageSize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .conftest import domain_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base():
    return open_mini_world()


@pytest.fixture(scope="module")
def terms(base):
    return [BakedTerm("domain", Constant(1.5), domain_of(base))]


def config(**changes):
    fields = {"base": "mini_world", "domain": "x", "resolution": 64, "batch_size": 8, "states": ("own",), **changes}
    return BakeConfig(device="cpu", precision=fields.pop("precision", "fp32"), **fields)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made in it take at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in before | self.alive.keys():
                self.alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, id(storage))
        self.most = max(self.most, sum(self.alive.values()))
        return made


@pytest.mark.parametrize(
    "changes", [{}, {"layers": "attention", "gradient_checkpointing": True}, {"train": "all"}], ids=str
)
def test_memory_is_what_a_step_takes(changes, base, terms):
    """Every tensor of a real step is followed; beside them lie the weights, the optimizer's numbers, the average."""
    setting = config(**changes)
    found = estimate_baking(base, setting, terms)
    trainee = start_model(
        base, "full", setting.train, additions=setting.additions, gradient_checkpointing=setting.gradient_checkpointing
    )
    before = trainee.unet if setting.train == "low_rank" else base.load_unet()
    teacher = Teacher(base, before, terms)
    latents, places = torch.randn(16, 4, 8, 8), torch.arange(16) % 2
    own = {"own": OwnSamples(latents, places, torch.full((16,), -1), ImageSize((64, 64)))}
    states = States(setting, base, EncodedTexts.of(base, ["a red seven"]), None, own)
    learner = BakeLearner(setting, trainee, teacher, states, OneProcess("cpu"))
    learner.take_step()  # the optimizer's numbers are there from now on
    with Peak() as peak:
        learner.take_step()
    stays = {name: size for name, size in found.parts.items() if name not in ("gradients", "activations")}
    assert 0.9 < (found.peak - sum(stays.values())) / peak.most < 1.2
    assert stays["weights"] == sum(4 * one.numel() for one in trainee.unet.parameters())
    assert stays["average"] == sum(4 * one.numel() for one in learner.values().values())
    numbers = [one for state in learner.optimizer.state.values() for one in state.values() if one.ndim]
    assert stays["optimizer"] == sum(4 * one.numel() for one in numbers)


def test_counts_what_each_choice_costs(base, terms):
    of = lambda **changes: estimate_baking(base, config(**changes), terms, 100)  # noqa: E731
    usual, every = of(), of(train="all")
    trained = start_model(base, "full", "low_rank", additions=config().additions).named_trainable().values()
    assert usual.trainable == sum(one.numel() for one in trained) < every.trainable == every.parameters
    assert usual.disk["for the finished file"] == 2 * usual.trainable
    assert usual.disk["of cached latents"] == 100 * 2 * 4 * 4 * 8 * 8
    # With all weights the guidance has a prior of its own.
    assert every.parts["the guidance's models"] - usual.parts["the guidance's models"] == 4 * every.parameters
    assert of(precision="bf16").parts["the guidance's models"] * 2 == usual.parts["the guidance's models"]
    assert of(ema=0.0).parts["average"] == 0 < usual.parts["average"]
    assert of(gradient_checkpointing=True).peak < usual.peak < every.peak


def test_says_what_to_change_when_it_does_not_fit(base, terms, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda device: 2**20)
    told = [
        estimate_baking(base, config(**changes), terms).advice
        for changes in ({"train": "all"}, {"gradient_checkpointing": True, "batch_size": 1})
    ]
    assert told == [
        "This is more than the 1.0 MiB available: try train low_rank, gradient_checkpointing, batch_size 1.",
        "This is more than the 1.0 MiB available: try another device.",
    ]
    monkeypatch.setattr(module, "free_bytes", lambda device: None)
    assert estimate_baking(base, config(), terms).advice == ""
