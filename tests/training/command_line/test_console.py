"""What a terminal shows: names of files that strangers chose move no cursor and end no command."""

import io

from indomain_guidance.training.command_line.console import Console
from indomain_guidance.training.engine.events import Preparing, Warned


def test_names_that_are_no_text_are_shown_escaped():
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    console = Console(errors=terminal)
    console(Warned("bad\udcfe\x1b[2J.png cannot be read;\nleft out"))
    console.count("evil\x1b[1A", 1, 1)
    console(Preparing("encoding images", 2, 2))
    terminal.flush()
    shown = terminal.buffer.getvalue().decode()
    assert "bad\\udcfe\\x1b[2J.png cannot be read;\nleft out" in shown and "evil\\x1b[1A [###" in shown
    assert "\x1b" not in shown
