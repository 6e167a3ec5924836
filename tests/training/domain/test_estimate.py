"""The estimate against what the same steps really take on the mini world."""

from __future__ import annotations

import gc

import pytest
import torch
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.training.domain import estimate as module
from indomain_guidance.training.domain import trainee as parts
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.domain.estimate import estimate, trace_unet
from indomain_guidance.training.engine import tracing
from indomain_guidance.training.prior.opening import open_mini_world

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base():
    return open_mini_world()


def config(**changes):
    return TrainConfig(**{"base": "mini_world", "data": ("x",), "resolution": 64, "batch_size": 8, **changes})


def one_step(trainee, setting):
    """A training step of this configuration, and what must live through it."""
    x, t = torch.randn(setting.batch_size, 4, 8, 8), torch.arange(setting.batch_size)
    optimizer = torch.optim.AdamW(trainee.named_trainable().values())
    average = [parameter.detach().clone() for parameter in trainee.named_trainable().values()]

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
            output = trainee.unet(x, t)
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [parameter.detach() for parameter in trainee.named_trainable().values()], 0.1)

    step()
    return step, optimizer, average


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "precision": "bf16"}], ids=str)
def test_memory_is_what_torchs_tracker_sees(changes, base):
    """torch's memory tracker follows every tensor of a real step; the estimate adds the waiting base to that."""
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker").MemTracker()
    setting = config(**changes)
    found = estimate(base, setting)
    trainee = parts.start_model(base, gradient_checkpointing=setting.gradient_checkpointing)
    step, optimizer, average = one_step(trainee, setting)
    tracker.track_external(trainee.unet, optimizer, *average)
    with tracker:
        step()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    peak = next(value for name, value in snapshot.items() if "total" in str(name).lower())
    assert 0.95 < (found.peak - found.parts["the prior"]) / peak < 1.15


def test_counts_what_each_choice_costs(base):
    def of(**changes):
        return estimate(base, config(sample_every=0, **changes), 100)

    all_of_it, low_rank = of(), of(train="low_rank", rank=8)
    additions = config(train="low_rank", rank=8).additions
    trainee = parts.start_model(base, "cached", "low_rank", additions=additions)
    assert low_rank.trainable == sum(one.numel() for one in trainee.named_trainable().values())
    assert (
        all_of_it.trainable
        == all_of_it.parameters
        == sum(p.numel() for p in parts.start_model(base).named_trainable().values())
    )
    assert of(optimizer="adamw8bit").parts["optimizer"] * 4 == all_of_it.parts["optimizer"] == 8 * all_of_it.trainable
    assert (
        of(ema=0.0).parts["average"] == 0
        and of(file_dtype="fp32").disk["for the finished file"]
        == 2 * all_of_it.disk["for the finished file"]
        == 4 * all_of_it.parameters
    )
    lora = of(form="full", train="low_rank", rank=8)
    assert lora.disk["for the finished file"] == 2 * lora.trainable < all_of_it.disk["for the finished file"] / 4
    assert of(accumulation=4).peak > all_of_it.peak > low_rank.peak
    assert of(batch_size=16).parts["activations"] == 2 * all_of_it.parts["activations"]
    assert (
        of(random_crops=3, flip=True).disk["of cached latents"]
        == 6 * all_of_it.disk["of cached latents"]
        == 6 * 100 * 2 * 4 * 4 * 8 * 8
    )
    assert 0 < of(gradient_checkpointing=True).parts["activations"] < all_of_it.parts["activations"] / 2
    assert all_of_it.preview == 0 and estimate(base, config()).preview > 0


def test_says_what_to_change_when_it_does_not_fit(base, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda device: 60 * 2**20)
    found = estimate(base, config(sample_every=0))
    text = found.to_text()
    assert "trains 2.85 M of 2.85 M parameters (100.0 %)" in text
    # What the weights and all that goes with them take, no batch lowers.
    fixed = sum(found.parts.values()) - found.parts["activations"]
    assert f"than the 60.0 MiB available, and {tracing.size_text(fixed)} of it are needed whatever the batch" in text
    assert text.endswith("try train self_attention or low_rank, optimizer adamw8bit, ema 0.")
    monkeypatch.setattr(module, "free_bytes", lambda device: fixed)
    text = estimate(base, config(sample_every=0)).to_text()
    assert "available: try gradient_checkpointing, batch_size 1 with accumulation 8, train self_attention" in text


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"train": "self_attention", "ema": 0.0}, "try train low_rank, optimizer adamw8bit."),
        ({"train": "low_rank", "optimizer": "adamw8bit", "ema": 0.0}, "try another device."),
    ],
    ids=["self_attention", "all done"],
)
def test_advice_names_only_what_is_left_to_lower(changes, told):
    assert module._advice(9, 8, 7, config(**changes)).endswith(told)
    assert module._advice(7, 7, 7, config(**changes)) == module._advice(9, 8, None, config(**changes)) == ""


def test_traces_stable_diffusion_without_its_memory():
    """SD 1.5 at 512 px: the published 859.5 M parameters."""
    config = UNetConfig(
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=(2, 2, 2, 2),
        transformer_depth=(1, 1, 1, 1, 1, 1, 0, 0),
        transformer_depth_middle=1,
        transformer_depth_output=(1,) * 9 + (0,) * 3,
        context_dim=768,
        num_heads=8,
    )
    trace = trace_unet(lambda: UNet(config), 1, 64, 77, torch.float32, checkpointing=False)
    assert trace.parameters == trace.trainable == 859_520_964
    assert 1 < trace.kept / 2**30 < 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_stays_in_memory_of_a_trace(checkpointing):
    """A server estimates before every run."""
    from torch._subclasses.fake_tensor import FakeTensor

    def alive() -> int:
        gc.collect()
        return sum(type(one) is FakeTensor for one in gc.get_objects())

    config, before = (
        UNetConfig(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=(1, 1),
            transformer_depth=(0, 1),
            num_heads=2,
            transformer_depth_middle=1,
            transformer_depth_output=(1, 0, 0, 0),
            context_dim=32,
        ),
        alive(),
    )
    trace_unet(lambda: UNet(config), 1, 8, 7, torch.float32, checkpointing)
    assert alive() == before
