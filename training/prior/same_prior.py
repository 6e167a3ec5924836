"""Whether a run that goes on has the prior it began with: the same latents, noise and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..engine.settings import ConfigProblem
from .prior import Prior
from .text_encoders import Text

# The largest difference, relative to the norm. On another device or in half precision the same text differs by about a
# thousandth; ComfyUI may hold a VAE in bf16, which moves the mini world's latents by 0.003. Others differ by far more.
LARGEST = {"latents": 0.02, "context": 0.01, "pooled": 0.01}
PARTS = {"latents": "VAE", "context": "text encoder", "pooled": "text encoder"}
PICTURE_SIDE, PICTURE_SEED = 64, 21


def prior_traits(prior: Prior, text: Text | None) -> dict[str, Any]:
    """What the autoencoder makes of a fixed picture, the noise and the text of a run, as a checkpoint keeps them.

    text: what the UNet is conditioned on; None is a text-free one, into which the empty prompt went.
    """
    text = text or prior.null_text
    noise = prior.prediction_type + (" with zero terminal SNR" if prior.zero_snr else "")
    latents = prior.encode(_fixed_picture())[0].cpu()
    return {"latents": latents, "noise": noise, "context": text.context, "pooled": text.pooled}


def _fixed_picture() -> Tensor:
    """[1, 3, S, S] in -1..1, the same for ever: coarse and fine, so that it shows every scale of an encoder."""
    random = torch.Generator().manual_seed(PICTURE_SEED)
    sides = [8 * 2**power for power in range((PICTURE_SIDE // 8).bit_length())]
    parts = [torch.rand(1, 3, side, side, generator=random) for side in sides]
    grown = [torch.nn.functional.interpolate(part, size=PICTURE_SIDE, mode="nearest") for part in parts]
    return torch.stack(grown).mean(0) * 2 - 1


def check_same_prior(now: Mapping[str, Any], before: Mapping[str, Any], source: str) -> list[str]:
    """Raise ConfigProblem when a run began with another autoencoder, noise or text; smaller differences as warnings.

    Fields that one of them lacks are not compared.
    """
    if "noise" in now and now["noise"] != before.get("noise", now["noise"]):
        raise ConfigProblem(
            f"{source}: expected a run whose prior predicts {now['noise']}, found {before['noise']}; set prediction as "
            "before, or start a new run."
        )
    warnings = []
    for name in now.keys() & before.keys() & LARGEST.keys():
        difference = relative_difference(now[name], before[name])
        warnings += check_difference(difference, LARGEST[name], PARTS[name], name, source)
    return warnings


def check_difference(difference: float, largest: float, what: str, name: str, source: str) -> list[str]:
    """Raise ConfigProblem for a relative difference above `largest`; a smaller one is a warning.

    what: parts of a run that must be the same; name: that of them which differs.
    """
    if difference > largest:
        raise ConfigProblem(
            f"{source}: expected a run with the same {what}, found one whose {name} differs for the same input; use "
            "what the run began with, or start a new run."
        )
    if difference == 0:
        return []
    return [
        f"{what}: {name} now and in {source} differ by {difference:.1e}; the run goes on, and its weights will differ "
        "from an uninterrupted run's."
    ]


def relative_difference(now: Tensor | None, before: Tensor | None) -> float:
    """Norm of the difference relative to that of `before`; infinite where the shapes differ."""
    if now is None or before is None or now.shape != before.shape:
        return 0.0 if now is before else float("inf")
    now, before = now.detach().float().cpu(), before.float()
    return float((now - before).norm() / before.norm().clamp_min(1e-12))
