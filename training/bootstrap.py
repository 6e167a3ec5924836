"""Register this checkout as the package ``indomain_guidance``, for processes that ComfyUI did not start.

Inside ComfyUI the package is loaded under its path, and a checkout folder can have any name, so
``import indomain_guidance`` would find nothing. Tests, benchmarks, the mini world's recipe and training processes go
through here:

    python training/bootstrap.py indomain_guidance.training.mini_world.recipe --help
    python training/bootstrap.py tests/benchmarks/bench_sampling.py --quick

Only the standard library is needed, and nothing but the package's own (light) ``__init__.py`` is executed.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "indomain_guidance"
ROOT = Path(__file__).resolve().parent.parent


def _same_folder(entry: str, folder: Path) -> bool:
    try:
        return Path(entry or os.curdir).resolve() == folder
    except OSError:
        return False


def forget_checkout_on_path(*folders: Path) -> None:
    """Take the checkout (and `folders`) off sys.path: its ``nodes/`` would shadow ComfyUI's ``nodes.py``."""
    unwanted = (ROOT, Path(__file__).resolve().parent, *folders)
    sys.path[:] = [entry for entry in sys.path if not any(_same_folder(entry, folder) for folder in unwanted)]


def register(root: Path = ROOT) -> ModuleType:
    """Import the folder `root` as ``indomain_guidance`` and return the module; a second call returns the first's."""
    root = root.resolve()  # as the checkout's own path is, also where a link leads to it
    loaded = sys.modules.get(PACKAGE)
    if loaded is not None:
        if Path(loaded.__file__ or "").resolve().parent != root:
            raise ImportError(
                f"Expected {PACKAGE} to come from {root}, but {loaded.__file__} is already imported: "
                "start a new process for another copy."
            )
        return loaded
    spec = importlib.util.spec_from_file_location(PACKAGE, root / "__init__.py", submodule_search_locations=[str(root)])
    if spec is None or spec.loader is None:
        raise ImportError(f"Expected a package in {root}, found no __init__.py to load.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[PACKAGE]
        raise
    return module


def register_folder(folder: Path) -> str:
    """Make `folder` importable as a package named after itself, without putting anything on sys.path; its name."""
    name = folder.name
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    if list(getattr(sys.modules.setdefault(name, package), "__path__", [])) != package.__path__:
        raise ImportError(f"Expected the name {name!r} to be free for {folder}, but a module of that name is loaded.")
    return name


def main(arguments: list[str]) -> None:
    """Run a module by its name, or a file of this checkout by its path, as ``__main__`` with the remaining arguments.

    A file runs as a module of a package named after its folder, so that it can import its neighbours relatively.
    """
    if not arguments:
        raise SystemExit("usage: bootstrap.py MODULE|FILE.py [ARGUMENT ...]")
    target = arguments[0]
    forget_checkout_on_path()
    register()
    if target.endswith(".py"):
        path = Path(target).resolve()
        if not path.is_file():
            raise SystemExit(f"bootstrap.py: expected a file or the name of a module to run, found no file {target}")
        target = f"{register_folder(path.parent)}.{path.stem}"
    sys.argv = arguments
    runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
