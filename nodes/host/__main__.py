"""The commands of ``run.py``, run by the environment's Python. Takes one argument: stage one's order, as JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from .server import CHECKOUT, PACK_NAME, ComfyServer, ServerProblem

BOOTSTRAP = CHECKOUT / "training" / "bootstrap.py"
BENCHMARKS = CHECKOUT / "tests" / "benchmarks"
MOST_TESTERS = 4


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _end_on_signals() -> None:
    """Turn a request to end into an exception, so that every server is stopped on the way out."""

    def leave(number: int, _frame: object) -> None:
        # From here on a second request must not interrupt the clean-up.
        for name in _ENDING:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        raise SystemExit(128 + number)

    for name in _ENDING:
        signal.signal(getattr(signal, name), leave)


_ENDING = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


def demo(order: dict) -> int:
    from .demo import run_demo

    output = Path(order.get("output") or CHECKOUT / "output" / "demo").absolute()
    result = run_demo(Path(order["comfyui"]), output, order.get("flags") or ())
    print(json.dumps(result), flush=True)
    return 0


def serve(order: dict) -> int:
    base = Path(order.get("output") or Path(order["cache"]) / "serve").absolute()
    base.mkdir(parents=True, exist_ok=True)
    _say("starting ComfyUI ...")
    flags = ["--preview-method", "auto", *(order.get("flags") or ())]
    with ComfyServer(Path(order["comfyui"]), base, flags=flags, port=order.get("port") or 0) as server:
        _say(f"the graph editor is at {server.url}; to begin, open this graph and press Run:")
        _say(f"    {server.url}/?template=in_domain_text_to_image&source={PACK_NAME}")
        _say(f"more graphs: Templates (left bar) > Extensions > {PACK_NAME}")
        _say(f"models, images and server.log are in {base}; Ctrl+C ends the server")
        print(server.url, flush=True)
        status = server.wait()
        raise ServerProblem(f"{server.log_tail()}\nComfyUI ended by itself (exit status {status}); its log is above.")


def test(order: dict) -> int:
    # The models of the tests are tiny: more threads than one only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # `python -m pytest` would put the checkout on sys.path, where its nodes/ shadows ComfyUI's nodes.py. The tools are
    # named once more because the Python of the portable Windows package does not read PYTHONPATH.
    start = (
        "import sys; tools = sys.argv.pop(1); sys.path[:] = [p for p in sys.path if p]; "
        "sys.path[:0] = [tools] if tools and tools not in sys.path else []; import pytest; sys.exit(pytest.main())"
    )
    wanted = [argument for argument in order["rest"] if argument != "--quick"]
    if "--quick" in order["rest"]:
        wanted = [*_shared_out(_cores()), "-m", "not slow and not server", *wanted]
    wanted = wanted or _shared_out(_cores())
    return _child([sys.executable, "-c", start, order.get("tools") or "", *wanted], cwd=CHECKOUT)


def lint(order: dict) -> int:
    """Everything that is wrong with the code's style, format and types; `fix`: first mend what ruff can."""
    checks = [["ruff", "check", "."], ["ruff", "format", "--check", "."]]
    checks.append(["pyright", "--pythonpath", sys.executable, "--warnings"])
    if order.get("fix"):
        checks[:0] = [["ruff", "check", "--fix", "--quiet", "."], ["ruff", "format", "."]]
    return max([_child([sys.executable, "-m", *check], cwd=CHECKOUT) for check in checks])


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shared_out(cores: int) -> list[str]:
    """What tells pytest-xdist to share the tests out file by file, to a few processes that may each hold a ComfyUI."""
    # The processes that it starts must find the tools by PYTHONPATH, which not every Python reads.
    shared = cores > 1 and not sys.flags.ignore_environment
    # Files in the order of their names: the benchmarks' and the servers', which take longest, come first.
    return ["-n", str(min(cores, MOST_TESTERS)), "--dist", "loadfile", "--no-loadscope-reorder"] if shared else []


def bench(order: dict) -> int:
    available = {path.stem.removeprefix("bench_"): path for path in sorted(BENCHMARKS.glob("bench_*.py"))}
    if order.get("list"):
        print("\n".join(available))
        return 0
    rest = list(order["rest"])
    named = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if named is not None and named not in available:
        raise ServerProblem(f"Expected the name of a benchmark ({', '.join(available)}), found {named!r}.")
    status = 0
    for name in [named] if named else available:
        _say(f"benchmark {name}")
        status = _child([sys.executable, str(BOOTSTRAP), str(available[name]), *rest]) or status
    return status


def mini_world(order: dict) -> int:
    return _child([sys.executable, str(BOOTSTRAP), "indomain_guidance.training.mini_world.recipe", *order["rest"]])


def _become(module: str, order: dict) -> int:
    """Run a module in the place of this process, so that it gets every signal once and may take its time to save."""
    command = [sys.executable, str(BOOTSTRAP), module, *order["rest"]]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":
        os.execv(command[0], command)
    # Windows has no such thing: this process waits, and leaves Ctrl+C to the command, which shares the console.
    for name in _ENDING:
        signal.signal(getattr(signal, name), lambda number, frame: None)
    return subprocess.call(command)


def _child(command: list[str], cwd: Path | None = None) -> int:
    """Run `command` in this terminal; its exit status. It gets the signals that end this process, and time to obey."""
    with subprocess.Popen(command, cwd=cwd) as process:
        try:
            return process.wait()
        except SystemExit as ending:
            # A Ctrl+C in a terminal has reached the child as well; a second one would disturb its clean-up.
            told = ending.code == 128 + signal.SIGINT
            for patience_s in (20, 40):
                if not told:
                    process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
                try:
                    process.wait(patience_s)
                    break
                except subprocess.TimeoutExpired:
                    told = False
            else:
                process.kill()
            raise


COMMANDS = {
    "demo": demo,
    "serve": serve,
    "test": test,
    "lint": lint,
    "bench": bench,
    "mini-world": mini_world,
    "indomain": partial(_become, "indomain_guidance"),
    "claims": partial(_become, "indomain_guidance.training.claims"),
}


def main() -> int:
    order = json.loads(sys.argv[1])
    _end_on_signals()
    os.environ["INDOMAIN_COMFYUI_PATH"] = str(order["comfyui"])
    try:
        return COMMANDS[order["command"]](order)
    except (ServerProblem, RuntimeError, OSError) as problem:
        _say(f"run.py {order['command']}: {problem}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
