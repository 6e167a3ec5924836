"""The step loop: what a step draws and computes, and that a state continues it bit for bit."""

from __future__ import annotations

import copy
import math
import sys
from contextlib import closing

import pytest
import torch
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.training.data.problems import DataProblem
from indomain_guidance.training.domain.learner import DomainLearner
from indomain_guidance.training.domain.losses import min_snr_weight
from indomain_guidance.training.domain.previews import preview_dtype
from indomain_guidance.training.engine import optimizers
from indomain_guidance.training.engine.average import ema_decay
from indomain_guidance.training.engine.checkpoints import load_checkpoint, save_checkpoint
from indomain_guidance.training.engine.learner import NonFiniteLoss
from indomain_guidance.training.engine.optimizers import rate_at
from indomain_guidance.training.engine.processes import OneProcess, pick_device, pick_precision, refuse_sharding
from indomain_guidance.training.engine.settings import ConfigProblem

SCHEDULE = NoiseSchedule.scaled_linear()


@pytest.fixture
def learn(tiny_unet, latents):
    """Makes learners of the same UNet and data; closes them."""
    made = []

    def make(config, unet=None, prediction="epsilon", **more):
        made.append(DomainLearner(config, unet or tiny_unet(), latents, SCHEDULE, prediction, prior="p", **more))
        return made[-1]

    yield make
    for learner in made:
        learner.close()


def weights_of(learner):
    return {name: one.detach().clone() for name, one in learner.parameters.items()}


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_step_is_adamw_on_the_weighted_loss_of_its_batch(configure, learn, tiny_unet, monkeypatch):
    """Against the same step written out with plain autograd and torch's AdamW from its formula."""
    # A large eps: Adam would blow rounding up where gradients vanish.
    monkeypatch.setattr(optimizers, "EPS", 1e-3)
    config = configure(clip=0.5, noise_offset=0.1, weight_decay=0.1, warmup=0)
    learner = learn(config, prediction="v_prediction")
    unet = tiny_unet()
    for step in range(3):
        (one,) = learner._load_passes(step)
        abar = SCHEDULE.alphas_cumprod[one.timesteps]
        root, rest = (part.reshape(-1, 1, 1, 1) for part in (abar.sqrt(), (1 - abar).sqrt()))
        output = unet(root * one.latents + rest * one.noise, one.timesteps)
        error = (output - (root * one.noise - rest * one.latents)).square().mean(dim=(1, 2, 3))
        snr = abar / (1 - abar)
        loss = (snr.clamp(max=5.0) / (snr + 1) * error).mean()
        unet.zero_grad()
        loss.backward()
        loss = loss.detach()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in unet.parameters()))
        if step == 0:
            moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in unet.named_parameters()}
        with torch.no_grad():
            for name, p in unet.named_parameters():
                gradient, (m, v) = p.grad * min(1.0, 0.5 / float(norm)), moments[name]
                m.lerp_(gradient, 0.1)
                v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                p.mul_(1 - config.learning_rate * (config.weight_decay if p.ndim > 1 else 0.0))
                size = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + optimizers.EPS)
                p.sub_(config.learning_rate * size)
        outcome = learner.take_step()
        assert outcome.loss == pytest.approx(float(loss), rel=1e-5)
        assert outcome.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    for name, p in unet.named_parameters():
        torch.testing.assert_close(learner.parameters[name].detach(), p.detach(), rtol=1e-4, atol=1e-6)


