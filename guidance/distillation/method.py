"""What a distillation method and a regularizer are: which predictions they need, and the gradient made from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .critic import Critic, Prediction

__all__ = ["Context", "Method", "Regularizer"]


@dataclass(frozen=True)
class Context:
    """One step as a method sees it, all latents [B, C, h, w] in float32 and without a graph.

    z: the trained image's latents. t [B], abar [B, 1, 1, 1]. noise, z_t: what was added to z, and the result.
    prediction: the critic on z_t. frozen, frozen_t, frozen_prediction: the same of the frozen generator's image, with
    the same noise; None where nobody needs them. step, steps: where the run is. generator: for a method's own draws.
    """

    critic: Critic
    z: Tensor
    t: Tensor
    abar: Tensor
    noise: Tensor
    z_t: Tensor
    prediction: Prediction
    frozen: Tensor | None = None
    frozen_t: Tensor | None = None
    frozen_prediction: Prediction | None = None
    step: int = 0
    steps: int = 1
    generator: torch.Generator | None = None

    @property
    def progress(self) -> float:
        """0 at the run's first step, 1 at its last."""
        return min(max(self.step / max(self.steps - 1, 1), 0.0), 1.0)


class LatentTerm(ABC):
    """A part of the objective on latents. `needs` and `needs_frozen` name opinions (`critic.OPINIONS`) on z_t and on
    the frozen image's latents; all opinions of a step are asked in one go. `uses_frozen`: whether the frozen image's
    latents are looked at. `negative_from`: e_negative is needed only for samples at this timestep or later, 0 for all.
    """

    name: str = ""
    needs: frozenset[str] = frozenset()
    needs_frozen: frozenset[str] = frozenset()
    uses_frozen: bool = False
    negative_from: int = 0

    @abstractmethod
    def gradient(self, context: Context) -> Tensor:
        """The gradient on z [B, C, h, w] before w(t), such as e - noise."""


class Method(LatentTerm):
    """A distillation method. Stateless ones define `gradient` alone; `step` trains what belongs to the others."""

    def step(self, context: Context) -> dict[str, float]:
        """Called once per step after the gradient was made; returns losses to log."""
        return {}

    def parameters(self) -> Iterable[Tensor]:
        """The method's own trainable tensors."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on with identical numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""


class Regularizer(LatentTerm):
    """A term that keeps the adapted generator near the frozen one; `weight` is its lambda, 0 switches it off."""

    weight: float = 1.0
    uses_frozen = True
