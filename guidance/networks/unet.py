"""The Stable Diffusion UNet (1.x, 2.x, SDXL), with text or text-free, under LDM parameter names.

The network of "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752), section 3, extended
by the vector conditioning of SDXL (arXiv 2307.01952). Everything its shape depends on is read from a state dict.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import Problem
from ..plain_json import parse_json

GROUPS = 32
NULL_TEXT_FORMS = ("none", "constant", "cached")
# Attention heads leave no trace in the weights. The published families: Stable Diffusion 1.x (context 768) splits every
# width into 8 heads, 2.x (1024), SDXL (2048) and the SDXL refiner (1280) into heads of 64 channels.
HEADS_BY_CONTEXT = {768: (8, -1), 1024: (-1, 64), 1280: (-1, 64), 2048: (-1, 64)}
PUBLISHED_MODEL_CHANNELS = (320, 384)
SDXL_ADM_CHANNELS = 2816


@dataclass(frozen=True)
class UNetConfig:
    """The architecture of one UNet; `unet_config_from_state_dict` reads it from weights.

    `transformer_depth` counts transformer blocks per residual block of the input half, in order;
    `transformer_depth_output` per block of the output half, last block first (as ComfyUI's detection lists them).
    `transformer_depth_middle`: -1 leaves one residual block in the middle, -2 removes the middle (distilled models).
    One of `num_heads` (same count at every width) and `num_head_channels` (same width of a head) is positive.
    `null_text`: "none" takes text; "constant" has no cross-attention; "cached" has it over frozen keys and values.
    """

    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: tuple[int, ...]
    transformer_depth: tuple[int, ...]
    transformer_depth_middle: int
    transformer_depth_output: tuple[int, ...]
    context_dim: int | None
    in_channels: int = 4
    out_channels: int = 4
    num_heads: int = -1
    num_head_channels: int = -1
    use_linear_in_transformer: bool = False
    adm_in_channels: int | None = None
    null_text: str = "none"
    null_tokens: int = 77

    def __post_init__(self) -> None:
        lists = ("channel_mult", "num_res_blocks", "transformer_depth", "transformer_depth_output")
        optional = ("context_dim", "adm_in_channels")
        for name in (item.name for item in fields(self)):
            value = getattr(self, name)
            if name in lists:
                valid = isinstance(value, (list, tuple)) and all(type(item) is int and item >= 0 for item in value)
                object.__setattr__(self, name, tuple(value) if valid else value)
            elif name == "null_text":
                valid = True  # checked below
            elif name == "use_linear_in_transformer":
                valid = isinstance(value, bool)
            else:
                valid = type(value) is int or (value is None and name in optional)
            if not valid:
                wanted = "whole numbers" if name in lists else "true or false" if "use" in name else "a whole number"
                raise Problem(f"UNet configuration: {name} must be {wanted}, got {value!r}.")
        widths = {name: getattr(self, name) for name in ("in_channels", "out_channels", "model_channels", *optional)}
        for name, value in (*widths.items(), *(("channel_mult", mult) for mult in self.channel_mult)):
            if value is not None and value < 1:
                raise Problem(f"UNet configuration: {name} must be positive, got {value}.")
        if self.null_text not in NULL_TEXT_FORMS:
            raise Problem(f"UNet configuration: null_text must be one of {NULL_TEXT_FORMS}, got {self.null_text!r}.")
        if (self.num_heads > 0) == (self.num_head_channels > 0):
            raise Problem(
                "UNet configuration: exactly one of num_heads and num_head_channels must be positive, got "
                f"{self.num_heads} and {self.num_head_channels}."
            )
        if len(self.channel_mult) != len(self.num_res_blocks):
            raise Problem(
                f"UNet configuration: channel_mult has {len(self.channel_mult)} levels, num_res_blocks "
                f"{len(self.num_res_blocks)}; they must agree."
            )
        inputs, outputs = sum(self.num_res_blocks), sum(self.num_res_blocks) + len(self.num_res_blocks)
        if len(self.transformer_depth) != inputs or len(self.transformer_depth_output) != outputs:
            raise Problem(
                f"UNet configuration: expected {inputs} input and {outputs} output transformer depths, got "
                f"{len(self.transformer_depth)} and {len(self.transformer_depth_output)}."
            )
        if self.null_text == "none" and self.context_dim is None and self._has_transformers():
            raise Problem("UNet configuration: a UNet that takes text needs context_dim.")

    def _has_transformers(self) -> bool:
        return any(self.transformer_depth) or any(self.transformer_depth_output) or self.transformer_depth_middle > 0

    def heads_for(self, channels: int) -> int:
        """Number of attention heads at a width of `channels`."""
        heads = self.num_heads if self.num_heads > 0 else channels // self.num_head_channels
        if heads < 1 or channels % heads:
            raise Problem(
                f"UNet configuration: a width of {channels} channels cannot be split into heads "
                f"(num_heads {self.num_heads}, num_head_channels {self.num_head_channels})."
            )
        return heads

    def to_dict(self) -> dict:
        """A JSON-able dictionary; `from_dict` inverts it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> UNetConfig:
        """Inverse of `to_dict`. Raises ValueError on unknown or missing fields."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise Problem(f"UNet configuration: unknown fields {', '.join(unknown)}; this file may be newer.")
        try:
            return cls(**values)
        except TypeError as error:
            raise Problem(f"UNet configuration is incomplete: {error}.") from None

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> UNetConfig:
        try:
            values = parse_json(text)
        except ValueError as error:
            raise Problem(f"UNet configuration is not JSON: {error}.") from None
        if not isinstance(values, dict):
            raise Problem(f"UNet configuration must be a JSON object, got {type(values).__name__}.")
        return cls.from_dict(values)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of (fractional) timesteps [B] -> [B, dim], cosines first (arXiv 1706.03762, section 3.5)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = timesteps.float()[:, None] * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def _zero(module: nn.Module) -> nn.Module:
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
            _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
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

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


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
        if self.attn2 is not None:
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
        self.proj_out = _zero(nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1))
        self.linear = linear

    def forward(self, x: Tensor, context: Tensor | None, gradient_checkpointing: bool = False) -> Tensor:
        height = x.shape[2]
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            if gradient_checkpointing:
                h = checkpoint(block, h, context, use_reentrant=False)
            else:
                h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        h = h if self.linear else self.proj_out(h)
        return x + h


class UNet(nn.Module):
    """The noise-predicting UNet of latent diffusion (arXiv 2112.10752, eq. 3), parameters named as in LDM.

    `forward(x, timesteps, context, y)`: x [B, C, H, W] is the noisy latent scaled to unit variance, timesteps [B] lie
    in 0..999 (fractions allowed), context [B or 1, T, D] is the encoded text, y [B or 1, A] SDXL's vector conditioning.
    The result [B, C, H, W] is eps, v or x0, whatever the weights were trained for. A text-free UNet ignores context.
    x has the weights' dtype, context and y are cast to it. Raises ValueError for inputs that do not fit.
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
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), _zero(nn.Conv2d(channels, config.out_channels, 3, padding=1))
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
        self,
        layers: nn.ModuleList,
        x: Tensor,
        embedding: Tensor,
        context: Tensor | None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in layers:
            if isinstance(layer, ResBlock):
                x = checkpoint(layer, x, embedding, use_reentrant=False) if checkpointing else layer(x, embedding)
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
            fits = context is not None and context.ndim == 3 and context.shape[-1] == config.context_dim
            if not fits or context.shape[0] not in (1, x.shape[0]):
                found = "none" if context is None else list(context.shape)
                raise Problem(f"UNet: expected encoded text [{x.shape[0]}, T, {config.context_dim}], got {found}.")
        if (y is None) != (config.adm_in_channels is None) or (y is not None and y.shape[-1] != config.adm_in_channels):
            found = "none" if y is None else list(y.shape)
            wanted = "none" if config.adm_in_channels is None else f"[B, {config.adm_in_channels}]"
            raise Problem(f"UNet: expected a vector conditioning y of {wanted}, got {found}.")


