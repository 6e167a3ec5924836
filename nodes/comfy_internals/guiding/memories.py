"""Where patches and wrappers remember a prompt although each conditioning has a copy of them (`patch_copies`).

On the network and its blocks, in classes, in global variables, in generators, in tensors that are written over, and in
functions that replace the model's own methods. A tensor that is there after a call, and was not at the start of the
run, is a memory that the next call would read.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher

PACKAGE = __name__.rsplit(".", 2)[0]  # comfy_internals
# Packages that store what they know of a prompt under its name, or store nothing.
_KNOWN = {"torch", "numpy", "comfy", "comfy_extras", "comfy_api", "comfy_execution"} | set(sys.stdlib_module_names)
_OF_MODULES = frozenset(vars(torch.nn.Module()))
_MOST = 10_000  # objects that are looked at; a pack's code has hundreds


@dataclass(frozen=True)
class _Globals:
    """Variables of a module that a function names; the copies of the function share them."""

    namespace: dict[str, Any]
    names: frozenset[str]


_LOOKED_INTO = (
    *(torch.Tensor, torch.nn.Module, ModelPatcher, _Globals, types.MethodType, types.CellType, types.GeneratorType),
    *(dict, list, tuple, set, deque, functools.partial, classmethod, staticmethod),
)


def reachable(*roots: Any) -> dict[int, Any]:
    """What code can reach from the roots, by identity, without what is torch's, core's or Python's own."""
    found: dict[int, Any] = {}
    waiting = deque(roots)
    while waiting and len(found) < _MOST:
        value = waiting.popleft()
        key = hash((id(value.namespace), value.names)) if isinstance(value, _Globals) else id(value)
        if key not in found and not _is_known(value):
            found[key] = value
            waiting += _content(value)
    return found


def tensors_in(places: Iterable[Any]) -> set[tuple[int, int]]:
    """The tensors that can be reached from these places, each with how often it was written to."""
    tensors = [value for value in reachable(*places).values() if isinstance(value, torch.Tensor)]
    return {(id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in tensors}


def attributes(module: torch.nn.Module) -> dict[str, int]:
    """A module's plain attributes, each with the identity of its value: what a call puts on the model shows here."""
    return {key: id(value) for key, value in vars(module).items()}


def holds_memories(module: torch.nn.Module) -> bool:
    """Whether a module has dictionaries or lists of tensors that are none of torch's own: left by an earlier run."""
    return bool(tensors_in(value for value in _plain_attributes(module) if isinstance(value, (dict, list, tuple))))


def _is_known(value: Any) -> bool:
    if isinstance(value, _LOOKED_INTO):
        return False
    module = value.__module__ if isinstance(value, (types.FunctionType, type)) else type(value).__module__
    return _is_known_module(module)


def _is_known_module(name: str | None) -> bool:
    return (name or "").split(".")[0] in _KNOWN or (name or "").startswith(PACKAGE)


def _content(value: Any) -> list[Any]:
    """What code can reach from a value directly."""
    if isinstance(value, torch.Tensor):
        return []
    if isinstance(value, ModelPatcher):
        return [value.model]
    if isinstance(value, torch.nn.Module):
        network = getattr(value, "diffusion_model", None)
        modules = value.modules() if network is None else [value]
        return [network, type(value), value._buffers, *(item for part in modules for item in _plain_attributes(part))]
    if isinstance(value, types.FunctionType):
        variables = _Globals(value.__globals__, _names(value.__code__))
        return [value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__, variables]
    if isinstance(value, _Globals):
        found = [value.namespace[name] for name in value.names if name in value.namespace]
        return [_of_module(item, value.names) if isinstance(item, types.ModuleType) else item for item in found]
    if isinstance(value, types.GeneratorType):
        return list(value.gi_frame.f_locals.values()) if value.gi_frame else []
    return gc.get_referents(value)


def _of_module(module: types.ModuleType, names: frozenset[str]) -> _Globals | None:
    return None if _is_known_module(module.__name__) else _Globals(vars(module), names)


def _names(code: types.CodeType) -> frozenset[str]:
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def _plain_attributes(module: torch.nn.Module) -> list[Any]:
    if isinstance(module, comfy.ops.CastWeightBiasOp):  # core moves weights about there
        return []
    return [item for key, item in vars(module).items() if key not in _OF_MODULES]
