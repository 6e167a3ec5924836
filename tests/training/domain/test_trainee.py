"""Trainees: which weights learn, what they start as, and that the prior is never touched."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.files import prior_content_hash
from indomain_guidance.guidance.null_text import load_unet
from indomain_guidance.training.domain import trainee as parts
from indomain_guidance.training.prior.opening import open_checkpoint, open_mini_world
from indomain_guidance.training.prior.prior import ImageSize


@pytest.fixture(scope="module")
def base():
    return open_mini_world()


@pytest.fixture(scope="module")
def probe(base):
    """Inputs, and what the prior says about them on the empty prompt."""
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([900.0, 100.0])
    with torch.no_grad():
        return x, t, base.load_unet()(x, t, context=base.null_context.tensor)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("train", parts.TRAINS)
@pytest.mark.parametrize("form, bound", [("cached", 1e-5), ("full", 1e-5), ("constant", 0.1)])
def test_starts_as_the_prior_and_trains_only_what_it_says(form, bound, train, base, probe):
    trainee = parts.start_model(
        base, form, train, additions={"rank": 4}, constants=zeros(base) if form == "constant" else None
    )
    x, t, expected = probe
    cond = base.conditioning([ImageSize((64, 64))] * 2, trainee.text)
    output = trainee.unet(x, t, **cond)
    assert relative(output.detach(), expected) < (0.5 if form == "constant" else bound)
    before = {name: parameter.detach().clone() for name, parameter in trainee.unet.named_parameters()}
    optimizer = torch.optim.Adam(trainee.named_trainable().values(), lr=0.01)
    for _ in range(2):  # the second reaches lora_down, whose gradient is zero while lora_up is
        optimizer.zero_grad()
        (trainee.unet(x, t, **cond) - 1).square().mean().backward()
        optimizer.step()
    changed = {name for name, parameter in trainee.unet.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(trainee.named_trainable())
    kinds = {"all": "", "self_attention": ".attn1.", "low_rank": ".lora_"}
    assert changed == {name for name in before if kinds[train] in name}
    assert (trainee.text is None) == (form != "full") and trainee.config.null_text == form.replace("full", "none")


def blocks(base):
    return [key.removesuffix(".attn1.to_q.weight") for key in base.unet if key.endswith(".attn1.to_q.weight")]


def zeros(base):
    """Constants that cost no pass of the prior."""
    return {block: torch.zeros(base.unet[f"{block}.attn1.to_out.0.bias"].shape) for block in blocks(base)}


def test_the_prior_stays_as_it_was(base):
    before = prior_content_hash(base.unet)
    trainee = parts.start_model(base, "full", "all")
    with torch.no_grad():
        for parameter in trainee.named_trainable().values():
            parameter.add_(1.0)
    assert prior_content_hash(base.unet) == before


def test_constant_is_measured_and_can_be_given_back(base, probe):
    seen = []
    trainee = parts.start_model(base, "constant", "low_rank", resolution=64, on_probe=lambda *at: seen.append(at))
    assert seen[0] == (1, 56) and seen[-1] == (56, 56)
    x, t, expected = probe
    with torch.no_grad():
        assert relative(trainee.unet(x, t), expected) < 0.1
    assert set(trainee.constants) == set(trainee.null_text_error) == set(blocks(base))
    assert 0 < max(trainee.null_text_error.values()) < 1
    again = parts.start_model(
        base,
        "constant",
        "low_rank",
        constants=trainee.constants,
        null_text_error=trainee.null_text_error,
        on_probe=lambda *_: pytest.fail("probed although the constants are known"),
    )
    assert again.null_text_error == trainee.null_text_error
    pairs = zip(again.unet.state_dict().items(), trainee.unet.state_dict().items())
    assert all(one == other and torch.equal(a, b) for (one, a), (other, b) in pairs)


def test_weights_are_complete_and_merged(base, probe):
    trainee = parts.start_model(base, "cached", "low_rank", additions={"rank": 3})
    generator = torch.Generator().manual_seed(1)
    shapes = {name: one.shape for name, one in trainee.named_trainable().items()}
    averages = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    x, t, _ = probe
    plain = trainee.weights()
    with trainee.using(averages) as unet, torch.no_grad():
        assert not unet.training
        expected = unet(x, t)
    with torch.no_grad():
        found = load_unet(trainee.weights(averages), trainee.config)(x, t)
        own = load_unet(plain, trainee.config)(x, t)
        assert relative(found, expected) < 1e-5 and relative(own, expected) > 1e-2
        assert relative(trainee.unet(x, t), own) < 1e-5 and trainee.unet.training  # back again


def test_low_rank_starts_from_its_seed(base):
    trainees = [parts.start_model(base, "cached", "low_rank", seed=seed) for seed in (0, 0, 1)]
    first, same, other = (trainee.named_trainable() for trainee in trainees)
    name = next(key for key in first if key.endswith("lora_down"))
    assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])


def test_full_takes_its_caption(base):
    trainee = parts.start_model(base, "full", caption="a red seven")
    assert torch.equal(trainee.text.context, base.encode_text(["a red seven"]).context)
    assert torch.equal(parts.start_model(base, "full").text.context, base.null_context.tensor)


@pytest.mark.parametrize("form", parts.FORMS)
def test_sdxl_keeps_its_sizes(form, tiny_checkpoint):
    """Text-free SDXL ignores the pooled text, and sizes stay live; the full form is given the real pooled text."""
    base = open_checkpoint(tiny_checkpoint("sdxl").path)
    trainee = parts.start_model(base, form, "self_attention", constants=zeros(base) if form == "constant" else None)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    small, large = (base.conditioning([ImageSize(size)], trainee.text) for size in ((64, 64), (900, 700)))
    with torch.no_grad():
        outputs = trainee.unet(x, t, **small), trainee.unet(x, t, **large)
        assert relative(*outputs) > 1e-4
        other = dict(small, y=torch.cat([torch.randn(1, 1280), small["y"][:, 1280:]], dim=1))
        ignored = torch.allclose(trainee.unet(x, t, **other), outputs[0], atol=1e-6)
        assert ignored == (form != "full")
        if form != "constant":
            prior = base.load_unet()
            expected = prior(x, t, **base.conditioning([ImageSize((64, 64))], base.null_text))
            assert relative(outputs[0], expected) < 1e-3


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(form="none"), "form to be one of"),
        (dict(train="bias"), "train to be one of"),
        (dict(caption="a cat"), "no caption with the text-free form cached"),
        (dict(train="low_rank", additions={"rank": 0}), "rank of at least 1"),
    ],
)
def test_refuses_nonsense(wrong, says, base):
    with pytest.raises(ValueError, match=says):
        parts.start_model(base, **wrong)
