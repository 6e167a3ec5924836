"""JSON from strangers: what is read, and what is refused before anything is made of it."""

from __future__ import annotations

import json
import random
import time

import pytest
from indomain_guidance.guidance.plain_json import MOST_NESTED, parse_json


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x"], "b": {"c": -3e-7, "d": ""}},
        [],
        "caf\udce9",
        2**63 - 1,
        1e300,
        {"brackets in texts": "[" * 1000 + '\\"' + "{" * 1000},
        [[[[]]]],
        ["[", '"', "\\", '\\"[', "]"] * 50,
    ],
)
def test_what_python_writes_comes_back(value):
    assert parse_json(json.dumps(value)) == value
    if value != "caf\udce9":
        text = json.dumps(value, ensure_ascii=False)
        for data in (text.encode(), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")):
            assert parse_json(data) == value


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[" * 100_000 + "]" * 100_000, "more than 64 lists or objects in one another"),
        ('{"a":' * 100_000, "more than 64 lists"),
        ("9" * 310, r"a number of 310 digits \(99999999999999999999...\)"),
        ("-1e999", r"no float holds \(-1e999\)"),
        ("1." + "0" * 200, "no float holds"),
        ("[NaN]", "NaN, which is no number in JSON"),
        ("-Infinity", "-Infinity, which is no number"),
        ('{"steps": 1, "steps": 2}', "'steps' stands twice; keep one"),
        ("{", "in line 1, column 2"),
        ('{"a": 1}\n]', "Extra data in line 2, column 1"),
        (b"\xff\xfe\x00", "save it as UTF-8"),
        ('{"a": "\udce9'.encode("latin-1", "replace") + b'\xe9"}', "save it as UTF-8"),
        ('"' + "x" * 2**20 + '"', "more than 1048576 bytes"),
        ("", "line 1, column 1"),
    ],
)
def test_what_is_refused_has_its_reason(text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(text)
    assert not isinstance(caught.value, json.JSONDecodeError) and len(str(caught.value)) < 200


def test_as_deep_as_allowed_and_one_deeper():
    assert parse_json("[" * MOST_NESTED + "]" * MOST_NESTED) is not None
    with pytest.raises(ValueError, match="in one another"):
        parse_json("[" * (MOST_NESTED + 1) + "]" * (MOST_NESTED + 1))


@pytest.mark.parametrize("piece", ['"', "\\\\", '"\\"', "[],", "\\", '""['])
def test_texts_that_are_nothing_but_one_piece_are_refused_at_once(piece):
    started = time.perf_counter()
    with pytest.raises(ValueError):
        parse_json("[" * 70 + piece * (2**19 // len(piece)))
    assert time.perf_counter() - started < 2


def test_damaged_texts_give_values_or_reasons():
    """Two thousand mutations of a real header and a real configuration: a value, or ValueError with a short reason."""
    dice = random.Random(13)
    kinds = [
        json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"x": "y"}}),
        json.dumps({"base": "m", "steps": 7, "learning_rate": 1e-5, "data": ["a", "b\udce9"], "flip": False}),
    ]
    pieces = ["[", "]", "{", "}", '"', "\\", "\\u", "9" * 400, "1e999", "NaN", "null", ",", ":", "\x00", "\ud800", "-"]
    read = 0
    for _ in range(2000):
        text = dice.choice(kinds)
        for _ in range(dice.randint(1, 4)):
            start = dice.randrange(len(text) + 1)
            text = text[:start] + dice.choice(pieces) * dice.choice((1, 1, 300)) + text[start + dice.randrange(4) :]
        try:
            parse_json(text)
            read += 1
        except ValueError as problem:
            assert len(str(problem)) < 300
    assert 0 < read < 1000
