"""The compared methods: a row each. Another method or rival is a row in METHODS and its points in `sweep.py`."""

from __future__ import annotations

from ..methods import CONTROL, DOMAIN, HIGH, LOW, TUNED, Method, named

METHODS = {
    "prior": Method("prior", "prior", (("control", "prior", "cond", "scale"),)),
    "domain": Method("domain", "domain model alone", (("domain", "trained", "uncond", "scale"),)),
    "multi_guidance": Method("paper", "multi-guidance", (DOMAIN, CONTROL)),
    "scheduled": Method("beyond", "scheduled terms", (DOMAIN, CONTROL)),
    "orthogonal": Method("beyond", "orthogonal domain term", (DOMAIN, CONTROL)),
    "bands": Method("beyond", "domain term by frequency", (LOW, HIGH, CONTROL)),
    "fine_tune": Method("fine_tune", "", (TUNED,), base="trained"),
    "fine_tune_prior_u": Method("fine_tune", ", prior's u", (TUNED,)),
}
PAPER, BEYOND, FINE_TUNES = (named(METHODS, *roles) for roles in (("paper",), ("paper", "beyond"), ("fine_tune",)))
