"""The cost of a run: the predictions that models really made, which caches may save and hooks may repeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from .calls import KEY, function_wrappers
from .sampling_hooks import has_hooks


class Cost:
    """Counts one run. `evaluations`: the number of predictions for each term, `per_step` those per image and step."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps
        # By (model, term).
        self._asked: Counter[tuple[int, str]] = Counter()
        self._made: Counter[tuple[int, str]] = Counter()
        self._ran: dict[int, Counter[Any]] = {}
        self._open: dict[tuple[int, str], list[Any]] = {}

    def watch(self, model: Any, options: dict[str, Any]) -> dict[str, Any]:
        """model_options with a wrapper that counts passes through the network, where some may be saved or repeated."""
        easycache = "easycache" in options.get("transformer_options", {})
        if not (easycache or function_wrappers(options) or has_hooks(options)):
            return options
        ran = self._ran[id(model)] = Counter()

        def count(executor: Callable, *args: Any, **kwargs: Any) -> Any:
            ran.update(_uuids([*args, *kwargs.values()]))
            return executor(*args, **kwargs)

        options = comfy.model_patcher.create_model_options_clone(options)
        # The last wrapper is next to the network, behind caches that may skip it.
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, count, options, is_model_options=True)
        return options

    def ask(self, model: Any, name: str, entries: Iterable[dict[str, Any]]) -> None:
        """A term's prediction is being made; entries: those of its conditioning."""
        self._open[id(model), name] = [entry.get("uuid") for entry in entries]

    def close_step(self) -> None:
        """The predictions asked for have been made. A conditioning of several areas is one prediction."""
        for key, uuids in self._open.items():
            self._asked[key] += 1
            ran = self._ran.get(key[0])
            self._made[key] += 1 if ran is None else max((ran[uuid] for uuid in uuids), default=0)
        self._open.clear()
        for ran in self._ran.values():
            ran.clear()

    @property
    def evaluations(self) -> Counter[str]:
        # Some of core's networks call no wrappers: for those, what was asked for counts.
        counted = {model for (model, _), count in self._made.items() if count}
        counts = {name: (self._made if model in counted else self._asked)[model, name] for model, name in self._asked}
        return Counter({name: count for name, count in counts.items() if count})

    @property
    def per_step(self) -> float:
        return sum(self.evaluations.values()) / max(self.steps, 1)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {count}" for name, count in self.evaluations.items())
        return f"{self.steps} steps, {self.per_step:.2f} samples per step ({parts or 'none'})"


def _uuids(values: Iterable[Any]) -> list[Any]:
    """The names of the conditionings in one pass, from the options that core hands to every network."""
    return next((value["uuids"] for value in values if isinstance(value, dict) and "uuids" in value), [])
