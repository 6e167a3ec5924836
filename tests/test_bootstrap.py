"""The checkout as the package ``indomain_guidance``: in this process, and in one started through the bootstrap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOOTSTRAP = ROOT / "training" / "bootstrap.py"


def test_package_is_this_checkout():
    import indomain_guidance

    assert Path(indomain_guidance.__file__).resolve().parent == ROOT
    assert not any(Path(entry or ".").resolve() == ROOT for entry in sys.path)


def test_bootstrap_runs_a_module_as_main_with_its_arguments(tmp_path):
    # A checkout under another folder name, with a module that says who it is.
    checkout = tmp_path / "some other name"
    (checkout / "training").mkdir(parents=True)
    (checkout / "__init__.py").write_text("", encoding="utf-8")
    (checkout / "training" / "__init__.py").write_text("MARK = 7\n", encoding="utf-8")
    (checkout / "training" / "bootstrap.py").write_text(BOOTSTRAP.read_text(encoding="utf-8"), encoding="utf-8")
    (checkout / "training" / "tool.py").write_text(
        "import sys\nfrom . import MARK\nprint(__name__, __package__, MARK, sys.argv[1:])\n", encoding="utf-8"
    )
    (checkout / "nodes").mkdir()
    (checkout / "nodes" / "__init__.py").write_text("", encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(checkout / "training" / "bootstrap.py"), "indomain_guidance.training.tool", "-x", "1"],
        capture_output=True,
        text=True,
        cwd=checkout,
    )
    assert result.stderr == ""
    assert result.stdout.strip() == "__main__ indomain_guidance.training 7 ['-x', '1']"


def test_bootstrap_runs_a_file_that_imports_its_neighbour_and_the_package(tmp_path):
    folder = tmp_path / "scripts_here"
    folder.mkdir()
    (folder / "common.py").write_text("VALUE = 5\n", encoding="utf-8")
    (folder / "bench_x.py").write_text(
        "import sys\nimport indomain_guidance\nfrom .common import VALUE\n"
        "if __name__ == '__main__':\n    print(VALUE, indomain_guidance.__name__, sys.argv[1:])\n",
        encoding="utf-8",
    )
    result = subprocess.run(
        [sys.executable, str(BOOTSTRAP), str(folder / "bench_x.py"), "--quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.stderr == ""
    assert result.stdout.strip() == "5 indomain_guidance ['--quick']"


def test_registering_another_copy_is_refused(tmp_path):
    (tmp_path / "__init__.py").write_text("", encoding="utf-8")
    code = (
        "import importlib.util as u, pathlib, sys\n"
        f"s = u.spec_from_file_location('b', {str(BOOTSTRAP)!r}); b = u.module_from_spec(s); s.loader.exec_module(b)\n"
        "b.register()\n"
        f"b.register(pathlib.Path({str(tmp_path)!r}).resolve())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode != 0 and "already imported" in result.stderr


def test_the_checkout_is_the_same_through_a_link_and_a_folder_registers_twice_but_not_two(tmp_path):
    link = tmp_path / "link"
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        link = ROOT  # no permission to make links here
    for parent in ("a", "b"):
        (tmp_path / parent / "scripts_here").mkdir(parents=True)
    code = (
        "import importlib.util as u, pathlib\n"
        f"s = u.spec_from_file_location('b', {str(BOOTSTRAP)!r}); b = u.module_from_spec(s); s.loader.exec_module(b)\n"
        f"assert b.register(pathlib.Path({str(link)!r})) is b.register()\n"
        f"one, other = (pathlib.Path({str(tmp_path)!r}, parent, 'scripts_here') for parent in 'ab')\n"
        "assert b.register_folder(one) == b.register_folder(one) == 'scripts_here'\n"
        "b.register_folder(other)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stderr.splitlines()[-1].startswith("ImportError: Expected the name 'scripts_here' to be free")


def test_a_file_that_is_not_there_is_named_in_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, str(BOOTSTRAP), "nowhere.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 1 and result.stderr.splitlines()[-1].endswith("found no file nowhere.py")
    assert len(result.stderr.splitlines()) == 1
