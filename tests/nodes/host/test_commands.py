"""Stage two's commands that need no server."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(os.name == "nt", reason="stands in for a Python with a shell script")
@pytest.mark.parametrize("isolated", [[], ["-E"]], ids=["reads PYTHONPATH", "does not"])
def test_test_tools_are_found_whether_or_not_python_reads_its_variable(tmp_path, monkeypatch, isolated):
    from indomain_guidance.nodes.host import __main__ as commands

    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "pytest.py").write_text(
        "import sys\ndef main():\n    print('arguments', sys.argv[1:])\n    return 7\n", encoding="utf-8"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" {" ".join(isolated)} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(commands.sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", str(tools))
    printed = tmp_path / "printed"
    with open(printed, "wb") as out:
        real = subprocess.Popen
        monkeypatch.setattr(commands.subprocess, "Popen", lambda command, cwd: real(command, cwd=cwd, stdout=out))
        assert commands.test({"rest": ["-k", "a and b"], "tools": str(tools)}) == 7
    assert printed.read_text() == "arguments ['-k', 'a and b']\n"


def test_the_whole_suite_is_shared_out_file_by_file(monkeypatch):
    from indomain_guidance.nodes.host import __main__ as commands

    started = []
    monkeypatch.setattr(commands, "_child", lambda command, cwd: started.append(command[4:]) or 0)
    monkeypatch.setattr(commands, "_cores", lambda: 2)
    commands.test({"rest": [], "tools": None})
    commands.test({"rest": ["tests/nodes"], "tools": None})
    monkeypatch.setattr(commands, "_cores", lambda: 64)
    commands.test({"rest": [], "tools": None})
    monkeypatch.setattr(commands, "_cores", lambda: 1)
    commands.test({"rest": [], "tools": None})
    commands.test({"rest": ["--quick", "tests/nodes"], "tools": None})
    by_file = ["--dist", "loadfile", "--no-loadscope-reorder"]
    quick = ["-m", "not slow and not server", "tests/nodes"]
    assert started == [["-n", "2", *by_file], ["tests/nodes"], ["-n", "4", *by_file], [], quick]


def test_lint_mends_before_it_checks_only_where_asked(monkeypatch):
    from indomain_guidance.nodes.host import __main__ as commands

    started = []
    monkeypatch.setattr(commands, "_child", lambda command, cwd: started.append(command[2:4]) or 0)
    checks = [["ruff", "check"], ["ruff", "format"], ["pyright", "--pythonpath"]]
    assert commands.lint({"fix": False}) == 0 and started == checks
    started.clear()
    assert commands.lint({"fix": True}) == 0 and started == [["ruff", "check"], ["ruff", "format"], *checks]


def test_a_python_that_reads_no_variables_tests_alone():
    """Its testers would not find pytest."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bootstrap; bootstrap.register(); "
        "from indomain_guidance.nodes.host import __main__ as commands; print(commands._shared_out(8))"
    )
    folder = str(bootstrap_folder())
    for flags, expected in (([], "['-n', '4', '--dist', 'loadfile', '--no-loadscope-reorder']"), (["-E"], "[]")):
        found = subprocess.run([sys.executable, *flags, "-c", code, folder], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected


def bootstrap_folder():
    from indomain_guidance.training import bootstrap

    return os.path.dirname(bootstrap.__file__)
