"""Events: to dicts and back, and told."""

from __future__ import annotations

import json

import pytest
from indomain_guidance.training.engine.events import (
    EVENTS,
    Failed,
    Finished,
    Preparing,
    Sampled,
    Saved,
    Started,
    Step,
    Stopped,
    Validated,
    Warned,
    describe,
    duration,
    event_from_dict,
)

ALL = [
    Started("training", "runs/a", {"steps": 9, "data": ["x"]}, 0, 9, 3, "an estimate"),
    Preparing("encoding images", 2, 3),
    step := Step(1, 9, 0.5, 1e-4, 2.0, 0.1, 0.8),
    Step(2, 9, 0.4, 1e-4, None, 0.1, None, {"t": 300.5, "clamped sds": 0.1}),
    Validated(3, 0.4, {"50": 0.1}),
    Validated(3, 0.4, {"50": 0.1}, "mismatch"),
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
    old = {"event": "validated", "step": 3, "loss": 0.4, "per_level": {}}  # as logs had it
    assert [describe(event_from_dict({**old, **more})) for more in ({}, {"what": "mismatch"})] == [
        "held-out loss at step 3: 0.4000",
        "held-out mismatch at step 3: 0.4000",
    ]
    assert "nothing was trained" in describe(Stopped(0, ""))


def test_durations_are_for_people():
    told = [duration(seconds) for seconds in (3, 99, 100, 5940, 7200, 200000)]
    assert told == ["3 s", "99 s", "2 min", "99 min", "2 h 00 min", "2 d 7 h"]
