"""Sampling a LATENT with a guider as core's KSampler node does with its CFG, and checks of the LATENT."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from torch import Tensor

from ....guidance.errors import Problem

_EMPTY_RATIO = "downscale_ratio_spacial"
_TINY = 64  # latent pixels; as many as one of a large model's deepest level stands for


def check_latent(samples: Tensor) -> None:
    """Refuse latents [B, C, ...] of no images, no pixels, or with values that are no numbers. Raises Problem."""
    parts = samples.unbind() if samples.is_nested else [samples]
    for part in parts:
        if part.ndim < 3 or part.numel() == 0:
            raise Problem(
                f"Expected a latent of at least one image and one pixel, got one of shape {list(part.shape)}; check "
                "the batch size, width and height of the node that made it."
            )
        if not torch.isfinite(part).all():
            raise Problem(
                "Expected a latent of finite numbers, found NaN or infinity, which would spread over the picture; "
                "where a VAE made them, run it in float32 (ComfyUI's --fp32-vae)."
            )


@contextlib.contextmanager
def large_enough(samples: Tensor) -> Iterator[None]:
    """Turn torch's error about a latent that is too small into a Problem: nothing can be normalised over one value."""
    try:
        yield
    except ValueError as problem:
        size = list(samples.shape[2:])
        if isinstance(problem, Problem) or math.prod(size) > _TINY:
            raise
        words = f"Expected a latent that is large enough for its models, got {size} pixels: {problem}"
        raise Problem(words) from problem


def sample_latent(
    guider: CFGGuider, latent: dict, seed: int, steps: int, sampler_name: str, scheduler: str, denoise: float
) -> dict:
    """Sample a LATENT as core's KSampler node does, with `guider` in place of its CFG: noise, mask, sigmas, preview."""
    check_latent(latent["samples"])
    mask = latent.get("noise_mask")
    if mask is not None and not mask.is_nested and not (mask.numel() and torch.isfinite(mask).all()):
        raise Problem("Expected a noise mask of finite numbers and at least one pixel, found none, NaN or infinity.")
    model = guider.model_patcher
    # Gives an empty latent the model's shape; newer versions also look at the factor it was made for.
    fix = comfy.sample.fix_empty_latent_channels
    factor = [latent.get(_EMPTY_RATIO)] if len(inspect.signature(fix).parameters) > 2 else []
    samples = fix(model, latent["samples"], *factor)
    _check_kind(model, samples)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    plan = comfy.samplers.KSampler(
        model, steps, model.load_device, sampler_name, scheduler, denoise, model.model_options
    )
    result = guider.sample(
        noise,
        samples,
        comfy.samplers.sampler_object(sampler_name),
        plan.sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    out = latent.copy()
    out.pop(_EMPTY_RATIO, None)
    out["samples"] = result.to(comfy.model_management.intermediate_device())
    return out


def _check_kind(model: ModelPatcher, samples: Tensor) -> None:
    """Refuse latents of another kind of picture than the model makes. Raises Problem."""
    space = model.get_model_object("latent_format")
    channels, dimensions = space.latent_channels, space.latent_dimensions
    if not samples.is_nested and (samples.ndim != 2 + dimensions or samples.shape[1] != channels):
        raise Problem(
            f"Expected a latent of the model's kind, {channels} channels and {dimensions} dimensions a picture, got "
            f"one of shape {list(samples.shape)}; use the Empty Latent or the VAE of the model's family."
        )
