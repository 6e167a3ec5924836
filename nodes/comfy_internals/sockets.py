"""Checks of what comes through a node's sockets: core passes on any value of a prompt, even a text as a MODEL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io


def _is_conditioning(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(
            isinstance(entry, (list, tuple))
            and len(entry) == 2
            and (entry[0] is None or isinstance(entry[0], torch.Tensor))
            and isinstance(entry[1], dict)
            for entry in value
        )
    )


def _are_terms(value: Any) -> bool:
    from ...guidance.terms import Term

    return isinstance(value, (list, tuple)) and all(isinstance(term, Term) for term in value)


def _is_generator(value: Any) -> bool:
    from .models.generators import GraphGenerator

    return isinstance(value, GraphGenerator)


def _is_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.numel() > 0 and bool(value.isfinite().all())


def _is_latent(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("samples"), torch.Tensor)


# By the type of the socket: a check of its value, and what to call it in messages.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "MODEL": (lambda value: isinstance(value, ModelPatcher), "a MODEL"),
    "CONDITIONING": (_is_conditioning, "a CONDITIONING with at least one entry"),
    "VAE": (lambda value: hasattr(value, "first_stage_model"), "a VAE"),
    "CLIP": (lambda value: hasattr(value, "cond_stage_model"), "a CLIP"),
    "LATENT": (_is_latent, "a LATENT"),
    "IMAGE": (_is_image, "an IMAGE of at least one picture and pixel, all finite numbers"),
    "INDOMAIN_GUIDANCE_TERMS": (_are_terms, "terms of Guidance Term"),
    "INDOMAIN_GENERATOR": (_is_generator, "a generator of Load Generator"),
    "INDOMAIN_TRAINING_OPTIONS": (lambda value: isinstance(value, dict), "options of In-Domain Training Options"),
    "INDOMAIN_ADAPT_OPTIONS": (lambda value: isinstance(value, dict), "options of In-Domain Adapt Options"),
}


def expected_of_socket(entry: io.Input, value: Any) -> str | None:
    """What a socket's value should be, for messages; None where it is right, and for other kinds of sockets."""
    is_right, name = _KINDS.get(str(entry.io_type), (None, ""))
    return None if is_right is None or is_right(value) else f"{name}, from another node's output"
