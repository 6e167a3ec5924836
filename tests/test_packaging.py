"""The package that pyproject.toml describes is the tree, installs from a wheel, and imports without doing work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKAGED = {"tests", "output", "build", "dist", "workflows"}


def pyproject() -> dict:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package_folders() -> dict[str, Path]:
    """{package name: folder} for every folder of the tree that holds Python modules, tests left out."""
    found = {"indomain_guidance": ROOT}
    for folder in sorted(path for path in ROOT.rglob("*") if path.is_dir()):
        parts = folder.relative_to(ROOT).parts
        hidden = any(part.startswith((".", "__")) or part.endswith(".egg-info") for part in parts)
        if parts[0] in NOT_PACKAGED or hidden:
            continue
        if any(folder.glob("*.py")):
            found[".".join(("indomain_guidance", *parts))] = folder
    return found


def test_listed_packages_are_the_tree():
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == sorted(package_folders())


def test_every_package_has_an_init():
    assert [name for name, folder in package_folders().items() if not (folder / "__init__.py").is_file()] == []


def test_no_upper_bound_and_no_requirements_file():
    dependencies = pyproject()["project"]["dependencies"]
    assert not [d for d in dependencies if "<" in d or "==" in d or "~=" in d]
    assert {d.split(">=")[0] for d in dependencies} == {"torch", "numpy", "pillow", "safetensors", "einops"}
    # Installers of node packs run `pip install -r requirements.txt`, which can replace a user's CUDA build of torch.
    assert not (ROOT / "requirements.txt").exists()


def test_comfyui_reads_what_the_registry_needs(core):
    """By core's own parser, which drops a whole list of classifiers for one that it does not know."""
    about = core("comfy_config.config_parser").extract_node_configuration(str(ROOT))
    project, comfy = about.project, about.tool_comfy
    assert (project.name, comfy.display_name) == ("indomain-guidance", "In-Domain Guidance") and comfy.publisher_id
    assert project.supported_os == ["OS Independent"] and len(project.supported_accelerators) == 3
    assert project.supported_comfyui_version == ">=0.3.75"


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so nothing says which files belong to it")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that setuptools builds from the files git knows, in a folder of its own."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    for path in tracked_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    output = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    result = subprocess.run([sys.executable, "-c", build, str(output)], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "Deprecat" not in result.stderr, result.stderr[-3000:]
    (built,) = output.glob("*.whl")
    return built


def test_wheel_holds_the_modules_the_data_and_nothing_else(wheel):
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert all(name.startswith("indomain_guidance/") for name in names)
    expected = {
        "indomain_guidance/" + path.relative_to(ROOT).as_posix()
        for folder in package_folders().values()
        for path in folder.glob("*.py")
    }
    data = {
        "indomain_guidance/" + path.relative_to(ROOT).as_posix()
        for pattern in (
            "workflows/*.json",
            "workflows/api/*.json",
            "nodes/web/docs/*.md",
            "training/mini_world/weights/**/*.safetensors",
        )
        for path in ROOT.glob(pattern)
    }
    assert expected <= set(names)
    assert data <= set(names), data - set(names)
    surplus = set(names) - expected - data
    assert [name for name in surplus if not name.startswith("indomain_guidance/training/mini_world/data/")] == []


def test_the_registrys_archive_holds_what_runs_and_no_pages_or_tests():
    """Its packer leaves out what .comfyignore names, in the language of .gitignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-ci", "-X", ".comfyignore"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    left_out = {path.split("/")[0] for path in listed}
    assert left_out == {".ci", ".github", ".pre-commit-config.yaml", "docs", "tests", "CONTRIBUTING.md", "run.py"}
    packed = {path.relative_to(ROOT).as_posix() for path in tracked_files()} - set(listed)
    assert {"__init__.py", "README.md", "LICENSE", "nodes/web/docs/InDomainSampler.md"} <= packed
    assert not [path for path in packed if "claims/" in path and not path.endswith(".py")]
    assert sum((ROOT / path).stat().st_size for path in packed) < 40e6


def test_wheel_imports_from_where_it_is_installed(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import json, sys, indomain_guidance, indomain_guidance.guidance as g\n"
        "import indomain_guidance.guidance.combination, indomain_guidance.training\n"
        "print(json.dumps([indomain_guidance.__file__, g.__file__]))"
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for file in json.loads(result.stdout):
        assert Path(file).is_relative_to(tmp_path)


def modules_after(code: str) -> set[str]:
    """Names in sys.modules after `code` ran in a new process in which the checkout is registered."""
    bootstrap = ROOT / "training" / "bootstrap.py"
    script = (
        f"import importlib.util as u, json, sys\ns = u.spec_from_file_location('b', {str(bootstrap)!r})\n"
        f"b = u.module_from_spec(s); s.loader.exec_module(b); b.register()\n{code}\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy():
    loaded = modules_after("")
    assert not loaded & {"torch", "numpy", "PIL", "safetensors", "einops", "aiohttp"}
    assert {name for name in loaded if name.startswith("indomain_guidance")} == {"indomain_guidance"}


def test_importing_the_library_loads_neither_training_nor_nodes_nor_comfyui():
    loaded = modules_after("import indomain_guidance.guidance")
    assert not {n for n in loaded if n.startswith(("indomain_guidance.training", "indomain_guidance.nodes", "comfy"))}


@pytest.mark.comfy
def test_the_list_of_nodes_loads_no_training_module():
    comfyui = os.environ.get("INDOMAIN_COMFYUI_PATH")
    if not comfyui:
        pytest.skip("needs a ComfyUI: start the tests with `python run.py test`")
    loaded = modules_after(
        f"sys.path.insert(0, {comfyui!r}); sys.argv = ['main.py', '--cpu']\n"
        "import comfy.options; comfy.options.enable_args_parsing()\n"
        "import indomain_guidance.nodes as pack\n"
        "assert len(pack.node_classes()) >= 7"
    )
    heavy = ("indomain_guidance.training.", "indomain_guidance.nodes.host")
    # Names of the mini world's files and words; its networks, assets and recipe are read when its node runs.
    light = {"indomain_guidance.training.mini_world", "indomain_guidance.training.mini_world.tokens"}
    assert {name for name in loaded if name.startswith(heavy)} - light == set()
