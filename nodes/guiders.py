"""Guidance Term, Multi-Guidance Guider, In-Domain Guider and In-Domain Sampler."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from ..guidance.schedules import GuidanceError, Interval, Keyframes, WeightLike
from .comfy_internals.guider import MultiGuidanceGuider as Guider
from .comfy_internals.guider import TermInput, in_domain_guider, sample_latent

CATEGORY = "In-Domain Guidance"
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

    Raises GuidanceError for an unknown ramp, an interval that runs backwards, or numbers that are not finite.
    """
    if ramp not in RAMPS:
        raise GuidanceError(f"Expected a ramp of {', '.join(RAMPS)}, got {ramp!r}.")
    shape = RAMPS[ramp]
    if shape is None:
        return weight if (start, end) == (0.0, 1.0) else Interval(weight, start, end)
    if start >= end:
        return Interval(weight, start, end)  # Nothing to ramp over: empty, or refused as running backwards.
    first, last, curve = shape
    return Interval(Keyframes(((start, first * weight), (end, last * weight)), ramp=curve), start, end)


def _domain_interval_inputs() -> list:
    return [
        io.Float.Input(
            "domain_start_percent", default=0.0, min=0.0, max=1.0, step=0.01, optional=True,
            tooltip="Where in sampling the domain term begins: 0 (the default) is the start, at the highest noise, 1 "
            "the end. Beginning later leaves the composition to the prior and saves time.",
        ),
        io.Float.Input(
            "domain_end_percent", default=1.0, min=0.0, max=1.0, step=0.01, optional=True,
            tooltip="Where in sampling the domain term ends: 0 to 1; 1 (the default) is the end of sampling.",
        ),
    ]  # fmt: skip


def _domain_weight_input():
    return io.Float.Input(
        "domain_weight", default=2.5, min=-100.0, max=100.0, step=0.05, round=0.001,
        tooltip="How strongly the image is drawn into the domain. Typical 0.5 to 5; 0 turns the domain model off, and "
        "the result is the prior's own; negative values push away from the domain.",
    )  # fmt: skip


def _control_weight_input():
    return io.Float.Input(
        "control_weight", default=2.5, min=-100.0, max=100.0, step=0.05, round=0.001,
        tooltip="How strongly the image follows the positive conditioning: the CFG scale of the prior. Typical 1 to "
        "8; 0 ignores the positive conditioning. With domain weight 0, 1 means no classifier-free guidance, as in "
        "KSampler.",
    )  # fmt: skip


