"""Places where patches and wrappers may store what all of their copies (`patch_copies`) share.

On the network and its blocks, in classes, in global variables, in generators, in tensors that are written over, and in
functions that replace the model's own methods. A tensor that is there after a call, and was not at the start of the
run, is a memory that the next call would read.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher

PACKAGE = __name__.rsplit(".", 2)[0]  # comfy_internals
# Packages that store what they know of a prompt under its name, or store nothing.
_KNOWN = {"torch", "numpy", "comfy", "comfy_extras", "comfy_api", "comfy_execution"} | set(sys.stdlib_module_names)
_MOST = 10_000  # objects that are looked at; a pack's code has hundreds
_DEPTH = 6

Held = set[tuple[int, int]]
"""Tensors, each with how often it was written to."""


class SharedPlaces:
    """The places that the code on one model may write to and does not have to itself.

    options: the model's, whose functions and objects are copied for each conditioning. replaced: its object patches,
    which are not.
    """

    def __init__(self, model: Any, options: Mapping[str, Any], replaced: Mapping[str, Any]) -> None:
        self._seen: dict[tuple[int, bool], Any] = {}
        self._found: dict[int, Callable[[], Iterable[Any]]] = {}
        self._visit_network(model)
        for key in ("model_function_wrapper", "transformer_options"):
            self._visit(options.get(key), True)
        for value in replaced.values():
            self._visit(value, False)

    def common(self, others: Iterable[SharedPlaces]) -> frozenset[int]:
        """Names of the places that others have, too."""
        return frozenset(self._found) & frozenset().union(*(other._found for other in others))

    def held(self, names: Iterable[int] | None = None) -> Held:
        """The tensors in these places, None for all of them."""
        found: dict[int, tuple[Any, int]] = {}
        for name in self._found if names is None else names:
            _collect(self._found[name](), found, _DEPTH)
        return {(key, version) for key, (_, version) in found.items()}

    def _visit(self, value: Any, copied: bool) -> None:
        """Find places in what code can reach from `value`. copied: whether each conditioning has a copy of it."""
        if (id(value), copied) in self._seen or len(self._seen) > _MOST:
            return
        self._seen[id(value), copied] = value
        if isinstance(value, torch.Tensor):
            self._found[id(value)] = lambda: [value]
        elif isinstance(value, ModelPatcher):
            self._visit(value.model, copied)
        elif isinstance(value, torch.nn.Module) and _known(type(value)):
            self._visit_network(value)
        elif isinstance(value, types.FunctionType):
            if not _known(value):
                self._visit_function(value, copied)
        elif isinstance(value, types.MethodType):
            self._visit_all([value.__self__, value.__func__], copied)
        elif isinstance(value, functools.partial):
            self._visit_all([value.func, *value.args, *value.keywords.values()], copied)
        elif isinstance(value, types.GeneratorType):
            self._found[id(value)] = lambda: value.gi_frame.f_locals.values() if value.gi_frame else ()
        elif isinstance(value, type):
            if not _known(value):
                self._found[id(value)] = lambda: vars(value).values()
                self._visit_all([*vars(value).values(), *value.__bases__], False)
        elif isinstance(value, (classmethod, staticmethod)):
            self._visit(value.__func__, copied)
        elif isinstance(value, (dict, list, tuple, set, deque)):
            if not copied:
                self._found[id(value)] = lambda: _items(value)
            elif isinstance(value, list) and not is_state(value):  # shared, as a rule, but not what is in it
                self._found[id(value)] = lambda: [item for item in value if isinstance(item, (torch.Tensor, tuple))]
            self._visit_all(_items(value), copied)
        elif _may_remember(value):
            if not copied:
                self._found[id(value)] = lambda: _items(value)
            self._visit(type(value), False)
            self._visit_all(_items(value), copied)

    def _visit_all(self, values: Iterable[Any], copied: bool) -> None:
        for value in list(values):
            self._visit(value, copied)

    def _visit_network(self, module: torch.nn.Module) -> None:
        """A model of core's, or a part of one, all by the name of its network."""
        network = getattr(module, "diffusion_model", module)
        self._found[id(network)] = functools.partial(_on_modules, {module: None, **dict.fromkeys(network.modules())})

    def _visit_function(self, function: types.FunctionType, copied: bool) -> None:
        names = _names(function.__code__)
        self._visit_namespace(function.__globals__, names)
        for cell in function.__closure__ or ():
            if not copied:
                self._found[id(cell)] = lambda cell=cell: content_of(cell)
            self._visit_all(content_of(cell), copied)
        self._visit_all([function.__defaults__, function.__kwdefaults__, function.__dict__], copied)

    def _visit_namespace(self, namespace: dict[str, Any], names: frozenset[str]) -> None:
        """Global variables, of which there are no copies."""

        def values() -> list[Any]:
            return [namespace[name] for name in names if name in namespace]

        self._found[hash((id(namespace), names))] = values
        for value in values():
            if isinstance(value, types.ModuleType):
                if not _known_name(value.__name__) and (id(value), False) not in self._seen:
                    self._seen[id(value), False] = value
                    self._visit_namespace(vars(value), names)
            else:
                self._visit(value, False)


