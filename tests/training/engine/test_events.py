"""Events: to dicts and back, the log, the loss curve."""

from __future__ import annotations

import json
import math

import pytest
from indomain_guidance.training.engine import events
from indomain_guidance.training.engine.events import (
    EVENTS,
    Caching,
    Distilled,
    Failed,
    Finished,
    LogFile,
    LossCurve,
    Measuring,
    Sampled,
    Saved,
    Started,
    Step,
    Stopped,
    Validated,
    Warned,
    describe,
    draw_losses,
    duration,
    event_from_dict,
    read_log,
    smoothed,
    thinned,
)
from PIL import Image

ALL = [
    Started("runs/a", {"steps": 9, "data": ["x"]}, 0, 9, 3, "an estimate"),
    Caching(2, 3),
    Measuring(1, 56),
    step := Step(1, 9, 0.5, 1e-4, 2.0, 0.1, 0.8),
    Distilled(2, 9, 0.4, 1e-4, None, 0.1, None, {"t": 300.5, "clamped sds": 0.1}),
    Validated(3, 0.4, {"50": 0.1}),
    Sampled(3, "s.png"),
    Saved(3, "c.ckpt"),
    Warned("careful"),
    Stopped(3, "c.ckpt"),
    Finished(9, "a.safetensors"),
    Failed(3, "the disk is full"),
]


def test_every_event_survives_json_and_can_be_told():
    assert {type(event) for event in ALL} == set(EVENTS.values())
    for event in ALL:
        assert event_from_dict(json.loads(json.dumps(event.to_dict()))) == event
        assert "Event" not in describe(event) and describe(event)
    assert event_from_dict({**step.to_dict(), "later": 1}) == step
    for wrong in ({}, {"event": "party"}, {"event": "saved"}, 7):
        with pytest.raises(ValueError, match="Expected"):
            event_from_dict(wrong)
    assert "nothing was trained" in describe(Stopped(0, ""))


def at(number, loss, steps=100):
    return Step(number, steps, loss, 1e-4, 1.0, 0.1)


def test_the_log_averages_steps_and_survives_a_kill(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    log = LogFile(path, every=4)
    for event in [Caching(1, 2), Caching(2, 2), *(at(number, number) for number in range(1, 7)), Saved(6, "c")]:
        log(event)
    log.close()
    assert [(type(e).__name__, getattr(e, "step", None)) for e in read_log(path)] == [
        ("Caching", None),
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


def colours(image):
    return {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}


def test_the_loss_curve_is_drawn_and_forgets_what_a_killed_run_repeats(tmp_path):
    history = [at(number, 1.0) for number in range(1, 31)] + [Validated(20, 0.9, {}), Validated(30, 0.8, {})]
    curve = LossCurve(tmp_path / "loss.png", history, start=20)
    assert max(curve.train) == 20 and curve.held_out == {20: 0.9}
    curve(at(21, float("nan")))
    curve(at(22, 0.7))
    assert 21 not in curve.train and not (tmp_path / "loss.png").exists()
    curve(Saved(22, "c"))
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (960, 480)
        assert {(31, 95, 191), (224, 124, 24)} <= colours(image)
    LossCurve(tmp_path / "empty.png").draw()
    assert not (tmp_path / "empty.png").exists()


def test_a_curve_that_cannot_be_written_ends_no_run(tmp_path):
    """As on Windows while a viewer has the picture open: it is drawn again with the next event."""
    curve = LossCurve(tmp_path / "loss.png", [at(1, 1.0), at(2, 0.9)], start=2)
    (tmp_path / "loss.png").mkdir()
    curve(Saved(2, "c"))
    (tmp_path / "loss.png").rmdir()
    assert not list(tmp_path.iterdir())
    curve(Saved(2, "c"))
    assert (tmp_path / "loss.png").is_file()


def blue_heights(image):
    """Mean row of the running mean's pixels in each column that has any."""
    pixels = image.load()
    found = {}
    for x in range(image.width):
        rows = [y for y in range(image.height) if pixels[x, y] == (31, 95, 191)]
        if rows:
            found[x] = sum(rows) / len(rows)
    return found


def test_the_curve_falls_as_the_loss_falls():
    heights = blue_heights(draw_losses({step: 2.0 - step / 400 for step in range(1, 401)}, {}))
    columns = sorted(heights)
    assert columns[-1] - columns[0] > 800
    assert all(heights[a] <= heights[b] + 1 for a, b in zip(columns, columns[1:]))  # rows count downwards
    assert heights[columns[-1]] - heights[columns[0]] > 300


@pytest.mark.parametrize(
    "train, held_out",
    [
        ({5: 0.25}, {}),
        ({}, {0: 0.3}),
        ({1: 0.5, 2: 0.5}, {0: 0.5}),
        ({1: 0.0, 2: 0.0}, {}),
        ({1: -1.0, 2: 1e6}, {3: 1e-9}),
    ],
)
def test_degenerate_curves_can_be_drawn(train, held_out):
    assert draw_losses(train, held_out).size == (960, 480)


def test_smoothing_keeps_lines_and_means():
    line = [float(value) for value in range(200)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([]) == [] and smoothed([3.0]) == [3.0]
    rough = [0.0, 1.0] * 100
    assert max(abs(value - 0.5) for value in smoothed(rough)[20:-20]) < 0.06


def test_thinning_keeps_the_last_step_and_the_mean():
    values = {step: float(step) for step in range(1, 5001)}
    fewer = thinned(values, 1000)
    assert len(fewer) == 1000 and max(fewer) == 5000 and fewer[5000] == 4998.0
    assert thinned({3: 1.0}) == {3: 1.0} and thinned({}) == {}


def test_durations_are_for_people():
    told = [duration(seconds) for seconds in (3, 99, 100, 5940, 7200, 200000)]
    assert told == ["3 s", "99 s", "2 min", "99 min", "2 h 00 min", "2 d 7 h"]


def test_tensorboard_that_is_missing_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        events.TensorBoard(tmp_path)


def test_tensorboard_hides_the_steps_that_a_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(steps, **more):
        board = events.TensorBoard(tmp_path, 1, **more)
        for step in steps:
            board(Step(step, 9, 0.1, 1e-4, None, 0.1))
        board.close()
        return [one.step for one in EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")]

    assert write([1, 2, 3, 4]) == [1, 2, 3, 4]
    assert write([3, 4], start=2) == [1, 2, 3, 4]
    assert write([5]) == [1, 2, 3, 4, 5]  # nothing is repeated
