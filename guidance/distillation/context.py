"""One step as the terms of an objective see it: latents, noise, and the critic's predictions on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import GuidanceError
from .critic import Critic, Prediction, Request

if TYPE_CHECKING:
    from .method import LatentTerm


@dataclass(frozen=True)
class Draws:
    """A step's random numbers: t [B] and each term's noise [B, C, h, w], by the term's name."""

    t: Tensor
    noise: Mapping[str, Tensor]


@dataclass(frozen=True)
class Context:
    """One step as a term sees it, all latents [B, C, h, w] in float32 and without a graph.

    z: the trained image's latents. t [B], abar [B, 1, 1, 1]. noise, z_t: what was added to z, and the result.
    prediction: the critic on z_t. frozen, frozen_prediction: latents of the frozen generator's image, and the critic on
    them with the same noise, where a term needs them. step, steps: where the run is. generator: for a method's own
    draws.
    """

    critic: Critic
    z: Tensor
    t: Tensor
    abar: Tensor
    noise: Tensor
    z_t: Tensor
    prediction: Prediction
    frozen: Tensor | None = None
    frozen_prediction: Prediction = Prediction()
    step: int = 0
    steps: int = 1
    generator: torch.Generator | None = None

    @property
    def progress(self) -> float:
        """0 at the run's first step, 1 at its last."""
        return min(max(self.step / max(self.steps - 1, 1), 0.0), 1.0)


def contexts_of(
    terms: Sequence[LatentTerm],
    critic: Critic,
    z: Tensor,
    frozen: Tensor | None,
    draws: Draws,
    *,
    step: int,
    steps: int,
    generator: torch.Generator | None,
) -> list[Context]:
    """Each term's context, with all their predictions made at once.

    Terms whose noise is one tensor share z_t and the predictions on it. Raises GuidanceError for noise that is missing
    or has another shape than z.
    """
    t = draws.t.to(z.device)
    groups: dict[int, list[LatentTerm]] = {}
    for term in terms:
        noise = draws.noise.get(term.name)
        if noise is None or noise.shape != z.shape:
            raise GuidanceError(f"Expected noise of shape {list(z.shape)} for the term {term.name}.")
        groups.setdefault(id(noise), []).append(term)
    noisy: list[tuple[Tensor, Tensor, Request, Request | None]] = []
    for group in groups.values():
        noise = draws.noise[group[0].name].to(z)
        own = Request(critic.noisy(z, noise, t), t, *_needed([(term, term.needs) for term in group]))
        needs, unwanted_from = _needed([(term, term.needs_frozen) for term in group])
        of_frozen = None
        if frozen is not None and needs:
            of_frozen = Request(critic.noisy(frozen, noise, t), t, needs, unwanted_from)
        noisy.append((noise, own.z_t, own, of_frozen))
    requests = [request for *_, own, other in noisy for request in (own, other) if request and request.needs]
    answers = dict(zip(map(id, requests), critic.predict_many(requests)))
    found: dict[str, Context] = {}
    for group, (noise, z_t, own, of_frozen) in zip(groups.values(), noisy):
        context = Context(
            critic,
            z,
            t,
            critic.alphas_cumprod(t, z),
            noise,
            z_t,
            answers.get(id(own), Prediction()),
            frozen,
            answers.get(id(of_frozen), Prediction()),
            step,
            steps,
            generator,
        )
        found.update((term.name, context) for term in group)
    return [found[term.name] for term in terms]


def _needed(of_terms: Sequence[tuple[LatentTerm, frozenset[str]]]) -> tuple[frozenset[str], int]:
    """The predictions that some terms need together, and the first timestep at which one needs e_unwanted."""
    first = min((term.unwanted_from for term, needs in of_terms if "e_unwanted" in needs), default=0)
    return frozenset().union(*(needs for _, needs in of_terms)), first
