"""The architecture of a StyleGAN2 generator: described, checked, and read from weights under NVIDIA's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import Problem
from .configuration import POSITIVE, Configuration, Rule, is_number, one_of, whole_number, whole_numbers
from .stylegan2_formulas import fir_kernel

ARCHITECTURES = ("skip", "resnet", "orig")
MAX_TAPS = 64  # of a resampling filter, which is squared; the published one has 4
FILTER_TOLERANCE = 1e-3  # relative to the largest tap: what half precision leaves of one


def _is_filter(taps: Any) -> bool:
    return isinstance(taps, tuple) and 0 < len(taps) <= MAX_TAPS and all(map(is_number, taps)) and sum(taps) != 0


_FILTER = Rule(_is_filter, f"at most {MAX_TAPS} numbers with a sum other than 0")
_SIZE = Rule(lambda size: whole_number(4).accepts(size) and not size & (size - 1), "a power of two from 4")
_PAIR = Rule(lambda size: whole_numbers(1).accepts(size) and len(size) == 2, "a height and a width")


@dataclass(frozen=True)
class GeneratorConfig(Configuration):
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

    _NAME = "Generator"
    _RULES = {
        "resolution": _SIZE,
        "c_dim": whole_number(0),
        "mapping_lr_multiplier": POSITIVE,
        "architecture": one_of(ARCHITECTURES),
        "conv_clamp": POSITIVE.or_none(),
        "resample_filter": _FILTER,
        "first_size": _PAIR,
        "image_filter": _FILTER.or_none(),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mapping_lr_multiplier", "conv_clamp", "resample_filter", "image_filter"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(map(float, value)) if isinstance(value, tuple) else float(value))
        if len(self.channels) != len(self.block_resolutions):
            raise self._problem(f"channels lists {len(self.channels)} widths for {len(self.block_resolutions)} blocks")

    @property
    def block_resolutions(self) -> tuple[int, ...]:
        """4, 8, ... `resolution`, in pixels: what the blocks are called."""
        return tuple(2**power for power in range(2, self.resolution.bit_length()))

    def block_size(self, resolution: int) -> tuple[int, int]:
        """Height and width in pixels of the features of the block that is called `resolution`."""
        return self.first_size[0] * resolution // 4, self.first_size[1] * resolution // 4

    @property
    def height(self) -> int:
        return self.block_size(self.resolution)[0]

    @property
    def width(self) -> int:
        return self.block_size(self.resolution)[1]

    @property
    def num_ws(self) -> int:
        """How many style vectors one image takes (W+): one per convolution and one for the last conversion to RGB."""
        return 2 * len(self.block_resolutions)


def standard_channels(resolution: int, base: int = 32768, most: int = 512) -> tuple[int, ...]:
    """Widths of the blocks as published: min(base / resolution, most); base 32768 is the paper's config F, 16384 E."""
    return tuple(min(base // 2**power, most) for power in range(2, resolution.bit_length()))


# -------------------------------------------------- reading weights


def _filter_of(key: str) -> str | None:
    """Which filter of the configuration a tensor is, "" where it is one that nothing reads, None for other tensors."""
    if not key.endswith(".resample_filter"):
        return None
    layer = key.split(".")[-2]
    if layer == "conv1":
        return ""  # it does not upsample, and keeps NVIDIA's default whatever the network's filter is
    return "resample_filter" if layer in ("conv0", "skip") else "image_filter"


def drop_checked_filters(config: GeneratorConfig, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Take the resampling filters, which NVIDIA's files repeat in every layer, out of a state dict.

    Raises Problem for a filter that is not the configuration's.
    """
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
    value. Raises Problem when the keys are not such a generator's.
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
    found |= _filters_in(state_dict, found.get("architecture"))
    for name, value in hints.items():
        hint = tuple(value) if isinstance(value, list) else value
        if name in found and hint != found[name] and not (hint == w_dim and found[name] is None):
            raise Problem(f"Generator: {name} was said to be {value!r}, but the weights show {found[name]!r}.")
        found.setdefault(name, value)
    return GeneratorConfig.from_dict(found)


def _filters_in(state_dict: Mapping[str, Tensor], architecture: str | None) -> dict[str, tuple[float, ...]]:
    """The filters of the configuration, where the file has them."""
    found: dict[str, tuple[float, ...]] = {}
    for key, value in state_dict.items():
        if (name := _filter_of(key)) and name not in found:
            found[name] = _taps(key, value)
    if "image_filter" in found:
        found.setdefault("resample_filter", found["image_filter"])
        if found["image_filter"] == found["resample_filter"] or architecture != "skip":
            del found["image_filter"]
    return found


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
        raise Problem(f"Generator: the resampling filter {key} is not separable into one row of taps.")
    scaled = row / row[row.abs() > 1e-3 * row.abs().max()][0]
    whole = scaled.round()
    return tuple((whole if torch.allclose(scaled, whole, FILTER_TOLERANCE, 1e-5) else row).tolist())
