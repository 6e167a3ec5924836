"""NVIDIA's pickles: read as the original's writer writes them, and every hostile stream refused without running it."""

from __future__ import annotations

import gc
import io
import pickle
import random
import re
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, holds_generator, read_generator
from indomain_guidance.guidance.files import generator as generator_files
from indomain_guidance.guidance.files.inert_pickle import ReadingBudget, Refused, Vocabulary, read_pickle
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"resolution": 16, "channels": (6, 5, 4), "z_dim": 5, "w_dim": 7, "mapping_layers": 3}


@pytest.fixture
def read(tmp_path):
    """Reads a stream as a file."""

    def reading(data: bytes, name: str = "network.pkl"):
        path = tmp_path / name
        path.write_bytes(data)
        return read_generator(path)

    return reading


@pytest.fixture(scope="module")
def attacks(streams):
    return streams.attacks()


def same(first, second) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["stylegan2_ada", "stylegan3"])
def test_pickles_of_the_original_writer_give_the_originals_images(name, relative_error, watched):
    path = GOLDEN / f"{name}.pkl"
    read_generator(path)
    with watched() as seen:
        loaded = read_generator(path)
    assert seen == []
    expected, generator = load_file(path.with_suffix(".safetensors")), loaded.generator
    labels = expected["c"] if generator.config.c_dim else None
    ws = generator.map(expected["z"], labels, truncation=0.7)
    assert relative_error(ws, expected["ws"]) < 1e-5
    assert relative_error(generator.synthesize(ws), expected["images"]) < 1e-5
    assert generator.config.conv_clamp == 256 and "half precision" in " ".join(loaded.notes)
    assert not generator.training and not any(value.requires_grad for value in generator.parameters())
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in generator.state_dict().values())
    metadata = loaded.metadata
    assert (metadata.class_name, metadata.source_format, metadata.name) == ("Generator", "NVIDIA pickle", name)
    assert len(metadata.source_sha256) == len(metadata.source_code_sha256) == 64
    assert holds_generator(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"architecture": "resnet"},
        {"architecture": "orig", "img_channels": 1},
        {"c_dim": 3},
        {"conv_clamp": 256.0, "mapping_lr_multiplier": 0.1},
        {"use_noise": False, "resample_filter": (1.0, 2.0, 1.0)},
    ],
    ids=str,
)
def test_every_architecture_in_every_protocol(streams, read, protocol, more):
    generator = streams.filled(GeneratorConfig(**SMALL | more), seed=protocol)
    loaded = read(streams.dump(streams.snapshot(generator), protocol))
    assert loaded.generator.config == generator.config and same(loaded.generator, generator)


def test_strides_and_number_formats_of_weights(streams, read):
    generator = streams.filled()
    key = "synthesis.b8.conv1.weight"
    weight = generator.state_dict()[key]
    wide = torch.zeros(4, 9, 3, 3)
    wide[:, 2:6] = weight
    forms = {
        "channels last": weight.contiguous(memory_format=torch.channels_last),
        "a slice": wide[:, 2:6],
        "turned": weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "double": weight.double(),
    }
    for name, form in forms.items():
        changed = {key: streams.tensor(form, parameter=True)}
        assert torch.equal(form.float(), weight), name
        assert same(read(streams.dump({"G_ema": streams.network(generator, changed)})).generator, generator), name
    for dtype in (torch.float16, torch.bfloat16):
        changed = {key: streams.tensor(weight.to(dtype), parameter=True)}
        loaded = read(streams.dump({"G_ema": streams.network(generator, changed)})).generator
        assert torch.equal(loaded.state_dict()[key], weight.to(dtype).float())


def test_what_a_file_may_lack(streams, read):
    generator = streams.filled()
    plain = read(streams.dump({"G": streams.network(generator), "D": None}))
    assert same(plain.generator, generator) and "no averaged generator" in plain.notes[0]
    other = streams.filled(seed=5)
    both = read(streams.dump({"G": streams.network(other), "G_ema": streams.network(generator)}))
    assert same(both.generator, generator) and not both.notes
    measured = read(streams.dump({"G_ema": streams.network(generator, {"mapping.w_avg": None})}))
    assert "no mean style" in measured.notes[0]
    centre, sample = measured.generator.mapping.w_avg, generator.map(torch.randn(4000, 5))[:, 0]
    assert float((centre - sample.mean(0)).norm() / sample.std(0).norm()) < 0.1


@pytest.mark.slow
def test_attacks_are_refused_with_their_reason_and_run_nothing(attacks, read, watched):
    assert len(attacks) > 130
    few = ("POP", "size too large", "missing tensor")
    assert read_all({name: attacks[name] for name in few}, read) == []  # what is imported late is imported now
    with watched() as seen:
        wrong = read_all(attacks, read)
    assert wrong == [] and seen == []


def read_all(attacks, read) -> list:
    wrong = []
    for name, (data, reason) in attacks.items():
        try:
            read(data)
            text = ""
        except FileProblem as problem:
            text = str(problem)
            if text.count("\n") or not text.endswith(".") or "network.pkl: expected" not in text or len(text) > 600:
                wrong.append((name, "not one sentence", text))
        if not re.search(reason, text):
            wrong.append((name, reason, text))
    return wrong


