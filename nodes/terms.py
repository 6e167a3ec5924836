"""Guidance Term and Shape Guidance Term: chains of terms for the Multi-Guidance Guider."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..guidance.errors import GuidanceError
from ..guidance.options import options_of
from ..guidance.schedules import Interval, Keyframes, WeightLike
from ..guidance.shaping import InOrder
from ..guidance.shapings import SHAPINGS, make_shaping
from ..guidance.terms import Term
from .inputs import checked
from .widgets import GUIDANCE, option_input, percent_input, schema, weight_input

GuidanceTerms = io.Custom("INDOMAIN_GUIDANCE_TERMS")

# How a weight moves within its interval: (value at the start, value at the end) in parts of the weight, and the curve.
RAMPS = {
    "constant": None,
    "linear rise": (0.0, 1.0, "linear"),
    "linear fall": (1.0, 0.0, "linear"),
    "cosine rise": (0.0, 1.0, "cosine"),
    "cosine fall": (1.0, 0.0, "cosine"),
}


def weight_over_sampling(weight: float, start: float, end: float, ramp: str) -> WeightLike:
    """A term's weight from the node's widgets: `weight` between `start` and `end` percent of sampling, 0 elsewhere.

    A weight of 0 is 0 everywhere. Raises GuidanceError for an interval that runs backwards.
    """
    inside: WeightLike = weight
    shape = RAMPS[ramp]
    if shape is None and (start, end) == (0.0, 1.0):
        return weight
    if shape is not None and start < end:
        first, last, curve = shape
        inside = Keyframes(((start, first * weight), (end, last * weight)), ramp=curve)
    over_sampling = Interval(inside, start, end)
    return 0.0 if weight == 0 else over_sampling


def shaping_options() -> dict[str, tuple[dataclasses.Field, list[str]]]:
    """Name -> (field, the modes that have it), of the options of all shapings that can be chosen."""
    found: dict[str, tuple[dataclasses.Field, list[str]]] = {}
    for mode, shaping in SHAPINGS.items():
        for field in options_of(shaping):
            found.setdefault(field.name, (field, []))[1].append(mode)
    return found


def term_to_shape(terms: Sequence[Term], name: str) -> Term:
    """The term of that name, the last one for an empty name. Raises GuidanceError where it is none, or two."""
    if not terms:
        raise GuidanceError(
            "Shape Guidance Term: expected at least one Guidance Term, got none; connect a Guidance Term."
        )
    name = name or terms[-1].name
    known = ", ".join(term.name for term in terms)
    found = [term for term in terms if term.name == name]
    if not found:
        raise GuidanceError(f"Shape Guidance Term: expected one of the terms so far ({known}), got {name!r}.")
    if len(found) > 1:
        raise GuidanceError(
            f"Shape Guidance Term: expected terms with different names, got {name!r} twice among {known}; rename one."
        )
    return found[0]


class GuidanceTerm(io.ComfyNode):
    """One term w (D_i - R_i) of multi-guidance, added to a chain of terms."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainGuidanceTerm",
            display_name="Guidance Term",
            category=GUIDANCE,
            search_aliases=["CFG", "autoguidance", "DualCFG", "personalization guidance", "domain guidance"],
            advanced=["start_percent", "end_percent", "ramp"],
            description="One guidance: what a model predicts for a conditioning, minus a reference, times a weight. "
            "Chain terms and feed them to the Multi-Guidance Guider.",
            inputs=[
                io.String.Input(
                    "name",
                    default="domain",
                    tooltip="What this term is called in messages and in the reference of other terms. Names must "
                    "differ within a chain.",
                ),
                weight_input(
                    "weight",
                    "The strength of this term. Typical 0.5 to 8; 0 turns it off (its model is not even run); "
                    "negative values push away.",
                ),
                percent_input(
                    "start_percent",
                    0.0,
                    "Where in sampling this term begins: 0 (the default) is the start, at the highest noise, 1 "
                    "the end.",
                ),
                percent_input(
                    "end_percent",
                    1.0,
                    "Where in sampling this term ends: 0 to 1; 1 (the default) is the end of sampling.",
                ),
                io.Combo.Input(
                    "ramp",
                    options=list(RAMPS),
                    default="constant",
                    tooltip="How the weight moves between start and end: constant (the default) keeps it, rise goes "
                    "from 0 to the weight, fall from the weight to 0, in a straight line or along half a cosine.",
                ),
                io.String.Input(
                    "reference",
                    default="",
                    optional=True,
                    tooltip="The name of the term whose prediction is subtracted. Empty (the default) or 'base' means "
                    "the base conditioning of the prior.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="The model that makes this prediction. Not connected: the prior."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="The conditioning of this prediction. Not connected: the guider's base conditioning.",
                ),
                GuidanceTerms.Input(
                    "terms", optional=True, tooltip="Terms to add this one to. Not connected: a new chain."
                ),
            ],
            outputs=[GuidanceTerms.Output(display_name="terms", tooltip="The terms so far, this one last.")],
        )

    @classmethod
    @checked()
    def execute(
        cls,
        name: str,
        weight: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        ramp: str = "constant",
        reference: str = "",
        model=None,
        conditioning=None,
        terms=(),
    ) -> io.NodeOutput:
        name = name.strip()
        try:
            over_sampling = weight_over_sampling(weight, start_percent, end_percent, ramp)
        except GuidanceError as problem:
            raise GuidanceError(f"Term {name!r}: {problem}") from None
        term = Term(name, model, conditioning, over_sampling, reference.strip() or None)
        return io.NodeOutput((*(terms or ()), term))


