"""Training of two networks against each other: generator and discriminator, as in StyleGAN2."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from ....guidance.networks.stylegan2 import StyleGAN2
from .discriminator import Discriminator
from .loop import LoopConfig, run_steps, update_average


@dataclass(frozen=True)
class AdversarialConfig(LoopConfig):
    """Settings of one stage; both networks share rate and schedule: constant, then down to 0 over the last part.

    gamma: of the gradient penalties R1 and R2 (0: none), evaluated every ``lazy`` steps. fall: share of the steps over
    which the rate falls; 0 keeps it, for a stage that another one continues. ``clip`` and ``weight_decay`` are not
    used.
    """

    batch: int = 32
    gamma: float = 1.0
    lazy: int = 8
    fall: float = 0.0


@dataclass
class Pair:
    """Two networks in training and the average of the generator's weights, which is what ships."""

    generator: StyleGAN2
    discriminator: Discriminator
    average: StyleGAN2


def pair_of(generator: StyleGAN2, discriminator: Discriminator) -> Pair:
    return Pair(generator, discriminator, copy.deepcopy(generator).requires_grad_(False).eval())


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Relativistic pairing loss (arXiv 1807.00734, section 4.1): logits [B] of real pictures above those of made ones.

    Each made picture is compared with a real one, instead of all with one threshold, so that a generator which draws
    only some of the digits keeps a gradient towards the others (arXiv 2501.05441, section 2). It converges with the
    penalties at real and at made pictures.
    """
    return F.softplus(fake.float() - real.float()).mean()


def gradient_penalty(logits: Tensor, pictures: Tensor) -> Tensor:
    """Mean |grad of the logits|^2 (arXiv 1801.04406, eq. 9, without gamma / 2): R1 of real, R2 of made pictures."""
    (gradient,) = torch.autograd.grad(logits.sum(), pictures, create_graph=True)
    return gradient.square().sum(dim=tuple(range(1, gradient.ndim))).mean()


def rate_share(progress: float, warmup: float, fall: float) -> float:
    """Share of the rate at a progress in 0..1: linear rise, constant, linear fall; 0 skips either."""
    rise = min(1.0, (progress + 1e-3) / warmup) if warmup else 1.0
    return min(rise, (1.0 - progress) / fall) if fall else rise


def _adam(network: nn.Module, rate: float, every: int = 0) -> torch.optim.Adam:
    """Adam without momentum; for a penalty at every n-th step, corrected as in arXiv 1912.04958, appendix B."""
    correction = every / (every + 1) if every else 1.0
    return torch.optim.Adam(network.parameters(), lr=rate * correction, betas=(0.0, 0.99**correction), eps=1e-8)


def run_adversarial(
    config: AdversarialConfig,
    pair: Pair,
    real_of: Callable[[int, Generator], Tensor],
    latents_of: Callable[[int, Generator], Tensor],
    folder: Path,
) -> Pair:
    """Train the pair in place, see `run_steps`.

    real_of(count, generator) draws real pictures [count, C, R, R]; latents_of(count, generator) what the generator
    takes. One step: pictures are made once, the discriminator learns from them, then the generator from the updated
    discriminator.
    """
    networks = {"generator": pair.generator, "discriminator": pair.discriminator, "average": pair.average}
    for network in networks.values():
        # A tenth to a third faster on CPUs, bf16 above all; torch's stub does not list the argument.
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizers = {
        "generator_optimizer": _adam(pair.generator, config.rate),
        "discriminator_optimizer": _adam(pair.discriminator, config.rate, config.lazy if config.gamma else 0),
    }
    full = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    pair.generator.train()
    pair.discriminator.train()

    def take_step(generator: Generator, step: int) -> dict[str, float]:
        share = rate_share(step / config.steps, config.warmup, config.fall)
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = full[name] * share
        real = real_of(config.batch, generator).contiguous(memory_format=torch.channels_last)
        numbers = _step(config, pair, optimizers, real, latents_of(config.batch, generator), step)
        update_average(pair.average, pair.generator, config.ema, step)
        return numbers

    run_steps(config, {**networks, **optimizers}, take_step, folder)
    return pair


def _step(
    config: AdversarialConfig, pair: Pair, optimizers: Mapping[str, Optimizer], real: Tensor, latents: Tensor, step: int
) -> dict[str, float]:
    """One update of the discriminator, with the lazy penalties when they are due, and one of the generator."""
    numbers: dict[str, float] = {}
    critic = pair.discriminator
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        made = pair.generator(latents)
        loss = discriminator_loss(critic(real), critic(made.detach()))
    numbers["discriminator"] = loss.item()
    if config.gamma and step % config.lazy == 0:
        # In fp32: a gradient of a gradient in bf16 is mostly rounding.
        for name, pictures in (("r1", real), ("r2", made.detach().float())):
            penalty = gradient_penalty(critic(pictures.requires_grad_()), pictures)
            numbers[name] = penalty.item()
            loss = loss + 0.5 * config.gamma * config.lazy * penalty
    _update(optimizers["discriminator_optimizer"], loss)

    critic.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        loss = discriminator_loss(critic(made), critic(real.detach()))  # with the roles exchanged
    numbers["generator"] = loss.item()
    _update(optimizers["generator_optimizer"], loss)
    critic.requires_grad_(True)
    return numbers


def _update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
