"""Makes the checkout importable as ``indomain_guidance`` in every test, whatever its folder is called."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _load_bootstrap():
    path = ROOT / "training" / "bootstrap.py"
    spec = importlib.util.spec_from_file_location("indomain_bootstrap", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Tests of CUDA code ask for it themselves; everything else is compared on the CPU.
os.environ.setdefault("PYTHONUTF8", "1")
sys.dont_write_bytecode = sys.dont_write_bytecode or bool(os.environ.get("CI"))

bootstrap = _load_bootstrap()
bootstrap.forget_checkout_on_path()
bootstrap.register()
