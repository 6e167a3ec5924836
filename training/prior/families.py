"""The published families of Stable Diffusion that training starts from: how each encodes text and scales latents."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...guidance.files import FileProblem
from ...guidance.networks.text_encoder import END_TOKEN
from ...guidance.networks.unet_config import UNetConfig
from ...guidance.null_text import POOLED_TEXT_ADM
from ..mini_world import MINI_WORLD

# Scaled latent = mean * factor: 1 / standard deviation of the training latents, as each family was published with.
LATENT_SCALES = {"sd15": 0.18215, "sdxl": 0.13025}
# Sides in pixels of the images that models were made for, by the name of their latents.
NATIVE_RESOLUTIONS = {"sd15": 512, "sdxl": 1024, MINI_WORLD: 64}


@dataclass(frozen=True)
class Family:
    """How one published family encodes text; `text_encoders` as (name, layer, final norm, padding token)."""

    name: str
    latent_format: str
    text_encoders: tuple[tuple[str, int, bool, int], ...]


# By width of the text conditioning. SD 1.x: CLIP-L's last layer; 2.x: the last but one of ViT-H, through the final
# norm; XL: the last but one of CLIP-L and of ViT-bigG side by side, without the norm, and bigG's pooled vector.
FAMILIES = {
    768: Family("Stable Diffusion 1.x", "sd15", (("clip_l", -1, True, END_TOKEN),)),
    1024: Family("Stable Diffusion 2.x", "sd15", (("clip_h", -2, True, 0),)),
    2048: Family("Stable Diffusion XL", "sdxl", (("clip_l", -2, False, END_TOKEN), ("clip_g", -2, False, 0))),
}


def native_resolution(latent_format: str, context_dim: int | None, is_v: bool) -> int | None:
    """The side in pixels of the images that a model was made for; None for latents of no published family.

    context_dim: width of its text; is_v: whether it predicts v. Both together tell Stable Diffusion 2.x at 768 px.
    """
    if latent_format == "sd15" and context_dim == 1024 and is_v:
        return 768
    return NATIVE_RESOLUTIONS.get(latent_format)


def check_trainable(config: UNetConfig, source: str | os.PathLike) -> None:
    """Raise FileProblem for a UNet that cannot be trained on images alone: inpainting, SDXL's refiner, unCLIP."""
    if config.in_channels != config.out_channels:
        raise FileProblem(
            f"{source}: expected a text-to-image model, found one with {config.in_channels} input channels (inpainting "
            "or editing), which would need masks to train on; use the family's text-to-image model."
        )
    if config.context_dim == 1280 and config.adm_in_channels in POOLED_TEXT_ADM:
        raise FileProblem(f"{source}: expected a base model, found the SDXL refiner; train from the SDXL base model.")
    if config.context_dim in FAMILIES and (config.adm_in_channels is not None) != (config.context_dim == 2048):
        raise FileProblem(
            f"{source}: expected {FAMILIES[config.context_dim].name}, found vector conditioning of "
            f"{config.adm_in_channels} channels (unCLIP), which images alone do not give; use a text-to-image model."
        )
