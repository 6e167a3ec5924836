"""What a distillation method and a regularizer are: which predictions they need, and the gradient made from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from .context import Context
from .critic import PROMPT_OF, Critic


class LatentTerm(ABC):
    """A part of the objective on latents: what it needs, and its gradient.

    needs, needs_frozen: the predictions (`critic.PREDICTIONS`) that it reads, on z_t and on the frozen image's latents;
    all predictions of a step are made in one go. uses_frozen: it reads the frozen image's latents themselves.
    unwanted_from: it reads e_unwanted only for samples at this timestep or later; 0: for all.
    """

    name: str = ""
    needs: frozenset[str] = frozenset()
    needs_frozen: frozenset[str] = frozenset()
    uses_frozen: bool = False
    unwanted_from: int = 0

    @abstractmethod
    def gradient(self, context: Context) -> Tensor:
        """The gradient on z [B, C, h, w] before w(t), such as e - noise."""

    @classmethod
    def compares_with_frozen(cls) -> bool:
        """Whether it needs the image that the frozen generator makes from the same latents."""
        return cls.uses_frozen or bool(cls.needs_frozen)


def prompts_of(term: LatentTerm | type[LatentTerm]) -> frozenset[str]:
    """The prompts that a method needs beside the one to reach: "source", "unwanted" (`critic.PROMPTS`) or none."""
    return frozenset(PROMPT_OF[name] for name in term.needs | term.needs_frozen if name in PROMPT_OF)


Own = TypeVar("Own", bound="Method")


class Method(LatentTerm):
    """A distillation method: a dataclass whose `options.option` fields are its settings.

    A method without a state of its own defines `name`, `needs` and `gradient`. One that trains something beside the
    generator sets `learns` and defines the rest too. through_encoder: its gradient is one on latents, which goes back
    to the image through the encoder; `Objective` takes no others.
    """

    learns: bool = False
    through_encoder: bool = True

    @classmethod
    def of(cls: type[Own], critic: Critic, seed: int, **options: Any) -> Own:
        """The method for a critic; seed is for what it draws at the start."""
        return cls(**options)

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
