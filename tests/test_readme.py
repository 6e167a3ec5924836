"""The first page and all others: a short README, links that lead somewhere, commands that exist, code that runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from indomain_guidance.training.command_line import main as command_line

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")],
    key=lambda page: page.as_posix(),
)
MOST_WORDS = 900


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def names_of(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_page_is_short():
    assert len(README.split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_files_it_names_exist(page):
    named = re.findall(r"`((?:workflows|training|tests|nodes|guidance|docs)/[\w./-]+)`", text_of(page))
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_commands_of_the_checkout_exist(page):
    run = (ROOT / "run.py").read_text(encoding="utf-8")
    listed = set(re.findall(r'^    "([\w-]+)": "', run, re.M))
    benches = {path.stem.removeprefix("bench_") for path in (ROOT / "tests" / "benchmarks").glob("bench_*.py")}
    for command, argument in re.findall(r"python run\.py ([\w-]+)(?: ([\w-]+))?", text_of(page)):
        assert command in listed, command
        if command == "bench":
            assert argument in benches, argument
        if command == "claims":
            assert argument in ("idg", "sgf", "bake"), argument


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_commands_of_the_trainer_are_understood(page):
    for kind, block in re.findall(r"```(\w*)\n(.*?)```", text_of(page), re.DOTALL):
        for line in block.splitlines() if not kind else ():
            if "indomain" in line.split():  # what it does not understand ends the process
                words = shlex.split(line)
                command_line.build_parser().parse(words[words.index("indomain") + 1 :])


def run_the_code_of(page: Path) -> list[dict]:
    """What each Python block of a page leaves behind; every block starts anew."""
    results = []
    for code in re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL):
        names: dict = {}
        exec(compile(code, str(page), "exec"), names)
        results.append(names)
    return results


def test_the_code_of_the_librarys_page_runs():
    first, *others = run_the_code_of(ROOT / "docs" / "library.md")
    assert first["images"].shape == (4, 3, 64, 64) and bool(first["images"].isfinite().all())
    assert set(first["guided"].samples_per_step) == {2.0, 3.0}
    assert len(others) == 3


def test_every_preset_is_listed():
    from indomain_guidance.guidance import presets

    listed = set(re.findall(r"^\| `(\w+)` \|", text_of(ROOT / "docs" / "library.md"), re.M))
    assert listed == set(presets.PRESETS)


def test_the_code_of_the_trainers_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (names,) = run_the_code_of(ROOT / "docs" / "training_api.md")
    assert Path(names["result"].path).is_file()


def test_every_node_is_listed():
    displayed = re.findall(
        r'display_name="([^"]+)",\s*category',
        "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py")),
    )
    assert len(displayed) >= 10
    page = text_of(ROOT / "docs" / "nodes.md")
    assert not [name for name in displayed if f"| {name} |" not in page]


def test_no_placeholder_was_left():
    assert not [page.name for page in PAGES if "@@" in text_of(page)]
