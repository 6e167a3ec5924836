"""How a method samples: the terms of its guidance, and from which prediction they start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...guidance.combination import Guidance
from ...guidance.frequency import Bands
from ...guidance.orthogonal import Orthogonal
from ...guidance.schedules import weight_from_json
from ...guidance.shaping import Shaping
from ...guidance.terms import Source, Term

# A term: its name, the model and the conditioning of its prediction, and the setting that is its weight.
Row = tuple[str, str, str, str]
CONTROL: Row = ("control", "prior", "cond", "w_c")
DOMAIN: Row = ("domain", "trained", "uncond", "w_d")
LOW: Row = ("domain, low", "trained", "uncond", "w_low")
HIGH: Row = ("domain, high", "trained", "uncond", "w_high")
TUNED: Row = ("control", "trained", "cond", "scale")


class Method(NamedTuple):
    """A way of sampling. role: what tables and claims choose by, such as "prior" (what everything is held against),
    "paper" (multi-guidance as the paper has it) or "fine_tune" (its rival). title: in tables; of fine-tunes what stands
    after their kind. base: the model whose unconditional prediction the terms start from."""

    role: str
    title: str
    terms: tuple[Row, ...]
    base: str = "prior"


def named(methods: Mapping[str, Method], *roles: str) -> tuple[str, ...]:
    """The names of the methods of these roles."""
    return tuple(name for name, method in methods.items() if method.role in roles)


def guidance(
    method: Method, settings: Mapping[str, Any], models: Mapping[str, Any], conds: Mapping[str, Any]
) -> Guidance:
    """The guidance of a method at some settings. Weights are numbers or the JSON form of a schedule
    (`guidance.schedules`). models: "prior" and "trained"; conds: "uncond" and "cond"."""
    terms = [
        Term(name, models[model], conds[cond], weight_from_json(settings[weight]), shaping=_shaping(name, settings))
        for name, model, cond, weight in method.terms
    ]
    return Guidance(Source(models[method.base], conds["uncond"]), terms)


def _shaping(term: str, settings: Mapping[str, Any]) -> Shaping | None:
    """What settings with "per" (the domain direction loses its component along the control's) or "width" (a weight for
    its low and one for its high frequencies) change of a term."""
    if term == DOMAIN[0] and "per" in settings:
        options = {key: settings[key] for key in ("share", "only_opposing", "per") if key in settings}
        return Orthogonal(("control",), **options)
    if term in (LOW[0], HIGH[0]):
        return Bands(float(settings["width"]), *((1.0, 0.0) if term == LOW[0] else (0.0, 1.0)))
    return None
