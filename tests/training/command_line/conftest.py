"""Commands run in this process, and what they ask of a training."""

from __future__ import annotations

import contextlib
import io

import pytest
from indomain_guidance.training.command_line.main import main
from indomain_guidance.training.engine.run import Result


@pytest.fixture
def run():
    """Runs one command: (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main([str(part) for part in arguments])
            except SystemExit as ending:
                status = ending.code
        return status, out.getvalue(), err.getvalue()

    return run


@pytest.fixture
def started(monkeypatch):
    """What `train` is asked for, without training: each call's configuration and keywords."""
    calls = []

    def train(config, **keywords):
        calls.append((config, keywords))
        return Result("dry_run", 0, None, config.run_folder)

    monkeypatch.setattr("indomain_guidance.training.command_line.runs.train", train)
    return calls
