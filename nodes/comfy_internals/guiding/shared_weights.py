"""MODELs that were cloned from one checkpoint and patched differently: one module for several sets of weights.

Core keeps one module per loaded file and patches it in place. Two clones with different LoRAs in one sampling run would
both run with the weights that were patched in last, without any warning.
"""

from __future__ import annotations

import copy
import operator
import weakref
from contextlib import suppress
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ....guidance.errors import logger

LOG = logger(__name__)

# Object patches that hold no reference to the module they sit in, so that a copied module may carry them too.
_COPYABLE_OBJECTS = {"model_sampling", "latent_format"}


# Copies made so far: a queue that changes only a seed brings the same MODELs again, in a new guider.
_copies: weakref.WeakKeyDictionary[ModelPatcher, ModelPatcher] = weakref.WeakKeyDictionary()


def same_weights(a: ModelPatcher, b: ModelPatcher) -> bool:
    """Whether two MODELs can run on one module without touching it in between.

    Stricter than core's `clone_has_same_weights` in object patches (such as another noise schedule), and more lenient
    in what does not reach the weights (wrappers, callbacks).
    """
    same_patches = (not a.patches and not b.patches) or a.patches_uuid == b.patches_uuid
    return a is b or (
        a.model is b.model
        and same_patches
        and a.hook_patches.keys() == b.hook_patches.keys()
        and _same_values(a.object_patches, b.object_patches)
        and _same_values(a.weight_wrapper_patches, b.weight_wrapper_patches)
        and not a.injections
        and not b.injections
    )


def _same_values(a: dict, b: dict) -> bool:
    def same(one: Any, other: Any) -> bool:
        both_lists = isinstance(one, list) and isinstance(other, list) and len(one) == len(other)
        return one is other or (both_lists and all(map(operator.is_, one, other)))

    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


def on_own_weights(patcher: ModelPatcher) -> ModelPatcher | None:
    """The same MODEL on a private copy of its module, which lives as long as `patcher` does.

    None where main memory does not allow it, or where something else holds on to the module (compiled code, injections,
    wrappers, dynamic loading).
    """
    if not _is_copyable(patcher):
        return None
    kept = _copies.get(patcher)
    if kept is None:
        module = _copy_module(patcher)
        if module is None:
            return None
        pristine = type(patcher)(module, patcher.load_device, patcher.offload_device, patcher.model_size())
        kept = _copies[patcher] = _clone_around(patcher, pristine)
        kept.parent = None
    own = _clone_around(patcher, kept)
    # Core falls back on the parent of a clone that is gone, so that a copy may stay loaded from one guider to the next.
    own.parent = kept
    return own


def _clone_around(patcher: ModelPatcher, holder: ModelPatcher) -> ModelPatcher:
    """A clone of `patcher` around the module of `holder`, which knows what is patched into that."""
    clone = patcher.clone()
    for name, value in vars(patcher).items():
        # What clones share describes their module: what to put back when it is unloaded, what is pinned, and so on.
        if isinstance(value, (dict, list, set)) and vars(clone).get(name) is value:
            setattr(clone, name, getattr(holder, name))
    clone.model, clone.current_hooks, clone.cached_hook_patches = holder.model, None, {}
    return clone


def _copy_module(patcher: ModelPatcher) -> torch.nn.Module | None:
    """A copy of a MODEL's module without its patches; None where there is no room or way for one."""
    size = patcher.model_size()
    if comfy.model_management.get_free_memory(torch.device("cpu")) < 1.5 * size + 2**30:
        return None
    _unload(patcher)
    # The configuration is shared: nothing writes to it, and newer versions of core give it no way to be copied.
    config = getattr(patcher.model, "model_config", None)
    try:
        return copy.deepcopy(patcher.model, {id(config): config})
    except (RuntimeError, TypeError, MemoryError) as problem:
        LOG.debug("Could not copy %s: %s", type(patcher.model).__name__, problem)
        return None


def _is_copyable(patcher: ModelPatcher) -> bool:
    dynamic = getattr(patcher, "is_dynamic", None)
    return not (
        (dynamic is not None and dynamic())
        or patcher.injections
        or patcher.weight_wrapper_patches
        or patcher.attachments
        or patcher.additional_models
        or any(patcher.wrappers.values())
        or any(patcher.callbacks.values())
        or patcher.model_options["transformer_options"].get("wrappers")
        or not set(patcher.object_patches) <= _COPYABLE_OBJECTS
    )


def _unload(patcher: ModelPatcher) -> None:
    """Give the module back its own weights, in main memory, and take it off core's list of loaded models."""
    loaded = comfy.model_management.current_loaded_models
    for entry in [entry for entry in loaded if entry.model is not None and entry.model.is_clone(patcher)]:
        entry.model_unload()
        with suppress(ValueError):  # unloading may have collected it
            loaded.remove(entry)
    patcher.detach()