class ShapeGuidanceTerm(io.ComfyNode):
    """Changes the direction of one term of a chain before it is weighted: w S(D_i - R_i)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        options = shaping_options()
        return schema(
            node_id="InDomainShapeTerm",
            display_name="Shape Guidance Term",
            category=GUIDANCE,
            search_aliases=["CFG", "frequency guidance", "orthogonal guidance", "APG", "colour"],
            advanced=[name for name, (field, _) in options.items() if field.metadata.get("advanced")],
            description="Lets a term guide only where it should: coarse and fine detail each with its own strength, or "
            "nothing that other terms decide already. For a domain of few colours and a prompt with others.",
            inputs=[
                GuidanceTerms.Input(
                    "terms",
                    tooltip="The terms so far, from Guidance Term or another Shape Guidance "
                    "Term. Terms that come later may be named in orthogonal_to as well.",
                ),
                io.String.Input(
                    "term",
                    default="",
                    tooltip="The name of the term to shape. Empty (the default): the last one. Shaping a term again "
                    "adds to what was done to it before.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(SHAPINGS),
                    default="frequencies",
                    tooltip="; ".join(f"{name} {shaping.summary}" for name, shaping in SHAPINGS.items())
                    + ". frequencies is the default.",
                ),
                *(option_input(field, f"For {' and '.join(modes)}: ") for field, modes in options.values()),
            ],
            outputs=[GuidanceTerms.Output(display_name="terms", tooltip="The same terms, one of them shaped.")],
        )

    @classmethod
    @checked()
    def execute(cls, terms=(), term: str = "", mode: str = "frequencies", **options: Any) -> io.NodeOutput:
        chosen = term_to_shape(terms or (), term.strip())
        given = {field.name: options[field.name] for field in options_of(SHAPINGS[mode]) if field.name in options}
        try:
            shaping = make_shaping(mode, **given)
            if shaping is not None and chosen.shaping is not None:
                shaping = InOrder(chosen.shaping, shaping)
        except GuidanceError as problem:
            raise GuidanceError(f"Term {chosen.name!r}: {problem}") from None
        shaped = chosen if shaping is None else replace(chosen, shaping=shaping)
        return io.NodeOutput(tuple(shaped if other is chosen else other for other in terms))
