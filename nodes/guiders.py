"""Multi-Guidance Guider, In-Domain Guider and In-Domain Sampler."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..guidance.errors import GuidanceError
from .comfy_internals.guiding.guider import TermGuider, in_domain_guider
from .comfy_internals.guiding.latents import sample_latent
from .inputs import checked
from .terms import GuidanceTerms
from .widgets import GUIDANCE, percent_input, schema, weight_input


def _domain_interval_inputs() -> list:
    return [
        percent_input(
            "domain_start_percent",
            0.0,
            "Where in sampling the domain term begins: 0 (the default) is the start, at the highest noise, 1 the end. "
            "Beginning later leaves the composition to the prior and saves time.",
            optional=True,
        ),
        percent_input(
            "domain_end_percent",
            1.0,
            "Where in sampling the domain term ends: 0 to 1; 1 (the default) is the end of sampling.",
            optional=True,
        ),
    ]


def _weight_inputs() -> list:
    return [
        weight_input(
            "domain_weight",
            "How strongly the image is drawn into the domain. Typical 0.5 to 5; 0 turns the domain model off, and the "
            "result is the prior's own; negative values push away from the domain.",
        ),
        weight_input(
            "control_weight",
            "How strongly the image follows the positive conditioning: the CFG scale of the prior. Typical 1 to 8; 0 "
            "ignores the positive conditioning. With domain weight 0, 1 means no classifier-free guidance, as in "
            "KSampler.",
        ),
    ]


def _prior_input():
    return io.Model.Input(
        "prior",
        tooltip="The large model, untouched. It sees both conditionings. Nodes that change the sampling function "
        "(RescaleCFG, PAG, ...) belong on this one. The domain model pushes against a LoRA that only this one has: see "
        "the help page.",
    )


def _model_inputs() -> list:
    return [
        _prior_input(),
        io.Model.Input(
            "domain",
            tooltip="The domain model, from Load Domain UNet. It takes no text; ControlNets, areas and masks of the "
            "negative conditioning act on it.",
        ),
        io.Conditioning.Input("positive", tooltip="What the image should show: the control conditioning."),
        io.Conditioning.Input(
            "negative",
            tooltip="The base conditioning that both guidances start from: the empty prompt in the paper, or a "
            "negative prompt. Apply ControlNets to both conditionings (Apply ControlNet does), so that the domain "
            "model sees them too.",
        ),
    ]


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
            inputs=[*_model_inputs(), *_weight_inputs(), *_domain_interval_inputs()],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    @checked()
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(in_domain_guider(**inputs))


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
                *_model_inputs(),
                io.Latent.Input(
                    "latent_image", tooltip="The latent to denoise, empty or encoded; its noise mask is kept to."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed of the noise: 0 to 2^64 - 1.",
                ),
                io.Int.Input(
                    "steps", default=25, min=1, max=10000, tooltip="Sampling steps. Typical 15 to 50, default 25."
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="dpmpp_2m",
                    tooltip="The sampling algorithm, any of ComfyUI's; the default is the paper's dpmpp_2m.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="normal",
                    tooltip="How noise levels are spread over the steps, any of ComfyUI's; default normal.",
                ),
                *_weight_inputs(),
                percent_input(
                    "denoise",
                    1.0,
                    "How much of the image is made anew: 1 all of it, lower values keep the structure of the latent, 0 "
                    "returns it unchanged.",
                ),
                *_domain_interval_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )

    @classmethod
    @checked()
    def execute(
        cls, latent_image, seed: int, steps: int, sampler_name: str, scheduler: str, denoise=1.0, **guiding: Any
    ) -> io.NodeOutput:
        guider = in_domain_guider(**guiding)
        latent = sample_latent(guider, latent_image, seed, steps, sampler_name, scheduler, denoise)
        # A dictionary, as clients expect every item of a node's outputs to be.
        return io.NodeOutput(latent, ui={"samples_per_step": [{"value": guider.samples_per_step}]})
