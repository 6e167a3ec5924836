"""Load Domain UNet and Load Mini World."""

from __future__ import annotations

from comfy_api.latest import io

from .comfy_internals.models import loading
from .comfy_internals.models.folders import DOMAIN_UNETS
from .inputs import checked, found
from .widgets import GUIDANCE, schema


class LoadDomainUNet(io.ComfyNode):
    """A domain model from `models/domain_unets` or `models/diffusion_models`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainLoadDomainUNet",
            display_name="Load Domain UNet",
            category=GUIDANCE,
            search_aliases=["domain model", "text-free", "fine-tune", "load UNet"],
            advanced=["weight_dtype"],
            description="Loads a domain model: a text-free UNet trained on the images of a domain, or a fully "
            "fine-tuned UNet. Text-free models ignore prompts and need less memory than the prior they come from.",
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=DOMAIN_UNETS.listed(),
                    tooltip="A file from models/domain_unets (the mini world's models are listed too) or from "
                    "models/diffusion_models. It must work in the same latent space as the prior it will guide.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(loading.WEIGHT_DTYPES),
                    default="default",
                    tooltip="How weights are kept in memory. default: what suits the file and the device (changes "
                    "nothing). bf16 and fp16 take 2 bytes a weight, the fp8 types 1 byte and cost accuracy.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The domain model, patchable like any MODEL.")],
        )

    @classmethod
    def validate_inputs(cls, unet_name: str | None = None) -> bool | str:
        # In place of core's comparison with the list, which knows no other system's spelling of a name.
        return found(unet_name, loading.find_domain_unet)

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, weight_dtype: str):
        # A file that was replaced (by training it further) has to be loaded again.
        return DOMAIN_UNETS.fingerprint(unet_name)

    @classmethod
    @checked("unet_name")
    def execute(cls, unet_name: str, weight_dtype: str) -> io.NodeOutput:
        path = loading.find_domain_unet(unet_name)
        return io.NodeOutput(loading.load_domain_unet(str(path), weight_dtype))


class LoadMiniWorld(io.ComfyNode):
    """The miniature Stable Diffusion that ships with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainLoadMiniWorld",
            display_name="Load Mini World",
            category=GUIDANCE,
            search_aliases=["demo", "example model", "tiny model"],
            description="Loads the miniature Stable Diffusion that ships with this pack: coloured digits, 64x64 px, "
            "prompts such as 'a red seven on a yellow background'. For trying things out in seconds, even on a CPU.",
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The mini world's prior. Its latents are 8x8 for 64x64 pixels."),
                io.Clip.Output(tooltip="The mini world's text encoder, behind the tokenizer of Stable Diffusion 1.x."),
                io.Vae.Output(tooltip="The mini world's autoencoder; 8 pixels per latent pixel."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*loading.load_mini_world())
