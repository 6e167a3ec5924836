"""The compared methods: a row each, with what it is called and the guidance that its settings make.

Weights in settings are numbers or the JSON form of a schedule (`guidance.schedules`). Another method or rival is a row
in METHODS and its points in `sweep.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ....guidance import presets
from ....guidance.combination import Guidance
from ....guidance.frequency import Bands
from ....guidance.orthogonal import Orthogonal
from ....guidance.schedules import Weight, weight_from_json
from ....guidance.terms import Source, Term


@dataclass(frozen=True)
class Method:
    """A way of sampling. role: "prior" (what everything is held against), "paper" (multi-guidance as the paper has it),
    "beyond" (what this project adds to it), "fine_tune" (the paper's rival) or "domain". guidance(prior, model, weight,
    settings, uncond, cond): weight(name) is a setting as a weight."""

    name: str
    role: str
    title: str
    guidance: Callable[..., Guidance]

    def guide(self, prior: Any, model: Any, settings: Mapping[str, Any], uncond: Any, cond: Any) -> Guidance:
        """The guidance of a prior and a trained model under two conditionings."""

        def weight(name: str) -> Weight:
            return weight_from_json(settings[name])

        return self.guidance(prior, model, weight, settings, uncond, cond)


def in_domain(prior, model, w, s, u, c) -> Guidance:
    return presets.in_domain(prior, model, u, c, w("w_d"), w("w_c"))


def orthogonal(prior, model, w, s, u, c) -> Guidance:
    """The domain direction loses (a share of) its component along the control direction."""
    shaping = Orthogonal(("control",), **{key: s[key] for key in ("share", "only_opposing", "per") if key in s})
    terms = [Term("domain", model, u, w("w_d"), shaping=shaping), Term("control", prior, c, w("w_c"))]
    return Guidance(Source(prior, u), terms)


def bands(prior, model, w, s, u, c) -> Guidance:
    """The domain direction has one weight for its low and one for its high spatial frequencies, split at a width in
    latent pixels; the text "inf" makes the low band each channel's mean."""
    width = float(s["width"])
    terms = [
        Term("domain, low", model, u, w("w_low"), shaping=Bands(width, 1.0, 0.0)),
        Term("domain, high", model, u, w("w_high"), shaping=Bands(width, 0.0, 1.0)),
        Term("control", prior, c, w("w_c")),
    ]
    return Guidance(Source(prior, u), terms)


METHODS = {
    method.name: method
    for method in (
        Method("prior", "prior", "prior", lambda prior, model, w, s, u, c: presets.cfg(prior, u, c, w("scale"))),
        Method(
            "domain",
            "domain",
            "domain model alone",
            lambda prior, model, w, s, u, c: presets.domain_guidance(prior, model, u, scale=w("scale")),
        ),
        Method("multi_guidance", "paper", "multi-guidance", in_domain),
        Method("scheduled", "beyond", "scheduled terms", in_domain),
        Method("orthogonal", "beyond", "orthogonal domain term", orthogonal),
        Method("bands", "beyond", "domain term by frequency", bands),
        Method("fine_tune", "fine_tune", "", lambda prior, model, w, s, u, c: presets.cfg(model, u, c, w("scale"))),
        Method(
            "fine_tune_prior_u",
            "fine_tune",
            ", prior's u",
            lambda prior, model, w, s, u, c: presets.unconditional_prior(prior, model, u, c, w("scale")),
        ),
    )
}


def methods_of(*roles: str) -> tuple[str, ...]:
    """The names of the methods in these roles."""
    return tuple(method.name for method in METHODS.values() if method.role in roles)


PAPER, BEYOND, FINE_TUNES = methods_of("paper"), methods_of("paper", "beyond"), methods_of("fine_tune")
