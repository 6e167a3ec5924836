"""The StyleGAN2 generator in plain PyTorch, under the parameter names of NVIDIA's PyTorch releases.

"Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958): weight demodulation (section 2.2) and the
architectures without progressive growing (section 4.1); "Training Generative Adversarial Networks with Limited Data"
(arXiv 2006.06676), appendix D: conditional mapping, and what half precision needs. Every convolution is an ordinary
one shared by the batch, its styles applied before it and its demodulation after: equal to modulated weights by
linearity, without a weight per sample and without compiled extensions, so that any device and any derivative works.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import Problem
from .stylegan2_config import GeneratorConfig, drop_checked_filters
from .stylegan2_formulas import feature_dtype, fir_kernel, scale_dtype, without_autocast
from .stylegan2_layers import MappingNetwork, SynthesisBlock

NOISE_MODES = ("const", "random", "none")
LARGEST_SEED = 2**32 - 1  # seeds are numbers of 32 bits, as in NVIDIA's tools; of larger ones only these bits count
MEAN_SAMPLES_AT_ONCE = 1000
MEAN_NUMBERS_AT_ONCE = 2**24  # of a layer; fewer samples are taken at once where it is wider than any published one


class Synthesis(nn.Module):
    """The blocks b4, b8, ... under their resolutions' names."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.resolutions = config.block_resolutions
        for index, resolution in enumerate(self.resolutions):
            self.add_module(f"b{resolution}", SynthesisBlock(index, config))

    @property
    def blocks(self) -> dict[int, SynthesisBlock]:
        """By resolution, in pixels."""
        return {resolution: getattr(self, f"b{resolution}") for resolution in self.resolutions}


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
        for resolution, block in self.synthesis.blocks.items():
            for offset, name in enumerate(block.style_layers):
                names.append(f"b{resolution}.{name}")
                index[names[-1]] = position + offset
            position += 1 if resolution == 4 else 2
        self.style_layers: tuple[str, ...] = tuple(names)
        self.ws_index: dict[str, int] = index
        if self.synthesis.blocks[4].const.is_meta:
            return  # shapes alone; drawing numbers for them would load torch's compiler
        with torch.no_grad():
            for module in self.modules():
                initialise = getattr(module, "initialise", None)
                if initialise is not None:
                    initialise(generator)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # In place of a hook, which torch has in public from 2.5 on. The parts' own entries are taken afterwards.
        drop_checked_filters(self.config, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def num_ws(self) -> int:
        return self.config.num_ws

    def map(
        self, z: Tensor, c: Tensor | None = None, truncation: float = 1.0, truncation_cutoff: int | None = None
    ) -> Tensor:
        """Styles of latents, truncated as in arXiv 1812.04948, appendix B: w_avg + truncation * (w - w_avg).

        z [B, z_dim], standard normal; c [B, c_dim] for a conditional generator, else None. -> ws [B, num_ws, w_dim].
        truncation 1: no-op; 0: the mean style; 0.5 to 1 is usual. truncation_cutoff: only the first so many of the
        num_ws vectors are truncated (None: all; 0: none). Raises Problem for inputs that do not fit.
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
        with without_autocast(z.device):
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
            raise Problem(f"Generator: expected styles [B, {self.num_ws}, {config.w_dim}], got {list(ws.shape)}.")
        if noise not in NOISE_MODES:
            raise Problem(f"Generator: noise must be one of {NOISE_MODES}, got {noise!r}.")
        weight = self.synthesis.blocks[4].const
        dtype = feature_dtype(weight)
        ws = ws.to(scale_dtype(weight))
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        x: Tensor | None = None
        image: Tensor | None = None
        with without_autocast(ws.device):
            filters = (config.resample_filter, config.image_filter or config.resample_filter)
            kernels = tuple(fir_kernel(taps, device=ws.device, dtype=ws.dtype) for taps in filters)
            for resolution, block in self.synthesis.blocks.items():
                # Drawn here, so that a checkpointed block sees the same noise again.
                draws = self._noise(block, resolution, noise, ws, generator)
                styles = {name: ws[:, self.ws_index[f"b{resolution}.{name}"]] for name in block.style_layers}
                arguments = (x, image, styles, draws, kernels, dtype)
                made: Any = checkpoint(block, *arguments, use_reentrant=False) if checkpointing else block(*arguments)
                x, image = made
        assert image is not None  # the last block makes one
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
    def mean_style(self, samples: int = 10000, seed: int = 0) -> Tensor:
        """Mean [w_dim] of w over random latents and labels in turn: what `mapping.w_avg` of a trained one estimates."""
        config, weight = self.config, self.mapping.layers[0].weight
        random = torch.Generator().manual_seed(seed)
        total = torch.zeros(config.w_dim, dtype=torch.float64)
        at_once = max(1, min(MEAN_SAMPLES_AT_ONCE, MEAN_NUMBERS_AT_ONCE // max(config.c_dim, *self.mapping.widths)))
        for start in range(0, samples, at_once):
            count = min(at_once, samples - start)
            z = torch.randn(count, config.z_dim, generator=random).to(weight.device)
            labels = None
            if config.c_dim:
                rows = torch.arange(count) + start
                labels = torch.zeros(count, config.c_dim).scatter_(1, rows[:, None] % config.c_dim, 1.0)
                labels = labels.to(weight.device)
            with without_autocast(weight.device):
                w = self.mapping(z, labels)
            total += w.cpu().double().sum(dim=0)  # in this order: not every device has float64
        return (total / samples).to(weight.device, scale_dtype(weight))


def random_generator(config: GeneratorConfig, seed: int) -> StyleGAN2:
    """A generator with the published initialisation, the same for the same seed; torch's global state is untouched."""
    return StyleGAN2(config, torch.Generator().manual_seed(seed))


def class_labels(classes: Sequence[int], c_dim: int) -> Tensor:
    """One-hot labels [B, c_dim] of classes, each below c_dim."""
    labels = torch.zeros(len(classes), c_dim)  # a file may claim more classes than an identity matrix has room for
    labels[range(len(classes)), list(classes)] = 1.0
    return labels


def latents_of_seeds(seeds: Iterable[int], z_dim: int) -> Tensor:
    """Latents z [B, z_dim] in float32 on the CPU, one for each seed, as NVIDIA's StyleGAN tools draw them.

    There seed 7 of a published network is a known picture; NumPy's old generator gives it in every version.
    """
    rows = [np.random.RandomState(seed & LARGEST_SEED).randn(z_dim) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).float() if rows else torch.empty(0, z_dim)
