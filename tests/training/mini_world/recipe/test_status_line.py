"""The line that says how far a long job is."""

import io
from types import SimpleNamespace

from indomain_guidance.training.mini_world.recipe import status_line


def test_progress_is_said_now_and_then_where_there_is_no_terminal(monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(status_line, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    stream = io.StringIO()
    progress = status_line.StatusLine("stage", stream, first=100)
    for done in range(200, 1001, 100):
        progress.update(done, 1000)
    said = [line.split("] ")[1].split() for line in stream.getvalue().splitlines()]
    # Every 20 s at 5 s for a hundred, and the end.
    assert [(done, left) for done, left, *_ in said] == [("500/1000", "0.4"), ("900/1000", "0.1"), ("1000/1000", "0.0")]
