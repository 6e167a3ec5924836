"""Adapt Generator and its options."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..guidance.distillation.method import prompts_of
from ..guidance.distillation.methods import METHODS, methods_with
from . import widgets
from .comfy_internals.models import generators
from .comfy_internals.runs import adapting, execution
from .comfy_internals.runs.critic import CriticInputs
from .generators import GeneratorType
from .inputs import checked
from .terms import GuidanceTerms

AdaptOptions = io.Custom("INDOMAIN_ADAPT_OPTIONS")

# On the node itself, each with what its widget changes; what is connected decides DECIDED_HERE; the others are options.
ON_THE_NODE: dict[str, dict[str, Any]] = {
    "name": {"default": "my_generator"},
    "method": {},
    "scale": {},
    "directional": {"step": 0.05},
    "reconstruction": {"step": 0.05},
    "steps": {},
    "batch_size": {},
    "learning_rate": {},
    "layers": {},
    "sample_every": {},
    "seed": widgets.SEED_OF_A_RUN,
}
DECIDED_HERE = (
    "generator base prompt negative source_prompt domain domain_weight output export_to vae tokenizer device "
    "precision"  # the connected model and VAE have their own
).split()
# What the options node shows at once, where the editor folds the rest away.
USUAL_OPTIONS = ("mode", "t_min", "t_max", "perceptual", "train", "truncation", "label", "gradient_checkpointing")


def options_of_adapting() -> list[str]:
    """The fields of `AdaptConfig` that the options node offers, in the order of its widgets.

    The options of methods come last: saved graphs store widgets by position, and a new method must shift none of them.
    """
    from ..training.adaptation.config import OPTIONS_OF_METHODS, AdaptConfig

    settings = widgets.option_names(AdaptConfig, (*ON_THE_NODE, *DECIDED_HERE, *OPTIONS_OF_METHODS))
    return [*settings, *OPTIONS_OF_METHODS]


class AdaptGenerator(io.ComfyNode):
    """A generator and a prompt in, a generator for the prompt's domain out; needs no browser."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..training.adaptation.config import AdaptConfig

        return widgets.schema(
            node_id="InDomainAdaptGenerator",
            display_name="Adapt Generator (SDS)",
            category=widgets.GENERATORS,
            search_aliases=["SDS", "score distillation", "StyleGAN-Fusion", "GAN", "fine-tune", "domain adaptation"],
            advanced=["layers"],
            description="Moves a StyleGAN2 generator into a domain that only a prompt describes, with a diffusion "
            "model as the judge (StyleGAN-Fusion, arXiv 2212.04473). No images are needed. Cancel saves; running again "
            "continues. The finished file lands in models/generators.",
            is_output_node=True,
            inputs=[
                GeneratorType.Input("generator", tooltip="The generator to adapt; it stays as it is."),
                io.Model.Input(
                    "model",
                    tooltip="The diffusion model that judges (Stable Diffusion 1.x, 2.x, SDXL, the mini world). LoRAs "
                    "and hooks on it act as they do in sampling.",
                ),
                io.Vae.Input("vae", tooltip="The model's VAE. Gradients go through its encoder."),
                io.Conditioning.Input(
                    "positive", tooltip="The domain to reach, such as 'a 3d render of a face, Pixar'."
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What guidance starts from: the empty prompt in the paper, a negative prompt if you like.",
                ),
                *(widgets.config_input(AdaptConfig, name, **changes) for name, changes in ON_THE_NODE.items()),
                widgets.resume_input(),
                GuidanceTerms.Input(
                    "terms",
                    optional=True,
                    tooltip="More judges, from Guidance Term: a domain model, another checkpoint, another prompt. "
                    "Percentages count the model's noise levels, 0 the noisiest.",
                ),
                io.Conditioning.Input(
                    "source",
                    optional=True,
                    tooltip="What the generator makes now, such as 'a photo of a face'. Needed by: "
                    f"{methods_with('source')}; without effect for others.",
                ),
                io.Conditioning.Input(
                    "unwanted",
                    optional=True,
                    tooltip="What images should not be, such as 'blurry, low quality, unrealistic', beside an empty "
                    f"negative. Needed by: {methods_with('unwanted')}; without effect for others.",
                ),
                AdaptOptions.Input("options", optional=True, tooltip="Other settings, from In-Domain Adapt Options."),
            ],
            outputs=[
                GeneratorType.Output(display_name="generator", tooltip="The adapted generator, loaded from its file."),
                *widgets.picture_outputs("The grid, with the source's images in its first row,"),
                io.String.Output(display_name="path", tooltip="The finished file in models/generators."),
            ],
            # For the texts behind the conditionings, which the finished file names.
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    @checked()
    def execute(cls, generator, resume: str, options: dict | None = None, **values: Any) -> io.NodeOutput:
        options = widgets.given_options(options, options_of_adapting(), "In-Domain Adapt Options")
        # What the method does not ask for costs no evaluation, and may change when the run goes on.
        judge = ("model", "vae", "positive", "negative", "terms", *prompts_of(METHODS[values["method"]]))
        connected = {name: values[name] for name in judge if values.get(name) is not None}
        critic = CriticInputs(scale=values["scale"], **connected)
        values = {name: values[name] for name in ON_THE_NODE if name in values}
        texts = adapting.prompt_texts(getattr(cls.hidden, "prompt", None))
        config = adapting.config_of({**options, **values}, generator, critic, texts)
        execution.check_claim(config)
        result, warnings = adapting.run(config, generator, critic, widgets.RESUME[resume])
        adapted, _ = generators.load_generator(f"{config.name}.safetensors")
        return widgets.run_outputs(cls, adapted, result, execution.finished_file(config), warnings)


class GeneratorAdaptOptions(io.ComfyNode):
    """All settings of an adaptation that its node does not show."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..training.adaptation.config import AdaptConfig

        names = options_of_adapting()
        return widgets.schema(
            node_id="InDomainAdaptOptions",
            display_name="In-Domain Adapt Options",
            category=widgets.GENERATORS,
            search_aliases=["SDS", "score distillation", "StyleGAN", "GAN"],
            advanced=[name for name in names if name not in USUAL_OPTIONS],
            description="All settings that Adapt Generator does not show. Leave the node out to use the defaults.",
            inputs=[widgets.config_input(AdaptConfig, name, optional=True) for name in names],
            outputs=[AdaptOptions.Output(display_name="options", tooltip="For Adapt Generator (SDS).")],
        )

    @classmethod
    @checked()
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(values)
