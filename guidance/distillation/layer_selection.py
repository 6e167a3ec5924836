"""Which layers of a generator to train at a step: those whose style the critic wants to move most.

Here the layers learn that read the styles which the critic moves most, as the paper says. The released StyleGAN-Fusion
is one off: where style i of W+ (from 0, i >= 2) is among those that moved most, it trains its list's convolution i - 2,
while convolution i - 1 is the one that reads style i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import GuidanceError
from .objective import Encode, Objective


class Stylized(Protocol):
    """The part of `networks.stylegan2.StyleGAN2` that the selection uses."""

    @property
    def style_layers(self) -> Sequence[str]: ...

    @property
    def ws_index(self) -> Mapping[str, int]: ...

    @property
    def synthesis(self) -> nn.Module: ...

    def synthesize(self, ws: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...


def rank_layers(
    synthesize: Callable[[Tensor], Tensor], ws: Tensor, image_gradient: Callable[[Tensor], Tensor]
) -> Tensor:
    """Scores [num_ws] of StyleGAN-NADA's layer selection (arXiv 2108.00946): mean |delta w| of each layer's style.

    After one SGD step of rate 0.01 on W+, with the critic of StyleGAN-Fusion (arXiv 2212.04473). synthesize: ws [B,
    num_ws, w] -> images. image_gradient: images -> the gradient on them.
    """
    leaf = ws.detach().clone().requires_grad_()
    with torch.enable_grad():
        images = synthesize(leaf)
    (gradient,) = torch.autograd.grad(images, leaf, image_gradient(images.detach()).to(images.dtype))
    return (0.01 * gradient.float()).abs().mean(dim=-1).mean(dim=0)


def select_layers(
    generator: Stylized,
    ws: Tensor,
    objective: Objective,
    encode: Encode,
    k: int,
    *,
    step: int,
    steps: int,
    randomness: torch.Generator | None = None,
    t: Tensor | None = None,
    frozen: Stylized | None = None,
    among: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """The names of the layers whose styles are among the k that the method alone moves most, in order of synthesis.

    generator: the one in training. ws: fresh latents [B, num_ws, w], the same for every layer (released: one). k: how
    many styles; SGF's 12, 6, 3 or 1; at least as many as there are gives all. t [B]: the step's timesteps, which the
    selection shares with it; the noise is its own, from `randomness`. frozen: the frozen generator, for a method that
    compares with its image (DDS). among: the layers that can be chosen, all with something to train; None: those with a
    parameter that requires a gradient, but for the ones that make colours. The regularizers take no part. Raises
    GuidanceError for k below 1 and where there is no layer to choose.
    """
    if k < 1:
        raise GuidanceError(f"Expected at least 1 layer to train, got {k}; 0 means no selection and belongs before.")
    if among is None:
        among = [
            name
            for name in generator.style_layers
            if not name.rpartition(".")[2].startswith("torgb")
            and any(weights.requires_grad for weights in generator.synthesis.get_submodule(name).parameters())
        ]
    allowed = [name for name in generator.style_layers if name in among]
    if not allowed:
        raise GuidanceError("Expected a generator with layers to choose from, got one of which no layer learns.")
    styles = sorted({generator.ws_index[name] for name in allowed})
    if k >= len(styles):
        return tuple(allowed)

    compares = objective.method.compares_with_frozen()

    def gradient(images: Tensor) -> Tensor:
        with torch.no_grad():
            reference = frozen.synthesize(ws) if compares and frozen is not None else None
        return objective.image_gradient(
            images, reference, encode, step=step, steps=steps, generator=randomness, t=t, regularize=False
        )[0]

    scores = rank_layers(generator.synthesize, ws, gradient)
    chosen = {styles[index] for index in scores[torch.tensor(styles, device=scores.device)].topk(k).indices.tolist()}
    return tuple(name for name in allowed if generator.ws_index[name] in chosen)
