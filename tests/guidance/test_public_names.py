"""The library's public names resolve, and importing the package itself loads nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from indomain_guidance import guidance

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", guidance.__all__)
def test_every_public_name_resolves(name):
    value = getattr(guidance, name)
    assert value.__name__ == name and value.__module__.startswith(guidance.__name__ + ".")
    assert name in dir(guidance)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'guide'"):
        guidance.guide  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('g', {str(ROOT / 'guidance' / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(ROOT / 'guidance')!r}])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['g'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules and not [n for n in sys.modules if n.startswith('g.')]\n"
        "assert module.Interval(2, 0, 1).at(1.0) == 2.0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
