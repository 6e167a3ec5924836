"""A guidance as one denoiser of plain callables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .batching import Piece, evaluate, for_rows
from .combination import Guidance, Step
from .errors import GuidanceError
from .schedules import PercentToSigma
from .terms import Source


class MultiGuidance:
    """A guidance as one denoiser: `MultiGuidance(g)(x, sigma)` is D of arXiv 2312.08195, from plain callables.

    Every model of the guidance is a callable `model(x, sigma, **cond) -> x0`, with x = x0 + sigma * noise (k-diffusion
    scale), and every conditioning a dict of its keyword arguments, or None. The object itself has the same signature,
    so any sampler loop that takes such a denoiser can use it, this library's `sample` and k-diffusion's among them,
    and it may serve as a model of another guidance. Gradients flow through it.

    What is not needed at a noise level is not evaluated, identical (model, conditioning) pairs are evaluated once, and
    the conditionings of one model run in one call: tensors, whose first dimension is the batch (1 is expanded), are
    joined along it where their shapes agree, everything else must be equal. Conditionings that do not fit together,
    and those with lists or dicts, whose entries may belong to single images, are called one by one.

    percent_to_sigma: needed when a weight has positions in percent (e.g. `NoiseSchedule.percent_to_sigma`).

    `samples_per_step` lists, for each call since `reset`, the predictions evaluated per image; `calls_per_step` the
    model calls.
    """

    def __init__(self, guidance: Guidance, percent_to_sigma: PercentToSigma | None = None) -> None:
        if guidance.needs_percent and percent_to_sigma is None:
            names = ", ".join(term.name for term in guidance.terms if term.weight.needs_percent)
            raise GuidanceError(f"Expected a percent_to_sigma for weights with positions in percent: {names}.")
        for source in guidance.sources:
            source.check_callable(" and ".join(guidance.names(source)))
        self.guidance = guidance
        self.percent_to_sigma = percent_to_sigma
        self.reset()

    def reset(self) -> None:
        """Forget the counts of earlier calls."""
        self.samples_per_step: list[float] = []
        self.calls_per_step: list[int] = []
        self._calls = 0

    def __call__(self, x: Tensor, sigma: Tensor | float, **kwargs: Any) -> Tensor:
        """Denoise x [B, ...] at `sigma`, a number or one per image [B].

        Images of one batch may differ in sigma; those that need the same predictions run together. Keyword arguments
        go to every model, those of a conditioning take precedence. Raises GuidanceError for a sigma of another shape.
        """
        batch = x.shape[0]
        if not isinstance(sigma, Tensor) or sigma.ndim == 0:
            levels = [float(sigma)]
        elif sigma.ndim == 1 and sigma.shape[0] in (1, batch):
            levels = sigma.tolist()
        else:
            raise GuidanceError(f"Expected sigma as a number or [{batch}], got shape {list(sigma.shape)}.")
        steps = {level: self.guidance.at(level, self.percent_to_sigma) for level in dict.fromkeys(levels)}
        groups: dict[tuple[Source, ...], list[int]] = {}
        for row, level in enumerate(levels):
            groups.setdefault(steps[level].needed, []).append(row)
        calls_before, evaluated = self._calls, 0.0
        parts, order = [], []
        for needed, rows in groups.items():
            chosen = None if len(groups) == 1 else torch.tensor(rows, device=x.device)
            predictions = self._predictions(needed, x, sigma, kwargs, chosen)
            # A number stands for all images of the batch.
            parts.append(_combined([steps[levels[row]] for row in rows], predictions))
            order += rows
            evaluated += len(needed) * len(rows) / len(levels)
        self.samples_per_step.append(evaluated)
        self.calls_per_step.append(self._calls - calls_before)
        return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.tensor(order, device=x.device).argsort()]

    def _predictions(
        self, needed: Sequence[Source], x: Tensor, sigma: Tensor | float, kwargs: Mapping[str, Any], rows: Tensor | None
    ) -> dict[Source, Tensor]:
        """The predictions of these sources for the images `rows` of the batch x, None: for all of them."""
        batch = len(x)
        if rows is not None:
            assert isinstance(sigma, Tensor)  # only then can images differ
            x, sigma = x[rows], sigma[rows.to(sigma.device)]
        pieces = [
            Piece(source, x, sigma, for_rows({**kwargs, **(source.cond or {})}, batch, rows)) for source in needed
        ]
        predictions: dict[Source, Tensor] = {}
        for call in evaluate(pieces):
            self._calls += 1
            predictions.update((piece.source, output) for piece, output in call)
        return predictions


def _combined(steps: Sequence[Step], predictions: Mapping[Source, Tensor]) -> Tensor:
    """D of images that need the same predictions, each at its own step; a single step is that of all of them."""
    first = steps[0]
    if all(step.recipe == first.recipe for step in steps):
        return first.combine(predictions)
    rows = [{source: output[row : row + 1] for source, output in predictions.items()} for row in range(len(steps))]
    return torch.cat([step.combine(own) for step, own in zip(steps, rows)])
