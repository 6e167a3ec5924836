"""What the README shows is true: its example runs and what it names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs_as_printed():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["images"].shape == (4, 3, 64, 64) and bool(names["images"].isfinite().all())
    assert set(names["guided"].samples_per_step) == {2.0, 3.0}


def test_pictures_and_files_it_names_exist():
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    named += re.findall(r"`((?:workflows|training|tests|nodes|guidance)/[\w./-]+)`", README)
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_every_node_is_listed():
    displayed = re.findall(
        r'display_name="([^"]+)",\s*category',
        "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py")),
    )
    assert len(displayed) >= 10
    assert not [name for name in displayed if f"| {name} |" not in README]


def test_no_placeholder_was_left():
    assert "@@" not in README and "@@" not in (ROOT / "training" / "mini_world" / "README.md").read_text(
        encoding="utf-8"
    )
