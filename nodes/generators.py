"""Load Generator, Generator Sample, Adapt Generator and its options, Blend Generators and Save Generator."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

from ..guidance.distillation.method import prompts_of
from ..guidance.distillation.methods import METHODS, methods_with
from ..guidance.errors import printable
from .comfy_internals.models import generators
from .comfy_internals.runs import adapting, training
from .guiders import GuidanceTerms
from .inputs import checked, found
from .schema import GENERATORS, schema
from .training import LARGEST_SEED, RESUME, config_input, run_outputs

GeneratorType = io.Custom("INDOMAIN_GENERATOR")
AdaptOptions = io.Custom("INDOMAIN_ADAPT_OPTIONS")

# On the node itself; what is connected decides the others of DECIDED_HERE; everything else is an option.
ON_THE_NODE = (
    "name",
    "method",
    "scale",
    "directional",
    "reconstruction",
    "steps",
    "batch_size",
    "learning_rate",
    "layers",
    "sample_every",
    "seed",
)
DECIDED_HERE = (
    "generator",
    "base",
    "prompt",
    "negative",
    "source_prompt",
    "domain",
    "domain_weight",
    "output",
    "export_to",
    "vae",
    "tokenizer",
    "device",
    "precision",  # the connected model and VAE have their own
)

# What the options node shows at once, where the editor folds the rest away.
USUAL_OPTIONS = ("mode", "t_min", "t_max", "perceptual", "train", "truncation", "label", "gradient_checkpointing")


def option_fields() -> list[dataclasses.Field]:
    """The fields of `AdaptConfig` that the options node offers."""
    from ..training.adaptation.config import AdaptConfig

    elsewhere = (*ON_THE_NODE, *DECIDED_HERE)
    return [field for field in dataclasses.fields(AdaptConfig) if field.name not in elsewhere]


class LoadGenerator(io.ComfyNode):
    """A StyleGAN2 generator from `models/generators`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainLoadGenerator",
            display_name="Load Generator",
            category=GENERATORS,
            search_aliases=["GAN", "StyleGAN", "StyleGAN2", "pkl"],
            advanced=["convert"],
            description="Loads a StyleGAN2 generator: this pack's .safetensors, NVIDIA's .pkl (read as plain data, "
            "nothing in it is executed), rosinality's and StyleGAN-NADA's .pt.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "generator_name",
                    options=generators.list_generators(),
                    tooltip="A file from models/generators (the mini world's generator is listed too). StyleGAN3, "
                    "StyleGAN-XL and TensorFlow pickles are refused by name.",
                ),
                io.Boolean.Input(
                    "convert",
                    default=False,
                    tooltip="Also write a .pkl or .pt as .safetensors beside it, which loads faster, can hide no code "
                    "and is read from then on. off (the default) writes nothing.",
                ),
            ],
            outputs=[
                GeneratorType.Output(display_name="generator", tooltip="The generator, for the nodes of this pack.")
            ],
        )

    @classmethod
    def validate_inputs(cls, generator_name: str | None = None) -> bool | str:
        # In place of core's comparison with the list, which knows no other system's spelling of a name.
        return found(generator_name, generators.find_generator)

    @classmethod
    def fingerprint_inputs(cls, generator_name: str, convert: bool = False):
        # A file that was replaced (by adapting it further) has to be loaded again.
        return generators.generator_fingerprint(generator_name)

    @classmethod
    @checked("generator_name")
    def execute(cls, generator_name: str, convert: bool = False) -> io.NodeOutput:
        generator, notes = generators.load_generator(generator_name)
        converted = [generators.convert_generator(generator)] if convert else []
        return io.NodeOutput(
            generator,
            ui={"text": tuple(map(printable, (generators.describe_generator(generator), *notes, *converted)))},
        )


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
                    "numbers mean what they mean in NVIDIA's tools; no value is neutral.",
                ),
                io.Float.Input(
                    "truncation",
                    default=0.7,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How far images may lie from the mean image: 1 changes nothing, 0.5 to 0.8 gives cleaner "
                    "and less varied images, 0 the mean image, negative values the opposite of each image. -2 to 2.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=4096,
                    tooltip="How many images, 1 to 4096; no value is neutral, 1 is the fewest.",
                ),
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
    def execute(
        cls,
        generator,
        seed: int,
        truncation: float,
        batch_size: int,
        noise: str = "const",
        class_index: int = 0,
        truncation_cutoff: int = 0,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            generators.draw(generator, seed, truncation, truncation_cutoff, batch_size, class_index, noise)
        )


