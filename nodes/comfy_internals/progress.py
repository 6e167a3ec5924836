"""ComfyUI's progress bar and its cancel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import comfy.model_management
import comfy.utils

Item = TypeVar("Item")


class ProgressBar(comfy.utils.ProgressBar):
    """Newer versions of core's bar move, and ask whether the run was cancelled, a few times a second at most."""

    def update_absolute(self, *args: Any, **kwargs: Any) -> None:
        super().update_absolute(*args, **kwargs)
        comfy.model_management.throw_exception_if_processing_interrupted()


def uncancelled(values: Iterable[Item]) -> Iterator[Item]:
    """The values one by one; a cancel in between ends the node as ComfyUI's other nodes end."""
    for value in values:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield value
