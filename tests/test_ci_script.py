""".ci/run on machines with and without a browser: what it installs, and that the tests start whatever came of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("dirname", "mktemp", "rm", "tail")
pytestmark = pytest.mark.skipif(
    os.name == "nt" or any(shutil.which(tool) is None for tool in (*NEEDED, "bash")), reason="needs a POSIX shell"
)
PACKAGES = "chromium fonts-dejavu-core"


@pytest.fixture
def machine(tmp_path):
    """A PATH of stand-ins beside a copy of the script: `add` puts a command on it, `run` gives (status, out, calls)."""
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    (tmp_path / "repo" / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / "repo" / ".ci" / "run")
    for tool in NEEDED:
        (bin_folder / tool).symlink_to(shutil.which(tool))

    class Machine:
        def add(self, name: str, body: str = "") -> None:
            script = bin_folder / name
            script.write_text(f'#!{shutil.which("bash")}\necho "{name} $*" >>"{calls}"\n{body}\n', encoding="utf-8")
            script.chmod(0o755)

        def run(self, *arguments: str):
            command = [shutil.which("bash"), str(tmp_path / "repo" / ".ci" / "run"), *arguments]
            result = subprocess.run(
                command,
                env={"PATH": str(bin_folder)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd=tmp_path,
                timeout=60,
            )
            return result.returncode, result.stderr, calls.read_text().splitlines() if calls.exists() else []

    made = Machine()
    made.add("python3", "exit 7")
    made.add("id", "echo 0")
    return made


def test_chromium_is_installed_where_it_is_missing(machine):
    machine.add("apt-get")
    status, _, calls = machine.run("-k", "a b")
    assert status == 7, "the status of what failed first"
    assert [call.split()[-1] for call in calls if call.startswith("apt-get")] == ["update", PACKAGES.split()[-1]]
    assert any(PACKAGES in call and " -y " in call for call in calls)
    assert calls[-1] == "python3 run.py test -k a b"


@pytest.mark.parametrize("browser", ["chromium", "google-chrome"])
def test_a_browser_that_is_there_is_enough(machine, browser):
    machine.add("apt-get")
    machine.add(browser)
    _, _, calls = machine.run()
    assert calls == ["python3 run.py lint", "python3 run.py test"]


def test_without_the_rights_nothing_is_installed(machine):
    machine.add("apt-get")
    machine.add("id", "echo 1000")
    _, _, calls = machine.run()
    assert not any(call.startswith("apt-get") for call in calls) and calls[-1] == "python3 run.py test"


def test_an_update_that_fails_does_not_keep_chromium_away(machine):
    machine.add("apt-get", 'case "$*" in *update*) exit 100;; esac')
    _, said, calls = machine.run()
    assert any(PACKAGES in call for call in calls) and "could not be installed" not in said
    assert calls[-1] == "python3 run.py test"


def test_an_installation_that_fails_is_told_and_the_tests_run(machine):
    machine.add("apt-get", 'echo "E: Unable to locate package chromium"; exit 100')
    status, said, calls = machine.run()
    assert status == 7 and calls[-1] == "python3 run.py test"
    assert "Unable to locate package" in said and "editor test will be skipped" in said


def test_a_machine_without_python_is_told_what_to_install(machine, tmp_path):
    (tmp_path / "bin" / "python3").unlink()
    status, said, calls = machine.run()
    assert status == 2 and "Python 3.10" in said and calls == []
