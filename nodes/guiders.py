"""Guidance Term, Shape Guidance Term, Multi-Guidance Guider, In-Domain Guider and In-Domain Sampler."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import comfy.samplers
from comfy_api.latest import io

from ..guidance.frequency import Bands
from ..guidance.orthogonal import PER, Orthogonal
from ..guidance.schedules import GuidanceError, Interval, Keyframes, WeightLike
from ..guidance.shaping import InOrder, Shaping
from ..guidance.terms import Term
from .comfy_internals.guiding.guider import TermGuider, in_domain_guider
from .comfy_internals.guiding.latents import sample_latent
from .inputs import checked
from .schema import GUIDANCE, schema

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

    A weight of 0 is 0, whatever its interval. Raises GuidanceError for an unknown ramp, an interval that runs
    backwards, or numbers that are not finite.
    """
    made = _weight_over_sampling(weight, start, end, ramp)
    return 0.0 if weight == 0 else made


def _weight_over_sampling(weight: float, start: float, end: float, ramp: str) -> WeightLike:
    if ramp not in RAMPS:
        raise GuidanceError(f"Expected a ramp of {', '.join(RAMPS)}, got {ramp!r}.")
    shape = RAMPS[ramp]
    if shape is None:
        return weight if (start, end) == (0.0, 1.0) else Interval(weight, start, end)
    if start >= end:
        return Interval(weight, start, end)  # Nothing to ramp over: empty, or refused as running backwards.
    first, last, curve = shape
    return Interval(Keyframes(((start, first * weight), (end, last * weight)), ramp=curve), start, end)


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


def _domain_interval_inputs() -> list:
    return [
        io.Float.Input(
            "domain_start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Where in sampling the domain term begins: 0 (the default) is the start, at the highest noise, 1 "
            "the end. Beginning later leaves the composition to the prior and saves time.",
        ),
        io.Float.Input(
            "domain_end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Where in sampling the domain term ends: 0 to 1; 1 (the default) is the end of sampling.",
        ),
    ]


def _domain_weight_input():
    return io.Float.Input(
        "domain_weight",
        default=2.5,
        min=-100.0,
        max=100.0,
        step=0.05,
        round=0.001,
        tooltip="How strongly the image is drawn into the domain. Typical 0.5 to 5; 0 turns the domain model off, and "
        "the result is the prior's own; negative values push away from the domain.",
    )


def _control_weight_input():
    return io.Float.Input(
        "control_weight",
        default=2.5,
        min=-100.0,
        max=100.0,
        step=0.05,
        round=0.001,
        tooltip="How strongly the image follows the positive conditioning: the CFG scale of the prior. Typical 1 to "
        "8; 0 ignores the positive conditioning. With domain weight 0, 1 means no classifier-free guidance, as in "
        "KSampler.",
    )


def _prior_input():
    return io.Model.Input(
        "prior",
        tooltip="The large model, untouched. It sees both conditionings. Nodes that change the sampling function "
        "(RescaleCFG, PAG, ...) belong on this one. The domain model pushes against a LoRA that only this one has: see "
        "the help page.",
    )


def _domain_input():
    return io.Model.Input(
        "domain",
        tooltip="The domain model, from Load Domain UNet. It takes no text; ControlNets, areas and masks of the "
        "negative conditioning act on it.",
    )


def _positive_input():
    return io.Conditioning.Input("positive", tooltip="What the image should show: the control conditioning.")


