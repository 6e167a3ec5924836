"""ComfyUI's progress bar and its cancel, and what a run shows on its node while it trains: bar, text, previews."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from PIL import Image

from ...guidance.errors import printable

if TYPE_CHECKING:
    from ...training.engine.events import Event

PREVIEW_PX = 1024
TEXT_EVERY_S = 0.25  # often enough to read along, seldom enough to cost nothing
MOST_OF_A_TEXT = 2000  # characters that a node shows

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


class RunProgress:
    """Listener of a run: progress bar, text and sample previews on the node. `should_stop`: ComfyUI's cancel."""

    def __init__(self) -> None:
        context = get_executing_context()
        self._node_id = None if context is None else context.node_id
        self._bar = comfy.utils.ProgressBar(1)
        self._last_text = 0.0
        self._interrupted: BaseException | None = None
        self.warnings: list[str] = []

    def __call__(self, event: Event) -> None:
        from ...training.engine import events

        if isinstance(event, (events.Step, events.Preparing)):
            done, total = (event.step, event.steps) if isinstance(event, events.Step) else (event.done, event.total)
            self._update(done, total)
            self.text(describe(event), last=done == total)
        elif isinstance(event, events.Sampled):
            self._preview(event.path)
        elif not isinstance(event, events.Saved):
            if isinstance(event, events.Warned):
                self.warnings.append(event.text)
            self.text(describe(event), last=True)

    def should_stop(self) -> bool:
        return self._interrupted is not None or comfy.model_management.processing_interrupted()

    def cancel(self, interrupted: BaseException) -> None:
        """Take note of a cancel that was raised, and so used up, in the middle of a step."""
        # Its traceback would keep that step's tensors while the step is done once more.
        self._interrupted = interrupted.with_traceback(None)

    def pass_on(self) -> None:
        """Give a cancel that came too late to stop the run back to ComfyUI, which asks before its next node."""
        if self._interrupted is not None:
            comfy.model_management.interrupt_current_processing()

    def raise_if_cancelled(self) -> None:
        """End the node the way ComfyUI ends a cancelled one."""
        if self._interrupted is not None:
            raise self._interrupted
        comfy.model_management.throw_exception_if_processing_interrupted()

    def text(self, text: str, last: bool = True) -> None:
        """Show a line on the node; lines that come too fast are left out unless `last`."""
        now = time.monotonic()
        if self._node_id is None or not (last or now - self._last_text > TEXT_EVERY_S):
            return
        self._last_text = now
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None:
            server.send_progress_text(printable(text, MOST_OF_A_TEXT), self._node_id)

    def _update(self, value: int, total: int, preview: tuple | None = None) -> None:
        if total != self._bar.total or value < self._bar.current:
            # Newer versions show of one bar only what lies beyond what it has shown before.
            self._bar = comfy.utils.ProgressBar(total)
        try:
            self._bar.update_absolute(value, total, preview)
        except comfy.model_management.InterruptProcessingException as interrupted:
            # Raised here it would end the run in the middle of a step; `should_stop` lets it finish the step and save.
            self.cancel(interrupted)

    def _preview(self, path: str) -> None:
        try:
            with Image.open(path, formats=("PNG",)) as image:
                picture = image.convert("RGB")
        except OSError:
            return
        self._update(self._bar.current, self._bar.total, ("JPEG", picture, PREVIEW_PX))


def describe(event: Event) -> str:
    """An event in the few words that fit on a node."""
    from ...training.engine import events

    if isinstance(event, events.Step):
        left = "" if event.eta_s is None else f", {events.duration(event.eta_s)} left"
        return f"step {event.step} of {event.steps}: loss {event.loss:.4f}{left}"
    if isinstance(event, events.Preparing):
        return f"{event.what}: {event.done} of {event.total}"
    if isinstance(event, events.Started):
        if event.step == event.steps:
            return f"already trained for {event.steps} steps; raise steps to go on, or choose another name"
        images = f"{event.images} images, " if event.images else ""
        return f"{images}{event.steps} steps\n{event.estimate}".rstrip()
    if isinstance(event, events.Stopped) and event.path:
        return f"stopped and saved at step {event.step} in {event.path}; run again to continue"
    return events.describe(event)
