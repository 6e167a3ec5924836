"""The compared methods: a row each, with what it is called and the guidance that its settings make.

Weights in settings are numbers or the JSON form of a schedule (`guidance.schedules`). Another method or rival is a row
in METHODS and its points in `sweep.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ....guidance import presets
from ....guidance.combination import Guidance
from ....guidance.frequency import Bands
from ....guidance.orthogonal import Orthogonal
from ....guidance.schedules import Weight, weight_from_json
from ....guidance.terms import Source, Term


class Given(NamedTuple):
    """What a method makes its guidance of: the prior, a trained model, settings, and the two conditionings."""

    prior: Any
    model: Any
    settings: Mapping[str, Any]
    uncond: Any
    cond: Any

    def weight(self, name: str) -> Weight:
        return weight_from_json(self.settings[name])

    def with_control(self, *terms: Term) -> Guidance:
        """Terms, and classifier-free guidance of the prior."""
        control = Term("control", self.prior, self.cond, self.weight("w_c"))
        return Guidance(Source(self.prior, self.uncond), [*terms, control])


class Method(NamedTuple):
    """A way of sampling. role: "prior" (what everything is held against), "paper" (multi-guidance as the paper has it),
    "beyond" (what this project adds to it), "fine_tune" (the paper's rival) or "domain". title: in tables; of
    fine-tunes what stands after their kind."""

    name: str
    role: str
    title: str
    guidance: Callable[[Given], Guidance]


def in_domain(given: Given) -> Guidance:
    return given.with_control(Term("domain", given.model, given.uncond, given.weight("w_d")))


def orthogonal(given: Given) -> Guidance:
    """The domain direction loses (a share of) its component along the control direction."""
    options = {key: given.settings[key] for key in ("share", "only_opposing", "per") if key in given.settings}
    shaping = Orthogonal(("control",), **options)
    return given.with_control(Term("domain", given.model, given.uncond, given.weight("w_d"), shaping=shaping))


def bands(given: Given) -> Guidance:
    """The domain direction has one weight for its low and one for its high spatial frequencies, split at a width in
    latent pixels; the text "inf" makes the low band each channel's mean."""
    parts = {"low": (1.0, 0.0), "high": (0.0, 1.0)}
    shapings = {part: Bands(float(given.settings["width"]), *shares) for part, shares in parts.items()}
    return given.with_control(
        *(
            Term(f"domain, {part}", given.model, given.uncond, given.weight(f"w_{part}"), shaping=shaping)
            for part, shaping in shapings.items()
        )
    )


def domain(given: Given) -> Guidance:
    return presets.domain_guidance(given.prior, given.model, given.uncond, scale=given.weight("scale"))


def prior(given: Given) -> Guidance:
    return presets.cfg(given.prior, given.uncond, given.cond, given.weight("scale"))


def fine_tune(given: Given) -> Guidance:
    return presets.cfg(given.model, given.uncond, given.cond, given.weight("scale"))


def fine_tune_prior_u(given: Given) -> Guidance:
    return presets.unconditional_prior(given.prior, given.model, given.uncond, given.cond, given.weight("scale"))


_ROWS = (
    Method("prior", "prior", "prior", prior),
    Method("domain", "domain", "domain model alone", domain),
    Method("multi_guidance", "paper", "multi-guidance", in_domain),
    Method("scheduled", "beyond", "scheduled terms", in_domain),
    Method("orthogonal", "beyond", "orthogonal domain term", orthogonal),
    Method("bands", "beyond", "domain term by frequency", bands),
    Method("fine_tune", "fine_tune", "", fine_tune),
    Method("fine_tune_prior_u", "fine_tune", ", prior's u", fine_tune_prior_u),
)
METHODS = {method.name: method for method in _ROWS}


def methods_of(*roles: str) -> tuple[str, ...]:
    """The names of the methods in these roles."""
    return tuple(method.name for method in METHODS.values() if method.role in roles)


PAPER, BEYOND, FINE_TUNES = methods_of("paper"), methods_of("paper", "beyond"), methods_of("fine_tune")
