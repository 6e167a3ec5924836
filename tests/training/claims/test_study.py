"""Two processes share a sweep, and Ctrl+C keeps what is measured."""

from __future__ import annotations

from indomain_guidance.training.claims import study
from indomain_guidance.training.claims.keeping import Row
from indomain_guidance.training.claims.study import Plan, Sampling
from indomain_guidance.training.engine.lock import Busy


def test_two_processes_share_the_points(capsys, monkeypatch):
    """What is busy is skipped, looked at again after the rest and then until it is there or time is up."""
    waited = []
    monkeypatch.setattr(study.time, "sleep", waited.append)

    class Shared:
        plan = Plan("test", Sampling(1), ("here", "there", "long", "also here"))
        kept: dict[str, Row] = {}
        answers = {"there": [Busy("at it"), Row], "long": [Busy("at it")] * 3 + [Row]}

        def find(self, point):
            return self.kept.get(point)

        def measure(self, point):
            answer = self.answers.get(point, [Row]).pop(0)
            if isinstance(answer, Busy):
                raise answer
            self.kept[point] = Row(point, {}, {}, {})
            return self.kept[point]

        def line(self, row):
            return "{}"

    rows, stopped = study.gather(Shared())
    assert [row.point for row in rows] == ["here", "there", "long", "also here"] and not stopped
    assert capsys.readouterr().err.count("another process is at it") == 4
    assert waited == [study.WAIT_S]

    Shared.answers["never"] = [Busy("at it")] * 9
    monkeypatch.setattr(Shared, "plan", Plan("test", Sampling(1), ("here", "never")))
    assert [row.point for row in study.gather(Shared(), limit=0)[0]] == ["here"]
    monkeypatch.setattr(study.time, "sleep", interrupted)
    rows, stopped = study.gather(Shared())
    assert [row.point for row in rows] == ["here"] and stopped


def interrupted(seconds):
    raise KeyboardInterrupt
