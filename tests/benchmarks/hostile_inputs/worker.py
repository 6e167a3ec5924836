"""Reads inputs one after the other in a process of its own, and watches: what runs, what is said, seconds, memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .. import reporting
from .case import Reader, Silent

# What only code that runs does; the rest of a read, opening its file included, raises other events.
ACTS = (
    "exec",
    "compile",
    "import",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "os.putenv",
    "os.startfile",
    "subprocess.",
    "socket.",
    "ctypes.",
    "marshal.",
    "pickle.",
    "webbrowser.",
    "urllib.",
)
# What is done to files, which readers do in their own folder alone: latents are cached, runs go on.
WRITING = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "shutil.",
    "tempfile.",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MOST_CHARACTERS = 500
MOST_SECONDS, MOST_BYTES = 10.0, 500e6
KEPT_BYTES = 20_000_000  # a failing input up to this size is kept


class Watch:
    """What ran while it was on, through Python's audit events, which no code can take back."""

    def __init__(self, folder: Path) -> None:
        self.on, self.seen, self.folder = False, [], str(folder)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        writes = event.startswith(WRITING) or (event == "open" and _for_writing(arguments))
        if event.startswith(ACTS) or (writes and not str(arguments[0]).startswith(self.folder)):
            self.seen.append((event, str(arguments)[:120]))

    @contextmanager
    def watching(self) -> Iterator[list[tuple[str, str]]]:
        """What runs within."""
        self.seen, self.on = [], True
        try:
            yield self.seen
        finally:
            self.on = False


def _for_writing(arguments: tuple) -> bool:
    return isinstance(arguments[2], int) and bool(arguments[2] & WRITES)


def run(reader: Reader, seed: int, numbers: range, keep: Path, stream: TextIO) -> None:
    """Write, read and judge the inputs of these numbers; a JSON object each to `stream`."""
    import indomain_guidance.guidance.errors  # noqa: F401 - what judging an input imports counts as code that ran

    watch = Watch(reader.folder)
    reader.warm()
    print(json.dumps({"ready": True}), file=stream, flush=True)
    for number in numbers:
        dice = random.Random(f"{seed} {reader.name} {number}")
        kind, path = reader.write(number, dice)
        size = _size(path)
        print(json.dumps({"begun": number, "kind": kind[:200]}), file=stream, flush=True)
        reporting.restart_peak()
        before, cpu, wall = reporting.peak_memory(), time.process_time(), time.monotonic()
        with watch.watching() as seen:
            outcome, wrong = _outcome(reader, kind, path, dice)
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        over = reporting.peak_memory() - before - size
        faults = {
            "ran": str(seen[0]) if seen else "",
            "said": wrong,
            "slow": f"took {cpu:.1f} s" if cpu > MOST_SECONDS else "",
            "large": f"took {over / 1e6:.0f} MB over its size" if over > MOST_BYTES else "",
        }
        faults = {name: text for name, text in faults.items() if text}
        if faults:
            keep_input(path, keep, f"{reader.name}-{seed}-{number}")
        result = {"case": number, "outcome": outcome, "seconds": round(min(cpu, wall), 4), "over": over}
        print(json.dumps({**result, **({"faults": faults} if faults else {})}), file=stream, flush=True)
        if over > MOST_BYTES / 5:
            reporting.resident_memory()  # gives it back, so that the next one's growth shows


def _outcome(reader: Reader, kind: str, path: Path, dice: random.Random) -> tuple[str, str]:
    """("refused" | "read" | "error", what is wrong with how it was refused)."""
    from indomain_guidance.guidance.errors import Problem

    try:
        sentences = list(reader.read(kind, path, dice))
    except Problem as problem:
        sentences = [str(problem)]
    except Silent as problem:
        return "error", f"nothing was said: {problem}"
    except Exception as problem:
        return "error", f"{type(problem).__name__} instead of a sentence: {str(problem)[:300]!r}"
    faults = [fault for fault in (judge(text, path.name) for text in sentences) if fault]
    return ("refused" if sentences else "read"), (faults[0] if faults else "")


def judge(sentence: str, name: str) -> str:
    """What is wrong with a sentence about the file `name`; "" for one that may be shown to anybody."""
    if name not in sentence:
        return f"the file is not named: {sentence[:300]!r}"
    if len(sentence) > MOST_CHARACTERS:
        return f"{len(sentence)} characters: {sentence[:200]!r}"
    unprintable = [one for one in sentence if not one.isprintable() and one != "\n"]
    if unprintable:
        return f"{unprintable[0]!r} cannot be shown: {sentence[:300]!r}"
    if " " not in sentence.strip():
        return f"no reason: {sentence!r}"
    return ""


def keep_input(path: Path, folder: Path, name: str) -> None:
    """A copy of a failing input, unless it is large."""
    if path.is_file() and path.stat().st_size <= KEPT_BYTES:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{name}{path.suffix}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@contextmanager
def limited_memory(more: int = 6 * 2**30) -> Iterator[None]:
    """No more than `more` bytes of address space on top of what is used now, where the system can say so."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def private_folder(name: str) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=f"indomain-{name}-") as folder:
        yield Path(folder)
