"""The layers of the Stable Diffusion UNet: residual blocks, resampling, attention and transformer blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .unet_config import UNetConfig

GROUPS = 32


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of (fractional) timesteps [B] -> [B, dim], cosines first (arXiv 1706.03762, section 3.5)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = timesteps.float()[:, None] * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def zeroed(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """Residual block with an additive timestep embedding: [B, C, H, W], [B, E] -> [B, O, H, W]."""

    def __init__(self, channels: int, embedding: int, out_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        # Index 2 holds the dropout in LDM's numbering; it has no weights and is zero in every published model.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Halves height and width (rounding up) by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to `size` (the skip connection's, which may be odd), then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(x, size=list(size), mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of x [B, N, C] over context [B, T, D] (x itself when context is None) -> [B, N, C]."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.to_out(_attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class NullTextAttention(nn.Module):
    """Cross-attention over frozen-in keys and values of the empty prompt, the `cached` text-free form.

    `null_k`, `null_v` [T, C] are what to_k and to_v make of the empty prompt's context; they are trainable.
    """

    def __init__(self, channels: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))
        self.null_k = nn.Parameter(torch.randn(tokens, channels) * channels**-0.5)
        self.null_v = nn.Parameter(torch.randn(tokens, channels) * channels**-0.5)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch = x.shape[0]
        k, v = (null.to(x.dtype).expand(batch, -1, -1) for null in (self.null_k, self.null_v))
        return self.to_out(_attend(self.to_q(x), k, v, self.heads))


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=heads) for part in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


class GEGLU(nn.Module):
    """Gated linear unit with a GELU gate (arXiv 2002.05202, section 2)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, channels * 4), nn.Identity(), nn.Linear(channels * 4, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text (in whichever form `null_text` leaves it) and a feed-forward layer."""

    def __init__(self, channels: int, heads: int, config: UNetConfig) -> None:
        super().__init__()
        self.attn1 = Attention(channels, channels, heads)
        self.ff = FeedForward(channels)
        if config.null_text == "none":
            assert config.context_dim is not None  # the configuration refuses
            self.attn2: nn.Module | None = Attention(channels, config.context_dim, heads)
        elif config.null_text == "cached":
            self.attn2 = NullTextAttention(channels, config.null_tokens, heads)
        else:
            self.attn2 = None
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = None if self.attn2 is None else nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        linear = config.use_linear_in_transformer
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        heads = config.heads_for(channels)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, config) for _ in range(depth))
        self.proj_out = zeroed(nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1))
        self.linear = linear

    def forward(self, x: Tensor, context: Tensor | None, gradient_checkpointing: bool = False) -> Tensor:
        height = x.shape[2]
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            if gradient_checkpointing:
                h = cast(Tensor, checkpoint(block, h, context, use_reentrant=False))
            else:
                h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        h = h if self.linear else self.proj_out(h)
        return x + h
