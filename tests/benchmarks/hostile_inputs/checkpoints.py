"""Checkpoints of runs: torn ones, and ones whose digest is right about a content that is not."""

from __future__ import annotations

import hashlib
import io
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import pickle_streams as streams
from .case import Reader, Silent, damaged_bytes, write_bytes

# What may stand in the place of any value of a state.
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    3,
    2**70,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "../../x",
    [],
    {},
    [[]],
    (),
    {"a": {}},
    torch.zeros(0),
    torch.zeros(1),
    torch.full((2, 2), float("nan")),
    torch.zeros(3, dtype=torch.int64),
    torch.zeros(1).expand(10**6),
    "x" * 100_000,
    {str(n): n for n in range(1000)},
)


class RunCheckpoints(Reader):
    """Read as a run that goes on reads its folder; about one in ten is then resumed from in earnest."""

    name = "run_checkpoints"

    def __init__(self, folder: Path) -> None:
        from indomain_guidance.tests.training.tiny_run import draw_images, tiny_base, tiny_config
        from indomain_guidance.training.domain.train import train
        from indomain_guidance.training.engine.checkpoints import MARK, TRAILER, checkpoint_path

        super().__init__(folder)
        self.mark, self.base = MARK, tiny_base()
        draw_images(folder / "images", count=3, sizes=((64, 64),))
        self.config = tiny_config(folder, steps=2, sample_every=0, validate_every=0, held_out_share=0.0)
        train(self.config, base=self.base)
        self.path = checkpoint_path(self.config.run_folder, 2)
        whole = self.path.read_bytes()
        self.body, self.trailer = whole[:-TRAILER], whole[-TRAILER:]
        self.whole = [(".ckpt", whole), (".ckpt", self._sealed(self.body[:-9]))]
        with zipfile.ZipFile(io.BytesIO(self.body)) as file:
            self.parts = {one.filename: file.read(one) for one in file.infolist()}
        (self.pickle_name,) = (name for name in self.parts if name.endswith("/data.pkl"))
        attacks = {name: self._sealed(self._zipped(data)) for name, (data, _) in streams.attacks().items()}
        self.by_hand = {
            name: write_bytes(data)
            for name, data in {
                **attacks,
                "nothing": b"",
                "a digest alone": self._sealed(b""),
                "no digest": self.body,
                "sealed text": self._sealed(b"x" * 1000),
                "sealed zip without anything": self._sealed(b"PK\x05\x06" + bytes(18)),
                "the old format of torch": self._sealed(self._old_format()),
                "a zip bomb": self._sealed(self._bomb()),
            }.items()
        }

    def ending(self, name: str, dice: random.Random) -> str:
        return ".ckpt"

    def place(self, path: Path) -> Path:
        # Where a run looks for it, under the name that its folder gives it.
        return path.replace(self.path)

    def damage(self, dice: random.Random) -> tuple[str, Path]:
        path, what = self.folder / "hostile.ckpt", dice.random()
        if what < 0.2:
            kind, data = damaged_bytes(self.body + self.trailer, dice)
        elif what < 0.4:
            kind, data = damaged_bytes(self.body, dice)
            kind, data = f"sealed: {kind}", self._sealed(data)
        elif what < 0.7:
            kind, stream = streams.damaged([self.parts[self.pickle_name]], dice)
            kind, data = f"pickle: {kind}", self._sealed(self._zipped(stream))
        else:
            kind, state = self._other_state(dice)
            kind, data = f"state: {kind}", self._sealed(self._torch(state))
        path.write_bytes(data)
        return kind, path

    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        from indomain_guidance.training.command_line.inspect import inspect_text
        from indomain_guidance.training.engine.checkpoints import latest_checkpoint

        way, said = dice.random(), []
        if way < 0.15:
            inspect_text(path)
            return []
        if way < 0.2:
            return self._resumed(path)
        found = latest_checkpoint(self.config.run_folder, said.append)
        if found is None and not said:
            raise Silent("the checkpoint was passed over")
        return said

    def _resumed(self, path: Path) -> Sequence[str]:
        """Go on from it in earnest: what was said of the file, or all that was said where it was not named."""
        from indomain_guidance.guidance.errors import Problem
        from indomain_guidance.training.domain.train import train
        from indomain_guidance.training.engine.events import Warned

        said: list[str] = []

        def listen(event: object) -> None:
            if isinstance(event, Warned):
                said.append(event.text)

        try:
            train(self.config, base=self.base, resume=True, listener=listen)
        except Problem as problem:
            said.append(str(problem))
        return [text for text in said if path.name in text] or said

    def warm(self) -> None:
        self._resumed(self.path)
        super().warm()

    def _sealed(self, body: bytes) -> bytes:
        return body + self.mark + hashlib.sha256(body).digest()

    def _zipped(self, stream: bytes) -> bytes:
        """The checkpoint with another pickle in it."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as file:
            for name, data in {**self.parts, self.pickle_name: stream}.items():
                file.writestr(name, data)
        return out.getvalue()

    def _torch(self, state: Any) -> bytes:
        out = io.BytesIO()
        torch.save(state, out)
        return out.getvalue()

    def _old_format(self) -> bytes:
        out = io.BytesIO()
        torch.save({"format": "indomain_guidance_checkpoint", "version": 1}, out, _use_new_zipfile_serialization=False)
        return out.getvalue()

    def _bomb(self) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(self.pickle_name, bytes(2**29))
        return out.getvalue()

    def _other_state(self, dice: random.Random) -> tuple[str, Any]:
        state = torch.load(io.BytesIO(self.body), weights_only=True)
        if dice.random() < 0.05:
            return "another whole", dice.choice(VALUES)
        kinds = []
        for _ in range(dice.choice((1, 1, 2))):
            owner, names = state, []
            while isinstance(owner, (dict, list)) and owner:
                name = dice.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
                names.append(str(name))
                if not isinstance(owner[name], (dict, list)) or not owner[name] or dice.random() < 0.3:
                    break
                owner = owner[name]
            if not names:
                break
            if isinstance(owner, dict) and dice.random() < 0.2:
                del owner[name]
                kinds.append(f"without {'.'.join(names)}")
            else:
                owner[name] = value = dice.choice(VALUES)
                kinds.append(f"{'.'.join(names)} = {str(value)[:20]!r}")
        return ", ".join(kinds), state
