"""One model on several conditionings: what goes into one of core's calls, and what must not.

Core runs a model on two conditionings at a time, positive (0) and negative (1), and methods that patch a model rely on
that. Two are run as core does. A third goes into the same call where nothing patches the model; else it gets a separate
call, as a positive, with copies of the patches and wrappers (`patch_copies`). A method that stores what it remembers
where copies share it (`memories`) is refused by name.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....guidance.errors import GuidanceError
from .memories import attributes, holds_memories, reachable, tensors_in
from .patch_copies import PatchCopies, callables

Conditionings = dict[str, list[dict[str, Any]]]

# The two conditionings that core batches as (cond, uncond); patches tell them apart by this order.
POSITIVE, NEGATIVE = "positive", "negative"

KEY = "indomain_guidance"
"""Under which this package's own wrappers are registered."""

# Keys of wrappers that take any number of conditionings: core's EasyCache knows each by its own name, and compiled code
# remembers nothing.
_ANY_NUMBER = {"easycache", "torch.compile", KEY}
_AROUND_THE_MODEL = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)


def function_wrappers(options: Mapping[str, Any]) -> list[str]:
    """The names of what wraps the model's calls, as far as it is not known to take any number of conditionings."""
    found = []
    if options.get("model_function_wrapper") is not None:
        found.append(_name(options["model_function_wrapper"]))
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    for kind in _AROUND_THE_MODEL:
        for key, functions in wrappers.get(kind, {}).items():
            if key not in _ANY_NUMBER and functions:
                found.append(_name(functions[0]) if key is None else str(key))
    return list(dict.fromkeys(found))


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def methods(model: Any, options: Mapping[str, Any]) -> list[str]:
    """The names of all that may know two conditionings only: patches, wrappers of calls, methods that are replaced."""
    transformer_options = options.get("transformer_options", {})
    patches = {key: value for key, value in transformer_options.items() if key not in ("wrappers", "callbacks")}
    found = [*function_wrappers(options), *map(_name, callables(patches)), *replaced(model)]
    if not found and (transformer_options.get("patches") or transformer_options.get("patches_replace")):
        found = ["a patch"]
    return list(dict.fromkeys(found))


def replaced(model: Any) -> dict[str, Any]:
    """What replaces methods or layers of a model's network, other than core's and torch's own."""
    objects = getattr(model.current_patcher, "object_patches", {})
    return {key: value for key, value in objects.items() if key.startswith("diffusion_model") and callables(value)}


class Calls:
    """The calls of one model in one run. keys: the names of all conditionings it may be asked for in it."""

    def __init__(self, keys: Sequence[str], what: str) -> None:
        self.what = what
        others = [key for key in keys if key not in (POSITIVE, NEGATIVE)]
        # The same two all the time, so that what is remembered of the first is never answered for another.
        self._first = POSITIVE if POSITIVE in keys else others[0] if others else None
        self._known_to_caches: set[str] = set()
        self._copies = {key: PatchCopies() for key in others if key != self._first}
        self._reached: dict[int, Any] | None = None
        self._shared: list[Any] = []
        self._before: set[tuple[int, int]] = set()

    def prime(self, model: Any, options: dict[str, Any]) -> None:
        """Copy patches and wrappers at the start of a run, before they have remembered anything."""
        if methods(model, options):
            self._reached = _reached(model, options)
            copied = [copies.of(options) for copies in self._copies.values()]
            if copied:
                self._shared = _in_both(self._reached, _reached(model, copied[0]))

    def watch(self, others: Iterable[Calls]) -> None:
        """Once all are primed: note what is stored where calls of other models or conditionings could read it."""
        if self._reached is not None and not self._copies:
            by_others = {key for other in others if other is not self for key in other._reached or ()}
            self._shared = _in_both(self._reached, by_others)
        self._before = tensors_in(self._shared)

    def tell_caches(self, keys: Sequence[str], options: Mapping[str, Any]) -> None:
        """Reset core's EasyCache, which skips whole calls, where a conditioning joins that it has not seen."""
        cache = options.get("transformer_options", {}).get("easycache")
        if cache is not None and self._known_to_caches and not self._known_to_caches.issuperset(keys):
            cache.reset()
        self._known_to_caches.update(keys)

    def run(
        self, model: Any, conds: Conditionings, keys: Sequence[str], x: Tensor, timestep: Tensor, options: dict
    ) -> dict[str, Tensor]:
        """The denoised predictions [B, C, ...] on the conditionings of those names, in as few calls as can be.

        Raises GuidanceError for a method that stores what it remembers where others would read it.
        """
        pair = [key if key in keys else None for key in (self._first, NEGATIVE)]
        others = [key for key in keys if key not in pair]
        names = methods(model, options)
        if not names:
            return _predict(model, conds, _without_end([*pair, *others]), x, timestep, options)
        before = attributes(model.diffusion_model)
        predictions = _predict(model, conds, _without_end(pair), x, timestep, options)
        self._check_memories(model, names, before)
        for key in others:
            predictions |= _predict(model, conds, [key, None], x, timestep, self._copies[key].of(options))
            self._check_memories(model, names, before)
        return predictions

    def _check_memories(self, model: Any, names: list[str], before: dict[str, int]) -> None:
        remembers = tensors_in(self._shared) != self._before
        network = model.diffusion_model
        if self._copies and (remembers or attributes(network) != before or holds_memories(network)):
            raise GuidanceError(
                f"Expected patches and wrappers that remember nothing on the model or in global variables, found "
                f"{', '.join(names)} on {self.what}, which would mix up its {len(self._copies) + 2} conditionings; "
                "give terms of further conditionings a model without it."
            )
        if remembers:
            raise GuidanceError(
                f"Expected patches and wrappers that remember nothing that several models share, found "
                f"{', '.join(names)} on {self.what}, which would mix up the models' conditionings; take it off one of "
                "them, or load that from a file of its own."
            )


def _reached(model: Any, options: Mapping[str, Any]) -> dict[int, Any]:
    code = (options.get("model_function_wrapper"), options.get("transformer_options"))
    return reachable(model, *code, *replaced(model).values())


def _in_both(reached: dict[int, Any], others: Container[int]) -> list[Any]:
    return [value for key, value in reached.items() if key in others]


def _without_end(call: list[str | None]) -> list[str | None]:
    """Without missing conditionings at the end; elsewhere their places count."""
    while call and call[-1] is None:
        call = call[:-1]
    return call


def _predict(
    model: Any, conds: Conditionings, call: Sequence[str | None], x: Tensor, timestep: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    if not any(call):
        return {}
    forget_adapter_outputs(conds)
    batch = [None if key is None else conds[key] for key in call]
    outputs = comfy.samplers.calc_cond_batch(model, batch, x, timestep, options)
    return {key: output for key, output in zip(call, outputs) if key is not None}


def forget_adapter_outputs(conds: Conditionings) -> None:
    """Have T2I-Adapters with several hint images run again: they keep their output in the first call's batch size."""
    for control in controls(conds).values():
        while control is not None:
            if getattr(control, "control_input", None) is not None and control.cond_hint_original.shape[0] > 1:
                control.control_input = None
            control = control.previous_controlnet


def entries(conds: Conditionings) -> list[dict[str, Any]]:
    """All entries of all conditionings."""
    return [entry for found in conds.values() for entry in found]


def controls(conds: Conditionings) -> dict[int, Any]:
    """The ControlNets in `conds`, by identity."""
    return {id(entry["control"]): entry["control"] for entry in entries(conds) if entry.get("control") is not None}
