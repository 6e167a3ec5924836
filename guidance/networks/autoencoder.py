"""The KL autoencoder of latent diffusion (arXiv 2112.10752, section 3.1) with LDM key names.

One class serves Stable Diffusion 1.x, 2.x and XL checkpoints and the mini world: only the configuration differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import Problem
from .configuration import Configuration
from .unet_layers import Upsample


@dataclass(frozen=True)
class AutoencoderConfig(Configuration):
    """The architecture of one autoencoder; the defaults are Stable Diffusion's.

    ch: channels at full resolution. ch_mult: multiplier of every level; each level after the first halves the
    resolution, so the factor is 2 ** (len(ch_mult) - 1). attention: self-attention in the middle block.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    embed_dim: int = 4
    in_channels: int = 3
    out_ch: int = 3
    attention: bool = True

    _NAME = "Autoencoder"

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    def to_ldm_params(self) -> dict[str, Any]:
        """The same shape under the names LDM's own `AutoencoderKL` configurations use (`ddconfig`)."""
        return {
            "embed_dim": self.embed_dim,
            "ddconfig": {
                "double_z": True,
                "z_channels": self.z_channels,
                "resolution": 256,
                "in_channels": self.in_channels,
                "out_ch": self.out_ch,
                "ch": self.ch,
                "ch_mult": list(self.ch_mult),
                "num_res_blocks": self.num_res_blocks,
                "attn_resolutions": [],
                "dropout": 0.0,
                "attn_type": "vanilla" if self.attention else "none",
            },
        }


def autoencoder_config_from_state_dict(state_dict: Mapping[str, Tensor]) -> AutoencoderConfig:
    """Read the configuration off key names and shapes (keys without prefix: `encoder.conv_in.weight`, ...).

    Raises Problem when the keys are not those of an LDM autoencoder.
    """
    try:
        ch = state_dict["encoder.conv_in.weight"].shape[0]
        in_channels = state_dict["encoder.conv_in.weight"].shape[1]
        levels = 1 + max(int(k.split(".")[2]) for k in state_dict if k.startswith("encoder.down."))
        blocks = 1 + max(int(k.split(".")[4]) for k in state_dict if k.startswith("encoder.down.0.block."))
        mult = tuple(state_dict[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] // ch for i in range(levels))
        return AutoencoderConfig(
            ch=ch,
            ch_mult=mult,
            num_res_blocks=blocks,
            in_channels=in_channels,
            z_channels=state_dict["encoder.conv_out.weight"].shape[0] // 2,
            embed_dim=state_dict["post_quant_conv.weight"].shape[1],
            out_ch=state_dict["decoder.conv_out.weight"].shape[0],
            attention="encoder.mid.attn_1.q.weight" in state_dict,
        )
    except (KeyError, ValueError, IndexError) as problem:
        found = ", ".join(sorted(state_dict)[:3]) or "no keys"
        raise Problem(
            f"Autoencoder: expected the keys of an LDM autoencoder (encoder.conv_in.weight, ...), found {found}; "
            "give the autoencoder's own weights, without a prefix"
        ) from problem


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual: [B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class PaddedDownsample(nn.Module):
    """Halve the resolution; LDM pads one pixel at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The residual blocks of one resolution, followed by the way to the next: down, up, or neither."""

    def __init__(self, channels: int, out_channels: int, count: int, *, down: bool = False, up: bool = False) -> None:
        super().__init__()
        widths = [channels, *[out_channels] * count]
        self.block = nn.ModuleList(ResnetBlock(*pair) for pair in zip(widths, widths[1:]))
        self.downsample = PaddedDownsample(out_channels) if down else None
        self.upsample = Upsample(out_channels) if up else None

    def forward(self, h: Tensor) -> Tensor:
        for block in self.block:
            h = block(h)
        h = h if self.downsample is None else self.downsample(h)
        return h if self.upsample is None else self.upsample(h, [2 * side for side in h.shape[2:]])


class Middle(nn.Module):
    """Two residual blocks, with self-attention between them where the configuration has it."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels) if attention else None
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        h = self.block_1(h)
        return self.block_2(h if self.attn_1 is None else self.attn_1(h))


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> moments [B, 2 z_channels, H / factor, W / factor]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        widths = [config.ch, *(config.ch * mult for mult in config.ch_mult)]
        last = len(config.ch_mult) - 1
        self.down = nn.ModuleList(
            Level(*pair, config.num_res_blocks, down=index < last) for index, pair in enumerate(zip(widths, widths[1:]))
        )
        self.mid = Middle(widths[-1], config.attention)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent [B, z_channels, h, w] -> image [B, 3, h * factor, w * factor]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, config.attention)
        levels: list[nn.Module] = []
        for index, mult in reversed(list(enumerate(config.ch_mult))):
            level = Level(channels, config.ch * mult, config.num_res_blocks + 1, up=index > 0)
            levels.insert(0, level)  # keys count from full resolution, computation from the smallest
            channels = config.ch * mult
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """Section 3.1 of arXiv 2112.10752: images [B, 3, H, W] in -1..1 to Gaussian latents and back.

    H and W are multiples of `config.factor`. Latents are unscaled: multiply the mean by the model's latent scale
    factor (0.18215 for SD 1.x) before diffusion and divide before `decode`.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance, each [B, embed_dim, H / factor, W / factor].

        Raises Problem for an image whose sides are not multiples of the factor.
        """
        factor = self.config.factor
        if x.ndim != 4 or x.shape[2] % factor or x.shape[3] % factor:
            raise Problem(f"Autoencoder: expected images [B, C, H, W] in multiples of {factor}, found {list(x.shape)}.")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Image [B, 3, H, W], about -1..1 and not clamped, of an unscaled latent [B, embed_dim, h, w]."""
        return self.decoder(self.post_quant_conv(z))


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of the posterior to the unit Gaussian, in nats, summed over a sample: [B, C, h, w] twice -> [B]."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)
