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