def _prior_input():
    return io.Model.Input(
        "prior",
        tooltip="The large model, untouched. It sees both conditionings. Put LoRAs, and nodes that change the sampling "
        "function (RescaleCFG, PAG, ...), on this one.",
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
        return io.Schema(
            node_id="InDomainGuidanceTerm",
            display_name="Guidance Term",
            category=CATEGORY,
            description="One guidance: what a model predicts for a conditioning, minus a reference, times a weight. "
            "Chain terms and feed them to the Multi-Guidance Guider.",
            inputs=[
                io.String.Input(
                    "name", default="domain",
                    tooltip="What this term is called in messages and in the reference of other terms. Names must "
                    "differ within a chain.",
                ),
                io.Float.Input(
                    "weight", default=2.5, min=-100.0, max=100.0, step=0.05, round=0.001,
                    tooltip="The strength of this term. Typical 0.5 to 8; 0 turns it off (its model is not even run); "
                    "negative values push away.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Where in sampling this term begins: 0 (the default) is the start, at the highest noise, 1 "
                    "the end.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Where in sampling this term ends: 0 to 1; 1 (the default) is the end of sampling.",
                ),
                io.Combo.Input(
                    "ramp", options=list(RAMPS), default="constant",
                    tooltip="How the weight moves between start and end: constant (the default) keeps it, rise goes "
                    "from 0 to the weight, fall from the weight to 0, in a straight line or along half a cosine.",
                ),
                io.String.Input(
                    "reference", default="", optional=True,
                    tooltip="The name of the term whose prediction is subtracted. Empty (the default) or 'base' means "
                    "the base conditioning of the prior.",
                ),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="The model that makes this prediction. Not connected: the prior.",
                ),
                io.Conditioning.Input(
                    "conditioning", optional=True,
                    tooltip="The conditioning of this prediction. Not connected: the guider's base conditioning.",
                ),
                GuidanceTerms.Input("terms", optional=True, tooltip="Terms to add this one to. Not connected: a new "
                "chain."),
            ],
            outputs=[GuidanceTerms.Output(display_name="terms", tooltip="The terms so far, this one last.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, name: str, weight: float, start_percent: float = 0.0, end_percent: float = 1.0, ramp: str = "constant",
        reference: str = "", model=None, conditioning=None, terms=(),
    ) -> io.NodeOutput:  # fmt: skip
        name = name.strip()
        try:
            over_sampling = weight_over_sampling(weight, start_percent, end_percent, ramp)
        except GuidanceError as problem:
            raise GuidanceError(f"Term {name!r}: {problem}") from None
        term = TermInput(name, over_sampling, model, conditioning, reference.strip() or None)
        return io.NodeOutput((*(terms or ()), term))


class MultiGuidanceGuider(io.ComfyNode):
    """Any number of guidance terms as a GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InDomainMultiGuidanceGuider",
            display_name="Multi-Guidance Guider",
            category=CATEGORY,
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
    def execute(cls, prior, base, terms=()) -> io.NodeOutput:
        if not terms:
            raise GuidanceError(
                "Multi-Guidance Guider: expected at least one Guidance Term, got none; connect a Guidance Term."
            )
        return io.NodeOutput(Guider(prior, base, terms))


class InDomainGuider(io.ComfyNode):
    """The two guidances of the paper as a GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InDomainGuider",
            display_name="In-Domain Guider",
            category=CATEGORY,
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
    def execute(
        cls, prior, domain, positive, negative, domain_weight: float, control_weight: float,
        domain_start_percent: float = 0.0, domain_end_percent: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
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
        return io.Schema(
            node_id="InDomainSampler",
            display_name="In-Domain Sampler",
            category=CATEGORY,
            description="KSampler with a domain model: images that follow the prompt and belong to the domain "
            "(arXiv 2312.08195). With domain weight 0 it is KSampler, bit for bit.",
            inputs=[
                _prior_input(),
                _domain_input(),
                _positive_input(),
                _negative_input(),
                io.Latent.Input("latent_image", tooltip="The latent to denoise, empty or encoded; its noise mask is "
                "kept to."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="The random seed of the noise: 0 to 2^64 - 1, no value is neutral.",
                ),
                io.Int.Input(
                    "steps", default=25, min=1, max=10000,
                    tooltip="The number of sampling steps. Typical 15 to 50; no value is neutral, 1 is the fewest.",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="dpmpp_2m",
                    tooltip="The sampling algorithm, any of ComfyUI's; none is neutral. The paper's is dpmpp_2m.",
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="normal",
                    tooltip="How noise levels are spread over the steps, any of ComfyUI's; none is neutral.",
                ),
                _domain_weight_input(),
                _control_weight_input(),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="How much of the image is made anew: 1 all of it, lower values keep the structure of the "
                    "latent, 0 returns it unchanged.",
                ),
                *_domain_interval_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, prior, domain, positive, negative, latent_image, seed: int, steps: int, sampler_name: str, scheduler: str,
        domain_weight: float, control_weight: float, denoise: float = 1.0, domain_start_percent: float = 0.0,
        domain_end_percent: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        guider = in_domain_guider(
            prior, domain, positive, negative, domain_weight, control_weight, domain_start_percent, domain_end_percent
        )
        latent = sample_latent(guider, latent_image, seed, steps, sampler_name, scheduler, denoise)
        return io.NodeOutput(latent, ui={"samples_per_step": [guider.samples_per_step]})
