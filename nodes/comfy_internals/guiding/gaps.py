"""Gaps in conditionings: masks, areas and step ranges can leave pixels, or whole steps, without any entry.

Core's `calc_cond_batch` returns 0 there. That is no prediction: taken for one, it would push the picture away from the
term's reference with the whole weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import comfy.model_base
import comfy.samplers
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.combination import Guidance
from ....guidance.terms import Source

# What limits an entry, as nodes write it and as core processes it. An entry with none of these covers everything.
_LIMITS = {
    *("area", "mask", "strength", "timestep_start", "timestep_end"),
    *("start_percent", "end_percent", "clip_start_percent", "clip_end_percent"),
}
# Entries that make core run models; without them it only weighs pixels.
_RUNS_MODELS = {"control", "gligen", "hooks", "model_conds"}


def may_have_gaps(options: Iterable[dict[str, Any]]) -> bool:
    """Whether a conditioning, given as its entries' options, is not certain to cover every pixel of every step."""
    return not any(_LIMITS.isdisjoint(entry) for entry in options)


def limited_to_area(options: dict[str, Any]) -> bool:
    """Whether an entry, given as its options, is for a rectangle of the picture."""
    return "area" in options or bool(options.get("set_area_to_bounds") and "mask" in options)


def covered(entries: list[dict[str, Any]], x: Tensor, timestep: Tensor) -> Tensor | None:
    """Where [B, C, ...] the entries of a processed conditioning apply; None: everywhere.

    Core itself decides: its batch runs on a model that predicts 1, so that the result is 1 wherever an entry applies.
    """
    if not may_have_gaps(entries):
        return None
    bare = [{key: entry[key] for key in entry if key not in _RUNS_MODELS} | {"model_conds": {}} for entry in entries]
    (applies,) = comfy.samplers.calc_cond_batch(_model_of_ones().model, [bare], x, timestep, {})
    where = applies > 0
    return None if bool(where.all()) else where


# By source that does not cover the picture: where [B, C, ...] it does, and the source that is used elsewhere.
Gaps = dict[Source, tuple[Tensor, Source]]


def find_gaps(
    guidance: Guidance, sources: Iterable[Source], entries: Callable[[Source], list[dict]], x: Tensor, timestep: Tensor
) -> Gaps:
    """The gaps of these sources, and of the references that fill them.

    entries: gives the processed conditioning of a source. The base keeps its gaps, as in core: nothing could fill them.
    """
    found: Gaps = {}
    waiting = list(sources)
    while waiting:
        source = waiting.pop()
        if source == guidance.base or source in found:
            continue
        where = covered(entries(source), x, timestep)
        if where is not None:
            reference = next(guidance.reference(term) for term in guidance.terms if term.source == source)
            found[source] = where, reference
            waiting.append(reference)
    return found


def without_gaps(predictions: dict[Source, Tensor], found: Gaps) -> dict[Source, Tensor]:
    """Predictions [B, C, ...] in which those of the references fill the gaps."""

    def filled(source: Source) -> Tensor:
        if source not in found:
            return predictions[source]
        where, reference = found[source]
        return torch.where(where, predictions[source], filled(reference))

    return {source: filled(source) for source in predictions}


def with_references(sources: Sequence[Source], gaps: Gaps) -> list[Source]:
    """The sources to evaluate, with those that fill gaps."""
    return list(dict.fromkeys([*sources, *(reference for _, reference in gaps.values())]))


class _PredictsOne(comfy.model_base.BaseModel):
    """A model of core's without a network: predicts 1, in no memory."""

    def memory_required(self, *args: Any, **kwargs: Any) -> float:
        return 0.0

    def apply_model(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.ones_like(x)


@functools.cache
def _model_of_ones() -> ModelPatcher:
    """`_PredictsOne` as core holds a model while it samples, without hooks or callbacks that a run could notice."""
    model = _PredictsOne(comfy.supported_models_base.BASE({"disable_unet_model_creation": True}))
    cpu = torch.device("cpu")
    patcher = ModelPatcher(model, load_device=cpu, offload_device=cpu)
    patcher.pre_run()
    return patcher