def _names(code: types.CodeType) -> frozenset[str]:
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def content_of(cell: types.CellType) -> list[Any]:
    """The value of a closure's variable, in a list; an empty list where it has none yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _known_name(name: str | None) -> bool:
    return (name or "").split(".")[0] in _KNOWN or (name or "").startswith(PACKAGE)


def _known(what: Any) -> bool:
    return _known_name(getattr(what, "__module__", None))


def _may_remember(value: Any) -> bool:
    """Whether a value is an object with attributes, of a class that is neither known nor core's."""
    has_some = hasattr(value, "__dict__") or hasattr(type(value), "__slots__")
    return has_some and not (isinstance(value, (ModelPatcher, type, types.ModuleType)) or _known(type(value)))


def _items(value: Any) -> list[Any]:
    """The content of a container, or the attributes of an object; of a module, without parameters and layers."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, deque)):
        return list(value)
    own = vars(torch.nn.Module()) if isinstance(value, torch.nn.Module) else ()
    found = [item for key, item in getattr(value, "__dict__", {}).items() if key not in own or key == "_buffers"]
    return found + [getattr(value, name) for name in slots(value) if hasattr(value, name)]


def is_state(value: list) -> bool:
    """Whether a list holds state, such as one tensor for each conditioning; an empty one may as well be a log."""
    return any(item is None or isinstance(item, torch.Tensor) for item in value)


def slots(value: Any) -> list[str]:
    """The names of an object's slots."""
    found: list[str] = []
    for base in type(value).__mro__:
        names = base.__dict__.get("__slots__", ())
        found += [names] if isinstance(names, str) else names
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _on_modules(modules: Iterable[torch.nn.Module]) -> list[Any]:
    own = vars(torch.nn.Module())
    return [
        item
        for module in modules
        if not isinstance(module, comfy.ops.CastWeightBiasOp)  # core moves weights about there
        for key, item in vars(module).items()
        if key not in own
    ]


def _collect(values: Iterable[Any], found: dict[int, tuple[Any, int]], depth: int) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            found[id(value)] = value, -1 if value.is_inference() else value._version
        elif depth > 0:
            is_object = not isinstance(value, types.FunctionType) and _may_remember(value)
            if is_object or isinstance(value, (dict, list, tuple, set, deque)):
                _collect(_items(value), found, depth - 1)


def attributes(module: torch.nn.Module) -> dict[str, int]:
    """A module's plain attributes, each with the identity of its value: what a call puts on the model shows here."""
    return {key: id(value) for key, value in vars(module).items()}


def holds_memories(module: torch.nn.Module) -> bool:
    """Whether a module has dictionaries or lists of tensors that are none of torch's own: left by an earlier run."""
    own = vars(torch.nn.Module())
    return any(_holds_tensors(value) for key, value in vars(module).items() if key not in own)


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return depth > 0 and any(isinstance(item, torch.Tensor) or _holds_tensors(item, depth - 1) for item in items)
