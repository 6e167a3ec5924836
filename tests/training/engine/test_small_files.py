"""Small files of settings, logs and indices: damaged, hostile, and other things in their place."""

from __future__ import annotations

import json
import os
import random
import sys
import tracemalloc

import pytest
from indomain_guidance.guidance.errors import Problem
from indomain_guidance.guidance.files import FileProblem
from indomain_guidance.training.adaptation.config import AdaptConfig
from indomain_guidance.training.data.content_index import ContentIndex, Known
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.checkpoints import load_checkpoint
from indomain_guidance.training.engine.events import Saved, Started, Step, Validated
from indomain_guidance.training.engine.log import LogFile, read_log
from indomain_guidance.training.engine.loss_curve import LossCurve, draw_losses
from indomain_guidance.training.engine.settings import ConfigProblem
from indomain_guidance.training.engine.small_files import MOST_TOML, read_lines, read_values

TRAIN = TrainConfig(base="m", data=("a", "b"), caption="x", form="full", sample_prompts=("a cat",))
ADAPT = AdaptConfig(base="m", generator="g", prompt="a cat", label=2)
PIECES = [
    "[",
    "]",
    "{",
    "}",
    '"',
    "\\",
    "\\u12",
    "9" * 310,
    "1e999",
    "NaN",
    "null",
    "true",
    ",",
    ":",
    "\x00",
    "-",
    "'",
    "\ud800",
    "\u00e9",
    "[" * 5000,
    "1e308",
    "-0",
    "\n",
    ".",
    "=",
]
VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    10**309,
    -(10**309),
    10**5000,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "\ud800",
    "a\0b",
    "x" * 10_000,
    [],
    [[]],
    {"a": 1},
    [1],
    [""],
    ["\ud800"],
    ["a", None],
    b"x",
    [b"x"],
    (),
    "C:\new",
]
needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no TOML of its own")


def toml(config):
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in config.to_dict().items())


def damaged(text, dice):
    for _ in range(dice.randint(1, 3)):
        start = dice.randrange(len(text) + 1)
        text = text[:start] + dice.choice(PIECES) + text[start + dice.choice((0, 1, 5)) :]
    return text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    "kind, ending", [(TRAIN, "json"), (ADAPT, "json"), pytest.param(TRAIN, "toml", marks=needs_toml)]
)
def test_a_damaged_configuration_is_read_or_refused_by_name(tmp_path, kind, ending):
    text = toml(kind) if ending == "toml" else json.dumps(kind.to_dict())
    path, dice, read = tmp_path / f"c.{ending}", random.Random(15), 0
    for _ in range(400):
        path.write_bytes(damaged(text, dice))
        try:
            type(kind).read(path)
            read += 1
        except (FileProblem, ConfigProblem) as problem:
            assert str(problem).startswith(f"{path}: ") and len(str(problem)) <= 500
    assert 0 < read < 300


@pytest.mark.parametrize("config", [TRAIN, ADAPT], ids=["train", "adapt"])
@pytest.mark.parametrize("value", VALUES, ids=[f"{type(one).__name__}-{number}" for number, one in enumerate(VALUES)])
def test_any_value_in_any_field_is_taken_or_refused_by_the_fields_name(config, value):
    for name in config.to_dict():
        try:
            config.with_changes(**{name: value})
        except ConfigProblem as problem:
            both = ("t_min: ",) if name == "t_max" else ()
            assert str(problem).startswith((f"{name}: ", *both)), (name, problem)


@pytest.mark.parametrize("name", ["config.json", pytest.param("config.toml", marks=needs_toml)])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_editors(tmp_path, name, encoding):
    text = 'base = "caf\u00e9"\n' if name.endswith("toml") else '{"base": "caf\u00e9"}'
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert TrainConfig.read(tmp_path / name).base == "caf\u00e9"
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(FileProblem, match="save it as UTF-8"):
        TrainConfig.read(tmp_path / name)