class AdaptGenerator(io.ComfyNode):
    """A generator and a prompt in, a generator for the prompt's domain out; needs no browser."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..training.adaptation.config import AdaptConfig

        fields = {field.name: field for field in dataclasses.fields(AdaptConfig)}

        def own(name: str, **changes: Any):
            return config_input(fields[name], AdaptConfig, **changes)

        return schema(
            node_id="InDomainAdaptGenerator",
            display_name="Adapt Generator (SDS)",
            category=GENERATORS,
            search_aliases=["SDS", "score distillation", "StyleGAN-Fusion", "GAN", "fine-tune", "domain adaptation"],
            description="Moves a StyleGAN2 generator into a domain that only a prompt describes, with a diffusion "
            "model as the judge (StyleGAN-Fusion, arXiv 2212.04473). No images are needed. Cancel saves; running again "
            "continues. The finished file lands in models/generators.",
            is_output_node=True,
            inputs=[
                GeneratorType.Input("generator", tooltip="The generator to adapt; it stays as it is."),
                io.Model.Input(
                    "model",
                    tooltip="The diffusion model that judges (Stable Diffusion 1.x, 2.x, SDXL, the mini "
                    "world). LoRAs, DreamBooth checkpoints and hooks on it have their say.",
                ),
                io.Vae.Input("vae", tooltip="The model's VAE. Gradients go through its encoder."),
                io.Conditioning.Input(
                    "positive", tooltip="The domain to reach, such as 'a 3d render of a face, Pixar'."
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What guidance starts from: the empty prompt in the paper, a negative prompt if you like.",
                ),
                own("name", default="my_generator"),
                own("method"),
                own("scale"),
                own("directional", step=0.05),
                own("reconstruction", step=0.05),
                own("steps"),
                own("batch_size"),
                own("learning_rate"),
                own("layers"),
                own("sample_every"),
                # Not drawn anew for each run: a run continues only with the seed it was started with.
                own("seed", max=LARGEST_SEED, control_after_generate=False),
                io.Combo.Input(
                    "resume",
                    options=list(RESUME),
                    default="auto",
                    tooltip="auto: continue the run of this name if there is one, else start it. continue: there must "
                    "be one. new: there must be none.",
                ),
                GuidanceTerms.Input(
                    "terms",
                    optional=True,
                    tooltip="More judges, from Guidance Term: a domain model, another "
                    "checkpoint, another prompt. Percentages count the model's noise levels, 0 the noisiest.",
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
                AdaptOptions.Input("options", optional=True, tooltip="Everything else, from In-Domain Adapt Options."),
            ],
            outputs=[
                GeneratorType.Output(display_name="generator", tooltip="The adapted generator, loaded from its file."),
                io.Image.Output(
                    display_name="samples",
                    tooltip="The last grid, the source's images in its first row; nothing when sample every is 0.",
                ),
                io.Image.Output(display_name="loss", tooltip="The loss curve."),
                io.String.Output(display_name="path", tooltip="The finished file in models/generators."),
            ],
            # For the texts behind the conditionings, which the finished file names.
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    @checked()
    def execute(
        cls,
        generator,
        model,
        vae,
        positive,
        negative,
        resume: str,
        terms=(),
        source=None,
        unwanted=None,
        options: dict | None = None,
        **values: Any,
    ) -> io.NodeOutput:
        from ..training.adaptation.config import AdaptConfig
        from .comfy_internals.runs.critic import CriticInputs

        names = {field.name for field in option_fields()}
        options = training.given_options(options, names, "In-Domain Adapt Options")
        # What the method does not ask for neither costs an evaluation nor binds the run that goes on.
        needed = prompts_of(METHODS[values["method"]])
        source = source if "source" in needed else None
        unwanted = unwanted if "unwanted" in needed else None
        critic = CriticInputs(
            model, vae, positive, negative, values["scale"], tuple(terms or ()), source=source, unwanted=unwanted
        )
        texts = adapting.prompt_texts(getattr(cls.hidden, "prompt", None))
        config = AdaptConfig.from_mapping(
            {**options, **values, **adapting.places(values["name"], generator, critic, texts)}
        )
        adapting.check_name(config)
        result, warnings = adapting.run(config, generator, critic, RESUME[resume])
        adapted, _ = generators.load_generator(f"{config.name}.safetensors")
        return run_outputs(cls, adapted, result, adapting.finished_file(config), warnings)


class GeneratorAdaptOptions(io.ComfyNode):
    """The rest of the adaptation's configuration."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..training.adaptation.config import AdaptConfig

        return schema(
            node_id="InDomainAdaptOptions",
            display_name="In-Domain Adapt Options",
            category=GENERATORS,
            search_aliases=["SDS", "score distillation", "StyleGAN", "GAN"],
            advanced=[field.name for field in option_fields() if field.name not in USUAL_OPTIONS],
            description="Everything that Adapt Generator does not show. Leave the node out to use the defaults.",
            inputs=[config_input(field, AdaptConfig, optional=True) for field in option_fields()],
            outputs=[AdaptOptions.Output(display_name="options", tooltip="For Adapt Generator (SDS).")],
        )

    @classmethod
    @checked()
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(values)


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
                io.Float.Input(
                    "amount",
                    default=0.5,
                    min=-1.0,
                    max=2.0,
                    step=0.05,
                    round=0.001,
                    tooltip="0 is the source and 1 the adapted generator, both exactly; beyond 1 exaggerates, below 0 "
                    "goes the other way. -1 to 2.",
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
                io.Float.Input(
                    "amount_below_split",
                    default=0.0,
                    min=-1.0,
                    max=2.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip="The amount for layers up to split resolution: 0 (the default) keeps the source's shapes, "
                    "1 takes the adapted ones. -1 to 2; without effect when split resolution is 0.",
                ),
            ],
            outputs=[GeneratorType.Output(display_name="generator", tooltip="The blend.")],
        )

    @classmethod
    @checked()
    def execute(
        cls, source, adapted, amount: float, split_resolution: int = 0, amount_below_split: float = 0.0
    ) -> io.NodeOutput:
        return io.NodeOutput(generators.blend(source, adapted, amount, split_resolution, amount_below_split))


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
                    options=list(generators.DTYPES),
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
        path = str(generators.save_generator(generator, generators.output_path(filename), file_dtype, replace))
        return io.NodeOutput(path, ui={"text": (printable(path),)})
