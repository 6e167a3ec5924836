"""The StyleGAN2 generator in plain PyTorch, under the parameter names of NVIDIA's PyTorch releases.

"Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958): weight demodulation (section 2.2) and the
architectures without progressive growing (section 4.1); "Training Generative Adversarial Networks with Limited Data"
(arXiv 2006.06676), appendix D: conditional mapping, and what half precision needs. Every convolution is an ordinary
one shared by the batch, its styles applied before it and its demodulation after: equal to modulated weights by
linearity, without a weight per sample and without compiled extensions, so that any device and any derivative works.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import Problem
from ..plain_json import parse_json

ARCHITECTURES = ("skip", "resnet", "orig")
NOISE_MODES = ("const", "random", "none")
LEAK = 0.2
ACTIVATION_GAIN = math.sqrt(2.0)  # keeps the second moment through a leaky ReLU, as He's initialisation does
EPSILON = 1e-8
MEAN_MOMENTUM = 0.998
MAX_TAPS = 64  # of a resampling filter, which is squared; the published one has 4
FILTER_TOLERANCE = 1e-3  # relative to the largest tap: what half precision leaves of one
MEAN_SAMPLES_AT_ONCE = 1000
MEAN_NUMBERS_AT_ONCE = 2**24  # of a layer; fewer samples are taken at once where it is wider than any published one


@dataclass(frozen=True)
class GeneratorConfig:
    """The architecture of one StyleGAN2 generator; `generator_config_from_state_dict` reads it from weights.

    `resolution` is a power of two, 4 or more; `channels` lists the width of every block: 4, 8, ... `resolution` pixels.
    `first_size`: height and width of the first block's features; 4 x 4 in square networks, from which every block is
    named. Others begin with 4 x 2 and the like, and end with `height` x `width` pixels.
    `z_dim`, `w_dim`, `c_dim`: width of the latent, of the style space and of the label (0: unconditional).
    `mapping_layers` layers lead from z to w over `mapping_dim` features; labels are embedded into `embed_dim` (None for
    either: `w_dim`). `mapping_lr_multiplier` scales the mapping's weights at run time (their stored values are 1 / it).
    `architecture`: "skip" sums one image per block, "resnet" has residual blocks, "orig" neither; the last two make
    the image in the last block only. `conv_clamp` bounds activations to +- its value (None: unbounded; 256 in
    networks trained in half precision). `resample_filter`: taps of the separable upsampling filter, any scale and any
    count, symmetric or not; `image_filter`: those of the sum of images, where they are others (None: the same).
    `use_noise`: whether layers have noise inputs.
    """

    resolution: int
    channels: tuple[int, ...]
    z_dim: int = 512
    c_dim: int = 0
    w_dim: int = 512
    img_channels: int = 3
    mapping_layers: int = 8
    mapping_dim: int | None = None
    embed_dim: int | None = None
    mapping_lr_multiplier: float = 0.01
    architecture: str = "skip"
    conv_clamp: float | None = None
    resample_filter: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
    use_noise: bool = True
    first_size: tuple[int, int] = (4, 4)
    image_filter: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("z_dim", 1), ("c_dim", 0), ("w_dim", 1), ("img_channels", 1), ("mapping_layers", 1)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise Problem(f"Generator configuration: {name} must be a whole number from {least}, got {value!r}.")
        for name in ("mapping_dim", "embed_dim"):
            if (value := getattr(self, name)) is not None and (type(value) is not int or value < 1):
                raise Problem(f"Generator configuration: {name} must be a whole number from 1, got {value!r}.")
        size = self.resolution
        if type(size) is not int or size < 4 or size & (size - 1):
            raise Problem(f"Generator configuration: resolution must be a power of two from 4, got {size!r}.")
        if not isinstance(self.channels, (list, tuple)) or not all(type(n) is int and n > 0 for n in self.channels):
            raise Problem(f"Generator configuration: channels must be positive numbers, got {self.channels!r}.")
        object.__setattr__(self, "channels", tuple(self.channels))
        if len(self.channels) != len(self.block_resolutions):
            raise Problem(
                f"Generator configuration: {size} pixels have {len(self.block_resolutions)} blocks (4, 8, ... {size}), "
                f"but channels lists {len(self.channels)} widths."
            )
        if self.architecture not in ARCHITECTURES:
            raise Problem(
                f"Generator configuration: architecture must be one of {ARCHITECTURES}, got {self.architecture!r}."
            )
        for name, optional in (("mapping_lr_multiplier", False), ("conv_clamp", True)):
            value = getattr(self, name)
            if not (optional and value is None) and not (_is_number(value) and value > 0):
                raise Problem(f"Generator configuration: {name} must be a positive number, got {value!r}.")
            object.__setattr__(self, name, None if value is None else float(value))
        for name in ("resample_filter", "image_filter"):
            taps = getattr(self, name)
            if name == "image_filter" and taps is None:
                continue
            if isinstance(taps, (list, tuple)) and len(taps) > MAX_TAPS:
                raise Problem(f"Generator configuration: {name} must have at most {MAX_TAPS} taps, got {len(taps)}.")
            if not isinstance(taps, (list, tuple)) or not taps or not all(map(_is_number, taps)) or not sum(taps):
                raise Problem(f"Generator configuration: {name} must be taps with a sum, got {taps!r}.")
            object.__setattr__(self, name, tuple(map(float, taps)))
        if not isinstance(self.use_noise, bool):
            raise Problem(f"Generator configuration: use_noise must be true or false, got {self.use_noise!r}.")
        first = self.first_size
        if not isinstance(first, (list, tuple)) or len(first) != 2 or not all(type(n) is int and n > 0 for n in first):
            raise Problem(f"Generator configuration: first_size must be a height and a width, got {first!r}.")
        object.__setattr__(self, "first_size", tuple(first))

    @property
    def block_resolutions(self) -> tuple[int, ...]:
        """4, 8, ... `resolution`, in pixels: what the blocks are called."""
        return tuple(2**power for power in range(2, self.resolution.bit_length()))

    def block_size(self, resolution: int) -> tuple[int, int]:
        """Height and width in pixels of the features of the block that is called `resolution`."""
        return self.first_size[0] * resolution // 4, self.first_size[1] * resolution // 4

    @property
    def height(self) -> int:
        """Of an image, in pixels; `resolution` in square networks."""
        return self.block_size(self.resolution)[0]

    @property
    def width(self) -> int:
        """Of an image, in pixels; `resolution` in square networks."""
        return self.block_size(self.resolution)[1]

    @property
    def num_ws(self) -> int:
        """How many style vectors one image takes (W+): one per convolution and one for the last conversion to RGB."""
        return 2 * len(self.block_resolutions)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary; `from_dict` inverts it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneratorConfig:
        """Inverse of `to_dict`. Raises ValueError on unknown or missing fields."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise Problem(f"Generator configuration: unknown fields {', '.join(unknown)}; this file may be newer.")
        try:
            return cls(**values)
        except TypeError as error:
            raise Problem(f"Generator configuration is incomplete: {error}.") from None

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> GeneratorConfig:
        try:
            values = parse_json(text)
        except ValueError as error:
            raise Problem(f"Generator configuration is not JSON: {error}.") from None
        if not isinstance(values, dict):
            raise Problem(f"Generator configuration must be a JSON object, got {type(values).__name__}.")
        return cls.from_dict(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def standard_channels(resolution: int, base: int = 32768, most: int = 512) -> tuple[int, ...]:
    """Widths of the blocks as published: min(base / resolution, most); base 32768 is the paper's config F, 16384 E."""
    return tuple(min(base // 2**power, most) for power in range(2, resolution.bit_length()))


# ---------------------------------------------------------------------------------------------------------------------
# The formulas


def fir_kernel(taps: tuple[float, ...], *, device: torch.device | str = "cpu", dtype: torch.dtype) -> Tensor:
    """The separable low-pass filter of 2x upsampling [1, 1, K, K] with sum 4, which makes up for the inserted zeros."""
    row = torch.tensor(taps, dtype=torch.float64)
    kernel = torch.outer(row, row) * (4.0 / row.sum() ** 2)
    return kernel.to(dtype).to(device)[None, None]  # in this order: not every device has float64


def upsample(x: Tensor, kernel: Tensor) -> Tensor:
    """2x upsampling: zeros between the pixels, then `fir_kernel`'s filter. [B, C, H, W] -> [B, C, 2H, 2W]."""
    taps = kernel.shape[-1]
    channels = x.shape[1]
    before = taps - 1 - (taps + 1) // 2  # what to take off a full convolution so that pixel i comes to lie at 2i, 2i+1
    after = taps - 2 - before
    weight = kernel.expand(channels, 1, taps, taps)
    if before == after >= 0:
        return F.conv_transpose2d(x, weight, stride=2, padding=before, groups=channels)
    return F.pad(F.conv_transpose2d(x, weight, stride=2, groups=channels), (-before, -after, -before, -after))


def _blur_after_transposed(x: Tensor, kernel: Tensor) -> Tensor:
    """The filter of an upsampling 3x3 convolution after its transposed half: [.., 2H+1, 2W+1] -> [.., 2H, 2W]."""
    taps = kernel.shape[-1]
    channels = x.shape[1]
    before = (taps + 1) // 2 - 1
    after = taps - 2 - before
    weight = kernel.flip(-1, -2).expand(channels, 1, taps, taps)
    if before == after >= 0:
        return F.conv2d(x, weight, padding=before, groups=channels)
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, groups=channels)


def modulated_convolution(
    x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True, up_kernel: Tensor | None = None
) -> Tensor:
    """Convolution with modulated, demodulated weights, eqs. 1 and 3 of arXiv 1912.04958.

    x [B, I, H, W], weight [O, I, k, k], style [B, I] -> [B, O, H, W]: w'_{oik} = s_i w_{oik}, divided (`demodulate`) by
    sqrt(sum_ik w'^2 + 1e-8). With `up_kernel` (of `fir_kernel`) the result is [B, O, 2H, 2W]: x upsampled, then
    convolved (the weight not flipped, unlike torch's conv2d, so that one transposed convolution does both).
    Scales are computed in `style`'s dtype (at least float32), the convolution in x's. In half precision styles and
    weights enter it normalised (arXiv 2006.06676, appendix D), their norms joining the demodulation factor.
    """
    factor = None
    scaled_style, scaled_weight = style, weight
    if demodulate:
        energy = weight.to(style.dtype).square().sum(dim=(2, 3))  # [O, I]
        factor = (style.square() @ energy.t() + EPSILON).rsqrt()  # [B, O]
        if x.dtype in (torch.float16, torch.bfloat16):
            # Both norms cancel, so that no gradient has to pass through them.
            style_norm = style.detach().abs().amax(dim=1, keepdim=True).clamp_min(EPSILON)  # [B, 1]
            weight_norm = energy.detach().sum(dim=1).sqrt().clamp_min(EPSILON)  # [O]
            scaled_style = style / style_norm
            scaled_weight = weight.to(style.dtype) / weight_norm[:, None, None, None]
            factor = factor * (style_norm * weight_norm)
    x = x * scaled_style.to(x.dtype)[:, :, None, None]
    scaled_weight = scaled_weight.to(x.dtype)
    if up_kernel is None:
        x = F.conv2d(x, scaled_weight, padding=weight.shape[-1] // 2)
    else:
        x = _blur_after_transposed(F.conv_transpose2d(x, scaled_weight.transpose(0, 1), stride=2), up_kernel)
    return x if factor is None else x * factor.to(x.dtype)[:, :, None, None]


def activate(x: Tensor, bias: Tensor, gain: float = 1.0, clamp: float | None = None) -> Tensor:
    """sqrt(2) * leaky ReLU(x + bias), times gain, bounded to +- clamp * gain. x [B, C, ...], bias [C]."""
    bias = bias.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
    x = F.leaky_relu(x + bias, LEAK) * (ACTIVATION_GAIN * gain)
    return x if clamp is None else x.clamp(-clamp * gain, clamp * gain)


def _unit_second_moment(x: Tensor) -> Tensor:
    return x * (x.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()


# ---------------------------------------------------------------------------------------------------------------------
# The layers


class Dense(nn.Module):
    """Fully connected layer with the equalised learning rate of arXiv 1710.10196, section 4.1: [B, I] -> [B, O]."""

    def __init__(self, inputs: int, outputs: int, lr_multiplier: float = 1.0, bias_init: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.lr_multiplier, self.bias_init = lr_multiplier, bias_init

    def initialise(self, generator: torch.Generator | None) -> None:
        self.weight.normal_(generator=generator).div_(self.lr_multiplier)
        self.bias.fill_(self.bias_init / self.lr_multiplier)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * (self.lr_multiplier / math.sqrt(self.weight.shape[1]))
        bias = self.bias.to(x.dtype)
        return F.linear(x, weight, bias if self.lr_multiplier == 1 else bias * self.lr_multiplier)


class MappingNetwork(nn.Module):
    """z and a label to the style space, section 2 of arXiv 1812.04948: [B, z_dim], [B, c_dim] -> w [B, w_dim].

    `w_avg` [w_dim] is the running mean of w, the centre of truncation; `track_mean` moves it while training. `widths`:
    of what enters the first layer, and of what every layer gives.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        embedded = (config.embed_dim or config.w_dim) if config.c_dim else 0
        hidden = config.mapping_dim or config.w_dim
        self.widths = [config.z_dim + embedded, *[hidden] * (config.mapping_layers - 1), config.w_dim]
        if config.c_dim:
            self.embed = Dense(config.c_dim, embedded)
        for index in range(config.mapping_layers):
            self.add_module(f"fc{index}", Dense(*self.widths[index : index + 2], config.mapping_lr_multiplier))
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        dtype = _scale_dtype(self.fc0.weight)
        x = _unit_second_moment(z.to(dtype))
        if self.config.c_dim:
            x = torch.cat([x, _unit_second_moment(self.embed(c.to(dtype)))], dim=1)
        for index in range(self.config.mapping_layers):
            x = F.leaky_relu(getattr(self, f"fc{index}")(x), LEAK) * ACTIVATION_GAIN
        return x

    @torch.no_grad()
    def track_mean(self, w: Tensor, momentum: float = MEAN_MOMENTUM) -> None:
        """w_avg = momentum * w_avg + (1 - momentum) * mean of w [B, w_dim]."""
        self.w_avg.lerp_(w.detach().mean(dim=0).to(self.w_avg.dtype), 1 - momentum)


class StyledConvolution(nn.Module):
    """3x3 modulated convolution, noise, bias and activation; doubles the size of its input where `up`."""

    def __init__(self, inputs: int, outputs: int, resolution: int, up: bool, config: GeneratorConfig) -> None:
        super().__init__()
        self.up, self.clamp = up, config.conv_clamp
        self.affine = Dense(config.w_dim, inputs, bias_init=1.0)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.empty(outputs))
        if config.use_noise:
            self.noise_strength = nn.Parameter(torch.empty(()))
            self.register_buffer("noise_const", torch.empty(config.block_size(resolution)))

    def initialise(self, generator: torch.Generator | None) -> None:
        self.weight.normal_(generator=generator)
        self.bias.zero_()
        if "noise_const" in self._buffers:
            self.noise_strength.zero_()
            self.noise_const.normal_(generator=generator)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None, kernel: Tensor, gain: float = 1.0) -> Tensor:
        x = modulated_convolution(x, self.weight, self.affine(w), up_kernel=kernel if self.up else None)
        if noise is not None:
            x = x + (noise * self.noise_strength).to(x.dtype)
        return activate(x, self.bias, gain, self.clamp)


class ToRGB(nn.Module):
    """1x1 modulated convolution to the image's channels, without demodulation and activation."""

    def __init__(self, inputs: int, config: GeneratorConfig) -> None:
        super().__init__()
        self.clamp = config.conv_clamp
        self.affine = Dense(config.w_dim, inputs, bias_init=1.0)
        self.weight = nn.Parameter(torch.empty(config.img_channels, inputs, 1, 1))
        self.bias = nn.Parameter(torch.empty(config.img_channels))

    def initialise(self, generator: torch.Generator | None) -> None:
        self.weight.normal_(generator=generator)
        self.bias.zero_()

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) * (1 / math.sqrt(self.weight.shape[1]))
        x = modulated_convolution(x, self.weight, style, demodulate=False)
        x = x + self.bias.to(x.dtype)[:, None, None]
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class ResidualSkip(nn.Module):
    """The shortcut of architecture "resnet": 1x1 convolution, then upsampling (in this order they commute, cheaper)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, 1))

    def initialise(self, generator: torch.Generator | None) -> None:
        self.weight.normal_(generator=generator)

    def forward(self, x: Tensor, kernel: Tensor, gain: float) -> Tensor:
        weight = self.weight.to(_scale_dtype(self.weight)) * (gain / math.sqrt(self.weight.shape[1]))
        return upsample(F.conv2d(x, weight.to(x.dtype)), kernel)


class SynthesisBlock(nn.Module):
    """All layers of one resolution: features [B, I, H/2, W/2] -> [B, O, H, W], and the image where it is made."""

    def __init__(self, index: int, config: GeneratorConfig) -> None:
        super().__init__()
        resolution, outputs = config.block_resolutions[index], config.channels[index]
        self.residual = config.architecture == "resnet" and index > 0
        if index == 0:
            self.const = nn.Parameter(torch.empty(outputs, *config.first_size))
        else:
            self.conv0 = StyledConvolution(config.channels[index - 1], outputs, resolution, True, config)
        self.conv1 = StyledConvolution(outputs, outputs, resolution, False, config)
        if config.architecture == "skip" or resolution == config.resolution:
            self.torgb = ToRGB(outputs, config)
        if self.residual:
            self.skip = ResidualSkip(config.channels[index - 1], outputs)

    def initialise(self, generator: torch.Generator | None) -> None:
        if "const" in self._parameters:
            self.const.normal_(generator=generator)

    @property
    def style_layers(self) -> tuple[str, ...]:
        """Names of the modulated convolutions in the order they run."""
        return tuple(name for name in ("conv0", "conv1", "torgb") if name in self._modules)

    def forward(
        self,
        x: Tensor | None,
        image: Tensor | None,
        ws: dict[str, Tensor],
        noise: dict[str, Tensor],
        kernels: tuple[Tensor, Tensor],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        narrow, kernel = kernels[0].to(dtype), kernels[1]  # of the features, of the images
        if x is None:
            x = self.const.to(dtype).expand(ws["conv1"].shape[0], -1, -1, -1)
            x = self.conv1(x, ws["conv1"], noise.get("conv1"), narrow)
        else:
            gain = math.sqrt(0.5) if self.residual else 1.0
            shortcut = self.skip(x, narrow, gain) if self.residual else None
            x = self.conv0(x, ws["conv0"], noise.get("conv0"), narrow)
            x = self.conv1(x, ws["conv1"], noise.get("conv1"), narrow, gain)
            x = x if shortcut is None else shortcut + x
        if image is not None:
            image = upsample(image, kernel)
        if "torgb" in self._modules:
            # The sum of the images stays in full precision.
            rgb = self.torgb(x, ws["torgb"]).to(kernel.dtype)
            image = rgb if image is None else image + rgb
        return x, image


class Synthesis(nn.Module):
    """The blocks b4, b8, ... under their resolutions' names."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        for index, resolution in enumerate(config.block_resolutions):
            self.add_module(f"b{resolution}", SynthesisBlock(index, config))


class StyleGAN2(nn.Module):
    """The StyleGAN2 generator (arXiv 1912.04958), parameters named as in NVIDIA's PyTorch releases.

    `map` leads from latents z to styles, `synthesize` from styles to images, `forward` does both. Weights may be
    float32, bfloat16, float16 or float64 on any device; under `torch.autocast` float32 weights compute in its dtype.
    The mapping, styles, demodulation and the sum of images are computed in float32 (float64 for float64 weights), which
    is also the result's dtype. `style_layers` names the modulated convolutions in order of synthesis ("b4.conv1",
    "b4.torgb", "b8.conv0", ...; modules `synthesis.<name>`), `ws_index` says which style vector each reads
    ("b4.torgb" and "b8.conv0" share one, and so on up).
    `gradient_checkpointing = True` trades a second forward pass of each block for its activations while training.
    Initialised as published, from `generator` (torch's global one if None); styles' centre `mapping.w_avg` starts at 0.
    """

    def __init__(self, config: GeneratorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.mapping = MappingNetwork(config)
        self.synthesis = Synthesis(config)
        names, index, position = [], {}, 0
        for resolution in config.block_resolutions:
            for offset, name in enumerate(getattr(self.synthesis, f"b{resolution}").style_layers):
                names.append(f"b{resolution}.{name}")
                index[names[-1]] = position + offset
            position += 1 if resolution == 4 else 2
        self.style_layers: tuple[str, ...] = tuple(names)
        self.ws_index: dict[str, int] = index
        if self.synthesis.b4.const.is_meta:
            return  # shapes alone; drawing numbers for them would load torch's compiler
        with torch.no_grad():
            for module in self.modules():
                if hasattr(module, "initialise"):
                    module.initialise(generator)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        # In place of a hook, which torch has in public from 2.5 on. The parts' own entries are taken afterwards.
        _check_and_drop_filters(self.config, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others)

    @property
    def num_ws(self) -> int:
        return self.config.num_ws

    def map(
        self, z: Tensor, c: Tensor | None = None, truncation: float = 1.0, truncation_cutoff: int | None = None
    ) -> Tensor:
        """Styles of latents, truncated as in arXiv 1812.04948, appendix B: w_avg + truncation * (w - w_avg).

        z [B, z_dim], standard normal; c [B, c_dim] for a conditional generator, else None. -> ws [B, num_ws, w_dim].
        truncation 1: no-op; 0: the mean style; 0.5 to 1 is usual. truncation_cutoff: only the first so many of the
        num_ws vectors are truncated (None: all; 0: none). Raises ValueError for inputs that do not fit.
        """
        config = self.config
        if z.ndim != 2 or z.shape[1] != config.z_dim:
            raise Problem(f"Generator: expected latents [B, {config.z_dim}], got {list(z.shape)}.")
        if config.c_dim and (c is None or c.shape != (z.shape[0], config.c_dim)):
            found = "none" if c is None else list(c.shape)
            raise Problem(f"Generator: expected labels [{z.shape[0]}, {config.c_dim}], got {found}.")
        if not config.c_dim and c is not None and c.numel():
            raise Problem(f"Generator: expected no labels (it is unconditional), got {list(c.shape)}.")
        if not math.isfinite(truncation):
            raise Problem(f"Generator: truncation must be finite, got {truncation}.")
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        if not 0 <= cutoff <= self.num_ws:
            raise Problem(f"Generator: truncation_cutoff must lie in 0..{self.num_ws}, got {truncation_cutoff}.")
        with _without_autocast(z.device):
            w = self.mapping(z, c)
            # Repeated, not expanded: callers edit single styles in place.
            ws = w[:, None].repeat(1, self.num_ws, 1)
            if truncation == 1 or cutoff == 0:
                return ws
            truncated = torch.lerp(self.mapping.w_avg.to(w.dtype), w, float(truncation))
            return torch.cat([truncated[:, None].repeat(1, cutoff, 1), ws[:, cutoff:]], dim=1)

    def synthesize(self, ws: Tensor, noise: str = "const", generator: torch.Generator | None = None) -> Tensor:
        """Images [B, img_channels, H, W], about -1..1 and not clamped, of styles ws [B, num_ws, w_dim] or [B, w_dim].

        noise: "const" is the learned constant of every layer, "random" is fresh per image and layer, from `generator`
        (torch's global one if None; the same numbers on every device if it is the CPU's), "none" leaves it out.
        """
        config = self.config
        if ws.ndim == 2 and ws.shape[1] == config.w_dim:
            ws = ws[:, None].expand(-1, self.num_ws, -1)
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, config.w_dim):
            raise Problem(
                f"Generator: expected styles [B, {self.num_ws}, {config.w_dim}] or [B, {config.w_dim}], got "
                f"{list(ws.shape)}."
            )
        if noise not in NOISE_MODES:
            raise Problem(f"Generator: noise must be one of {NOISE_MODES}, got {noise!r}.")
        weight = self.synthesis.b4.const
        dtype = _feature_dtype(weight)
        ws = ws.to(_scale_dtype(weight))
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        x = image = None
        with _without_autocast(ws.device):
            filters = (config.resample_filter, config.image_filter or config.resample_filter)
            kernels = tuple(fir_kernel(taps, device=ws.device, dtype=ws.dtype) for taps in filters)
            for resolution in config.block_resolutions:
                block = getattr(self.synthesis, f"b{resolution}")
                # Drawn here, so that a checkpointed block sees the same noise again.
                draws = self._noise(block, resolution, noise, ws, generator)
                styles = {name: ws[:, self.ws_index[f"b{resolution}.{name}"]] for name in block.style_layers}
                if checkpointing:
                    x, image = checkpoint(block, x, image, styles, draws, kernels, dtype, use_reentrant=False)
                else:
                    x, image = block(x, image, styles, draws, kernels, dtype)
        return image

    def _noise(
        self, block: SynthesisBlock, resolution: int, mode: str, ws: Tensor, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        draws: dict[str, Tensor] = {}
        if mode == "none" or not self.config.use_noise:
            return draws
        for name in block.style_layers:
            if name != "torgb" and mode == "const":
                draws[name] = getattr(block, name).noise_const
            elif name != "torgb":
                device = ws.device if generator is None else generator.device
                shape = (ws.shape[0], 1, *self.config.block_size(resolution))
                draws[name] = torch.randn(shape, generator=generator, device=device).to(ws.device)
        return draws

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation: float = 1.0,
        noise: str = "const",
        truncation_cutoff: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`synthesize` of `map`: images [B, img_channels, H, W] of latents z [B, z_dim] (and labels c [B, c_dim])."""
        return self.synthesize(self.map(z, c, truncation, truncation_cutoff), noise, generator)

    @torch.no_grad()
    def mean_style(self, samples: int = 10000, seed: int = 0, c: Tensor | None = None) -> Tensor:
        """Mean [w_dim] of w over random latents: what `mapping.w_avg` of a trained generator estimates.

        A conditional generator takes its labels in turn from c [N, c_dim] (None: its one-hot labels).
        """
        config, weight = self.config, self.mapping.fc0.weight
        random = torch.Generator().manual_seed(seed)
        total = torch.zeros(config.w_dim, dtype=torch.float64)
        at_once = max(1, min(MEAN_SAMPLES_AT_ONCE, MEAN_NUMBERS_AT_ONCE // max(config.c_dim, *self.mapping.widths)))
        for start in range(0, samples, at_once):
            count = min(at_once, samples - start)
            z = torch.randn(count, config.z_dim, generator=random).to(weight.device)
            labels = None
            if config.c_dim:
                rows = torch.arange(count) + start
                if c is None:  # made in parts: the square of many classes is large
                    labels = torch.zeros(count, config.c_dim).scatter_(1, rows[:, None] % config.c_dim, 1.0)
                else:
                    labels = c[rows % len(c)]
                labels = labels.to(weight.device)
            with _without_autocast(weight.device):
                w = self.mapping(z, labels)
            total += w.cpu().double().sum(dim=0)  # in this order: not every device has float64
        return (total / samples).to(weight.device, _scale_dtype(weight))


def random_generator(config: GeneratorConfig, seed: int) -> StyleGAN2:
    """A generator with the published initialisation, the same for the same seed; torch's global state is untouched."""
    return StyleGAN2(config, torch.Generator().manual_seed(seed))


def _scale_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _feature_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    if weight.dtype == torch.float32 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _without_autocast(device: torch.device) -> Any:
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Reading weights


def _filter_of(key: str) -> str | None:
    """Which filter of the configuration a tensor is, "" where it is one that nothing reads, None for other tensors."""
    if not key.endswith(".resample_filter"):
        return None
    layer = key.split(".")[-2]
    if layer == "conv1":
        return ""  # it does not upsample, and keeps NVIDIA's default whatever the network's filter is
    return "resample_filter" if layer in ("conv0", "skip") else "image_filter"


def _check_and_drop_filters(config: GeneratorConfig, state_dict: dict[str, Tensor], prefix: str) -> None:
    """NVIDIA's files repeat the resampling filter in every layer; here it is the configuration's."""
    for key in [key for key in state_dict if key.startswith(prefix) and _filter_of(key) is not None]:
        found, name = state_dict.pop(key), _filter_of(key)
        if not name or (name == "image_filter" and config.architecture != "skip"):
            continue  # one image alone is never upsampled
        taps = getattr(config, name) or config.resample_filter
        expected = fir_kernel(taps, dtype=torch.float64)[0, 0] / 4
        fits = False
        if found.shape in (expected.shape, expected.shape[:1]):
            found = found.cpu().double()  # in this order: not every device has float64
            found = torch.outer(found, found) if found.ndim == 1 else found
            fits = torch.allclose(found, expected, 0, FILTER_TOLERANCE * float(expected.abs().max()))
        if not fits:
            raise Problem(f"Generator: the filter {key} is not the configuration's {name} {list(taps)}.")


def generator_config_from_state_dict(state_dict: Mapping[str, Tensor], **hints: Any) -> GeneratorConfig:
    """Read the architecture from parameter names and shapes (keys such as `synthesis.b4.const`, no prefix).

    `hints` are fields of `GeneratorConfig`: needed where weights show nothing (conv_clamp, mapping_lr_multiplier, and
    resample_filter where the file has none; their defaults are taken otherwise), refused where weights show another
    value. Raises ValueError when the keys are not such a generator's.
    """

    def shape(key: str, ndim: int) -> torch.Size:
        if key not in state_dict:
            raise Problem(f"This is not a StyleGAN2 generator: the tensor {key} is missing.")
        if state_dict[key].ndim != ndim:
            raise Problem(
                f"This is not a StyleGAN2 generator: {key} should have {ndim} dimensions, got "
                f"{list(state_dict[key].shape)}."
            )
        return state_dict[key].shape

    if "synthesis.input.freqs" in state_dict:
        raise Problem("This is a StyleGAN3 generator (Fourier features); only StyleGAN2 generators are supported.")
    const = shape("synthesis.b4.const", 3)
    channels, resolution = [const[0]], 4
    while f"synthesis.b{2 * resolution}.conv1.weight" in state_dict:
        resolution *= 2
        channels.append(shape(f"synthesis.b{resolution}.conv1.weight", 4)[0])
    last = f"synthesis.b{resolution}.torgb.weight"
    layers = 0
    while f"mapping.fc{layers}.weight" in state_dict:
        layers += 1
    first_width = shape("mapping.fc0.weight", 2)
    w_dim = shape("synthesis.b4.conv1.affine.weight", 2)[1]
    found: dict[str, Any] = {
        "resolution": resolution,
        "channels": tuple(channels),
        "w_dim": w_dim,
        "img_channels": shape(last, 4)[0],
        "mapping_layers": layers,
        "z_dim": first_width[1],
        "c_dim": 0,
        "first_size": tuple(const[1:]),
        "use_noise": "synthesis.b4.conv1.noise_const" in state_dict,
        "mapping_dim": first_width[0] if layers > 1 and first_width[0] != w_dim else None,
        "embed_dim": None,
    }
    if "mapping.embed.weight" in state_dict:
        embedded, found["c_dim"] = shape("mapping.embed.weight", 2)
        found["z_dim"] -= embedded
        found["embed_dim"] = None if embedded == w_dim else embedded
    if resolution > 4:
        if "synthesis.b8.skip.weight" in state_dict:
            found["architecture"] = "resnet"
        else:
            found["architecture"] = "skip" if "synthesis.b4.torgb.weight" in state_dict else "orig"
    for key, value in state_dict.items():
        if (name := _filter_of(key)) and name not in found:
            found[name] = _taps(key, value)
    if "image_filter" in found:
        found.setdefault("resample_filter", found["image_filter"])
        if found["image_filter"] == found["resample_filter"] or found.get("architecture") != "skip":
            del found["image_filter"]
    for name, value in hints.items():
        hint = tuple(value) if isinstance(value, list) else value
        if name in found and hint != found[name] and not (hint == w_dim and found[name] is None):
            raise Problem(f"Generator: {name} was said to be {value!r}, but the weights show {found[name]!r}.")
        found.setdefault(name, value)
    return GeneratorConfig.from_dict(found)


def _taps(key: str, kernel: Tensor) -> tuple[float, ...]:
    """The taps of a separable filter, as whole numbers where they are multiples of the first."""
    if any(size > MAX_TAPS for size in kernel.shape):
        raise Problem(f"Generator: {key} is no resampling filter of at most {MAX_TAPS} taps.")
    kernel = kernel.detach().cpu().double()
    row = kernel if kernel.ndim == 1 else kernel.sum(dim=0)
    if kernel.ndim not in (1, 2) or not bool(row.isfinite().all()) or not float(row.sum()):
        raise Problem(f"Generator: {key} is no resampling filter.")
    row = row / row.sum()
    kernel = kernel / kernel.sum()
    bound = FILTER_TOLERANCE * float(kernel.abs().max())
    if kernel.ndim == 2 and not (
        kernel.shape[0] == kernel.shape[1] and torch.allclose(torch.outer(row, row), kernel, 0, bound)
    ):
        raise Problem(
            f"Generator: the resampling filter {key} is not separable into one row of taps, which is not supported."
        )
    scaled = row / row[row.abs() > 1e-3 * row.abs().max()][0]
    whole = scaled.round()
    return tuple((whole if torch.allclose(scaled, whole, FILTER_TOLERANCE, 1e-5) else row).tolist())
