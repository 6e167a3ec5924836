"""Messages that quote strangers: printable, short, and with both ends kept."""

import pytest
from indomain_guidance.guidance.errors import MOST_CHARACTERS, Problem, printable


@pytest.mark.parametrize("text", ["", "plain", "Grüße, 日本 😀", "two\nlines", "C:\\folder\\file", "x" * MOST_CHARACTERS])
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
