"""Load Generator, Generator Sample, Blend Generators and Save Generator."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..guidance.errors import printable
from ..guidance.files import DTYPES
from .comfy_internals.models import generators
from .comfy_internals.models.folders import GENERATORS as GENERATOR_FILES
from .inputs import checked, found
from .widgets import GENERATORS, number_input, schema

GeneratorType = io.Custom("INDOMAIN_GENERATOR")


class LoadGenerator(io.ComfyNode):
    """A StyleGAN2 generator from `models/generators`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainLoadGenerator",
            display_name="Load Generator",
            category=GENERATORS,
            search_aliases=["GAN", "StyleGAN", "StyleGAN2", "pkl"],
            description="Loads a StyleGAN2 generator: this pack's .safetensors, NVIDIA's .pkl (read as plain data, "
            "nothing in it is executed), rosinality's and StyleGAN-NADA's .pt. Save Generator converts them.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "generator_name",
                    options=GENERATOR_FILES.listed(),
                    tooltip="A file from models/generators (the mini world's generator is listed too). StyleGAN3, "
                    "StyleGAN-XL and TensorFlow pickles are refused by name.",
                )
            ],
            outputs=[
                GeneratorType.Output(display_name="generator", tooltip="The generator, for the nodes of this pack.")
            ],
        )

    @classmethod
    def validate_inputs(cls, generator_name: str | None = None) -> bool | str:
        # In place of core's comparison with the list, which knows no other system's spelling of a name.
        return found(generator_name, GENERATOR_FILES.find)

    @classmethod
    def fingerprint_inputs(cls, generator_name: str):
        # A file that was replaced (by adapting it further) has to be loaded again.
        return GENERATOR_FILES.fingerprint(generator_name)

    @classmethod
    @checked("generator_name")
    def execute(cls, generator_name: str) -> io.NodeOutput:
        generator, notes = generators.load_generator(generator_name)
        text = (generators.describe_generator(generator), *notes)
        return io.NodeOutput(generator, ui={"text": tuple(map(printable, text))})


class GeneratorSample(io.ComfyNode):
    """Images from a generator."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainGeneratorSample",
            display_name="Generator Sample",
            category=GENERATORS,
            search_aliases=["GAN", "StyleGAN", "StyleGAN2", "truncation"],
            advanced=["noise", "class_index", "truncation_cutoff"],
            description="Draws images with a generator, in one pass each. The same seed gives related images before "
            "and after an adaptation.",
            inputs=[
                GeneratorType.Input("generator", tooltip="From Load Generator, Adapt Generator or Blend Generators."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=generators.LARGEST_SEED,
                    control_after_generate=True,
                    tooltip="The first image's latent, 0 to 2^32 - 1; the next images have seed + 1, seed + 2, ... The "
                    "same seed gives the image that NVIDIA's tools draw.",
                ),
                number_input(
                    "truncation",
                    0.7,
                    -2.0,
                    2.0,
                    "How far images may lie from the mean image: 1 changes nothing, 0.5 to 0.8 gives cleaner and less "
                    "varied images, 0 the mean image, negative values the opposite of each image. -2 to 2.",
                ),
                io.Int.Input("batch_size", default=4, min=1, max=4096, tooltip="How many images, 1 to 4096."),
                io.Combo.Input(
                    "noise",
                    options=list(generators.NOISE),
                    default="const",
                    optional=True,
                    tooltip="Fine detail such as single hairs: const (the default) is what the file holds, random is "
                    "drawn from the seed, none leaves it out.",
                ),
                io.Int.Input(
                    "class_index",
                    default=0,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    tooltip="The class to draw, counted from 0 (the default); only for generators with classes, "
                    "without effect for all others.",
                ),
                io.Int.Input(
                    "truncation_cutoff",
                    default=0,
                    min=0,
                    max=64,
                    optional=True,
                    tooltip="Truncate only this many style vectors, counted from the coarsest, and leave colours as "
                    "varied as they are; 0 (the default) truncates all of them.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The images as a batch.")],
        )

    @classmethod
    @checked()
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(generators.draw(**inputs))


class BlendGenerators(io.ComfyNode):
    """The dial from a source to what was made of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainBlendGenerators",
            display_name="Blend Generators",
            category=GENERATORS,
            search_aliases=["GAN", "StyleGAN", "interpolate", "layer swapping", "merge"],
            advanced=["split_resolution", "amount_below_split"],
            description="Blends two generators of one descent by their weights: how much of an adaptation you want, "
            "and in which sizes of detail.",
            inputs=[
                GeneratorType.Input("source", tooltip="The generator at amount 0, usually the one that was adapted."),
                GeneratorType.Input("adapted", tooltip="The generator at amount 1."),
                number_input(
                    "amount",
                    0.5,
                    -1.0,
                    2.0,
                    "0 is the source and 1 the adapted generator, both exactly; beyond 1 exaggerates, below 0 goes the "
                    "other way. -1 to 2.",
                ),
                io.Int.Input(
                    "split_resolution",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    tooltip="Layers up to this many pixels (shape, pose) take amount below split instead; one of the "
                    "generator's own sizes, 4, 8, 16, ... 0 (the default): amount holds for all layers.",
                ),
                number_input(
                    "amount_below_split",
                    0.0,
                    -1.0,
                    2.0,
                    "The amount for layers up to split resolution: 0 (the default) keeps the source's shapes, 1 takes "
                    "the adapted ones. -1 to 2; without effect when split resolution is 0.",
                    optional=True,
                ),
            ],
            outputs=[GeneratorType.Output(display_name="generator", tooltip="The blend.")],
        )

    @classmethod
    @checked()
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(generators.blend(**inputs))


class SaveGenerator(io.ComfyNode):
    """A generator as a file in `models/generators`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainSaveGenerator",
            display_name="Save Generator",
            category=GENERATORS,
            search_aliases=["GAN", "StyleGAN", "export", "convert"],
            advanced=["file_dtype"],
            description="Writes a generator as .safetensors into models/generators.",
            is_output_node=True,
            inputs=[
                GeneratorType.Input("generator", tooltip="The generator to write, such as a blend."),
                io.String.Input(
                    "filename",
                    default="my_generator",
                    tooltip="Name of the file in models/generators; .safetensors is added.",
                ),
                io.Combo.Input(
                    "file_dtype",
                    options=list(DTYPES),
                    default="fp32",
                    tooltip="Numbers of the file: fp32 (the default) is exact; fp16 and bf16 take half the space.",
                ),
                io.Boolean.Input(
                    "replace", default=False, tooltip="Replace a file of this name. off (the default): refuse."
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file.")],
        )

    @classmethod
    @checked()
    def execute(cls, generator, filename: str, file_dtype: str, replace: bool = False) -> io.NodeOutput:
        path = GENERATOR_FILES.new_file(filename, "Save Generator")
        generators.save_generator(generator, path, file_dtype, replace)
        return io.NodeOutput(str(path), ui={"text": (printable(path),)})