@needs_toml
@pytest.mark.parametrize(
    "text, message",
    [
        ('base = "C:\\Users\\me\\sd15.safetensors"', "write paths of Windows in single quotes, or with /"),
        ('base = "m"\ndata = ["D:\\pictures"]', "in single quotes, or with /"),
        ("a" + ".a" * 20_000 + " = 1", "of more than 16 parts"),
        ("x = {a" + ".a" * 20_000 + " = 1}", "of more than 16 parts"),
        ("[a" + ".a" * 20_000 + "]", "of more than 16 parts"),
        ("x = " + "[" * 100_000, "more than 64 lists"),
        ("x = 0x" + "f" * 1000, "300 characters"),
        ("x = " + "9" * 310, "300 characters"),
        ("a = 1\n" * (MOST_TOML // 6 + 1), "at most 262144 bytes, found more"),
        ("x = [" + '"""', "found a mistake"),
    ],
)
def test_toml_is_bounded_before_it_is_read(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(FileProblem, match=message):
            read_values(tmp_path / "c.toml")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@needs_toml
def test_what_looks_hostile_in_texts_of_toml_is_fine(tmp_path):
    text = (
        'a = "'
        + "[." * 500
        + "\"\nb = '''\n"
        + "...\\" * 500
        + '\'\'\'\nc = """\\""" '
        + "{" * 99
        + '"""\n# '
        + "[." * 999
    )
    (tmp_path / "c.toml").write_text(f"{text}\nd = [0.5, 0.25]\ne.f = 1\n")
    values = read_values(tmp_path / "c.toml")
    assert values["a"] == "[." * 500 and len(values["b"]) == 2000 and values["c"].endswith("{" * 99)
    assert values["d"] == [0.5, 0.25] and values["e"] == {"f": 1}


def test_json_says_how_to_write_paths_of_windows(tmp_path):
    (tmp_path / "c.json").write_text('{"base": "C:\\Users\\me\\sd15.safetensors"}')
    with pytest.raises(FileProblem, match=r"Invalid \\escape.*write paths of Windows with \\\\ or /"):
        TrainConfig.read(tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"base": "C:\\new\\sd15.safetensors"}')  # an escape that JSON knows
    with pytest.raises(FileProblem, match="Invalid"):
        TrainConfig.read(tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"base": "C:\\new.safetensors"}')
    with pytest.raises(
        ConfigProblem, match=r"c\.json: base: expected a path, found 'C:\\new.safetensors' with a special"
    ):
        TrainConfig.read(tmp_path / "c.json")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"base":"mini_world","seed":' + "9" * 310 + "}", "a number of 310 digits"),
        ('{"base": "m", "learning_rate": 1e999}', "no float holds"),
        ('{"base": "m", "learning_rate": NaN}', "NaN, which is no number"),
        ('{"base": "m", "steps": 1, "steps": 2}', "'steps' stands twice"),
        ("[" * 100_000, "more than 64 lists"),
        ('{"base": "m", "caption": ' + "[" * 60 + "]" * 60 + "}", "caption: expected text"),
        ('{"base": "m", "' + "x" * 900_000 + '": 1}', "is no field"),
        ('{"base": "\\ud800"}', "base: expected a path, .*which no file is called"),
        ('{"base": "m", "data": ["a\\u0000b"]}', "data: expected a path, .*special character"),
        ('{"base": "m", "data": ["  "]}', "data: expected paths, found an empty one"),
        (" " * 2**20 + "{}", "at most 1048576 bytes"),
    ],
)
def test_json_is_bounded_before_it_is_read(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Problem, match=message) as caught:
        TrainConfig.read(tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are POSIX")
def test_other_things_in_the_place_of_a_small_file_are_told_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(2**40)
    for name, reason in (
        ("pipe.json", "it is a pipe"),
        ("folder.json", "Is a directory"),
        ("zero.json", "it is a pipe, socket or device"),
        ("gone.json", "No such file"),
        ("huge.json", "of at most 1048576 bytes"),
    ):
        with pytest.raises(FileProblem, match=f"{name}: .*{reason}"):
            read_values(tmp_path / name)
        if not name.startswith("huge"):
            assert ContentIndex(tmp_path / name).look_up(_Entry("a", 1, 2, 3)) is None
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(FileProblem, match=f"{name}: cannot be read as a run's log"):
            read_log(tmp_path / name)
        with pytest.raises(FileProblem, match=f"{name}: cannot be read .*; move it away"):
            load_checkpoint(tmp_path / name)


# ---- the content index ----------------------------------------------------------------------------------------------


class _Entry:
    def __init__(self, *stamp):
        self._stamp = stamp

    def stamp(self):
        return self._stamp


LINE = ["/a/caf\udce9.png", 1234, 1_700_000_000_000_000_000, 1_700_000_000_000_000_001, "0af1" * 16, 480, 640]


def test_an_entry_of_the_index_comes_back(tmp_path):
    (tmp_path / "index").write_text(f"torn{json.dumps(LINE)}\n{json.dumps(LINE)}")
    assert ContentIndex(tmp_path / "index").look_up(_Entry(*LINE[:4])) == Known("0af1" * 16, 480, 640)


@pytest.mark.parametrize(
    "place, value",
    [
        (0, 7),
        (1, 10**309),
        (1, 1.5),
        (1, True),
        (1, "1234"),
        (2, None),
        (3, 2**70),
        (4, "x" * 64),
        (4, "0af1" * 15),
        (4, 5),
        (5, 0),
        (5, -480),
        (6, 1e308),
        (6, 2**64),
        (6, []),
    ],
)
def test_a_wrong_entry_of_the_index_counts_as_none(tmp_path, place, value):
    line = list(LINE)
    line[place] = value
    (tmp_path / "index").write_text(json.dumps(line))
    assert ContentIndex(tmp_path / "index")._known == {}


def test_a_damaged_index_is_read_as_far_as_it_goes(tmp_path):
    dice, path = random.Random(13), tmp_path / "index"
    good = json.dumps(LINE).encode() + b"\n"
    texts = [damaged(json.dumps([f"/b/{number}", *LINE[1:]]), dice) for number in range(1000)]
    path.write_bytes(b"\n".join(texts) + b"\n" + b"x" * 2**20 + b"\n" + b"[" * 60_000 + b"\n" + good + b"1e999, " * 9)
    index = ContentIndex(path)
    assert index.look_up(_Entry(*LINE[:4])) == Known("0af1" * 16, 480, 640)
    for state, known in index._known.values():
        assert {type(one) for one in (*state, known.height, known.width)} == {int} and type(known.content) is str


def test_long_lines_are_left_out_without_being_held(tmp_path):
    (tmp_path / "lines").write_bytes(b"a\n" + b"x" * 2**24 + b"\nb\n" + b"y" * 100 + b"\n\nlast")
    tracemalloc.start()
    try:
        assert list(read_lines(tmp_path / "lines", 100)) == [b"a\n", b"b\n", b"\n", b"last"]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# ---- the log --------------------------------------------------------------------------------------------------------


def test_a_damaged_log_gives_events_that_can_be_drawn(tmp_path):
    dice, path = random.Random(13), tmp_path / "log.jsonl"
    events = [
        Started("training", "runs/a", {"steps": 9, "data": ["x"]}, 0, 9, 3, "an estimate"),
        Step(1, 9, 0.5, 1e-4, None, 0.1, 0.8),
        Step(2, 9, 0.4, 1e-4, 1.0, 0.1, None, {"t": 300.5}),
        Validated(3, 0.4, {"50": 0.1}),
        Saved(3, "c.ckpt"),
    ]
    lines = [json.dumps(event.to_dict()) for event in events]
    path.write_bytes(b"\n".join(damaged(dice.choice(lines), dice) for _ in range(1500)) + b"\n" + lines[1].encode())
    found = read_log(path)
    assert 10 < len(found) < 1500 and found[-1] == events[1]
    curve = LossCurve(tmp_path / "loss.png", found, 2**62)
    draw_losses(curve.train, curve.held_out)


@pytest.mark.parametrize(
    "changes",
    [
        {"event": ["step"]},
        {"event": None},
        {"step": "1"},
        {"step": 10**309},
        {"step": True},
        {"loss": [1]},
        {"loss": 1e308},
        {"loss": "x"},
        {"eta_s": {}},
        {"gradient_norm": False},
        {"rate": None},
    ],
)
def test_a_line_of_other_types_is_no_event(tmp_path, changes):
    (tmp_path / "log.jsonl").write_text(json.dumps({**Step(1, 9, 0.5, 1e-4, 1.0, 0.1).to_dict(), **changes}))
    assert read_log(tmp_path / "log.jsonl") == []
    parts = {**Step(1, 9, 0.5, 1e-4, 1.0, 0.1).to_dict(), "parts": [1]}
    (tmp_path / "log.jsonl").write_text(json.dumps(parts) + "\n" + json.dumps({**parts, "parts": {"t": "x"}}))
    assert read_log(tmp_path / "log.jsonl") == []


def test_a_log_goes_on_behind_a_torn_line(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"event": "sav')
    log = LogFile(tmp_path / "log.jsonl")
    log(Saved(3, "c.ckpt"))
    log.close()
    assert read_log(tmp_path / "log.jsonl") == [Saved(3, "c.ckpt")]
