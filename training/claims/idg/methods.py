"""The compared methods by name: each turns its settings (plain JSON) into a guidance of the prior and a trained model.

Weights in settings are numbers or the JSON form of a schedule (`guidance.schedules`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ....guidance import presets
from ....guidance.combination import Guidance
from ....guidance.diffusion import Denoiser
from ....guidance.frequency import Bands
from ....guidance.orthogonal import Orthogonal
from ....guidance.schedules import Weight, weight_from_json
from ....guidance.terms import Source, Term

Settings = Mapping[str, Any]
Conditioning = Mapping[str, Any]


def prior(
    prior: Denoiser, model: Denoiser | None, settings: Settings, uncond: Conditioning, cond: Conditioning
) -> Guidance:
    """Classifier-free guidance of the prior alone (arXiv 2207.12598)."""
    return presets.cfg(prior, uncond, cond, _weight(settings["scale"]))


def domain(prior: Denoiser, model: Denoiser, settings: Settings, uncond: Conditioning, cond: Conditioning) -> Guidance:
    """The domain model alone at scale 1, domain guidance (arXiv 2504.01521) at others."""
    return presets.domain_guidance(prior, model, uncond, scale=_weight(settings["scale"]))


def fine_tune(
    prior: Denoiser, model: Denoiser, settings: Settings, uncond: Conditioning, cond: Conditioning
) -> Guidance:
    """Classifier-free guidance of a fine-tuned model."""
    return presets.cfg(model, uncond, cond, _weight(settings["scale"]))


def fine_tune_prior_u(
    prior: Denoiser, model: Denoiser, settings: Settings, uncond: Conditioning, cond: Conditioning
) -> Guidance:
    """The same with the prior's unconditional prediction (arXiv 2503.20240)."""
    return presets.unconditional_prior(prior, model, uncond, cond, _weight(settings["scale"]))


def multi_guidance(
    prior: Denoiser, model: Denoiser, settings: Settings, uncond: Conditioning, cond: Conditioning
) -> Guidance:
    """D_u + w_d (D_domain - D_u) + w_c (D_control - D_u) of arXiv 2312.08195."""
    return presets.in_domain(prior, model, uncond, cond, _weight(settings["w_d"]), _weight(settings["w_c"]))


def orthogonal(
    prior: Denoiser, model: Denoiser, settings: Settings, uncond: Conditioning, cond: Conditioning
) -> Guidance:
    """Multi-guidance whose domain direction loses (a share of) its component along the control direction."""
    options = {key: settings[key] for key in ("share", "only_opposing", "per") if key in settings}
    shaping = Orthogonal("control", **options)
    return Guidance(
        Source(prior, uncond),
        [
            Term("domain", model, uncond, _weight(settings["w_d"]), shaping=shaping),
            Term("control", prior, cond, _weight(settings["w_c"])),
        ],
    )


def bands(prior: Denoiser, model: Denoiser, settings: Settings, uncond: Conditioning, cond: Conditioning) -> Guidance:
    """Multi-guidance whose domain direction has one weight for its low and one for its high spatial frequencies.

    width: of the split in latent pixels; the text "inf" makes the low band each channel's mean.
    """
    width = float(settings["width"])
    return Guidance(
        Source(prior, uncond),
        [
            Term("domain, low", model, uncond, _weight(settings["w_low"]), shaping=Bands(width, 1.0, 0.0)),
            Term("domain, high", model, uncond, _weight(settings["w_high"]), shaping=Bands(width, 0.0, 1.0)),
            Term("control", prior, cond, _weight(settings["w_c"])),
        ],
    )


def _weight(setting: Any) -> Weight:
    return weight_from_json(setting)


METHODS: dict[str, Callable[..., Guidance]] = {
    "prior": prior,
    "domain": domain,
    "fine_tune": fine_tune,
    "fine_tune_prior_u": fine_tune_prior_u,
    "multi_guidance": multi_guidance,
    "scheduled": multi_guidance,
    "orthogonal": orthogonal,
    "bands": bands,
}
