"""Probes: inputs that a prior visits by itself, what its cross-attention does on them, and how far a copy is off."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .diffusion import Denoiser
from .errors import Problem


@dataclass(frozen=True, eq=False)
class Probes:
    """Inputs at which a UNet is measured: x [N, C, H, W] as the network sees it, timesteps [N], y [N, A] or None."""

    x: Tensor
    timesteps: Tensor
    y: Tensor | None = None

    def __post_init__(self) -> None:
        counts = {len(part) for part in (self.x, self.timesteps, self.y) if part is not None}
        if len(counts) != 1 or 0 in counts or self.x.ndim != 4:
            raise Problem("Probes: expected as many latents [N, C, H, W] as timesteps, at least 1.")

    def __len__(self) -> int:
        return len(self.x)


@torch.no_grad()
def collect_probes(
    denoiser: Denoiser,
    context: Tensor,
    shape: Sequence[int],
    *,
    y: Tensor | None = None,
    steps: int = 20,
    use: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Probes:
    """Latents that the prior itself visits without text: `use` of `steps` steps of a DDIM trajectory.

    context [1, T, D] (and y [1, A]) of the empty prompt. shape: [B, C, H, W] of one trajectory batch. DDIM is
    arXiv 2010.02502, eq. 12 with eta 0, over timesteps evenly spaced from the noisiest to 0. The steps used are
    evenly spaced too and include the first and the last. The noise is drawn on the CPU from `seed`, so that every
    device sees the same. on_step(done, steps) is called after each step.
    """
    if not 1 <= use <= steps:
        raise Problem(f"Probes: expected 1 to {steps} steps to use, got {use}.")
    if len(shape) != 4:
        raise Problem(f"Probes: expected a shape [B, C, H, W], got {list(shape)}.")
    schedule = denoiser.schedule
    cond = {"context": context.to(device).expand(shape[0], -1, -1)}
    if y is not None:
        cond["y"] = y.to(device).expand(shape[0], -1)
    trajectory = torch.linspace(len(schedule) - 1, 0, steps).round()
    sigmas = [*schedule.sigma(trajectory).tolist(), 0.0]
    used = set(torch.linspace(0, steps - 1, use).round().int().tolist())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator).to(device) * sigmas[0]
    inputs, timesteps = [], []
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        if step in used:
            inputs.append(x / (sigma**2 + 1) ** 0.5)
            timesteps.append(trajectory[step].expand(shape[0]))
        denoised = denoiser(x, sigma, **cond)
        x = denoised + (x - denoised) * (following / sigma)
        on_step(step + 1, steps)
    x = torch.cat(inputs).cpu()
    return Probes(x, torch.cat(timesteps), None if y is None else y.detach().cpu().expand(len(x), -1))


@dataclass
class AttentionStatistics:
    """Sufficient statistics of one cross-attention's output a [B, N, C] over all tokens of all probes."""

    count: int
    total: Tensor  # [C], float64: sum of a
    energy: float  # sum of |a|^2

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    def relative_error(self, constant: Tensor) -> float:
        """RMS(a - constant) / RMS(a) over these probes; 0 where a vanishes altogether."""
        constant = constant.double()
        residual = self.energy - 2 * float(constant @ self.total) + self.count * float(constant @ constant)
        return (max(residual, 0.0) / self.energy) ** 0.5 if self.energy > 0 else 0.0


@torch.no_grad()
def measure_cross_attention(
    unet: nn.Module,
    context: Tensor,
    probes: Probes,
    *,
    batch: int = 1,
    on_probe: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, AttentionStatistics]:
    """What each block's cross-attention adds, by the block's name (`input_blocks.1.1.transformer_blocks.0`).

    unet: any module with LDM names that is called as (x, timesteps, context=, y=), ComfyUI's included; it runs on the
    device and in the dtype of its own first parameter. context [1, T, D]. on_probe(done, of) after each batch. Raises
    Problem for a UNet without cross-attention and for one that overflows.
    """
    statistics: dict[str, AttentionStatistics] = {}

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            a = output.detach().flatten(0, -2).cpu().double()
            seen = statistics.setdefault(name, AttentionStatistics(0, torch.zeros_like(a[0]), 0.0))
            seen.count += len(a)
            seen.total += a.sum(dim=0)
            seen.energy += float(a.square().sum())

        return hook

    parameter = next(unet.parameters())
    to = {"device": parameter.device, "dtype": parameter.dtype}
    with ExitStack() as hooks:
        for name, module in unet.named_modules():
            if name.endswith(".attn2"):
                handle = module.register_forward_hook(record(name.removesuffix(".attn2")))
                hooks.callback(handle.remove)
        for start in range(0, len(probes), batch):
            part = slice(start, start + batch)
            x = probes.x[part].to(**to)
            y = {} if probes.y is None else {"y": probes.y[part].to(**to)}
            unet(x, probes.timesteps[part].to(parameter.device), context=context.to(**to).expand(len(x), -1, -1), **y)
            on_probe(min(start + batch, len(probes)), len(probes))
    if not statistics:
        raise Problem("Text-free UNet: expected a UNet with cross-attention (attn2), found none; give it the prior.")
    for name, seen in statistics.items():
        if not math.isfinite(seen.energy):
            raise Problem(f"Text-free UNet: found NaN or infinity in {name}.attn2; run the prior in float32.")
    return statistics


@torch.no_grad()
def unconditional_error(prior: nn.Module, text_free: nn.Module, context: Tensor, probes: Probes) -> float:
    """RMS(text_free(x, t) - prior(x, t, empty prompt)) / RMS(prior) over probes: rounding for `cached`.

    For `constant` it is what the approximation costs at the output, before any training.
    """
    difference = energy = 0.0
    parameter = next(prior.parameters())
    to = {"device": parameter.device, "dtype": parameter.dtype}
    for index in range(len(probes)):
        x, timesteps = probes.x[index : index + 1].to(**to), probes.timesteps[index : index + 1].to(parameter.device)
        y = {} if probes.y is None else {"y": probes.y[index : index + 1].to(**to)}
        expected = prior(x, timesteps, context=context.to(**to), **y).cpu().double()
        difference += float((text_free(x, timesteps, **y).cpu().double() - expected).square().sum())
        energy += float(expected.square().sum())
    return (difference / energy) ** 0.5 if energy > 0 else difference**0.5
