"""The Stable Diffusion UNet (1.x, 2.x, SDXL), with text or text-free, under LDM parameter names.

The network of "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752), section 3, extended
by the vector conditioning of SDXL (arXiv 2307.01952).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import Problem
from .unet_config import UNetConfig
from .unet_layers import GROUPS, Downsample, ResBlock, SpatialTransformer, Upsample, timestep_embedding, zeroed


class UNet(nn.Module):
    """The noise-predicting UNet of latent diffusion (arXiv 2112.10752, eq. 3), parameters named as in LDM.

    `forward(x, timesteps, context, y)`: x [B, C, H, W] is the noisy latent scaled to unit variance, timesteps [B] lie
    in 0..999 (fractions allowed), context [B or 1, T, D] is the encoded text, y [B or 1, A] SDXL's vector conditioning.
    The result [B, C, H, W] is eps, v or x0, whatever the weights were trained for. A text-free UNet ignores context.
    x has the weights' dtype, context and y are cast to it. Raises Problem for inputs that do not fit.
    `gradient_checkpointing = True` trades a second forward pass of each block for its activations while training.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width, embedding = config.model_channels, config.model_channels * 4
        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if config.adm_in_channels is not None:
            layers = nn.Linear(config.adm_in_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
            self.label_emb = nn.Sequential(nn.Sequential(*layers))

        def block(channels: int, out_channels: int, depth: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(channels, embedding, out_channels)]
            if depth > 0:
                layers.append(SpatialTransformer(out_channels, depth, config))
            return layers

        levels = len(config.channel_mult)
        depths = iter(config.transformer_depth)
        channels = width
        skips = [channels]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(config.in_channels, width, 3, padding=1)])])
        for level, (mult, count) in enumerate(zip(config.channel_mult, config.num_res_blocks)):
            for _ in range(count):
                self.input_blocks.append(nn.ModuleList(block(channels, mult * width, next(depths))))
                channels = mult * width
                skips.append(channels)
            if level < levels - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)

        middle: list[nn.Module] = []
        if config.transformer_depth_middle >= -1:
            middle.append(ResBlock(channels, embedding, channels))
        if config.transformer_depth_middle >= 0:
            middle.append(SpatialTransformer(channels, config.transformer_depth_middle, config))
            middle.append(ResBlock(channels, embedding, channels))
        self.middle_block = nn.ModuleList(middle)

        depths = reversed(config.transformer_depth_output)
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            mult, count = config.channel_mult[level], config.num_res_blocks[level]
            for index in range(count + 1):
                layers = block(channels + skips.pop(), mult * width, next(depths))
                channels = mult * width
                if level > 0 and index == count:
                    layers.append(Upsample(channels))
                self.output_blocks.append(nn.ModuleList(layers))

        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), zeroed(nn.Conv2d(channels, config.out_channels, 3, padding=1))
        )

    @property
    def text_free(self) -> bool:
        return self.config.null_text != "none"

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        self._check(x, timesteps, context, y)
        embedding = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(x.dtype))
        if y is not None:
            embedding = embedding + self.label_emb(y.to(x.dtype))
        context = None if self.text_free or context is None else context.to(x.dtype)

        skips = []
        for layers in self.input_blocks:
            x = self._run(layers, x, embedding, context)
            skips.append(x)
        x = self._run(self.middle_block, x, embedding, context)
        for layers in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = self._run(layers, x, embedding, context, size)
        return self.out(x)

    def _run(
        self, layers: nn.Module, x: Tensor, embedding: Tensor, context: Tensor | None, size: Sequence[int] | None = None
    ) -> Tensor:
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in cast(nn.ModuleList, layers):
            if isinstance(layer, ResBlock):
                made = checkpoint(layer, x, embedding, use_reentrant=False) if checkpointing else layer(x, embedding)
                x = cast(Tensor, made)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, checkpointing)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x

    def _check(self, x: Tensor, timesteps: Tensor, context: Tensor | None, y: Tensor | None) -> None:
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise Problem(f"UNet: expected a latent [B, {config.in_channels}, H, W], got {list(x.shape)}.")
        if timesteps.shape != x.shape[:1]:
            raise Problem(f"UNet: expected {x.shape[0]} timesteps, got shape {list(timesteps.shape)}.")
        if config.null_text == "none" and config.context_dim is not None:
            fits = context is not None and context.ndim == 3 and context.shape[0] in (1, x.shape[0])
            if context is None or not fits or context.shape[-1] != config.context_dim:
                found = "none" if context is None else list(context.shape)
                raise Problem(f"UNet: expected encoded text [{x.shape[0]}, T, {config.context_dim}], got {found}.")
        if (y is None) != (config.adm_in_channels is None) or (y is not None and y.shape[-1] != config.adm_in_channels):
            found = "none" if y is None else list(y.shape)
            wanted = "none" if config.adm_in_channels is None else f"[B, {config.adm_in_channels}]"
            raise Problem(f"UNet: expected a vector conditioning y of {wanted}, got {found}.")
