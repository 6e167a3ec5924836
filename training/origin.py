"""What a run learns from beside its images and weights, so that it does not go on with other parts unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import Base, Text
from .config import ConfigProblem

# Encoded on another device or in half precision, the same text differs by about a thousandth of its norm.
SAME_TEXT = 0.01


def origin_of(base: Base, text: Text | None) -> dict[str, Any]:
    """The autoencoder, the noise and the text of a run, as a checkpoint keeps them.

    text: what the UNet is conditioned on; None is a text-free one, into which the empty prompt went.
    """
    text = text or base.null_text
    noise = base.prediction_type + (" with zero terminal SNR" if base.zero_snr else "")
    return {"autoencoder": base.vae_id, "noise": noise, "context": text.context, "pooled": text.pooled}


def check_origin(now: Mapping[str, Any], before: Mapping[str, Any], source: str) -> list[str]:
    """Raise ConfigProblem when a run began with another autoencoder, noise or text; smaller differences as warnings.

    Fields that one of them lacks are not compared.
    """
    both = {name for name in now if name in before}
    if "autoencoder" in both and now["autoencoder"] != before["autoencoder"]:
        raise ConfigProblem(
            f"{source}: expected a run with the same VAE, found one that learned the latents of another (content "
            f"{before['autoencoder'][:12]} instead of {now['autoencoder'][:12]}); use that one, or start a new run."
        )
    if "noise" in both and now["noise"] != before["noise"]:
        raise ConfigProblem(
            f"{source}: expected a run of the same noise, found {before['noise']} where the prior is now taken for "
            f"{now['noise']}; set prediction as before, or start a new run."
        )
    difference = max((_difference(now[name], before[name]) for name in both & {"context", "pooled"}), default=0.0)
    if difference > SAME_TEXT:
        raise ConfigProblem(
            f"{source}: expected a run with the same text encoder, found another encoding of its text; use the text "
            "encoder (CLIP) that the run began with, or start a new run."
        )
    if difference > 0:
        return [f"the text is encoded by {difference:.1e} otherwise than when {source} was written; the run goes on, "
                "but its weights can differ from an uninterrupted run's in their last bits."]
    return []


def _difference(now: Tensor | None, before: Tensor | None) -> float:
    """Norm of the difference relative to that of `before`; infinite where the shapes differ."""
    if now is None or before is None or now.shape != before.shape:
        return 0.0 if now is before else float("inf")
    now, before = now.detach().float().cpu(), before.float()
    return float((now - before).norm() / before.norm().clamp_min(1e-12))
