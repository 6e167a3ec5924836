"""The perceptual regularizer: adapted and frozen image should look alike to a feature network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GuidanceError

Features = Callable[[Tensor], Tensor | Sequence[Tensor]]


@dataclass
class Perceptual:
    """StyleGAN-Fusion's perceptual regularizer (arXiv 2212.04473): 2000 lambda distance(frozen, image), batch mean.

    distance: `distance(images, frozen) -> [B]` on images [B, 3, H, W] as they are judged, both resized and clamped to
    -1..1: a `FeatureDistance` of any network, or `lpips_distance()`. weight: lambda, 0.3 to 1 as published, 0 is off.
    The published 2000 brings LPIPS to the size of the latent gradients.
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    weight: float = 1.0

    name = "perceptual"

    def gradient(self, images: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted distance, a scalar, and its gradient on images [B, 3, H, W] in float32."""
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            loss = self.distance(leaf, frozen.detach()).float().mean() * 2000 * self.weight
        return loss.detach(), torch.autograd.grad(loss, leaf)[0].float()


class FeatureDistance:
    """The distance of LPIPS (arXiv 1801.03924, eq. 1) in any network's features, channels weighted evenly.

    features: `features(images [B, 3, H, W]) -> map or maps [B, C, h, w]` (or vectors [B, C]). Each position's channels
    are brought to unit length; squared differences are summed over channels, averaged over positions and summed over
    maps. Gives [B].
    """

    def __init__(self, features: Features) -> None:
        self.features = features

    def __call__(self, images: Tensor, frozen: Tensor) -> Tensor:
        with torch.no_grad():
            references = self._maps(frozen)
        total = images.new_zeros(len(images), dtype=torch.float32)
        for own, reference in zip(self._maps(images), references):
            difference = (_unit(own) - _unit(reference)).square().sum(1)  # [B, h, w], or [B] of vectors
            total = total + (difference.flatten(1).mean(1) if difference.ndim > 1 else difference)
        return total

    def _maps(self, images: Tensor) -> list[Tensor]:
        found = self.features(images)
        return [features.float() for features in ([found] if isinstance(found, Tensor) else found)]


def _unit(features: Tensor) -> Tensor:
    # The square root has no derivative at 0: a position without any activation keeps the small constant.
    return features / (features.square().sum(1, keepdim=True) + 1e-20).sqrt()


def lpips_distance(net: str = "vgg", device: str | torch.device = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """The learned perceptual distance (arXiv 1801.03924) of the optional package `lpips`; its weights are downloaded.

    net: "vgg" as in StyleGAN-Fusion, "alex" or "squeeze". Raises GuidanceError where the package is missing.
    """
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise GuidanceError(
            "Expected the optional package lpips for the LPIPS distance, found none; install it with "
            "`pip install lpips`, or use another feature network."
        ) from None
    model = lpips.LPIPS(net=net, verbose=False).to(device).eval().requires_grad_(False)
    return lambda images, frozen: model(images, frozen).reshape(len(images))