def test_the_watch_sees_what_an_unpickler_would_have_run(streams, watched, capfd):
    # So that its silence above means something.
    evil = streams.dump(streams.Call(streams.Name("os", "system"), ("echo was run",)))
    with watched() as seen:
        pickle.loads(evil)
    assert {event for event, _ in seen} >= {"pickle.find_class", "os.system"} and "was run" in capfd.readouterr().out


def test_nothing_of_an_attack_stays_for_the_next_file(attacks, streams, read):
    generator = streams.filled()
    before = {name: id(value) for name, value in vars(streams.torch._utils).items()}
    for name in ("BUILD on a class", "BUILD on a function", "setattr by BUILD", "BUILD on a network"):
        with pytest.raises(FileProblem) if name != "setattr by BUILD" else pytest.MonkeyPatch.context():
            read(attacks[name][0])
    assert same(read(streams.dump(streams.snapshot(generator))).generator, generator)
    assert before == {name: id(value) for name, value in vars(streams.torch._utils).items()}


HUNGRY = (
    "count of numbers too large",
    "size of terabytes",
    "stride that repeats",
    "bytes of exabytes",
    "memo of 2 ** 31",
    "decoded again and again",
    "doubling list",
    "one storage for all",
    "text beyond the end",
    "open marks",
)


@pytest.mark.parametrize("name", HUNGRY)
def test_claims_take_no_memory(attacks, read, name):
    data = attacks[name][0]
    gc.collect()
    tracemalloc.start()
    try:
        with pytest.raises(FileProblem) if attacks[name][1] != "^$" else pytest.MonkeyPatch.context():
            read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**22 + 8 * len(data)


def test_damaged_streams_are_read_or_refused_and_run_nothing(streams, read, watched):
    originals = [streams.dump(streams.snapshot(), protocol) for protocol in (2, 3, 4)]
    for data in originals:
        read(data)
    refused, dice = 0, random.Random(11)
    kinds = set()
    with watched() as seen:
        for _ in range(400):
            kind, data = streams.damaged(originals, dice)
            begin = time.process_time()
            try:
                read(data)
            except FileProblem as problem:
                refused += 1
                kinds.add(kind)
                assert "\n" not in str(problem) and len(str(problem)) < 600
            assert time.process_time() - begin < 2
    assert [event for event in seen if event[0] != "import"] == []
    assert all("pickletools" in arguments for event, arguments in seen)
    assert refused > 200 and len(kinds) == 9


def test_files_that_are_no_pickles(tmp_path, read, monkeypatch):
    for content, found in {
        b"": "found an empty one",
        b"<!doctype html>": "a web page",
        b"version https://git-lfs": "a Git LFS pointer",
        b"(dp0\nS'a'\n": "found something else",
        b"hello, here is text": "found text",
    }.items():
        with pytest.raises(FileProblem, match=found):
            read(content)
    with pytest.raises(FileProblem, match="found nothing at this path"):
        read_generator(tmp_path / "absent.pkl")
    monkeypatch.setattr(generator_files, "LIMIT_BYTES", 100)
    with pytest.raises(FileProblem, match="at most 100 bytes, found 39123"):
        read_generator(GOLDEN / "stylegan2_ada.pkl")


# ------------------------------------------------------------------------------------------------ the machine by itself


def plain(data: bytes):
    return read_pickle(memoryview(data), 0, Vocabulary(), ReadingBudget())[0]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_data_is_read_as_pickle_reads_it(protocol):
    shared = ["a", 1]
    values = [
        None,
        True,
        False,
        0,
        255,
        256,
        65535,
        65536,
        -1,
        2**31 - 1,
        -(2**31),
        2**63,
        -(2**200),
        1.5,
        float("inf"),
        "",
        "\u00e9\u4e2d\U0001f600",
        "long " * 100,
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        [],
        [1],
        list(range(2000)),
        {},
        {"a": {"b": [1, (2,)]}, 3: None},
        {str(n): n for n in range(1500)},
        [shared, shared, (shared,)],
    ]
    for value in values:
        assert plain(pickle.dumps(value, protocol)) == value
    data = plain(pickle.dumps([b"", b"x" * 300, b"\x00\xff"], protocol))
    assert [bytes(part) for part in data] == [b"", b"x" * 300, b"\x00\xff"]
    twice = plain(pickle.dumps([shared, shared], protocol))
    assert twice[0] is twice[1]
    if protocol >= 4:
        assert plain(pickle.dumps({"a", "b"}, protocol)) == {"a", "b"}
    cycle: list = []
    cycle.append(cycle)
    found = plain(pickle.dumps(cycle, protocol))
    assert found[0] is found


def test_streams_follow_each_other():
    out = io.BytesIO()
    for value in (1, "b"):
        pickle.dump(value, out, 4)
    data = memoryview(out.getvalue())
    first, end = read_pickle(data, 0, Vocabulary(), ReadingBudget())
    second, end = read_pickle(data, end, Vocabulary(), ReadingBudget())
    assert (first, second, end) == (1, "b", len(data))


def test_a_refusal_says_where():
    with pytest.raises(Refused, match=r"the name os.system, .* \(byte 2\)"):
        plain(b"\x80\x03cos\nsystem\n.")
    with pytest.raises(Refused, match=r"the pickle instruction 0xff, .* \(byte 3\)"):
        plain(b"\x80\x03N\xff.")
