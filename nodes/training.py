"""Train Domain UNet, its options, and a folder of images to try it on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..guidance.errors import printable
from .comfy_internals.models.loading import ordinary_tensors
from .comfy_internals.runs import training
from .inputs import checked, found
from .schema import TRAINING, schema

if TYPE_CHECKING:
    from ..training.engine.engine import Result

TrainingOptions = io.Custom("INDOMAIN_TRAINING_OPTIONS")

# On the training node itself; where files go and what to compute on is ComfyUI's to say; everything else is an option.
ON_THE_NODE = ("name", "form", "steps", "batch_size", "learning_rate", "resolution", "sample_every", "seed")
DECIDED_HERE = ("base", "data", "output", "export_to", "vae", "tokenizer", "device", "cache", "within")
# What the options node shows at once, where the editor folds the rest away.
USUAL_OPTIONS = (
    "caption",
    "train",
    "rank",
    "gradient_checkpointing",
    "flip",
    "optimizer",
    "schedule",
    "ema",
    "sample_prompts",
)
RESUME = {"auto": "auto", "continue": True, "new": False}
# Numbers stay exact in the editor's JavaScript up to here.
LARGEST_SEED = 2**53 - 1


def option_fields() -> list[dataclasses.Field]:
    """The fields of `TrainConfig` that the options node offers."""
    from ..training.domain.config import TrainConfig

    elsewhere = (*ON_THE_NODE, *DECIDED_HERE)
    return [field for field in dataclasses.fields(TrainConfig) if field.name not in elsewhere]


def config_input(field: dataclasses.Field, settings: type | None = None, **changes: Any):
    """The widget of one field of a configuration: kind, default, range and tooltip are the field's own.

    settings: the configuration's class, `TrainConfig` unless given.
    """
    from ..training.domain.config import TrainConfig
    from ..training.engine.settings import kinds_of

    kind, about = kinds_of(settings or TrainConfig)[field.name], field.metadata
    tooltip = about["help"] + "."
    if not tooltip.startswith(about.get("choices", ())):
        tooltip = tooltip[0].upper() + tooltip[1:]
    if kind in (int, float):
        values = {"default": field.default, "min": about["min"], "max": about["max"], **changes}
        least, most, usual = (_number(values[name]) for name in ("min", "max", "default"))
        values["tooltip"] = f"{tooltip} {least} to {most}, default {usual}."
        if kind is int:
            return io.Int.Input(field.name, **values)
        step = _float_step(field.default, about["max"])
        return io.Float.Input(field.name, **{"step": step, "round": False, **values})
    values = {"default": field.default, "tooltip": tooltip}
    if kind is bool:
        return io.Boolean.Input(field.name, **{**values, **changes})
    if "choices" in about:
        return io.Combo.Input(field.name, **{**values, "options": list(about["choices"]), **changes})
    if kind is tuple:
        values |= {"default": "", "multiline": True, "tooltip": f"{tooltip} One a line."}
    return io.String.Input(field.name, **{**values, **changes})


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.10g}"


def _float_step(default: float, largest: float) -> float:
    """A step of the arrows that suits a number: a tenth of its own size, finer for decays that end just below 1."""
    if default <= 0.0:
        return 0.01
    if largest < 1.0 and default > 0.5:
        return 0.0001
    return 10.0 ** min(math.floor(math.log10(default)) - 1, -1)


def run_outputs(
    node: type[io.ComfyNode], made: Any, result: Result, path: Path, warnings: Sequence[str]
) -> io.NodeOutput:
    """What both training nodes give: what was made, grid, loss curve and file; the node shows the pictures too."""
    grid, plot = training.load_image(result.samples), training.load_image(result.plot)
    shown = [picture[0] for picture in (grid, plot) if picture is not None]
    preview = ui.PreviewImage(shown, cls=node).as_dict() if shown else {}
    return io.NodeOutput(
        made,
        training.or_blocked(grid),
        training.or_blocked(plot),
        str(path),
        ui={**preview, "text": tuple(map(printable, (path, *warnings)))},
    )


class TrainDomainUNet(io.ComfyNode):
    """Images in, domain model out; needs no browser."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..training.domain.config import TrainConfig

        fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
        return schema(
            node_id="InDomainTrainDomainUNet",
            display_name="Train Domain UNet",
            category=TRAINING,
            search_aliases=["LoRA", "fine-tune", "finetune", "DreamBooth", "trainer", "domain model"],
            description="Trains a domain model on your images: no captions, the prior stays untouched. Cancel saves; "
            "running again continues. The finished file lands in models/domain_unets.",
            is_output_node=True,
            # So that a list of images of many sizes is one training run and not one run an image.
            is_input_list=True,
            inputs=[
                config_input(fields["name"], default="my_domain"),
                io.Combo.Input(
                    "checkpoint",
                    options=training.list_checkpoints(),
                    default=training.CONNECTED,
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
                config_input(fields["form"]),
                config_input(fields["steps"]),
                config_input(fields["batch_size"]),
                config_input(fields["learning_rate"]),
                config_input(fields["resolution"], step=8),
                config_input(fields["sample_every"]),
                # Not drawn anew for each run: a run continues only with the seed it was started with.
                config_input(fields["seed"], max=LARGEST_SEED, control_after_generate=False),
                io.Combo.Input(
                    "resume",
                    options=list(RESUME),
                    default="auto",
                    tooltip="auto: continue the run of this name if there is one, else start it. continue: there must "
                    "be one. new: there must be none.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The prior, when checkpoint is 'connected'. LoRAs on it are baked in.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The prior's text encoder. It encodes the empty prompt and the "
                    "sample prompts; training itself has no captions.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The prior's VAE. It encodes the images, once."),
                io.Image.Input(
                    "images", optional=True, tooltip="Images to train on instead of a folder: a batch or a list."
                ),
                TrainingOptions.Input(
                    "options", optional=True, tooltip="Everything else, from In-Domain Training Options."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The trained domain model, loaded from its file."),
                io.Image.Output(
                    display_name="samples", tooltip="The last sample grid; nothing when sample every is 0."
                ),
                io.Image.Output(display_name="loss", tooltip="The loss curve."),
                io.String.Output(display_name="path", tooltip="The finished file in models/domain_unets."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: list[str | None] = ()) -> bool | str:
        # In place of core's comparison with the list, which knows no other system's spelling of a name.
        return found(next(iter(checkpoint), None), training.find_checkpoint)

    @classmethod
    def fingerprint_inputs(cls, image_folder: list[str | None] = (), checkpoint: list[str | None] = (), **inputs: Any):
        # A folder that has more or other images than last time has to be trained on again, and another checkpoint.
        images = training.data_fingerprint(";".join(filter(None, image_folder)))
        own = training.checkpoint_fingerprint(next(iter(checkpoint), None))
        return f"{images} {own}" if own and isinstance(images, str) else images

    @classmethod
    @checked("checkpoint")
    def execute(cls, image_folder: list[str], images: list | None = None, **lists: list) -> io.NodeOutput:
        from ..training.domain.config import TrainConfig

        given = {name: values[0] if values else None for name, values in lists.items()}
        names = {field.name for field in option_fields()}
        options = training.given_options(given.get("options"), names, "In-Domain Training Options")
        connected = [given.get(name) for name in ("model", "clip", "vae")]
        base = training.base_name(*connected, given["checkpoint"])
        values = {**options, **{name: given[name] for name in ON_THE_NODE}, "base": base}
        config = TrainConfig.from_mapping({**values, **training.places(given["name"], values)}).absolute()
        training.check_name(config)
        folders = training.check_data(";".join(image_folder), images)
        with ordinary_tensors():
            prior = training.prepare(*connected, config)
            with training.run_folder(config.run_folder):
                config = config.with_changes(**training.data_of(folders, images, config.run_folder))
                result, warnings = training.run(config, prior, RESUME[given["resume"]])
            model = training.load_trained(config, given.get("model"))
        return run_outputs(cls, model, result, training.finished_file(config), warnings)


class DomainTrainingOptions(io.ComfyNode):
    """The rest of the trainer's configuration."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainTrainingOptions",
            display_name="In-Domain Training Options",
            category=TRAINING,
            search_aliases=["LoRA", "low rank", "fine-tune", "finetune", "optimizer"],
            advanced=[field.name for field in option_fields() if field.name not in USUAL_OPTIONS],
            description="Everything that Train Domain UNet does not show. The defaults are the trainer's own: leave "
            "the node out to use them.",
            inputs=[config_input(field, optional=True) for field in option_fields()],
            outputs=[TrainingOptions.Output(display_name="options", tooltip="For Train Domain UNet.")],
        )

    @classmethod
    @checked()
    def execute(cls, **values: Any) -> io.NodeOutput:
        from ..training.domain.config import field_kinds

        kinds = field_kinds()
        lines = {
            name: tuple(filter(None, map(str.strip, text.splitlines())))
            for name, text in values.items()
            if kinds[name] is tuple
        }
        return io.NodeOutput({**values, **lines})


class MiniWorldImages(io.ComfyNode):
    """A folder of handwriting, the miniature's own images to train on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainMiniWorldImages",
            display_name="Mini World Images",
            category=TRAINING,
            search_aliases=["dataset", "example images", "MNIST"],
            description="Writes a folder of handwritten digits into ComfyUI's input folder: what somebody's own images "
            "are to a large model, in a size that trains on a CPU.",
            inputs=[
                io.Combo.Input(
                    "domain",
                    options=list(training.MINI_WORLD_DOMAINS),
                    default=training.MINI_WORLD_DOMAINS[0],
                    tooltip="handwriting: 4 inks on 4 grounds. narrow: white on black only.",
                ),
                io.Int.Input(
                    "count",
                    default=1000,
                    min=1,
                    max=8000,
                    tooltip="How many images, 1 to 8000. Few are learned by heart.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=False,
                    tooltip="In which colours; count alone decides which images. Without effect for narrow.",
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
        folder, batch = training.mini_world_images(domain, count, seed)
        return io.NodeOutput(str(folder), batch)