def _negative_input():
    return io.Conditioning.Input(
        "negative",
        tooltip="The base conditioning that both guidances start from: the empty prompt in the paper, a negative "
        "prompt if you like. Apply ControlNets to both conditionings (Apply ControlNet does), so that the domain "
        "model sees them too.",
    )


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
                io.Float.Input(
                    "weight",
                    default=2.5,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    round=0.001,
                    tooltip="The strength of this term. Typical 0.5 to 8; 0 turns it off (its model is not even run); "
                    "negative values push away.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling this term begins: 0 (the default) is the start, at the highest noise, 1 "
                    "the end.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling this term ends: 0 to 1; 1 (the default) is the end of sampling.",
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
                io.Float.Input(
                    "low_strength",
                    default=0.2,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip="For frequencies and mean: what share of the term's weight its coarse part, or its mean, "
                    "gets. 1 is neutral, 0 removes it and leaves colours to the other terms, negative values push "
                    "away. Typical 0 to 0.5, default 0.2.",
                ),
                io.Float.Input(
                    "high_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip="For frequencies and mean: what share of the term's weight its fine part (strokes, "
                    "texture), or all but its mean, gets. 1 (the default) is neutral, 0 removes it.",
                ),
                io.String.Input(
                    "orthogonal_to",
                    default="control",
                    optional=True,
                    tooltip="For orthogonal: the names of the terms to be orthogonal to, separated by commas; the "
                    "default is control. Where such a term has weight 0, it removes nothing.",
                ),
                io.Float.Input(
                    "share",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip="For orthogonal: how much of what the term has in common with those terms is removed. 0 is "
                    "neutral, 1 (the default) removes all of it.",
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
        return io.NodeOutput(tuple(shaped if one is chosen else one for one in terms))


class MultiGuidanceGuider(io.ComfyNode):
    """Any number of guidance terms as a GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainMultiGuidanceGuider",
            display_name="Multi-Guidance Guider",
            category=GUIDANCE,
            search_aliases=["CFG", "autoguidance", "DualCFG", "CFGGuider", "two models"],
            description="Generalized classifier-free guidance: the prior on the base conditioning, plus any number of "
            "weighted terms from any number of models. For SamplerCustomAdvanced.",
            inputs=[
                _prior_input(),
                io.Conditioning.Input(
                    "base",
                    tooltip="The conditioning that the terms start from, usually the empty or the negative prompt.",
                ),
                GuidanceTerms.Input(
                    "terms", optional=True, tooltip="At least one Guidance Term. A term of weight 0 is neutral."
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    @checked()
    def execute(cls, prior, base, terms=()) -> io.NodeOutput:
        if not terms:
            raise GuidanceError(
                "Multi-Guidance Guider: expected at least one Guidance Term, got none; connect a Guidance Term."
            )
        return io.NodeOutput(TermGuider(prior, base, terms))


class InDomainGuider(io.ComfyNode):
    """The two guidances of the paper as a GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainGuider",
            display_name="In-Domain Guider",
            category=GUIDANCE,
            search_aliases=["CFG", "CFGGuider", "domain model", "domain guidance"],
            advanced=["domain_start_percent", "domain_end_percent"],
            description="Guides the prior with a prompt and with a domain model (arXiv 2312.08195). For "
            "SamplerCustomAdvanced.",
            inputs=[
                _prior_input(),
                _domain_input(),
                _positive_input(),
                _negative_input(),
                _domain_weight_input(),
                _control_weight_input(),
                *_domain_interval_inputs(),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    @checked()
    def execute(
        cls,
        prior,
        domain,
        positive,
        negative,
        domain_weight: float,
        control_weight: float,
        domain_start_percent: float = 0.0,
        domain_end_percent: float = 1.0,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            in_domain_guider(
                prior,
                domain,
                positive,
                negative,
                domain_weight,
                control_weight,
                domain_start_percent,
                domain_end_percent,
            )
        )


class InDomainSampler(io.ComfyNode):
    """KSampler with a domain model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainSampler",
            display_name="In-Domain Sampler",
            category=GUIDANCE,
            search_aliases=["CFG", "KSampler", "domain model", "domain guidance"],
            advanced=["domain_start_percent", "domain_end_percent"],
            description="KSampler with a domain model: images that follow the prompt and belong to the domain "
            "(arXiv 2312.08195). With domain weight 0 it is KSampler, bit for bit.",
            inputs=[
                _prior_input(),
                _domain_input(),
                _positive_input(),
                _negative_input(),
                io.Latent.Input(
                    "latent_image", tooltip="The latent to denoise, empty or encoded; its noise mask is kept to."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed of the noise: 0 to 2^64 - 1, no value is neutral.",
                ),
                io.Int.Input(
                    "steps",
                    default=25,
                    min=1,
                    max=10000,
                    tooltip="The number of sampling steps. Typical 15 to 50; no value is neutral, 1 is the fewest.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="dpmpp_2m",
                    tooltip="The sampling algorithm, any of ComfyUI's; none is neutral. The paper's is dpmpp_2m.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="normal",
                    tooltip="How noise levels are spread over the steps, any of ComfyUI's; none is neutral.",
                ),
                _domain_weight_input(),
                _control_weight_input(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the image is made anew: 1 all of it, lower values keep the structure of the "
                    "latent, 0 returns it unchanged.",
                ),
                *_domain_interval_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )

    @classmethod
    @checked()
    def execute(
        cls,
        prior,
        domain,
        positive,
        negative,
        latent_image,
        seed: int,
        steps: int,
        sampler_name: str,
        scheduler: str,
        domain_weight: float,
        control_weight: float,
        denoise: float = 1.0,
        domain_start_percent: float = 0.0,
        domain_end_percent: float = 1.0,
    ) -> io.NodeOutput:
        guider = in_domain_guider(
            prior, domain, positive, negative, domain_weight, control_weight, domain_start_percent, domain_end_percent
        )
        latent = sample_latent(guider, latent_image, seed, steps, sampler_name, scheduler, denoise)
        # A dictionary, as clients expect every item of a node's outputs to be.
        return io.NodeOutput(latent, ui={"samples_per_step": [{"value": guider.samples_per_step}]})