def unet_config_from_state_dict(
    state_dict: Mapping[str, Tensor], num_heads: int | None = None, num_head_channels: int | None = None
) -> UNetConfig:
    """Read the architecture from parameter names and shapes (keys such as `input_blocks.0.0.weight`, no prefix).

    Attention heads leave no trace in the weights: give one of `num_heads`, `num_head_channels`, or the rule of the
    published Stable Diffusion families is used. `context_dim` of a text-free UNet, which leaves no trace either, is
    its family's, or None for a UNet of no published family.
    Raises ValueError when the keys are not such a UNet's or when self-attention reads the text.
    """

    def shape(key: str) -> torch.Size:
        if key not in state_dict:
            raise Problem(f"This is not a Stable Diffusion UNet in LDM layout: the tensor {key} is missing.")
        return state_dict[key].shape

    depths: dict[str, int] = {}
    blocks = {"input_blocks": 0, "output_blocks": 0}
    attn2, null_keys = set(), set()
    for key in state_dict:
        parts = key.split(".")
        if parts[0] in blocks and len(parts) > 1 and parts[1].isdigit():
            blocks[parts[0]] = max(blocks[parts[0]], int(parts[1]) + 1)
        if "transformer_blocks" in parts:
            at = parts.index("transformer_blocks")
            prefix = ".".join(parts[:at])
            depths[prefix] = max(depths.get(prefix, 0), int(parts[at + 1]) + 1)
            if parts[at + 2] == "attn2":
                attn2.add(prefix)
                if parts[at + 3] == "null_k":
                    null_keys.add(key)
        elif "time_stack" in parts or "time_mixer" in parts:
            raise Problem("This is a video UNet; only image UNets of the Stable Diffusion family are supported.")

    first = shape("input_blocks.0.0.weight")
    model_channels, in_channels = first[0], first[1]
    num_res_blocks, channel_mult, transformer_depth = [0], [0], []
    for index in range(1, blocks["input_blocks"]):
        if f"input_blocks.{index}.0.op.weight" in state_dict:
            num_res_blocks.append(0)
            channel_mult.append(0)
        else:
            num_res_blocks[-1] += 1
            channel_mult[-1] = shape(f"input_blocks.{index}.0.out_layers.3.weight")[0] // model_channels
            transformer_depth.append(depths.get(f"input_blocks.{index}.1", 0))
    transformer_depth_output = [depths.get(f"output_blocks.{i}.1", 0) for i in reversed(range(blocks["output_blocks"]))]
    if "middle_block.1.proj_in.weight" in state_dict:
        middle = depths.get("middle_block.1", 0)
    else:
        middle = -1 if "middle_block.0.in_layers.0.weight" in state_dict else -2

    context_dim, linear, null_text, null_tokens = None, False, "none", 77
    for prefix in depths:
        first_block = f"{prefix}.transformer_blocks.0"
        linear = len(shape(f"{prefix}.proj_in.weight")) == 2
        inner = shape(f"{first_block}.attn1.to_q.weight")[0]
        if shape(f"{first_block}.attn1.to_k.weight")[1] != inner:
            raise Problem(
                f"Self-attention {first_block}.attn1 reads the text (disable_self_attentions), which this UNet does "
                "not support; use a Stable Diffusion 1.x, 2.x or SDXL model."
            )
        if prefix in attn2 and not null_keys:
            context_dim = shape(f"{first_block}.attn2.to_k.weight")[1]
    if depths:
        if null_keys:
            null_text, null_tokens = "cached", shape(next(iter(null_keys)))[0]
        elif not attn2:
            null_text = "constant"
        if attn2 and attn2 != set(depths):
            raise Problem("Some transformer blocks of this UNet have cross-attention (attn2) and some do not.")

    adm = state_dict["label_emb.0.0.weight"].shape[1] if "label_emb.0.0.weight" in state_dict else None
    heads, head_channels = _heads(num_heads, num_head_channels, context_dim, model_channels, linear)
    if depths and null_text != "none":
        context_dim = _published_context_dim(model_channels, linear, adm)
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shape("out.2.weight")[0],
        model_channels=model_channels,
        channel_mult=tuple(channel_mult),
        num_res_blocks=tuple(num_res_blocks),
        transformer_depth=tuple(transformer_depth),
        transformer_depth_middle=middle,
        transformer_depth_output=tuple(transformer_depth_output),
        context_dim=context_dim,
        num_heads=heads,
        num_head_channels=head_channels,
        use_linear_in_transformer=linear,
        adm_in_channels=adm,
        null_text=null_text,
        null_tokens=null_tokens,
    )


def _published_context_dim(model_channels: int, linear: bool, adm: int | None) -> int | None:
    if model_channels == 384:
        return 1280
    if model_channels != 320:
        return None
    if not linear:
        return 768
    return 2048 if adm is not None and adm >= SDXL_ADM_CHANNELS else 1024


def _heads(
    num_heads: int | None, num_head_channels: int | None, context_dim: int | None, model_channels: int, linear: bool
) -> tuple[int, int]:
    if num_heads is not None or num_head_channels is not None:
        return num_heads or -1, num_head_channels or -1
    if context_dim in HEADS_BY_CONTEXT:
        return HEADS_BY_CONTEXT[context_dim]
    if context_dim is None and model_channels in PUBLISHED_MODEL_CHANNELS:
        # Text-free weights of a published family: only 1.x projects into its transformers by convolution.
        return (-1, 64) if linear else (8, -1)
    raise Problem(
        f"The number of attention heads cannot be read from weights and this UNet (context {context_dim}, "
        f"{model_channels} channels) is of no published family: give num_heads or num_head_channels."
    )
