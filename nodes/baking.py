"""Bake Domain LoRA and its options."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import widgets
from .comfy_internals.models.loading import ordinary_tensors
from .comfy_internals.runs import baking, execution, pictures
from .inputs import checked
from .terms import GuidanceTerms

BakeOptions = io.Custom("INDOMAIN_BAKE_OPTIONS")
LoraModel = io.Custom("LORA_MODEL")  # core's, which its node Load LoRA Model takes

# On the node itself, each with what its widget changes; ComfyUI decides DECIDED_HERE; the others are options.
ON_THE_NODE: dict[str, dict[str, Any]] = {
    "name": {"default": "my_domain_lora"},
    "domain_weight": {"step": 0.05},
    "domain_start": {"step": 0.01},
    "domain_end": {"step": 0.01},
    "steps": {},
    "batch_size": {},
    "learning_rate": {},
    "rank": {},
    "resolution": {"step": 8},
    "sample_every": {},
    "seed": widgets.SEED_OF_A_RUN,
}
DECIDED_HERE = ("base", "domain", "terms", "data", "output", "export_to", "vae", "tokenizer", "device", "cache")
DECIDED_HERE += ("within", "prompt_file")
# What the options node shows at once, where the editor folds the rest away.
USUAL_OPTIONS = "target control_weight states prompt_list random_prompts layers gradient_checkpointing sample_prompts"


def options_of_baking() -> list[str]:
    """The fields of `BakeConfig` that the options node offers."""
    from ..training.baking.config import BakeConfig

    return widgets.option_names(BakeConfig, (*ON_THE_NODE, *DECIDED_HERE))


class BakeDomainLoRA(io.ComfyNode):
    """A prior and a domain model in, a LoRA out that plain CFG turns into in-domain guidance; needs no browser."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..training.baking.config import BakeConfig

        name, *settings = (widgets.config_input(BakeConfig, key, **changes) for key, changes in ON_THE_NODE.items())
        return widgets.schema(
            node_id="InDomainBakeDomainLoRA",
            display_name="Bake Domain LoRA",
            category=widgets.TRAINING,
            search_aliases=["LoRA", "distill", "guidance distillation", "domain model", "export", "slider"],
            advanced=["domain_start", "domain_end"],
            description="Puts a domain model's guidance into a LoRA for the prior: with it, plain CFG in any program "
            "draws what In-Domain Sampler draws, at two predictions a step instead of three. The LoRA's strength is "
            "the domain weight. Cancel saves; running again continues. The finished file lands in models/loras.",
            is_output_node=True,
            # So that a list of images of many sizes is one run and not one an image.
            is_input_list=True,
            inputs=[
                name,
                io.Model.Input("model", tooltip="The prior that the LoRA is for. Connect it without other LoRAs."),
                io.Clip.Input("clip", tooltip="The prior's text encoder. It encodes the prompts to match at."),
                io.Vae.Input("vae", tooltip="The prior's VAE. It encodes the pictures, once."),
                io.String.Input(
                    "image_folder",
                    default="",
                    tooltip="Folder of pictures to match on, best those of the domain: a full path, or a folder in "
                    "ComfyUI's input folder. Empty: the images input. Needed when states has pictures.",
                ),
                *settings,
                widgets.resume_input(),
                io.Model.Input(
                    "domain",
                    optional=True,
                    tooltip="The domain model whose guidance is baked in, from Load Domain UNet or Train Domain UNet, "
                    "made of this prior.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures to match on instead of a folder: a batch or a list."
                ),
                GuidanceTerms.Input(
                    "terms",
                    optional=True,
                    tooltip="Further guidance to bake in, from Guidance Term and Shape Guidance Term, each with its "
                    "own weight. Terms that are shaped by the prompt's own term cannot be baked in.",
                ),
                BakeOptions.Input("options", optional=True, tooltip="All other settings, from In-Domain Bake Options."),
            ],
            outputs=[
                io.Model.Output(tooltip="The prior with the LoRA at strength 1, for any sampler."),
                LoraModel.Output(
                    display_name="lora", tooltip="The LoRA, for core's Load LoRA Model, whose strength is the dial."
                ),
                *widgets.picture_outputs("The sample grid, with the LoRA and with guidance,"),
                io.String.Output(display_name="path", tooltip="The finished file in models/loras."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, image_folder: list | tuple = (), **inputs: Any):
        # A folder that has more or other pictures than last time has to be matched on again.
        return pictures.data_fingerprint(";".join(filter(None, image_folder)))

    @classmethod
    @checked()
    def execute(cls, image_folder: list[str], images: list | None = None, **lists: list) -> io.NodeOutput:
        given: dict[str, Any] = {name: values[0] if values else None for name, values in lists.items()}
        options = widgets.given_options(given.get("options"), options_of_baking(), "In-Domain Bake Options")
        model, domain, terms = given["model"], given.get("domain"), given.get("terms") or ()
        values = {**options, **{name: given[name] for name in ON_THE_NODE}}
        config = baking.config_of(values, model, domain is not None, bool(terms))
        execution.check_claim(config)
        needed = "pictures" in config.states
        folders = pictures.check_data(";".join(image_folder), images, baking.NODE, needed)
        with ordinary_tensors():
            prior, own, more = baking.opened(config, model, given["clip"], given["vae"], domain, terms)
            with execution.run_folder(config.run_folder, config.name):
                config = config.with_changes(**pictures.data_of(folders, images, config.run_folder, baking.NODE))
                result, warnings = baking.run(config, prior, own, more, widgets.RESUME[given["resume"]])
            made, lora = baking.load_baked(config, model)
        return widgets.run_outputs(cls, (made, lora), result, execution.finished_file(config), warnings)


class BakeDomainOptions(io.ComfyNode):
    """All settings of a baking that its node does not show."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..training.baking.config import BakeConfig

        names = options_of_baking()
        return widgets.schema(
            node_id="InDomainBakeOptions",
            display_name="In-Domain Bake Options",
            category=widgets.TRAINING,
            search_aliases=["LoRA", "distill", "guidance distillation"],
            advanced=[name for name in names if name not in USUAL_OPTIONS.split()],
            description="All settings that Bake Domain LoRA does not show. The defaults are the command line's own: "
            "leave the node out to use them.",
            inputs=[widgets.config_input(BakeConfig, name, optional=True) for name in names],
            outputs=[BakeOptions.Output(display_name="options", tooltip="For Bake Domain LoRA.")],
        )

    @classmethod
    @checked()
    def execute(cls, **values: Any) -> io.NodeOutput:
        from ..training.baking.config import BakeConfig

        return io.NodeOutput(widgets.option_values(BakeConfig, values))
