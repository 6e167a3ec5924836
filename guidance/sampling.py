"""Small samplers in the k-diffusion scale, x = x0 + sigma * noise: enough to draw pictures without another library.

A denoiser is any callable `denoise(x [B, ...], sigma [B], **cond) -> x0 [B, ...]`: a `Denoiser`, a `MultiGuidance`, or
a user's own. Sigmas are a falling 1-D sequence that usually ends in 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .diffusion import NoiseSchedule
from .errors import GuidanceError

SAMPLERS = ("euler", "ddim", "dpmpp_2m")

Denoise = Callable[..., Tensor]


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise GuidanceError(f"Expected at least 1 sampling step, got {steps}.")


def sigmas_karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> Tensor:
    """The noise levels of arXiv 2206.00364, eq. 5: even in sigma^(1/rho) from sigma_max to sigma_min, then 0.

    steps: model calls, at least 1. rho: 7 as published. Returns [steps + 1] in float64.
    """
    _check_steps(steps)
    high, low = schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho)
    sigmas = torch.linspace(high, low, steps, dtype=torch.float64) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def sigmas_uniform(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Noise levels at even timesteps, the last to the first, then 0: the scheduler ComfyUI calls "normal".

    steps: model calls, at least 1. Returns [steps + 1] in float64.
    """
    _check_steps(steps)
    first, last = schedule.timestep(schedule.sigma_max), schedule.timestep(schedule.sigma_min)
    timesteps = torch.linspace(first, last, steps, dtype=torch.float64).tolist()
    return torch.tensor([*map(schedule.sigma, timesteps), 0.0], dtype=torch.float64)


def sigmas_sgm_uniform(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Noise levels at even timesteps from the last, the first left to the step to 0: ComfyUI's "sgm_uniform".

    The released code of arXiv 2312.08195 samples on it, 25 steps of "dpmpp_2m" (diffusers' DPMSolverMultistep, which
    rounds to whole timesteps). steps and result as of `sigmas_uniform`.
    """
    _check_steps(steps)
    levels = sigmas_uniform(schedule, steps + 1)
    return torch.cat([levels[:-2], levels[-1:]])


def _levels(sigmas: Tensor | Sequence[float]) -> list[float]:
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2:
        raise GuidanceError(f"Expected at least two sigmas, a start and an end, got {len(levels)}.")
    falling = all(math.isfinite(high) and high > low for high, low in zip(levels, levels[1:]))
    if not falling or not levels[-1] >= 0.0:
        shown = ", ".join(f"{level:g}" for level in levels[:4])
        raise GuidanceError(f"Expected finite sigmas that fall and end at 0 or above, got {shown}, ....")
    return levels


def sample(
    denoise: Denoise,
    noise: Tensor,
    sigmas: Tensor | Sequence[float],
    method: str = "euler",
    callback: Callable[[dict[str, Any]], None] | None = None,
    **cond: Any,
) -> Tensor:
    """Follow a denoiser from noise to a sample.

    noise: [B, ...], unit Gaussian; sampling begins at sigmas[0] * noise. (From the largest noise level on, ComfyUI and
    the released code of arXiv 2312.08195 begin at sqrt(1 + sigmas[0]^2) * noise, 0.2 % more for Stable Diffusion: give
    them noise * sqrt(1 + 1 / sigmas[0]^2) for the same picture.) sigmas: [steps + 1], falling (`sigmas_karras`,
    `sigmas_uniform`, `sigmas_sgm_uniform`). cond goes to every call of the denoiser.

    method, one model call a step each:
    * "euler": first order (arXiv 2206.00364, algorithm 1 without its correction);
    * "ddim": arXiv 2010.02502, eq. 12 with eta 0, which is the same as euler in this scale;
    * "dpmpp_2m": DPM-Solver++(2M), arXiv 2211.01095, algorithm 2, in data prediction; the first step, and a last one to
      sigma 0, are of first order.

    callback, called after each model call, gets a dict of i (step, from 0), sigma, x and denoised. Autograd is left as
    the caller set it. Returns [B, ...] at noise level sigmas[-1]. Raises GuidanceError for another method and sigmas
    that do not fall.
    """
    if method not in SAMPLERS:
        raise GuidanceError(f"Expected the sampling method to be one of {', '.join(SAMPLERS)}, got {method!r}.")
    levels = _levels(sigmas)
    x = noise * levels[0]
    previous: Tensor | None = None
    for i, (sigma, following) in enumerate(zip(levels, levels[1:])):
        denoised = denoise(x, torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device), **cond)
        if callback is not None:
            callback({"i": i, "sigma": sigma, "x": x, "denoised": denoised})
        shrink = following / sigma
        if method == "dpmpp_2m":
            estimate = denoised
            if previous is not None and following > 0.0:
                # Extrapolate the denoised estimate to the middle of the step in log sigma.
                lead = 0.5 * math.log(sigma / following) / math.log(levels[i - 1] / sigma)
                estimate = denoised + lead * (denoised - previous)
            x = shrink * x + (1.0 - shrink) * estimate
        else:
            x = denoised + shrink * (x - denoised)
        previous = denoised
    return x
