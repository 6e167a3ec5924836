"""Messages that quote strangers: printable, short, and with both ends kept."""

import ast
import logging
from pathlib import Path

import pytest
from indomain_guidance.guidance.errors import MOST_CHARACTERS, Problem, logger, printable

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "text", ["", "plain", "Grüße, 日本 😀", "two\nlines", "C:\\folder\\file", "x" * MOST_CHARACTERS]
)
def test_safe_text_comes_back_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("evil\ud800", "evil\\ud800"),
        ("\udcff.png", "\\udcff.png"),
        ("red \x1b[31m", "red \\x1b[31m"),
        ("a\rb\x00c\u202e", "a\\rb\\x00c\\u202e"),
    ],
)
def test_what_cannot_be_shown_is_escaped(text, shown):
    assert printable(text) == shown
    assert str(Problem(f"{text}: expected a picture")).encode() == f"{shown}: expected a picture".encode()


@pytest.mark.parametrize("filling", ["x", "\ud800", "\n"])
def test_long_text_loses_its_middle(filling):
    text = printable("Expected this, " + filling * 10_000_000 + "; do that.")
    assert len(text) <= MOST_CHARACTERS
    assert text.startswith("Expected this, ") and text.endswith("; do that.") and "[...]" in text


def test_text_whose_middle_is_cut_before_escaping_is_marked_as_cut():
    assert "[...]" in printable("x" * (MOST_CHARACTERS + 1))


def test_a_problem_is_a_value_error_with_its_message_as_it_was_given():
    with pytest.raises(ValueError, match="^Expected a, found b.$"):
        raise Problem("Expected a, found b.")


@pytest.mark.parametrize("message", [ValueError("inner"), 7])
def test_other_objects_are_shown_as_text(message):
    assert str(Problem(message)) == str(message)


def test_log_lines_are_printable_whole_and_with_what_they_quote(caplog):
    log = logger("indomain_guidance.tests.lines")
    assert logger(log.name) is log and len(log.filters) == 1
    with caplog.at_level(logging.INFO, log.name):
        log.info("term '%s' of %d", "evil\ud800\x1b[2J", 3)
        log.warning("plain \udcff %")
    assert caplog.messages == ["term 'evil\\ud800\\x1b[2J' of 3", "plain \\udcff %"]


def _sources():
    for part in ("guidance", "training", "nodes"):
        for path in sorted((ROOT / part).rglob("*.py")):
            if "host" not in path.parts:  # its own messages hold logs, and no server shows them
                yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_every_error_of_the_project_is_a_problem():
    builtin = {"ValueError", "TypeError", "RuntimeError", "KeyError", "IndexError", "UnicodeError", "Exception"}
    raised = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", "") in builtin
    ]
    assert raised == []


def test_every_log_of_the_project_is_printable():
    plain = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "getLogger" and path.name != "errors.py"
    ]
    assert plain == []
