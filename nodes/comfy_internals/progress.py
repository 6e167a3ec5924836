"""ComfyUI's progress bar, at every update of which a cancel is noticed."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils


class ProgressBar(comfy.utils.ProgressBar):
    """Newer versions of core's bar move, and ask whether the run was cancelled, a few times a second at most."""

    def update_absolute(self, *args: Any, **kwargs: Any) -> None:
        super().update_absolute(*args, **kwargs)
        comfy.model_management.throw_exception_if_processing_interrupted()
