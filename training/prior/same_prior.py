"""Whether a run that goes on has the prior it began with: the same latents, noise and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..engine.settings import ConfigProblem
from .prior import Prior
from .text_encoders import Text

# Encoded on another device or in half precision, the same text differs by about a thousandth of its norm.
SAME_TEXT = 0.01
# ComfyUI may hold a VAE in bf16, whose rounded weights (another `vae_id`) move the mini world's latents by 0.003;
# another encoder's latents have nothing in common with them.
SAME_LATENTS = 0.02
PICTURE_SIDE, PICTURE_SEED = 64, 21


def prior_traits(prior: Prior, text: Text | None) -> dict[str, Any]:
    """The autoencoder, the noise and the text of a run, as a checkpoint keeps them.

    text: what the UNet is conditioned on; None is a text-free one, into which the empty prompt went.
    """
    text = text or prior.null_text
    noise = prior.prediction_type + (" with zero terminal SNR" if prior.zero_snr else "")
    latents = prior.encode(_fixed_picture())[0].cpu()
    return {
        "autoencoder": prior.vae_id,
        "latents": latents,
        "noise": noise,
        "context": text.context,
        "pooled": text.pooled,
    }


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
    both = {name for name in now if name in before}
    warnings, other = [], "autoencoder" in both and now["autoencoder"] != before["autoencoder"]
    if other and "latents" in both:
        moved = relative_difference(now["latents"], before["latents"])
        other = moved > SAME_LATENTS
        if not other:
            warnings.append(
                f"the VAE's weights are rounded differently than when {source} was written (its latents differ by "
                f"{moved:.1e}); the run goes on, but its weights will differ from an uninterrupted run's."
            )
    if other:
        raise ConfigProblem(
            f"{source}: expected a run with the same VAE, found one that learned the latents of another (content "
            f"{before['autoencoder'][:12]} instead of {now['autoencoder'][:12]}); use that one, or start a new run."
        )
    if "noise" in both and now["noise"] != before["noise"]:
        raise ConfigProblem(
            f"{source}: expected a run whose prior predicts {now['noise']}, found {before['noise']}; set prediction as "
            "before, or start a new run."
        )
    texts = both & {"context", "pooled"}
    difference = max((relative_difference(now[name], before[name]) for name in texts), default=0.0)
    if difference > SAME_TEXT:
        raise ConfigProblem(
            f"{source}: expected a run with the same text encoder, found another encoding of its text; use the text "
            "encoder (CLIP) that the run began with, or start a new run."
        )
    if difference > 0:
        warnings.append(
            f"the encoded text differs by {difference:.1e} from when {source} was written; the run goes on, but its "
            "weights can differ from an uninterrupted run's in their last bits."
        )
    return warnings


def relative_difference(now: Tensor | None, before: Tensor | None) -> float:
    """Norm of the difference relative to that of `before`; infinite where the shapes differ."""
    if now is None or before is None or now.shape != before.shape:
        return 0.0 if now is before else float("inf")
    now, before = now.detach().float().cpu(), before.float()
    return float((now - before).norm() / before.norm().clamp_min(1e-12))
