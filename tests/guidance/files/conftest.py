"""The streams that benchmark and tests share, and a watch over what a reading does."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

STREAMS = Path(__file__).resolve().parents[2] / "benchmarks" / "pickle_streams.py"
# What only running code does. Opening is part of reading, and watched apart.
ACTS = (
    "exec",
    "compile",
    "import",
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "marshal.",
    "pickle.",
    "shutil.",
    "code.",
    "object.__setattr__",
    "sys._",
    "webbrowser.",
    "urllib.",
    "ftplib.",
)
_HARMLESS = ("os.stat", "os.listdir", "os.scandir", "os.fspath")


@pytest.fixture(scope="session")
def streams():
    """The module pickle_streams.py."""
    name = "indomain_pickle_streams"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, STREAMS)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class _Watch:
    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self.hook)  # for good: Python takes no hook back

    def hook(self, event: str, arguments: tuple) -> None:
        if self.on and event.startswith(ACTS) and event not in _HARMLESS:
            self.seen.append((event, str(arguments)[:200]))
        elif self.on and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):  # noqa: SIM102
            if not str(arguments[0]).endswith("network.pkl"):  # the test's own
                self.seen.append((event, str(arguments)[:200]))


_WATCH: list[_Watch] = []


@pytest.fixture
def watched():
    """A context that gathers, from Python's audit events, what was run, imported or written within it."""
    if not _WATCH:
        _WATCH.append(_Watch())
    watch = _WATCH[0]

    @contextlib.contextmanager
    def watching():
        watch.seen, watch.on = [], True
        try:
            yield watch.seen
        finally:
            watch.on = False

    return watching


@pytest.fixture(autouse=True)
def torch_for_comparison(monkeypatch):
    """torch.load is for what a test expects; asked by the reader, it fails."""
    load = torch.load

    def only_from_tests(*values, **more):
        if sys._getframe(1).f_globals["__name__"].startswith("indomain_guidance.guidance"):
            pytest.fail("torch was asked to read it")
        return load(*values, **more)

    monkeypatch.setattr(torch, "load", only_from_tests)
