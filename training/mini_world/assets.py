"""The shipped miniature: where its files are and how to get its parts, without ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...guidance.diffusion import Denoiser, NoiseSchedule
from ...guidance.files import FileProblem, ModelFile, check_finite, read_domain_file, read_generator
from ...guidance.networks.autoencoder import Autoencoder, AutoencoderConfig
from ...guidance.networks.stylegan2 import StyleGAN2
from ...guidance.networks.text_encoder import TextEncoder, TextEncoderConfig
from ...guidance.networks.unet import UNet
from ...guidance.networks.unet_config import UNetConfig
from .classifier import Classifier
from .tokens import expand_embedding, tokenize

Model = TypeVar("Model", bound=nn.Module)
EMBEDDING = "text_model.embeddings.token_embedding.weight"
# What a component's file must say beside its weights.
SAYS = {"prior_unet": ("config",), "text_encoder": ("config", "token_ids"), "autoencoder": ("config", "scale_factor")}
DECODED_AT_ONCE = 10


def weights_dir() -> Path:
    """The folder of the shipped weights."""
    return Path(__file__).resolve().parent / "weights"


def domain_unets_dir() -> Path:
    """The folder of the shipped domain models; ComfyUI lists it under domain_unets."""
    return weights_dir() / "domain_unets"


def generators_dir() -> Path:
    """The folder of the shipped generator; ComfyUI lists it under generators."""
    return weights_dir() / "generators"


def read_component(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """fp16 weights and metadata of a shipped file. Raises FileProblem when it is missing, damaged or holds NaN."""
    path = weights_dir() / f"{name}.safetensors"
    file = ModelFile(path)
    state_dict, metadata = file.tensors(), file.metadata
    check_finite(state_dict, path)
    missing = [key for key in SAYS.get(name, ()) if key not in metadata]
    if missing:
        raise FileProblem(
            f"{path}: expected the mini world's own file with {' and '.join(missing)} in its metadata, "
            "found none; take the file from the repository again"
        )
    return state_dict, metadata


def load_autoencoder() -> tuple[Autoencoder, float]:
    """The autoencoder in fp32 and its scale: diffusion latent = mean * scale."""
    state_dict, metadata = read_component("autoencoder")
    model = _ready(Autoencoder(AutoencoderConfig.from_json(metadata["config"])), state_dict)
    return model, float(metadata["scale_factor"])


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, images: Tensor, batch: int = 100) -> Tensor:
    """Pictures [N, 3, 64, 64] in -1..1 encoded (the posterior's mean) and decoded again."""
    parts = images.split(batch)
    return torch.cat([autoencoder.decode(autoencoder.encode(part)[0]).clamp(-1, 1) for part in parts])


def load_text_encoder() -> tuple[TextEncoder, TextEncoderConfig]:
    """The text encoder in fp32, its embedding expanded to CLIP's 49,408 token ids."""
    state_dict, metadata = read_component("text_encoder")
    state_dict[EMBEDDING] = expand_embedding(state_dict[EMBEDDING], json.loads(metadata["token_ids"]))
    config = TextEncoderConfig.from_json(metadata["config"])
    return _ready(TextEncoder(config), state_dict), config


def load_prior() -> tuple[dict[str, Tensor], UNetConfig]:
    """The prior's UNet in fp32 and its configuration."""
    state_dict, metadata = read_component("prior_unet")
    return {key: value.float() for key, value in state_dict.items()}, UNetConfig.from_json(metadata["config"])


def load_classifier(held_out: bool = False) -> Classifier:
    """The judge in fp32, or the second one, trained on the held-out fonts and rows alone."""
    return _ready(Classifier(), read_component("classifier_held_out" if held_out else "classifier")[0])


def load_domain(name: str = "mini-handwriting") -> UNet:
    """A shipped domain model's text-free UNet in fp32."""
    state_dict, metadata = read_domain_file(domain_unets_dir() / f"{name}.safetensors")
    return _ready(UNet(metadata.config), state_dict)


def load_generator() -> StyleGAN2:
    """The shipped StyleGAN2 of handwriting in fp32, latents [B, 128] -> grey pictures [B, 3, 64, 64] around -1..1."""
    return read_generator(generators_dir() / "mini-handwriting.safetensors").generator


def _ready(model: Model, state_dict: dict[str, Tensor]) -> Model:
    """The model, in fp32 as it was made, with weights of a file, frozen."""
    model.load_state_dict(state_dict)
    return model.eval().requires_grad_(False)


@dataclass
class MiniWorld:
    """The prior with everything around it: ``prior`` is a denoiser on scaled latents [B, 4, 8, 8]."""

    autoencoder: Autoencoder
    scale: float
    text_encoder: TextEncoder
    prior: Denoiser

    @property
    def schedule(self) -> NoiseSchedule:
        return self.prior.schedule

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> context [B, 77, 128]."""
        return self.text_encoder(torch.stack([tokenize(prompt) for prompt in prompts]))[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 4, h, w] -> pictures [B, 3, 8 h, 8 w] in -1..1.

        A few at a time: large batches fall out of the processor's cache and take nearly twice as long.
        """
        parts = (latents / self.scale).split(DECODED_AT_ONCE)
        return torch.cat([self.autoencoder.decode(part) for part in parts]).clamp(-1, 1)

    def domain(self, name: str = "mini-handwriting") -> Denoiser:
        """A shipped domain model as a denoiser that takes no text."""
        return Denoiser(load_domain(name), self.schedule)


def load_mini_world() -> MiniWorld:
    """The shipped miniature, ready to sample from."""
    autoencoder, scale = load_autoencoder()
    text_encoder, _ = load_text_encoder()
    state_dict, config = load_prior()
    prior = Denoiser(_ready(UNet(config), state_dict), NoiseSchedule.scaled_linear())
    return MiniWorld(autoencoder, scale, text_encoder, prior)
