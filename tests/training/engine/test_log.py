"""The log of a run: written, cut off by a kill, read again."""

from __future__ import annotations

import json
import math

import pytest
from indomain_guidance.training.engine.events import (
    Failed,
    Preparing,
    Saved,
    Step,
    Stopped,
    Validated,
    Warned,
    describe,
)
from indomain_guidance.training.engine.log import LogFile, read_log
from indomain_guidance.training.engine.loss_curve import LossCurve


def at(number, loss, steps=100):
    return Step(number, steps, loss, 1e-4, 1.0, 0.1)


def test_the_log_averages_steps_and_survives_a_kill(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    log = LogFile(path, every=4)
    for event in [
        Preparing("encoding images", 1, 2),
        Preparing("encoding images", 2, 2),
        *(at(number, number) for number in range(1, 7)),
        Saved(6, "c"),
    ]:
        log(event)
    log.close()
    assert [(type(e).__name__, getattr(e, "step", None)) for e in read_log(path)] == [
        ("Preparing", None),
        ("Step", 4),
        ("Step", 6),
        ("Saved", 6),
    ]
    assert [read_log(path)[index].loss for index in (1, 2)] == [2.5, 5.5]
    assert "time" in json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write('{"event": "saved", "st')  # killed while writing
    log = LogFile(path, every=4)
    log(Saved(8, "d"))
    log.close()
    assert [event.step for event in read_log(path) if isinstance(event, Saved)] == [6, 8]
    assert read_log(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("end", [Stopped(13, "c"), Failed(13, "no memory"), None], ids=["stop", "failure", "close"])
def test_no_step_is_missing_in_the_log(tmp_path, end):
    log = LogFile(tmp_path / "log.jsonl", every=10)
    for number in range(1, 14):
        log(at(number, number))
    if end is not None:
        log(end)
    log.close()
    found = read_log(tmp_path / "log.jsonl")
    assert [(event.step, event.loss) for event in found if isinstance(event, Step)] == [(10, 5.5), (13, 12.0)]
    assert end is None or found[-1] == end


def test_the_log_takes_any_file_name(tmp_path):
    """Names that are not UTF-8, as old archives and drives leave them, are halves of characters in Python."""
    log = LogFile(tmp_path / "log.jsonl")
    told = [Warned("caf\udce9.png is damaged"), Warned("\u78c1\u5668.png is damaged")]
    for event in told:
        log(event)
    log.close()
    assert read_log(tmp_path / "log.jsonl") == told


def test_what_json_cannot_hold_is_no_number(tmp_path):
    log = LogFile(tmp_path / "log.jsonl")
    log(Validated(3, math.nan, {"50": math.inf, "60": 0.5}))
    log.close()
    line = (tmp_path / "log.jsonl").read_text()
    values = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["loss"] is None and values["per_level"] == {"50": None, "60": 0.5}
    (event,) = read_log(tmp_path / "log.jsonl")
    assert math.isnan(event.loss) and math.isnan(event.per_level["50"]) and "nan" in describe(event)
    assert LossCurve(tmp_path / "loss.png", [event], start=9).held_out == {}


def test_the_last_step_is_always_logged(tmp_path):
    log = LogFile(tmp_path / "log.jsonl", every=10)
    log(at(3, 1.0, steps=3))
    log.close()
    assert [event.step for event in read_log(tmp_path / "log.jsonl")] == [3]
