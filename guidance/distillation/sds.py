"""Score distillation sampling and its descendants whose gradient is one formula of a step's predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import option
from .context import Context
from .method import Method, normalize


@dataclass
class SDS(Method):
    """Score distillation sampling (DreamFusion, arXiv 2209.14988, eq. 3): e(z_t) - noise, e guided.

    Needs a large guidance scale (100 in DreamFusion and StyleGAN-Fusion), at which it over-saturates and seeks modes.
    normalize: n() of prediction and noise first, as StyleGAN-Fusion does for EG3D; False leaves them.
    """

    normalize: bool = option(
        False,
        "bring prediction and noise to unit spread first, so that the scale does not set its strength; released for "
        "EG3D only",
    )

    name = "sds"
    needs = frozenset({"e"})

    def gradient(self, context: Context) -> Tensor:
        e, noise = context.prediction.e, context.noise
        return normalize(e) - normalize(noise) if self.normalize else e - noise


@dataclass
class CSD(Method):
    """Classifier score distillation (CSD, arXiv 2310.19415): (e_c - e_u) + w_n (e_u - e_unwanted).

    The guidance alone, whatever its scale. unwanted_weight: w_n at the run's start, falling linearly to
    unwanted_weight_end at its end (the paper's annealed negatives); 0 and 0 need no unwanted prompt.
    """

    # Not made with `option`: set in Python only; settings, command line and nodes leave the unwanted prompt out.
    unwanted_weight: float = 0.0
    unwanted_weight_end: float = 0.0

    name = "csd"
    needs = frozenset({"e_u", "e_c"})

    def __post_init__(self) -> None:
        if self.unwanted_weight != 0 or self.unwanted_weight_end != 0:
            self.needs = self.needs | {"e_unwanted"}

    def gradient(self, context: Context) -> Tensor:
        own = context.prediction
        result = own.e_c - own.e_u
        if "e_unwanted" in self.needs:
            start, end = self.unwanted_weight, self.unwanted_weight_end
            result = result + (start + (end - start) * context.progress) * (own.e_u - own.e_unwanted)
        return result


@dataclass
class NFSD(Method):
    """Noise-free score distillation (NFSD, arXiv 2310.17590): delta_D + s (e_c - e_u).

    The noise is left out of SDS: delta_D is e_u below timestep `threshold`, where e_u is mostly the domain's direction,
    and e_u - e_unwanted from there on, since both predict the same noise. s (e_c - e_u) is e - e_u of the critic's
    guidance, at a nominal scale (7.5 in the paper). threshold: 200 of 1000 as published, below which the unwanted
    prompt is not evaluated; 0 evaluates it at every timestep. That prompt says what images should not be ("unrealistic,
    blurry, low quality, ...").
    """

    # Not made with `option`: set in Python only; settings, command line and nodes use the published value.
    threshold: int = 200

    name = "nfsd"
    needs = frozenset({"e", "e_u", "e_unwanted"})

    def __post_init__(self) -> None:
        self.unwanted_from = self.threshold

    def gradient(self, context: Context) -> Tensor:
        own = context.prediction
        early = (context.t < self.threshold).reshape(-1, *[1] * (own.e.ndim - 1))
        return torch.where(early, own.e_u, own.e_u - own.e_unwanted) + (own.e - own.e_u)


@dataclass
class DDS(Method):
    """Delta denoising score (DDS, arXiv 2304.07090): e(z_t, target) - e(z_frozen_t, source), same t and noise.

    The frozen generator's image with the prompt that describes it stands for what SDS would do to an image that is
    right already, and is taken off. Needs the critic's source; nominal scales (7.5 in the paper). Its gradient is
    zero at the start if both prompts are the same.
    """

    name = "dds"
    needs = frozenset({"e"})
    needs_frozen = frozenset({"e_source"})

    def gradient(self, context: Context) -> Tensor:
        return context.prediction.e - context.frozen_prediction.e_source


@dataclass
class SDSBridge(Method):
    """SDS-Bridge (arXiv 2406.09417, second stage): s (e_c(z_t, target) - e_c(z_t, source)).

    The source prompt describes what the generator makes now, with its faults (the paper appends ", oversaturated,
    smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, malformed" to the target prompt). s is the
    sum of the guidance weights, e_c its effective condition: 30 in the released code.
    """

    name = "bridge"
    needs = frozenset({"e_c", "e_source_c"})

    def gradient(self, context: Context) -> Tensor:
        own = context.prediction
        return own.scale * (own.e_c - own.e_source_c)
