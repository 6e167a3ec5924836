"""Train Domain UNet, its options, and a folder of images to try it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from . import widgets
from .comfy_internals.models.export import is_untrained
from .comfy_internals.models.loading import ordinary_tensors
from .comfy_internals.runs import execution, pictures, prior, training
from .inputs import checked, found

TrainingOptions = io.Custom("INDOMAIN_TRAINING_OPTIONS")

# On the node itself, each with what its widget changes; ComfyUI decides DECIDED_HERE; the others are options.
ON_THE_NODE: dict[str, dict[str, Any]] = {
    "name": {"default": "my_domain"},
    "form": {},
    "steps": {},
    "batch_size": {},
    "learning_rate": {},
    "resolution": {"step": 8},
    "sample_every": {},
    "seed": widgets.SEED_OF_A_RUN,
}
DECIDED_HERE = ("base", "data", "output", "export_to", "vae", "tokenizer", "device", "cache", "within")
CAME_LATER = ("layers", "low_rank_scale", "dora")
# What the options node shows at once, where the editor folds the rest away.
USUAL_OPTIONS = "caption train rank gradient_checkpointing flip optimizer schedule ema sample_prompts".split()


def options_of_training() -> list[str]:
    """The fields of `TrainConfig` that the options node offers."""
    from ..training.domain.config import TrainConfig

    # Saved graphs store widgets by position: what came later comes last, and rank stays behind train.
    names = widgets.option_names(TrainConfig, (*ON_THE_NODE, *DECIDED_HERE, "rank", *CAME_LATER))
    names.insert(names.index("train") + 1, "rank")
    return [*names, *CAME_LATER]


class TrainDomainUNet(io.ComfyNode):
    """Images in, domain model out; needs no browser."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..training.domain.config import TrainConfig

        name, *settings = (widgets.config_input(TrainConfig, key, **changes) for key, changes in ON_THE_NODE.items())
        return widgets.schema(
            node_id="InDomainTrainDomainUNet",
            display_name="Train Domain UNet",
            category=widgets.TRAINING,
            search_aliases=["LoRA", "fine-tune", "finetune", "DreamBooth", "trainer", "domain model"],
            description="Trains a domain model on your images: no captions, the prior stays untouched. Cancel saves; "
            "running again continues. The finished file lands in models/domain_unets.",
            is_output_node=True,
            # So that a list of images of many sizes is one training run and not one run an image.
            is_input_list=True,
            inputs=[
                name,
                io.Combo.Input(
                    "checkpoint",
                    options=prior.list_checkpoints(),
                    default=prior.CONNECTED,
                    tooltip="The prior to start from: 'connected' takes the model, clip and vae inputs, anything else "
                    "a checkpoint by its name (Stable Diffusion 1.x, 2.x, SDXL, or the mini world that ships with the "
                    "pack).",
                ),
                io.String.Input(
                    "image_folder",
                    default="",
                    tooltip="Folder of images, searched recursively: a full path, or a folder in ComfyUI's input "
                    "folder. .tar shards work too; several are divided by ;. Leave it empty to train on the images "
                    "input. On a server that others reach: in the input folder, or where its owner allows (see the "
                    "help page).",
                ),
                *settings,
                widgets.resume_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The prior, when checkpoint is 'connected'. LoRAs on it are baked in.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The prior's text encoder. It encodes the empty prompt and the sample prompts; training "
                    "itself has no captions.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The prior's VAE. It encodes the images, once."),
                io.Image.Input(
                    "images", optional=True, tooltip="Images to train on instead of a folder: a batch or a list."
                ),
                TrainingOptions.Input(
                    "options", optional=True, tooltip="All other settings, from In-Domain Training Options."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The trained domain model, loaded from its file."),
                *widgets.picture_outputs("The sample grid"),
                io.String.Output(display_name="path", tooltip="The finished file in models/domain_unets."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: Sequence[str | None] = ()) -> bool | str:
        # In place of core's comparison with the list, which knows no other system's spelling of a name.
        return found(next(iter(checkpoint), None), prior.find_checkpoint)

    @classmethod
    def fingerprint_inputs(
        cls, image_folder: Sequence[str | None] = (), checkpoint: Sequence[str | None] = (), **inputs: Any
    ):
        # A folder that has more or other images than last time has to be trained on again, and another checkpoint.
        data = pictures.data_fingerprint(";".join(filter(None, image_folder)))
        own = prior.checkpoint_fingerprint(next(iter(checkpoint), None))
        return f"{data} {own}" if own and isinstance(data, str) else data

    @classmethod
    @checked("checkpoint")
    def execute(cls, image_folder: list[str], images: list | None = None, **lists: list) -> io.NodeOutput:
        given: dict[str, Any] = {name: values[0] if values else None for name, values in lists.items()}
        options = widgets.given_options(given.get("options"), options_of_training(), "In-Domain Training Options")
        model, clip, vae = (given.get(name) for name in ("model", "clip", "vae"))
        base = prior.base_name(model, clip, vae, given["checkpoint"])
        config = training.config_of({**options, **{name: given[name] for name in ON_THE_NODE}, "base": base})
        execution.check_claim(config, is_untrained)
        folders = pictures.check_data(";".join(image_folder), images)
        with ordinary_tensors():
            connected = prior.connected_prior(model, clip, vae, config)
            with execution.run_folder(config.run_folder, config.name):
                config = config.with_changes(**pictures.data_of(folders, images, config.run_folder))
                result, warnings = training.run(config, connected, widgets.RESUME[given["resume"]])
            made = training.load_trained(config, model)
        return widgets.run_outputs(cls, made, result, execution.finished_file(config), warnings)


class DomainTrainingOptions(io.ComfyNode):
    """All settings of the trainer that its node does not show."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..training.domain.config import TrainConfig

        names = options_of_training()
        return widgets.schema(
            node_id="InDomainTrainingOptions",
            display_name="In-Domain Training Options",
            category=widgets.TRAINING,
            search_aliases=["LoRA", "low rank", "fine-tune", "finetune", "optimizer"],
            advanced=[name for name in names if name not in USUAL_OPTIONS],
            description="All settings that Train Domain UNet does not show. The defaults are the trainer's own: leave "
            "the node out to use them.",
            inputs=[widgets.config_input(TrainConfig, name, optional=True) for name in names],
            outputs=[TrainingOptions.Output(display_name="options", tooltip="For Train Domain UNet.")],
        )

    @classmethod
    @checked()
    def execute(cls, **values: Any) -> io.NodeOutput:
        from ..training.domain.config import TrainConfig

        return io.NodeOutput(widgets.option_values(TrainConfig, values))


class MiniWorldImages(io.ComfyNode):
    """A folder of handwriting, the miniature's own images to train on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return widgets.schema(
            node_id="InDomainMiniWorldImages",
            display_name="Mini World Images",
            category=widgets.TRAINING,
            search_aliases=["dataset", "example images", "MNIST"],
            description="Writes a folder of handwritten digits into ComfyUI's input folder, to try training on: it "
            "takes minutes on a CPU.",
            inputs=[
                io.Combo.Input(
                    "domain",
                    options=list(pictures.MINI_WORLD_DOMAINS),
                    default=pictures.MINI_WORLD_DOMAINS[0],
                    tooltip="handwriting: 4 inks on 4 grounds. narrow: white on black only.",
                ),
                io.Int.Input(
                    "count",
                    default=1000,
                    min=1,
                    max=8000,
                    tooltip="How many images, 1 to 8000. With few, training learns them by heart.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=widgets.LARGEST_SEED,
                    control_after_generate=False,
                    tooltip="Decides the colours; count alone decides which digits. No effect on narrow.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="image_folder", tooltip="The folder, for Train Domain UNet."),
                io.Image.Output(tooltip="The images as a batch."),
            ],
        )

    @classmethod
    @checked()
    def execute(cls, domain: str, count: int, seed: int) -> io.NodeOutput:
        folder, batch = pictures.mini_world_images(domain, count, seed)
        return io.NodeOutput(str(folder), batch)
