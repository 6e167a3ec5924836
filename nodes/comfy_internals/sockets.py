"""Checks of what comes through a node's sockets: core passes on any value of a prompt, even a text as a MODEL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...guidance.terms import Term
from .models.generators import GraphGenerator


def _is_conditioning(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_entry, value))


def _is_entry(value: Any) -> bool:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    return is_pair and isinstance(value[0], (torch.Tensor, type(None))) and isinstance(value[1], dict)


def _are_terms(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(term, Term) for term in value)


def _is_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.numel() > 0 and bool(value.isfinite().all())


# By the type of the socket: a check of its value, and what to call it in messages.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "MODEL": (lambda value: isinstance(value, ModelPatcher), "a MODEL"),
    "CONDITIONING": (_is_conditioning, "a CONDITIONING with at least one entry"),
    "VAE": (lambda value: hasattr(value, "first_stage_model"), "a VAE"),
    "CLIP": (lambda value: hasattr(value, "cond_stage_model"), "a CLIP"),
    "LATENT": (lambda value: isinstance(value, dict) and isinstance(value.get("samples"), torch.Tensor), "a LATENT"),
    "IMAGE": (_is_image, "an IMAGE of at least one picture and pixel, all finite numbers"),
    "INDOMAIN_GUIDANCE_TERMS": (_are_terms, "terms of Guidance Term"),
    "INDOMAIN_GENERATOR": (lambda value: isinstance(value, GraphGenerator), "a generator of Load Generator"),
    "INDOMAIN_TRAINING_OPTIONS": (lambda value: isinstance(value, dict), "options of In-Domain Training Options"),
    "INDOMAIN_BAKE_OPTIONS": (lambda value: isinstance(value, dict), "options of In-Domain Bake Options"),
    "INDOMAIN_ADAPT_OPTIONS": (lambda value: isinstance(value, dict), "options of In-Domain Adapt Options"),
}


def expected_of_socket(entry: io.Input, value: Any) -> str | None:
    """What a socket's value should be, for messages; None where it is right, and for other kinds of sockets."""
    is_right, name = _KINDS.get(str(entry.io_type), (None, ""))
    return None if is_right is None or is_right(value) else f"{name}, from another node's output"
