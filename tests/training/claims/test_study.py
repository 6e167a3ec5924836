"""A sweep measures what is missing, in its order, and Ctrl+C keeps what is measured."""

from __future__ import annotations

import pytest
from indomain_guidance.training.claims import command_line
from indomain_guidance.training.claims.keeping import Row
from indomain_guidance.training.claims.study import Plan, Sampling, Study
from indomain_guidance.training.engine.lock import locked


class Sweep(Study):
    """A study whose points are words; `stop` is where Ctrl+C comes."""

    def __init__(self, *kept: str, stop: str = "") -> None:
        self.plan = Plan(Sampling(1), ("first", "second", "third"))
        self.rows, self.stop = {point: Row(point, {}, {}) for point in kept}, stop

    def find(self, point):
        return self.rows.get(point)

    def measure(self, point):
        if point == self.stop:
            raise KeyboardInterrupt
        self.rows[point] = Row(point, {}, {})
        return self.rows[point]

    training = examine = claims = report = None


def test_what_is_missing_is_measured_in_the_plans_order(capsys):
    assert [row.point for row in Sweep("second").gather()] == ["first", "second", "third"]
    assert capsys.readouterr().err.splitlines() == ["1/3: first", "3/3: third"]
    assert [row.point for row in Sweep("second").gather(measuring=False)] == ["second"]


def test_ctrl_c_ends_the_measuring_and_keeps_the_rest(capsys):
    assert [row.point for row in Sweep("third", stop="second").gather()] == ["first", "third"]
    assert "the same command goes on from here" in capsys.readouterr().err


def test_a_work_folder_belongs_to_one_process_at_a_time(tmp_path, capsys):
    with locked(tmp_path), pytest.raises(SystemExit):
        command_line.main(["idg", "--quick", "--work", str(tmp_path)])
    assert "another process is measuring" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["sgf", "--confirm"], ["idg", "--samples", "9"], ["other"]])
def test_options_that_fit_nothing_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        command_line.main(options)
    assert "error" in capsys.readouterr().err


def test_nothing_measured_is_nothing_to_report(tmp_path, capsys):
    assert command_line.main(["idg", "--quick", "--report-only", "--work", str(tmp_path)]) == 0
    assert "nothing measured yet" in capsys.readouterr().err and not list(tmp_path.rglob("*.md"))
