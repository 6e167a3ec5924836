"""The pack's categories in the menu, and a node's schema for all versions of ComfyUI."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

GUIDANCE = "In-Domain Guidance/guidance"
TRAINING = "In-Domain Guidance/training"
GENERATORS = "In-Domain Guidance/generators"


def schema(search_aliases: Sequence[str], advanced: Sequence[str] = (), **arguments: Any) -> io.Schema:
    """io.Schema(**arguments), with two things that only newer versions of ComfyUI know; elsewhere they are left out.

    An argument that is unknown to io.Schema would cost the pack this node and all that are listed after it.
    search_aliases: words to be found by, beside the names. advanced: inputs that the editor folds away until asked.
    """
    if "search_aliases" in inspect.signature(io.Schema).parameters:
        arguments["search_aliases"] = list(search_aliases)
    unknown = set(advanced) - {entry.id for entry in arguments["inputs"]}
    assert not unknown, f"{arguments['node_id']} has no inputs {unknown}"
    for entry in arguments["inputs"]:
        if entry.id in advanced and hasattr(entry, "advanced"):
            entry.advanced = True
    return io.Schema(**arguments)
