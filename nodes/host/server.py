"""A ComfyUI server process of our own: private folders, a free port, and an end that is certain."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .client import ComfyClient

CHECKOUT = Path(__file__).resolve().parents[2]
# The pack's folder name inside custom_nodes, hence its name in the editor and in /workflow_templates.
PACK_NAME = "in-domain-guidance"
_ATTEMPTS = 5
# A waiting person hears this often that the start goes on; it takes 10 s on a quick machine and minutes on a busy one.
_NEWS_EVERY_S = 15.0


class ServerProblem(RuntimeError):
    """The server did not start, or ended by itself; the message holds the end of its log."""


def has_accelerator() -> bool:
    """Whether this Python's torch sees a device that ComfyUI would use; without one it must be started with --cpu."""
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return True
    return any(hasattr(torch, name) and getattr(torch, name).is_available() for name in ("xpu", "npu", "mlu"))


def free_port() -> int:
    """A loopback port that was free a moment ago. Somebody may take it first, so the caller tries again."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link_folder(link: Path, target: Path) -> None:
    """Make `link` point at the folder `target`: a symbolic link, or a junction on Windows, which needs no rights."""
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def unlink_folder(link: Path) -> None:
    """Remove a link made by `link_folder`, and never what it points at."""
    if link.is_symlink():
        link.unlink()
    elif os.name == "nt" and os.path.lexists(link):  # a junction to a folder that is gone does not "exist"
        os.rmdir(link)  # a junction goes, a real folder with content stays and raises


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """Linux only: the kernel ends the server when this process is killed without a chance to do it."""
    assert _LIBC is not None
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class ComfyServer:
    """Context manager: a running ComfyUI with this checkout as its only custom node pack.

    comfyui: the folder with ComfyUI's main.py. base: its base directory (models, input, output, user, database); None
    makes one that is removed afterwards. port: 0 for any free one. Raises ServerProblem with the end of the log.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path | None = None,
        *,
        python: str = sys.executable,
        flags: Sequence[str] = (),
        port: int = 0,
        checkout: Path = CHECKOUT,
        start_timeout_s: float = 600.0,
    ):
        self.comfyui = Path(comfyui)
        self.python = python
        self.flags = list(flags)
        self.fixed_port = port
        self.checkout = checkout
        self.start_timeout_s = start_timeout_s
        self._given_base = base
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> ComfyServer:
        self.base = Path(self._given_base or tempfile.mkdtemp(prefix="indomain-comfyui-")).absolute()
        self.log_path = self.base / "server.log"
        try:
            self._prepare_base()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _prepare_base(self) -> None:
        for name in ("custom_nodes", "input", "models", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / PACK_NAME
        # A link, because a copy would go stale and a forwarding module would hide the templates. In a base directory
        # that is kept, another server may be using the same one.
        if not link.exists() or link.resolve() != self.checkout.resolve():
            unlink_folder(link)
            link_folder(link, self.checkout)

    def _command(self, port: int) -> list[str]:
        return [
            *(self.python, str(self.comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(port)),
            *("--base-directory", str(self.base)),
            *("--database-url", f"sqlite:///{(self.base / 'comfyui.db').as_posix()}"),
            *("--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_NAME),
            *("--disable-api-nodes", "--disable-auto-launch"),
            *([] if {"--cpu", "--directml"} & set(self.flags) or has_accelerator() else ["--cpu"]),
            *self.flags,
        ]

    def _start(self) -> None:
        for attempt in range(_ATTEMPTS):
            port = self.fixed_port or free_port()
            self._spawn(port)
            if self._wait_until_ready(port):
                return
            log = self.log_tail(400).lower()
            taken = any(sign in log for sign in ("already in use", "errno 98", "errno 48", "10048", "10013"))
            self._end_process()
            if self.fixed_port or not taken or attempt == _ATTEMPTS - 1:
                where = f" (is port {port} in use?)" if taken else ""
                raise ServerProblem(f"{self.log_tail()}\nComfyUI ended before it answered{where}; its log is above.")

    def _spawn(self, port: int) -> None:
        unwanted = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONSAFEPATH", "COMFYUI_PATH")
        environ = {key: value for key, value in os.environ.items() if key not in unwanted}
        own_group: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                self._command(port),
                cwd=self.comfyui,
                env={**environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent if _LIBC else None,
                **own_group,
            )
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = ComfyClient(self.url)

    def _wait_until_ready(self, port: int) -> bool:
        """True once the server answers, False when its process ended. Another server on the port does not count."""
        started = time.monotonic()
        news = started + _NEWS_EVERY_S
        while time.monotonic() < started + self.start_timeout_s:
            if not self.alive():
                return False
            with contextlib.suppress(urllib.error.URLError, OSError, json.JSONDecodeError):
                stats = self.client.get("/system_stats", timeout_s=5.0)
                if str(self.base) in stats.get("system", {}).get("argv", []):
                    return True
            if time.monotonic() > news:
                news += _NEWS_EVERY_S
                print(f"... still starting, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            time.sleep(0.2)
        raise ServerProblem(
            f"{self.log_tail()}\nComfyUI did not answer on port {port} within {self.start_timeout_s:.0f} s; "
            "its log is above."
        )

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """All that the server has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def wait(self) -> int:
        """Block until the server's process ends; its exit status."""
        assert self._process is not None
        # Not Popen.wait(), which on Windows lets no Ctrl+C through until the process has ended.
        while (status := self._process.poll()) is None:
            time.sleep(0.2)
        return status

    def stop(self) -> None:
        """End the server with everything it started, and remove the base directory if it was made here."""
        try:
            self._end_process()
        finally:
            if self._given_base is None:
                unlink_folder(self.base / "custom_nodes" / PACK_NAME)
                shutil.rmtree(self.base, ignore_errors=True)

    def _end_process(self, patience_s: float = 8.0) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if process.poll() is None:
                    self._signal_group(process, signal.SIGTERM)
                    process.wait(patience_s)
        finally:
            # Whatever came of the polite way, nothing of the group is left behind.
            self._signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)

    @staticmethod
    def _signal_group(process: subprocess.Popen, number: int) -> None:
        if os.name == "nt":
            if process.poll() is None:
                subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
