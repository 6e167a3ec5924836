"""Makes the checkout importable as ``indomain_guidance`` in every test, whatever its folder is called."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


bootstrap = _load("indomain_bootstrap", ROOT / "training" / "bootstrap.py")
bootstrap.forget_checkout_on_path()
bootstrap.register()


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI to test against: what `python run.py test` found or built."""
    path = os.environ.get("INDOMAIN_COMFYUI_PATH")
    if not path:
        pytest.skip("needs a ComfyUI: start the tests with `python run.py test`")
    return Path(path)


@pytest.fixture(scope="session")
def core():
    """Imports modules of ComfyUI in this process, on the CPU: ``core("comfy.model_sampling")``."""
    root = os.environ.get("INDOMAIN_COMFYUI_PATH")
    if not root:
        pytest.skip("INDOMAIN_COMFYUI_PATH names no ComfyUI to compare with")
    if root not in sys.path:
        sys.path.insert(0, root)
    arguments = importlib.import_module("comfy.cli_args").args
    assert os.path.realpath(sys.modules["comfy.cli_args"].__file__).startswith(os.path.realpath(root))
    if "comfy.model_management" not in sys.modules:
        arguments.cpu = True  # read when model_management is imported
    return importlib.import_module


@pytest.fixture(scope="session")
def server(comfyui_path: Path):
    """A real ComfyUI server with this checkout as its only node pack, started once for all tests that use it."""
    from indomain_guidance.nodes.host.server import ComfyServer

    with ComfyServer(comfyui_path, flags=["--preview-method", "auto"]) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Makes checkpoints of nothing in LDM layout, once each: ``tiny_checkpoint("sd1" | "sd2" | "sdxl")``."""
    module = _load("indomain_tiny_checkpoints", ROOT / "tests" / "tiny_checkpoints.py")
    made: dict = {}

    def get(family: str):
        if family not in made:
            made[family] = module.make(tmp_path_factory.mktemp("tiny"), family)
        return made[family]

    return get
