"""The layers of StyleGAN2: the mapping network, and a synthesis block with its convolutions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stylegan2_config import GeneratorConfig
from .stylegan2_formulas import (
    ACTIVATION_GAIN,
    LEAK,
    activate,
    modulated_convolution,
    scale_dtype,
    unit_second_moment,
    upsample,
)


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

    `w_avg` [w_dim] is the running mean of w, the centre of truncation. `widths`: of what enters the first layer, and of
    what every layer gives.
    """

    w_avg: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        embedded = (config.embed_dim or config.w_dim) if config.c_dim else 0
        hidden = config.mapping_dim or config.w_dim
        self.widths = [config.z_dim + embedded, *[hidden] * (config.mapping_layers - 1), config.w_dim]
        if config.c_dim:
            self.embed = Dense(config.c_dim, embedded)
        for index in range(config.mapping_layers):
            inputs, outputs = self.widths[index : index + 2]
            self.add_module(f"fc{index}", Dense(inputs, outputs, config.mapping_lr_multiplier))
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    @property
    def layers(self) -> list[Dense]:
        return [getattr(self, f"fc{index}") for index in range(self.config.mapping_layers)]

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        dtype = scale_dtype(self.layers[0].weight)
        x = unit_second_moment(z.to(dtype))
        if self.config.c_dim:
            assert c is not None  # `StyleGAN2.map` refuses
            x = torch.cat([x, unit_second_moment(self.embed(c.to(dtype)))], dim=1)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), LEAK) * ACTIVATION_GAIN
        return x


class StyledConvolution(nn.Module):
    """3x3 modulated convolution, noise, bias and activation; doubles the size of its input where `up`."""

    noise_const: Tensor

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
        weight = self.weight.to(scale_dtype(self.weight)) * (gain / math.sqrt(self.weight.shape[1]))
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
        features: Tensor
        if x is None:
            features = self.const.to(dtype).expand(ws["conv1"].shape[0], -1, -1, -1)
            features = self.conv1(features, ws["conv1"], noise.get("conv1"), narrow)
        else:
            gain = math.sqrt(0.5) if self.residual else 1.0
            shortcut = self.skip(x, narrow, gain) if self.residual else None
            features = self.conv0(x, ws["conv0"], noise.get("conv0"), narrow)
            features = self.conv1(features, ws["conv1"], noise.get("conv1"), narrow, gain)
            features = features if shortcut is None else shortcut + features
        if image is not None:
            image = upsample(image, kernel)
        if "torgb" in self._modules:
            # The sum of the images stays in full precision.
            rgb = self.torgb(features, ws["torgb"]).to(kernel.dtype)
            image = rgb if image is None else image + rgb
        return features, image
