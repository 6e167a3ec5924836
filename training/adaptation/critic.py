"""The critic of an adaptation: a base's models as a guidance, its VAE as a differentiable encoder, the objective."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ...guidance.combination import Guidance
from ...guidance.diffusion import Denoiser
from ...guidance.distillation.critic import Critic
from ...guidance.distillation.directional import Directional
from ...guidance.distillation.image_encoder import ImageEncoder
from ...guidance.distillation.methods import make_method
from ...guidance.distillation.objective import Objective
from ...guidance.distillation.perceptual import FeatureDistance, Perceptual, lpips_distance
from ...guidance.distillation.reconstruction import Reconstruction
from ...guidance.distillation.timesteps import Timesteps
from ...guidance.files import DTYPES, DomainMetadata, read_domain_file
from ...guidance.networks.stylegan2 import StyleGAN2
from ...guidance.null_text import load_unet
from ...guidance.terms import Source, Term
from ..engine.settings import ConfigProblem
from ..prior.prior import ImageSize, Prior
from .config import AdaptConfig
from .opinion import Encode

Domain = tuple[dict[str, Tensor], DomainMetadata]


def judged_resolution(config: AdaptConfig, prior: Prior | None, generator: StyleGAN2) -> int:
    """The side in pixels at which images are judged: as configured, the prior's own, else the generator's."""
    if prior is None:
        return config.resolution or generator.config.resolution
    return max(config.resolution or prior.native_resolution or generator.config.resolution, prior.factor)


def open_domain(config: AdaptConfig, prior: Prior) -> Domain | None:
    """Weights and metadata of the domain model that judges too, None where there is none or its weight is 0.

    Raises FileProblem, and ValueError where `prior` could not encode the caption that the model was trained with.
    """
    if not config.domain or not config.domain_weight:
        return None
    weights, metadata = read_domain_file(config.domain, latent_format=prior.latent_format)
    prior.check_prompts([metadata.caption or ""])
    return weights, metadata


def open_critic(
    config: AdaptConfig, prior: Prior, resolution: int, device: torch.device | str, domain: Domain | None = None
) -> Critic:
    """The guidance that a configuration describes, with the prior's models on `device` in the run's precision.

    The base prediction is on the negative prompt (on the empty one with a method that compares with it, nfsd); the
    terms are the domain model, where there is one, and the prompt. domain: from `open_domain`, which is asked
    otherwise. Raises ConfigProblem, FileProblem and ValueError.
    """
    config.check_prompts()
    dtype = DTYPES.get(config.precision, torch.float32)
    size = ImageSize((resolution, resolution))
    judge = Denoiser(prior.load_unet(dtype).to(device), prior.schedule, prior.prediction_type)

    def cond(prompt: str) -> dict[str, Tensor]:
        return prior.conditioning([size], prior.encode_text([prompt]), device)

    uncond = cond("" if config.needs("unwanted") else config.negative)
    terms = []
    domain = domain or open_domain(config, prior)
    if domain is not None:
        weights, metadata = domain
        domain_judge = Denoiser(
            load_unet(weights, metadata.config, dtype).to(device),
            prior.schedule,
            metadata.prediction_type or prior.prediction_type,
        )
        caption = metadata.caption
        own = uncond if caption is None else cond(caption)
        terms.append(Term("domain", domain_judge, own, config.domain_weight))
    if config.prompt:
        terms.append(Term("control", judge, cond(config.prompt), config.scale))
    source = None
    if config.source_prompt:
        source = Guidance(Source(judge, uncond), [Term("control", judge, cond(config.source_prompt), config.scale)])
    unwanted = Source(judge, cond(config.negative)) if config.needs("unwanted") else None
    return Critic(Guidance(Source(judge, uncond), terms), prior.schedule, unwanted=unwanted, source=source)


def latent_encoder(prior: Prior, resolution: int, precision: str = "fp32") -> ImageEncoder:
    """Images judged at `resolution` -> scaled posterior means [B, C, h, w], where the VAE is.

    The VAE runs in bf16 when that is the precision, else in fp32 (SDXL's overflows in fp16). Raises ConfigProblem for a
    resolution that the VAE cannot encode.
    """
    if resolution % prior.factor:
        raise ConfigProblem(
            f"resolution: expected a multiple of {prior.factor} px for {prior.name}, found {resolution}; give another."
        )

    def encode(images: Tensor) -> Tensor:
        half = torch.autocast(images.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        with half:
            mean, _ = prior.autoencoder.encode(images)
        return mean.float() * prior.latent_scale

    return ImageEncoder(encode, resolution)


def make_objective(config: AdaptConfig, critic: Critic, encode: Encode, device: torch.device | str) -> Objective:
    """The objective of the settings for a critic. Raises ValueError where the method needs what the critic lacks."""
    regularizers = []
    if config.directional:
        regularizers.append(Directional(config.directional, config.normalize_directional))
    if config.reconstruction:
        regularizers.append(Reconstruction(config.reconstruction))
    perceptual = None
    if config.perceptual:
        latents = config.features == "latents"
        distance = FeatureDistance(encode) if latents else lpips_distance(config.features, device)
        perceptual = Perceptual(distance, config.perceptual)
    return Objective(
        critic,
        make_method(config.method, critic, config.seed % 2**31, **config.method_options()),
        regularizers,
        Timesteps(config.t_min, config.t_max, config.t_schedule),
        config.weighting,
        config.latent_clamp or None,
        config.image_quantile or None,
        config.mode,
        perceptual,
        way_back=config.way_back if config.way_back >= 0 else None,
    )
