"""Noise schedules and denoisers of discrete diffusion models.

Everything outside a network lives on the sigma scale of "Elucidating the Design Space of Diffusion-Based Generative
Models" (arXiv 2206.00364): x = x0 + sigma * noise. A model trained on sqrt(abar) x0 + sqrt(1 - abar) noise at timestep
t is, up to the factor sqrt(abar), the same thing at sigma = sqrt((1 - abar) / abar).
"""

from __future__ import annotations

import math
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from .errors import Problem

Level = TypeVar("Level", float, Tensor)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# What remains of abar at the last step of a zero-terminal-SNR schedule: sigma stays finite (about 4519) and the
# float32 denoised estimate of a v-model exact enough. ComfyUI uses this value, and so every sigma agrees with it.
ZERO_SNR_ALPHAS_CUMPROD = 4.8973451890853435e-08


class NoiseSchedule:
    """The noise levels a discrete model was trained on.

    `alphas_cumprod` [T] falls from about 1, `sigmas` [T] = sqrt((1 - abar) / abar) rises. Timesteps count 0..T-1.
    `percent` is the sampling percent of ComfyUI: 0 is the start of sampling (all noise), 1 its end.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        alphas_cumprod = torch.as_tensor(alphas_cumprod).detach().cpu().double()
        valid = alphas_cumprod.ndim == 1 and alphas_cumprod.numel() > 1
        if not valid or not bool(((alphas_cumprod > 0) & (alphas_cumprod < 1)).all()):
            raise Problem("Noise schedule: alphas_cumprod must be at least two values between 0 and 1.")
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        if not bool((sigmas.diff() > 0).all()):
            raise Problem("Noise schedule: alphas_cumprod must fall from step to step.")
        self.alphas_cumprod = alphas_cumprod.float()
        self.sigmas = sigmas.float()
        self.log_sigmas = sigmas.log().float()

    @classmethod
    def from_betas(cls, betas: Tensor, zero_snr: bool = False) -> NoiseSchedule:
        """abar = cumprod(1 - beta) (arXiv 2006.11239, eq. 4); `zero_snr` rescales as arXiv 2305.08891, algorithm 1."""
        abar = torch.cumprod(1 - torch.as_tensor(betas).double(), dim=0)
        if zero_snr:
            root = abar.sqrt()
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            abar = root**2
            abar[-1] = ZERO_SNR_ALPHAS_CUMPROD
        return cls(abar)

    @classmethod
    def scaled_linear(
        cls, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, zero_snr: bool = False
    ) -> NoiseSchedule:
        """Betas whose square roots are linear: the schedule of every Stable Diffusion model, with its own defaults."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64) ** 2
        return cls.from_betas(betas, zero_snr)

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def timestep(self, sigma: Level, nearest: bool = False) -> Level:
        """The (fractional) timestep of a noise level, linear in log sigma and clamped to 0..T-1; inverts `sigma`.

        `nearest` gives the whole timestep nearest in log sigma, which is what ComfyUI shows its models.
        A float gives a float, a tensor a float32 tensor of its shape and device.
        """
        value = torch.as_tensor(sigma, dtype=torch.float32)
        logs = self.log_sigmas.to(value.device)
        wanted = value.clamp(min=torch.finfo(torch.float32).tiny).log()
        if nearest:
            steps = (wanted.reshape(1, -1) - logs[:, None]).abs().argmin(dim=0).reshape(value.shape).float()
        else:
            high = torch.searchsorted(logs, wanted).clamp(1, len(logs) - 1)
            low = high - 1
            fraction = (wanted - logs[low]) / (logs[high] - logs[low])
            steps = low + fraction.clamp(0, 1)
        return cast(Level, steps if isinstance(sigma, Tensor) else float(steps))

    def sigma(self, timestep: Level) -> Level:
        """The noise level of a (fractional) timestep, linear in log sigma; clamped to 0..T-1."""
        value = torch.as_tensor(timestep, dtype=torch.float32).clamp(0, len(self) - 1)
        logs = self.log_sigmas.to(value.device)
        low = value.floor().long()
        high = value.ceil().long()
        result = torch.lerp(logs[low], logs[high], value.frac()).exp()
        return cast(Level, result if isinstance(timestep, Tensor) else float(result))

    def percent_to_sigma(self, percent: float) -> float:
        """The noise level at a sampling percent (0 start, 1 end), in ComfyUI's convention for discrete models.

        At or below 0 a number above every noise level, at or above 1 zero, so that an interval [0, 1] covers all.
        """
        if not math.isfinite(percent):
            raise Problem(f"Sampling percent must be finite, got {percent}.")
        if percent <= 0.0:
            return 999999999.9
        if percent >= 1.0:
            return 0.0
        return self.sigma((1.0 - percent) * (len(self) - 1))


def denoised_from_output(output: Tensor, x: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The estimate of x0 from a network output at x = x0 + sigma * noise; sigma broadcasts against x.

    epsilon: x - sigma e. v_prediction (arXiv 2202.00512, section 4): x / (sigma^2 + 1) - v sigma / sqrt(sigma^2 + 1).
    sample: the output itself.
    """
    if prediction_type == "epsilon":
        return x - sigma * output
    if prediction_type == "v_prediction":
        return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
    if prediction_type == "sample":
        return output
    raise Problem(f"Prediction type must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")


def output_from_denoised(denoised: Tensor, x: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The network output that means this estimate of x0: the inverse of `denoised_from_output`, for sigma above 0."""
    if prediction_type == "epsilon":
        return (x - denoised) / sigma
    if prediction_type == "v_prediction":
        return (x / (sigma**2 + 1) - denoised) * (sigma**2 + 1).sqrt() / sigma
    if prediction_type == "sample":
        return denoised
    raise Problem(f"Prediction type must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")


class Denoiser:
    """D(x; sigma): a network and its schedule as an estimate of the clean latent (arXiv 2206.00364, section 2).

    `denoiser(x, sigma, **cond)`: x [B, C, H, W] = x0 + sigma * noise, sigma a number or [B], cond what the network
    takes (context, y) -> x0 [B, C, H, W]. The network sees x / sqrt(sigma^2 + 1) at the timestep of sigma; `quantize`
    rounds that to a trained timestep, as ComfyUI does, else it is fractional. It runs in the dtype of its own first
    parameter, everything around it in float32 at least, and x0 has the dtype of x. Raises ValueError for another
    prediction type or shape of sigma.
    """

    def __init__(
        self, unet: nn.Module, schedule: NoiseSchedule, prediction_type: str = "epsilon", quantize: bool = True
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise Problem(f"Prediction type must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")
        self.unet = unet
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.quantize = quantize

    def __call__(self, x: Tensor, sigma: float | Tensor, **cond: Tensor | None) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
        if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) not in (1, len(x))):
            raise Problem(f"Denoiser: expected one sigma or {len(x)}, got shape {list(sigma.shape)}.")
        sigma = sigma.expand(len(x))
        wide = sigma.reshape(-1, *[1] * (x.ndim - 1))
        timesteps = self.schedule.timestep(sigma, nearest=self.quantize)
        parameter = next(self.unet.parameters(), x) if isinstance(self.unet, nn.Module) else x
        output = self.unet((x / (wide**2 + 1).sqrt()).to(parameter.dtype), timesteps, **cond)
        return denoised_from_output(output, x, wide, self.prediction_type).to(x.dtype)
