"""What both training nodes give: what was made, and the grid and the curve of the finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..guidance.errors import printable
from .comfy_internals.runs.pictures import load_image, or_skipped

if TYPE_CHECKING:
    from ..training.engine.run import Result


def picture_outputs(grid: str) -> list:
    """The outputs for the finished run's pictures; while it runs, the node itself shows them. grid: what it shows."""
    return [
        io.Image.Output(
            display_name="final samples",
            tooltip=f"{grid} at the end of the run; while it runs, the node shows each new grid. Nothing when sample "
            "every is 0.",
        ),
        io.Image.Output(
            display_name="final loss curve",
            tooltip="The loss curve at the end of the run; while it runs, the node shows the loss as text.",
        ),
    ]


def run_outputs(
    node: type[io.ComfyNode], made: Any, result: Result, path: Path, warnings: Sequence[str]
) -> io.NodeOutput:
    """What was made, grid, loss curve and file; the node shows the pictures too."""
    grid, plot = load_image(result.samples), load_image(result.plot)
    shown = [picture[0] for picture in (grid, plot) if picture is not None]
    preview = ui.PreviewImage(shown, cls=node).as_dict() if shown else {}
    text = tuple(map(printable, (path, *warnings)))
    return io.NodeOutput(made, or_skipped(grid), or_skipped(plot), str(path), ui={**preview, "text": text})
