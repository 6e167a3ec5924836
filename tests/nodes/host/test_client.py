"""The parts of the host that need no server: what is shown to a waiting person, and what is said about a refusal."""

from __future__ import annotations

import io

from indomain_guidance.nodes.host.client import describe_rejection
from indomain_guidance.nodes.host.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_rewrites_its_line_on_a_terminal():
    stream = Terminal()
    bar = Bar("1/2 ", stream)
    for done in (1, 2, 4):
        bar.update("Sampler", done, 4)
    bar.close()
    *_, before, last = stream.getvalue().split("\r")
    assert stream.getvalue().count("\n") == 1 and last.endswith("\n")
    assert last.startswith("1/2 [" + "#" * 28 + "] 4/4") and last.rstrip().endswith("Sampler")
    assert before == last.rstrip("\n")


def test_bar_prints_one_line_a_task_elsewhere():
    stream = io.StringIO()
    bar = Bar("", stream)
    for task in ("first", "second"):
        for done in range(1, 11):
            bar.update(task, done, 10)
    bar.close()
    bar.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and "10/10" in lines[0] and lines[0].endswith("first") and lines[1].endswith("second")
    assert "\r" not in stream.getvalue()


def test_bar_that_starts_over_is_a_new_task():
    stream = io.StringIO()
    bar = Bar("", stream)
    for done in (1, 2, 1, 2):
        bar.update("same", done, 2)
    bar.close()
    assert len(stream.getvalue().splitlines()) == 2


def test_bar_without_a_total_does_not_divide():
    stream = io.StringIO()
    bar = Bar("", stream)
    bar.update("unknown length", 0, 0)
    bar.close()
    assert "0/0" in stream.getvalue()


def test_refusal_names_node_and_input():
    body = {
        "error": {"message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {"4": {"class_type": "KSampler", "errors": [{"message": "Value too big", "details": "steps"}]}},
    }
    assert describe_rejection(body, {}) == "node 4 (KSampler): Value too big: steps"
    assert describe_rejection({"error": body["error"]}, {}) == "Prompt outputs failed validation"
    assert describe_rejection({"error": "plain"}, {}) == "plain"
    assert "without saying why" in describe_rejection({}, {})