def test_it_learns(configure, learn):
    learner = learn(configure(steps=40, ema=0.0, min_snr_gamma=0.0))
    losses = [learner.take_step().loss for _ in range(40)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_state_continues_bit_for_bit(configure, learn, tmp_path):
    config = configure()
    whole = learn(config)
    losses = [whole.take_step().loss for _ in range(12)]
    first = learn(config)
    for _ in range(5):
        first.take_step()
    path = save_checkpoint(tmp_path / "step-000005.ckpt", first.state())
    second = learn(config)
    assert second.load(load_checkpoint(path)) == []
    assert [second.take_step().loss for _ in range(7)] == losses[5:]
    assert same_bits(weights_of(second), weights_of(whole))
    assert same_bits(second.average.average, whole.average.average)
    assert second.step == 12 and second.average.updates == 12


def test_loading_does_not_tie_the_optimizer_to_the_file(configure, learn, tmp_path):
    config = configure()
    first = learn(config)
    first.take_step()
    path = save_checkpoint(tmp_path / "a.ckpt", first.state())
    before = path.read_bytes()
    second = learn(config)
    second.load(load_checkpoint(path))
    second.take_step()
    assert path.read_bytes() == before


def test_a_state_of_another_run_is_refused_or_named(configure, learn, latents):
    first = learn(configure())
    first.take_step()
    state = first.state()
    with pytest.raises(ConfigProblem, match="learning_rate was 0.002 and is 0.01"):
        learn(configure(learning_rate=0.01)).load(state)
    with pytest.raises(ConfigProblem, match="same prior"):
        learn(configure()).load({**state, "prior": "another"})
    assert learn(configure(steps=40, name="x", checkpoint_every=3)).load(state) == []
    changed = copy.copy(state)
    changed["dataset"] = {"hash": "other", "images": 30}
    changed["facts"] = {**state["facts"], "torch": "2.0.0"}
    images, facts = learn(configure()).load(changed)
    assert "30 then, now 31" in images
    assert "torch 2.0.0 ->" in facts


@pytest.mark.parametrize("batch_size, accumulation", [(2, 4), (1, 8)])
def test_accumulation_is_the_big_batch(configure, learn, batch_size, accumulation):
    big = learn(configure(batch_size=8, steps=5))
    small = learn(configure(batch_size=batch_size, accumulation=accumulation, steps=5))
    small.plan = big.plan  # its own would join passes of different shapes
    for _ in range(5):
        left, right = big.take_step(), small.take_step()
        assert right.loss == pytest.approx(left.loss, rel=1e-4)
        assert right.gradient_norm == pytest.approx(left.gradient_norm, rel=1e-3)
    for name, weight in weights_of(big).items():
        torch.testing.assert_close(small.parameters[name].detach(), weight, rtol=1e-2, atol=1e-3)


def test_gradients_do_not_outlive_their_step(configure, learn):
    learner = learn(configure(batch_size=2, accumulation=2))
    learner.take_step()
    assert all(one.grad is None for one in learner.parameters.values())


def test_average_warms_up(configure, learn):
    learner = learn(configure(ema=0.9, steps=4))
    expected = weights_of(learner)
    for update in range(3):
        learner.take_step()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = {name: decay * one + (1 - decay) * weights_of(learner)[name] for name, one in expected.items()}
    assert ema_decay(0.9, 0) == 0.1 and ema_decay(0.9, 10**6) == 0.9
    for name, one in learner.values().items():
        torch.testing.assert_close(one, expected[name], rtol=1e-5, atol=1e-6)
    plain = learn(configure(ema=0.0))
    plain.take_step()
    assert same_bits(plain.values(), weights_of(plain))
    assert not same_bits(plain.values(), weights_of(learn(configure(ema=0.0))))


def test_only_what_requires_gradients_learns(configure, learn, tiny_unet):
    unet = tiny_unet()
    unet.requires_grad_(False)
    for name, one in unet.named_parameters():
        one.requires_grad_(".attn1." in name)
    before = {name: one.detach().clone() for name, one in unet.named_parameters()}
    learner = learn(configure(), unet)
    learner.take_step()
    moved = {name for name, one in unet.named_parameters() if not torch.equal(one, before[name])}
    assert moved and moved == set(learner.parameters) == set(learner.state()["weights"])
    with pytest.raises(ValueError, match="require gradients"):
        learn(configure(), tiny_unet().requires_grad_(False))


def test_gradient_checkpointing_changes_nothing(configure, learn):
    plain, thrifty = learn(configure()), learn(configure(gradient_checkpointing=True))
    for _ in range(2):
        assert plain.take_step().loss == pytest.approx(thrifty.take_step().loss, rel=1e-6)
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(thrifty.parameters[name].detach(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.03), ("fp16", 0.01)])
def test_half_precision_stays_near_and_keeps_fp32_weights(configure, learn, precision, tolerance):
    exact, half = learn(configure(steps=6)), learn(configure(steps=6, precision=precision))
    for _ in range(6):
        assert half.take_step().loss == pytest.approx(exact.take_step().loss, rel=tolerance)
    assert {one.dtype for one in half.parameters.values()} == {torch.float32}
    assert half.scaler.is_enabled() == (precision == "fp16")


def test_fp16_overflow_of_a_gradient_is_skipped_and_its_scale_resumed(configure, learn):
    config = configure(precision="fp16", steps=8)
    learner = learn(config)
    learner.take_step()
    learner.scaler.update(2.0**40)
    before = weights_of(learner)
    outcome = learner.take_step()
    assert not math.isfinite(outcome.gradient_norm) and math.isfinite(outcome.loss)
    assert same_bits(before, weights_of(learner)) and learner.average.updates == 1
    assert learner.scaler.get_scale() == 2.0**39
    again = learn(config)
    again.load(learner.state())
    assert again.scaler.get_scale() == 2.0**39


def test_a_loss_that_is_not_finite_names_step_and_images_and_changes_nothing(configure, learn, latents):
    latents.latents[3] = torch.full((4, 8, 8), math.nan)
    learner = learn(configure(steps=40))
    with pytest.raises(NonFiniteLoss, match=r"the loss became NaN .* at step \d+ on .*image-3\.png") as caught:
        for _ in range(40):
            before = weights_of(learner)
            learner.take_step()
    assert same_bits(before, weights_of(learner)) and learner.has_finite_weights()
    assert caught.value.step == learner.step + 1 and "image-3.png" in caught.value.names


