"""A prior: the UNet that training starts from, with its noise, its latent space and its text.

Latents outside of this room are always *scaled*: posterior mean times the family's factor, which is what the UNet is
trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...guidance.diffusion import NoiseSchedule
from ...guidance.errors import Problem
from ...guidance.files import FileProblem, prior_content_hash
from ...guidance.networks.autoencoder import Autoencoder
from ...guidance.networks.unet import UNet
from ...guidance.networks.unet_config import UNetConfig
from ...guidance.networks.unet_layers import timestep_embedding
from ...guidance.null_text import NullContext, load_unet
from .families import native_resolution
from .text_encoders import Text

SIZE_EMBEDDING = 256  # channels of each of SDXL's six size and crop numbers


@dataclass(frozen=True)
class ImageSize:
    """What SDXL is told about one image, in pixels: its size before resizing, where it was cropped, its size now.

    original (height, width), crop (top, left), target (height, width). Other families ignore it.
    """

    original: tuple[int, int]
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None


@dataclass(eq=False)
class Prior:
    """A prior and everything around it that training, previews and the finished file need; on the CPU.

    name: what to call it in messages. unet: its weights, LDM keys without prefix, in the number format of their file
    (fp8 as fp16); config: their architecture. prediction_type: "epsilon", "v_prediction" or "sample"; zero_snr:
    whether its noise ends in zero signal. latent_format: "sd15", "sdxl" or "mini_world"; latent_scale: the factor
    above. null_context: the empty prompt. text_encoder: encodes prompts, None where there is no tokenizer. notes: what
    the user should know about it.
    """

    name: str
    unet: dict[str, Tensor]
    config: UNetConfig
    prediction_type: str
    zero_snr: bool
    latent_format: str
    latent_scale: float
    null_context: NullContext
    autoencoder: Autoencoder
    text_encoder: Callable[[Sequence[str]], Text] | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """Its noise levels."""
        return NoiseSchedule.scaled_linear(zero_snr=self.zero_snr)

    @cached_property
    def prior_hash(self) -> str:
        """`prior_content_hash` of the UNet, which names the prior in a domain file."""
        return prior_content_hash(self.unet)

    @cached_property
    def vae_id(self) -> str:
        """SHA-256 over the autoencoder's weights, number formats included, and the scale: what latents depend on."""
        digest = hashlib.sha256(f"{self.latent_scale!r}\n{self.autoencoder.config.to_dict()}\n".encode())
        for key, tensor in sorted(self.autoencoder.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along one side."""
        return self.autoencoder.config.factor

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.config.embed_dim

    @property
    def native_resolution(self) -> int | None:
        """The side in pixels of the images it was made for, None where that is unknown."""
        return native_resolution(self.latent_format, self.config.context_dim, self.prediction_type == "v_prediction")

    @property
    def null_text(self) -> Text:
        """The empty prompt as encoded text."""
        return Text(self.null_context.tensor, self.null_context.pooled)

    @contextmanager
    def autoencoder_on(self, device: torch.device | str) -> Iterator[None]:
        """The autoencoder on `device` for a while, then back where it was, so that training has the memory."""
        before = next(self.autoencoder.parameters()).device
        self.autoencoder.to(device)
        try:
            yield
        finally:
            self.autoencoder.to(before)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in -1..1 -> mean and standard deviation of their scaled latents, fp32 [B, C, h, w] each.

        Runs in fp32 (SDXL's autoencoder overflows in fp16) where the autoencoder is (`autoencoder_on`); H and W are
        multiples of `factor`. Raises ValueError for other sizes and FileProblem when the autoencoder overflows.
        """
        where = next(self.autoencoder.parameters()).device
        mean, logvar = self.autoencoder.encode(images.to(where, torch.float32))
        if not bool(mean.isfinite().all()):
            raise FileProblem(
                f"{self.name}: expected finite latents, found NaN or infinity from its autoencoder; give another one "
                "as vae."
            )
        scaled = mean * self.latent_scale, (0.5 * logvar).exp() * self.latent_scale
        return scaled[0].to(images.device), scaled[1].to(images.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> images [B, 3, H, W] in -1..1, fp32, one image at a time to save memory."""
        where = next(self.autoencoder.parameters()).device
        unscaled = (latents.float() / self.latent_scale).to(where)
        return torch.cat([self.autoencoder.decode(latent).clamp(-1, 1) for latent in unscaled.split(1)]).to(
            latents.device
        )

    def encode_text(self, prompts: Sequence[str]) -> Text:
        """Prompts -> encoded text [B, T, D]. Empty prompts always work; others need a tokenizer, else ValueError."""
        prompts = list(prompts)
        self.check_prompts(prompts)
        if any(prompts) and self.text_encoder is not None:
            return self.text_encoder(prompts)
        pooled = self.null_context.pooled
        return Text(
            self.null_context.tensor.expand(len(prompts), -1, -1),
            None if pooled is None else pooled.expand(len(prompts), -1),
        )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError where `encode_text` could not encode these prompts, without encoding them."""
        if self.text_encoder is None and any(prompts):
            raise Problem(
                f"{self.name}: expected a tokenizer to encode the prompt {next(filter(None, prompts))!r}, found none; "
                "set tokenizer to a folder with CLIP's vocab.json and merges.txt (in ComfyUI: comfy/sd1_tokenizer)."
            )

    def vector(self, sizes: Sequence[ImageSize], pooled: Tensor | None = None) -> Tensor | None:
        """SDXL's vector conditioning y [B, A] (arXiv 2307.01952, section 2.2), None for families without one.

        pooled [1, P] or [B, P] comes first; None puts zeros there, which is right for text-free UNets, whose weights
        for it are zero.
        """
        if self.config.adm_in_channels is None:
            return None
        numbers = torch.tensor([[*size.original, *size.crop, *(size.target or size.original)] for size in sizes])
        embedded = timestep_embedding(numbers.flatten().float(), SIZE_EMBEDDING).reshape(len(sizes), -1)
        if pooled is None:
            pooled = torch.zeros(1, self.config.adm_in_channels - embedded.shape[1])
        return torch.cat([pooled.to("cpu", torch.float32).expand(len(sizes), -1), embedded], dim=1)

    def conditioning(
        self, sizes: Sequence[ImageSize], text: Text | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Keyword arguments of the UNet for a batch of images: context [B, T, D] and y [B, A], where it takes them.

        text: one prompt for all ([1, T, D]) or one per image; None for a text-free UNet.
        """
        arguments: dict[str, Tensor] = {}
        if text is not None:
            arguments["context"] = text.context.expand(len(sizes), -1, -1).to(device)
        y = self.vector(sizes, None if text is None else text.pooled)
        return arguments if y is None else {**arguments, "y": y.to(device)}

    def noise(self, seeds: Iterable[int], height: int, width: int) -> Tensor:
        """Standard normal latents [B, C, h, w] of pictures of height x width pixels, drawn on the CPU as ComfyUI does.

        Each depends on its seed alone.
        """
        shape = (1, self.latent_channels, height // self.factor, width // self.factor)
        return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def load_unet(self, dtype: torch.dtype = torch.float32) -> UNet:
        """Its UNet, untrained, as a module in evaluation mode; weights already in `dtype` are shared, not copied."""
        with torch.inference_mode(False):
            return load_unet(self.unet, self.config, dtype)
