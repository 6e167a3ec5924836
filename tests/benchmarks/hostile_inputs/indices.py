"""What runs keep for themselves: the index of contents, cached latents, logs.

They are memory aids: damage is passed over, and what was whole beside it still counts.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from . import safetensors_damage
from .case import NASTY, Reader, Silent, damaged_bytes, damaged_json, write_bytes
from .safetensors_damage import hole, hostile_headers


class ContentIndices(Reader):
    """A whole line, a damaged one, a whole one: both whole ones have to be known afterwards."""

    name = "content_indices"

    def __init__(self, folder: Path) -> None:
        from indomain_guidance.training.data.sources import ImageEntry

        super().__init__(folder)
        self.entries, self.lines = [], []
        for number in range(3):
            path = folder / f"picture-{number}.png"
            path.write_bytes(b"x" * (number + 1))
            os.utime(path, (1e9, 1e9))
            entry = ImageEntry(path.name, path, number + 1)
            self.entries.append(entry)
            self.lines.append([*entry.stamp(), "ab" * 32, 64, 64])
        self.whole = [(".jsonl", json.dumps(self.lines[0]).encode())]
        self.by_hand = {
            name: self._between(text.encode("utf-8", "surrogatepass"))
            for name, text in {
                **NASTY,
                "1,000,000 empty lists": "[" + "[]," * 999_999 + "[]]",
                "2,000,000 digits": "9" * 2_000_000,
                "10,000,000 spaces": " " * 10_000_000,
                "nothing": "",
                "100,000 lines": "[]\n" * 100_000,
            }.items()
        }
        self.by_hand |= {f"one value: {name}": self._between(self._with(nasty)) for name, nasty in NASTY.items()}

    def ending(self, name: str, dice: random.Random) -> str:
        return ".jsonl"

    def _with(self, nasty: str) -> bytes:
        """A line with the same nasty value in each place of a number."""
        where = json.dumps(self.lines[1][0])
        return f'[{where}, {nasty}, {nasty}, 1, "{"cd" * 32}", {nasty}, 64]'.encode()

    def _between(self, line: bytes):
        whole = [json.dumps(one).encode() for one in (self.lines[0], self.lines[2])]
        return write_bytes(whole[0] + b"\n" + line + b"\n" + whole[1] + b"\n")

    def damage(self, dice: random.Random) -> tuple[str, Path]:
        kind, line = damaged_json(self.lines[1], dice)
        path = self.folder / "hostile.jsonl"
        self._between(line.replace(b"\n", b" "))(path)
        return kind, path

    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        from indomain_guidance.training.data.content_index import ContentIndex, Known

        index = ContentIndex(path)
        for entry in (self.entries[0], self.entries[2]):
            if index.look_up(entry) is None:
                raise Silent(f"{entry.name}, whose line is whole, was forgotten")
        known = index.look_up(self.entries[1])
        if known is not None and not all(type(one) is int and 0 < one < 2**63 for one in (known.height, known.width)):
            raise Silent(f"a picture of {known.height!r} x {known.width!r} pixels was believed"[:200])
        index.add(self.entries[1].stamp(), Known("ef" * 32, 64, 64))
        return []


class CachedLatents(Reader):
    """A damaged entry is told of, removed, and encoded again."""

    name = "cached_latents"

    def __init__(self, folder: Path) -> None:
        from indomain_guidance.training.data.latent_cache import LatentCache

        super().__init__(folder)
        self.said: list[str] = []
        self.cache = LatentCache(folder / "cache", "vae", warn=self.said.append)
        self.key = self.cache.key("ab" * 32, (64, 64))
        self.cache.put(self.key, torch.randn(4, 8, 8), torch.rand(4, 8, 8))
        self.path = self.cache.path(self.key)
        self.original = self.path.read_bytes()
        self.whole = [(".safetensors", self.original)]
        self.by_hand = {name: write_bytes(data) for name, data in hostile_headers({}).items()}
        size = 2**28
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        self.by_hand["hole"] = hole({"mean": entry, "std": entry, "digest": entry}, size)
        self.by_hand["hole as the digest"] = hole({"digest": entry}, size)

    def place(self, path: Path) -> Path:
        return path.replace(self.path)

    def damage(self, dice: random.Random) -> tuple[str, Path]:
        kind, data = safetensors_damage.damaged(self.original, dice)
        path = self.folder / "hostile.safetensors"
        path.write_bytes(data)
        return kind, path

    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        from indomain_guidance.training.data.latent_cache import LatentCache

        self.said.clear()
        cache = LatentCache(self.folder / "cache", "vae", warn=self.said.append)  # each tells of its first few alone
        found = cache.get(self.key)
        if found is None and not self.said:
            raise Silent("the damaged entry was passed over")
        if found is not None and any(one.shape != (4, 8, 8) for one in found):
            raise Silent(f"latents of {found[0].shape} and {found[1].shape} were believed")
        return self.said


class Logs(Reader):
    """The log that a run goes on from, of which every line counts alone."""

    name = "logs"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.saved = {"event": "saved", "step": 5, "path": "checkpoints/step-000005.ckpt", "time": 1.0}
        self.lines = [
            {
                "event": "step",
                "step": 3,
                "steps": 9,
                "loss": 0.5,
                "rate": 1e-4,
                "grad_norm": 1.0,
                "seconds": 0.1,
                "time": 1.0,
            },
            {"event": "validated", "step": 3, "loss": 0.5, "per_level": {"0.1": 0.2}, "time": 1.0},
            {
                "event": "started",
                "run": "x",
                "config": {},
                "step": 0,
                "steps": 9,
                "images": 3,
                "estimate": "",
                "time": 1.0,
            },
            self.saved,
        ]
        self.whole = [(".jsonl", "\n".join(map(json.dumps, self.lines)).encode())]
        self.by_hand = {
            name: self._between(text.encode("utf-8", "surrogatepass"))
            for name, text in {
                **NASTY,
                "1,000,000 empty lists": "[" + "[]," * 999_999 + "[]]",
                "100,000 lines": "{}\n" * 100_000,
            }.items()
        }

    def ending(self, name: str, dice: random.Random) -> str:
        return ".jsonl"

    def _between(self, line: bytes):
        whole = json.dumps(self.saved).encode()
        return write_bytes(whole + b"\n" + line + b"\n" + whole + b"\n")

    def damage(self, dice: random.Random) -> tuple[str, Path]:
        kind, line = damaged_json(dice.choice(self.lines), dice)
        path = self.folder / "hostile.jsonl"
        self._between(line.replace(b"\n", b" "))(path)
        if dice.random() < 0.2:
            more, data = damaged_bytes(path.read_bytes(), dice)
            kind = f"torn {kind}, {more}"
            path.write_bytes(data)
        return kind, path

    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        from indomain_guidance.training.engine.events import Saved
        from indomain_guidance.training.engine.log import read_log
        from indomain_guidance.training.engine.loss_curve import LossCurve

        events = read_log(path)
        if not kind.startswith("torn") and sum(isinstance(event, Saved) for event in events) < 2:
            raise Silent("a whole line was passed over")
        LossCurve(path.with_suffix(".png"), events, 4)
        return []