def test_stop_is_asked_once_a_step(configure, learn):
    asked = []
    outcome = learn(configure()).take_step(lambda: asked.append(1) or True)
    assert outcome.stop and asked == [1]


def test_conditioning_follows_the_images(configure, tiny_unet, latents):
    """A UNet with vector conditioning is told the size of each image of the batch, in its order."""
    seen = []

    def conditioning(sizes):
        seen.append([size.original for size in sizes])
        return {"y": torch.tensor(seen[-1], dtype=torch.float32)}

    unet = tiny_unet(adm_in_channels=2)
    learner = DomainLearner(configure(steps=1), unet, latents, SCHEDULE, "epsilon", conditioning)
    with closing(learner):
        learner.take_step()
        indices = [draw.index for draw in learner.plan.batch_for(0)]
        assert seen == [[latents.draw(index, torch.Generator()).original for index in indices]]


def test_rate_warms_up_and_falls():
    from indomain_guidance.training.domain.config import TrainConfig

    def rates(**changes):
        config = TrainConfig(base="m", learning_rate=1.0, **changes)
        return [rate_at(config, step) for step in range(config.steps)]

    assert rates(steps=6, warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(steps=6, warmup=2, schedule="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(steps=4, warmup=0, schedule="cosine") == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert rates(steps=2, warmup=10) == [0.1, 0.2]


def test_noisy_share_moves_timesteps_up(configure, learn):
    plain, noisy = learn(configure(batch_size=16)), learn(configure(batch_size=16, noisy_share=1.0))
    low = torch.cat([plain._load_passes(step)[0].timesteps for step in range(12)])
    high = torch.cat([noisy._load_passes(step)[0].timesteps for step in range(12)])
    assert int(low.min()) < 120 and int(high.min()) >= 500 and int(high.max()) > 900
    assert float(min_snr_weight("epsilon", SCHEDULE.alphas_cumprod[high], 5.0).min()) == 1.0


def test_a_missing_8_bit_optimizer_is_named(configure, learn, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigProblem, match="adamw8bit needs the package bitsandbytes.*or choose adamw"):
        learn(configure(optimizer="adamw8bit"))


def test_a_batch_that_does_not_divide_among_processes_is_refused(configure, learn):
    class Two(OneProcess):
        world = 2

    with pytest.raises(ConfigProblem, match="batch_size: expected a multiple of the 2 processes, found 3"):
        learn(configure(batch_size=3), processes=Two("cpu"))


def test_passes_of_different_shapes_make_one_step(configure, learn):
    learner = learn(configure(batch_size=3, accumulation=4))
    steps = [[tuple(one.latents.shape) for one in learner._load_passes(step)] for step in range(12)]
    assert all(len(step) == 4 for step in steps) and any(len(set(step)) == 2 for step in steps)
    assert all(shape[0] == 3 for step in steps for shape in step)
    mixed = next(number for number, step in enumerate(steps) if len(set(step)) == 2)
    learner.step = mixed
    with torch.no_grad():
        expected = torch.cat([learner._losses(one) for one in learner._load_passes(mixed)]).mean()
    assert learner.take_step().loss == pytest.approx(float(expected), rel=1e-5)


def test_processes_with_different_images_are_refused(configure, learn, latents):
    class Two(OneProcess):
        world = 2

        def total(self, values):
            return values + torch.tensor([0, int(values[0]) - 1])  # the other one has other images, one fewer

    with pytest.raises(DataProblem, match="Expected all 2 processes to train on the same images, found 31 and 30"):
        learn(configure(), processes=Two("cpu"))


def test_devices_are_picked_or_refused():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cuda", "xpu", "mps", "cpu")
    missing = next(name for name in ("xpu", "mps", "cuda") if pick_device("auto").type != name)
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        with pytest.raises(ConfigProblem, match=f"works here .cpu., found {missing}"):
            pick_device(missing)
    cpu = torch.device("cpu")
    assert [pick_precision(name, cpu) for name in ("auto", "fp16")] == ["fp32", "fp16"]


def test_bf16_is_for_gpus_that_compute_in_it(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # as cards say that emulate it
    seen = []
    for capability in ((7, 5), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        seen.append((pick_precision("auto", device), preview_dtype(device)))
    assert seen == [("fp32", torch.float16), ("bf16", torch.bfloat16)]


def test_processes_that_share_the_weights_out_are_refused():
    kinds = pytest.importorskip("accelerate").DistributedType
    for kind in (kinds.NO, kinds.MULTI_GPU, kinds.MULTI_CPU):
        refuse_sharding(kind.name)
    for kind in (kinds.FSDP, kinds.DEEPSPEED):
        with pytest.raises(ConfigProblem, match=f"accelerate set to {kind.name}"):
            refuse_sharding(kind.name)
