"""Guidance Term and Shape Guidance Term: chains of terms for the Multi-Guidance Guider."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from comfy_api.latest import io

from ..guidance.frequency import Bands
from ..guidance.orthogonal import PER, Orthogonal
from ..guidance.schedules import GuidanceError, Interval, Keyframes, WeightLike
from ..guidance.shaping import InOrder, Shaping
from ..guidance.terms import Term
from .inputs import checked
from .schema import GUIDANCE, schema
from .widgets import number_input, percent_input, weight_input

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


SHAPES = ("frequencies", "mean", "orthogonal")


def shaping_of_mode(
    mode: str, orthogonal_to: str, share: float, only_opposing: bool, per: str, width: float, low: float, high: float
) -> Shaping | None:
    """A term's shaping from the node's widgets, None where they are neutral, so that nothing is rounded differently.

    Raises GuidanceError for an unknown mode, for a list of names without one or with one twice, and for values that
    the mode cannot use.
    """
    if mode not in SHAPES:
        raise GuidanceError(f"Expected a mode of {', '.join(SHAPES)}, got {mode!r}.")
    if mode == "orthogonal":
        names = [name.strip() for name in orthogonal_to.split(",") if name.strip()]
        for name, times in Counter(names).items():
            if times > 1:
                raise GuidanceError(f"Expected terms to be orthogonal to once each, got {name!r} twice.")
        shaping = Orthogonal(tuple(names), share, only_opposing, per)
        return None if share == 0.0 else shaping
    shaping = Bands(math.inf if mode == "mean" else width, low, high)
    return None if low == high == 1.0 else shaping


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
        return schema(
            node_id="InDomainShapeTerm",
            display_name="Shape Guidance Term",
            category=GUIDANCE,
            search_aliases=["CFG", "frequency guidance", "orthogonal guidance", "APG", "colour"],
            advanced=["width", "share", "only_opposing", "per"],
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
                    options=list(SHAPES),
                    default="frequencies",
                    tooltip="frequencies (the default) splits the term into coarse and fine detail, mean into the "
                    "picture's overall colour and all else: low_strength and high_strength weigh the two. orthogonal "
                    "takes out what the terms in orthogonal_to decide already.",
                ),
                io.Float.Input(
                    "width",
                    default=1.0,
                    min=0.1,
                    max=64.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    tooltip="For frequencies: the size in latent pixels (8 image pixels each in Stable Diffusion) "
                    "above which detail is coarse. Typical 0.5 to 4, default 1; none is neutral.",
                ),
                number_input(
                    "low_strength",
                    0.2,
                    -10.0,
                    10.0,
                    "For frequencies and mean: what share of the term's weight its coarse part, or its mean, "
                    "gets. 1 is neutral, 0 removes it and leaves colours to the other terms, negative values push "
                    "away. Typical 0 to 0.5, default 0.2.",
                    optional=True,
                ),
                number_input(
                    "high_strength",
                    1.0,
                    -10.0,
                    10.0,
                    "For frequencies and mean: what share of the term's weight its fine part (strokes, "
                    "texture), or all but its mean, gets. 1 (the default) is neutral, 0 removes it.",
                    optional=True,
                ),
                io.String.Input(
                    "orthogonal_to",
                    default="control",
                    optional=True,
                    tooltip="For orthogonal: the names of the terms to be orthogonal to, separated by commas; the "
                    "default is control. Where such a term has weight 0, it removes nothing.",
                ),
                number_input(
                    "share",
                    1.0,
                    0.0,
                    1.0,
                    "For orthogonal: how much of what the term has in common with those terms is removed. 0 is "
                    "neutral, 1 (the default) removes all of it.",
                    optional=True,
                ),
                io.Boolean.Input(
                    "only_opposing",
                    default=False,
                    optional=True,
                    tooltip="For orthogonal: remove only what works against those terms. Off (the default) also "
                    "removes what points their way.",
                ),
                io.Combo.Input(
                    "per",
                    options=list(PER),
                    default="position",
                    optional=True,
                    tooltip="For orthogonal: compare the terms at each position by itself (the default), or over the "
                    "whole image, which removes less.",
                ),
            ],
            outputs=[GuidanceTerms.Output(display_name="terms", tooltip="The same terms, one of them shaped.")],
        )

    @classmethod
    @checked()
    def execute(
        cls,
        terms=(),
        term: str = "",
        mode: str = "frequencies",
        width: float = 1.0,
        low_strength: float = 0.2,
        high_strength: float = 1.0,
        orthogonal_to: str = "control",
        share: float = 1.0,
        only_opposing: bool = False,
        per: str = "position",
    ) -> io.NodeOutput:
        chosen = term_to_shape(terms or (), term.strip())
        try:
            shaping = shaping_of_mode(
                mode, orthogonal_to, share, only_opposing, per, width, low_strength, high_strength
            )
            if shaping is not None and chosen.shaping is not None:
                shaping = InOrder(chosen.shaping, shaping)
        except GuidanceError as problem:
            raise GuidanceError(f"Term {chosen.name!r}: {problem}") from None
        shaped = chosen if shaping is None else replace(chosen, shaping=shaping)
        return io.NodeOutput(tuple(shaped if other is chosen else other for other in terms))
