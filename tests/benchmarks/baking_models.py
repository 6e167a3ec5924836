"""The contestants of `bench_baking`: sampling steps with and without a LoRA, and trainers of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from indomain_guidance.guidance.diffusion import Denoiser, NoiseSchedule
from indomain_guidance.guidance.files import add_lora, lora_tensors
from indomain_guidance.guidance.files.domain_metadata import DomainMetadata
from indomain_guidance.guidance.multi_guidance import MultiGuidance
from indomain_guidance.guidance.networks.low_rank import add_low_rank, low_rank_layers
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.guidance.null_text import fold_constants, load_unet
from indomain_guidance.guidance.presets import cfg, in_domain
from indomain_guidance.guidance.schedules import Constant
from indomain_guidance.training.baking.config import BakeConfig
from indomain_guidance.training.baking.learner import BakeLearner
from indomain_guidance.training.baking.prompts import EncodedTexts
from indomain_guidance.training.baking.states import States
from indomain_guidance.training.baking.teacher import Teacher
from indomain_guidance.training.baking.terms import BakedTerm
from indomain_guidance.training.domain.trainee import Trainee
from indomain_guidance.training.engine.processes import OneProcess
from indomain_guidance.training.prior.prior import Prior
from torch import Tensor, nn

from .bench_baking import DOMAIN_WEIGHT, RANK, SCALE
from .comfy_models import SD15
from .training_models import SHAPES, TINY_SHAPES, Latents, Ours, Shape, null_context, random_weights

SIGMA, PROMPTS = 2.0, 4
SAMPLED = {"sd15": Shape(SD15, 77), "tiny": TINY_SHAPES["sd15"]}
TRAINED = {"sd15": SHAPES["sd15"], "tiny": TINY_SHAPES["sd15"]}


def constant_form(weights: dict[str, Tensor], shape: Shape, seed: int) -> tuple[dict[str, Tensor], UNetConfig]:
    """The `constant` text-free form; measuring the constants would change no shape and no time."""
    suffix = ".attn1.to_out.0.bias"
    ends = [key for key in weights if key.endswith(suffix)]
    constants = {key.removesuffix(suffix): torch.zeros(len(weights[key])) for key in ends}
    return fold_constants(weights, shape.config, null_context(shape, seed), constants)


def randomised(unet: nn.Module, seed: int) -> None:
    """Give the additions of a network, which begin at zero, random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in low_rank_layers(unet).values():
            layer.lora_up.normal_(std=0.02, generator=generator)


class Sampling:
    """A prior, the same with a LoRA merged, and a domain model, each as a denoiser of the library."""

    def __init__(self, shape: str, seed: int) -> None:
        self.shape, self.seed, schedule = SAMPLED[shape], seed, NoiseSchedule.scaled_linear()
        weights, config = random_weights(self.shape.config, seed), self.shape.config
        self.module = load_unet(weights, config)
        add_low_rank(self.module, RANK, seed, layers="all")
        randomised(self.module, seed)
        merged = add_lora(weights, lora_tensors(self.module, config), config)
        self.merged = load_unet(merged, config)
        prior = Denoiser(load_unet(weights, config), schedule)
        baked, domain = (
            Denoiser(self.merged, schedule),
            Denoiser(load_unet(*constant_form(weights, self.shape, seed)), schedule),
        )
        contexts = [{"context": null_context(self.shape, seed + number).tensor} for number in range(2)]
        self.guidances = {
            "plain": MultiGuidance(cfg(prior, *contexts, SCALE)),
            "baked": MultiGuidance(cfg(baked, *contexts, SCALE)),
            "guidance": MultiGuidance(in_domain(prior, domain, *contexts, DOMAIN_WEIGHT, SCALE)),
        }
        self.context = contexts[1]["context"]

    def latent(self, side: int) -> Tensor:
        return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(self.seed)) * SIGMA

    @torch.no_grad()
    def merged_error(self, side: int) -> float:
        """The largest difference of the merged network to its module, over the largest output."""
        x, t = self.latent(side), torch.tensor([500])
        expected, found = (unet(x, t, self.context) for unet in (self.module, self.merged))
        return float((found - expected).abs().max() / expected.abs().max())

    def step(self, name: str, side: int) -> Callable[[], Tensor]:
        """One sampling step's prediction at batch 1."""
        x, guidance = self.latent(side), self.guidances[name]

        def predict() -> Tensor:
            with torch.no_grad():
                return guidance(x, SIGMA)

        return predict

    def samples(self, name: str, side: int) -> float:
        """How many predictions a step of this name asks for."""
        self.guidances[name].reset()
        self.step(name, side)()
        return self.guidances[name].samples_per_step[-1]


def trainers(name: str, side: int, batch: int, seed: int) -> dict[str, Callable[[], Any]]:
    """A step of training a domain model (form cached, all weights) and one of baking it, of one shape and batch."""
    shape = TRAINED[name]
    training = Ours(shape, "cached", side, batch, seed)
    weights, config = random_weights(shape.config, seed), shape.config
    empty = null_context(shape, seed)
    parts: dict[str, Any] = {"autoencoder": None, "latent_format": "sd15", "latent_scale": 1.0, "zero_snr": False}
    prior = Prior("benchmark", weights, config, prediction_type="epsilon", null_context=empty, **parts)
    settings = BakeConfig(
        base="benchmark",
        domain="benchmark",
        states=("pictures",),
        resolution=max(64, 8 * side),
        batch_size=batch,
        random_prompts=0,
        layers="all",
        rank=RANK,
        ema=0.0,
        warmup=0,
        precision="fp32",
        device="cpu",
        seed=seed,
    )
    unet = load_unet(weights, config).train()
    add_low_rank(unet, RANK, seed, layers="all")
    domain, text_free = constant_form(weights, shape, seed + 1)
    term = BakedTerm("domain", Constant(DOMAIN_WEIGHT), (domain, DomainMetadata(text_free)))
    teacher = Teacher(prior, unet, [term])
    contexts = [null_context(shape, seed + number).tensor for number in range(1 + PROMPTS)]
    latents: Any = Latents.of([(side, side)], max(4 * batch, 16), seed)
    states = States(settings, prior, EncodedTexts(prior, torch.cat(contexts), None), latents, {})
    trainee = Trainee(unet, "full", "low_rank")
    learner = BakeLearner(settings, trainee, teacher, states, OneProcess("cpu"))
    return {"training": training.step, "baking": learner.take_step}


def operations(name: str, side: int) -> float:
    """Floating point operations of a baking step at one picture, on tensors without data.

    The learner's forward and backward pass, and the guidance's three predictions.
    """
    from torch.utils.flop_counter import FlopCounterMode

    shape = SAMPLED[name]
    with torch.device("meta"):
        full, text_free = UNet(shape.config), UNet(replace(shape.config, null_text="constant"))
        learner = UNet(shape.config).requires_grad_(False)
        inputs = (
            torch.empty(1, 4, side, side),
            torch.zeros(1),
            torch.empty(1, shape.tokens, shape.config.context_dim or 0),
        )
    add_low_rank(learner, RANK, layers="all")
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            for unet in (full, full, text_free):
                unet(*inputs)
        learner(*inputs).sum().backward()
    return float(counter.get_total_flops())
