"""Copies of patches and wrappers, one for each conditioning: what a method remembers of one prompt stays with it.

Methods that patch a model were written for two conditionings in one call a step, the positive (0) and the negative (1).
Many remember something from one call to the next: the attention of step 5, or the last output. On a third conditioning,
or on a second model, such a method would use what it remembers of another. Here each gets a copy, made before the first
call of a run.

Copied is what code changes as it runs: variables of a closure, attributes, dicts, sets, defaults, lists that hold
tensors or None. Shared is what it only uses: tensors, models, the layers of modules, everything of torch's and core's,
lists of other things (logs, settings). State on the model, in classes or in global variables cannot be copied;
`memories` finds it.
"""

from __future__ import annotations

import copy
import functools
import operator
import types
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from .memories import PACKAGE

_NEVER = (torch.Tensor, ModelPatcher, type, types.ModuleType)
_LAYERS = ("_parameters", "_modules")  # of a module: what core loads, moves and patches


class PatchCopies:
    """Copies for one conditioning, or one model, during one run: the same copy for the same original every time."""

    def __init__(self) -> None:
        # The originals are kept too, so that none of their identities is given to another object.
        self._copies: dict[int, tuple[Any, Any]] = {}

    def of(self, options: dict[str, Any]) -> dict[str, Any]:
        """model_options whose patches and wrappers are copies."""
        keys = {"transformer_options", "model_function_wrapper"} & options.keys()
        return {**options, **{key: self._copy(options[key]) for key in keys}}

    def _copy(self, value: Any) -> Any:
        known = self._copies.get(id(value))
        if known is not None:
            return known[0]
        if isinstance(value, types.FunctionType):
            return value if _foreign(value) else self._function(value)
        if isinstance(value, types.MethodType):
            owner = self._copy(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            return functools.partial(self._copy(value.func), *map(self._copy, value.args), **self._copy(value.keywords))
        if isinstance(value, tuple):
            items = [self._copy(item) for item in value]
            unchanged = all(new is old for new, old in zip(items, value))
            return value if unchanged else getattr(value, "_make", tuple)(items)
        if isinstance(value, (list, dict, set, deque)):
            return self._container(value)
        if isinstance(value, _NEVER) or not (hasattr(value, "__dict__") or _slots(value)) or _foreign(type(value)):
            return value
        return self._object(value)

    def _keep(self, value: Any, made: Any) -> Any:
        self._copies[id(value)] = (made, value)
        return made

    def _container(self, value: Any) -> Any:
        made = self._keep(value, copy.copy(value))
        if not isinstance(made, set):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                made[key] = self._copy(item)
        if isinstance(value, list) and not _is_state(value) and all(map(operator.is_, made, value)):
            return self._keep(value, value)
        return made

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        cells = [self._copies.get(id(cell), (None,))[0] or types.CellType() for cell in value.__closure__ or ()]
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, tuple(cells) or None)
        self._keep(value, made)
        for old, new in zip(value.__closure__ or (), cells):
            if id(old) not in self._copies:
                self._keep(old, new)
                with suppress(ValueError):  # a variable that has no value yet
                    new.cell_contents = self._copy(old.cell_contents)
        made.__defaults__, made.__kwdefaults__ = self._copy(value.__defaults__), self._copy(value.__kwdefaults__)
        made.__dict__.update({key: self._copy(item) for key, item in value.__dict__.items()})
        made.__qualname__, made.__module__ = value.__qualname__, value.__module__
        return made

    def _object(self, value: Any) -> Any:
        try:
            made = copy.copy(value)
        except Exception:  # an object that refuses to be copied holds on to something outside, and is shared
            return self._keep(value, value)
        self._keep(value, made)
        if made is not value:
            for key, item in getattr(value, "__dict__", {}).items():
                if key not in _LAYERS:
                    made.__dict__[key] = self._copy(item)
            for key in _slots(value):
                if hasattr(value, key):
                    setattr(made, key, self._copy(getattr(value, key)))
        return made


def _is_state(value: list) -> bool:
    """Whether a list holds state, such as one tensor for each conditioning; an empty one may as well be a log."""
    return any(item is None or isinstance(item, torch.Tensor) for item in value)


def _slots(value: Any) -> list[str]:
    """The names of an object's slots."""
    declared = [vars(base).get("__slots__", ()) for base in type(value).__mro__]
    names = [name for found in declared for name in ([found] if isinstance(found, str) else found)]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _foreign(what: Any) -> bool:
    """Whether a function or class is torch's, core's or this package's own."""
    module = getattr(what, "__module__", None) or ""
    return module.split(".")[0] in ("torch", "comfy", "builtins", "numpy") or module.startswith(PACKAGE)


def share_code(options: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two models' options hold one and the same patch or wrapper."""
    own = {id(function) for function in callables(options)}
    return any(id(function) in own for function in callables(others))


def callables(value: Any) -> list[Any]:
    """The functions and callable objects in a value, containers looked into; not torch's, core's or this package's."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [function for item in value for function in callables(item)]
    foreign = _foreign(value if isinstance(value, (types.FunctionType, type)) else type(value))
    return [value] if callable(value) and not foreign else []
