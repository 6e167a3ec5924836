"""What a reader of files is to the benchmark, and damage that suits files of any kind: bytes, JSON, values.

An input is made from its number and the seed alone, so that each can be made again without those before it; only the
addresses and paths that torch and runs write into their files are others.
"""

from __future__ import annotations

import json
import random
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class Silent(Exception):
    """Something was lost without a word: no error that a user would see."""


class Reader(ABC):
    """One kind of file, and how the project reads it.

    by_hand: name -> what writes that input into a path, tried first, in turns with damaged files. whole: (ending,
    bytes) of good files, on which everything that reading imports late is imported. folder: the reader's own, made anew
    for every process; what is written elsewhere counts as code that ran.
    """

    name: str
    by_hand: Mapping[str, Callable[[Path], None]] = {}
    whole: Sequence[tuple[str, bytes]] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, number: int, dice: random.Random) -> tuple[str, Path]:
        """Write input `number` into the folder: (what it is, its path)."""
        half, odd = divmod(number, 2)
        if not odd and half < len(self.by_hand):
            name = list(self.by_hand)[half]
            path = self.folder / f"hostile{self.ending(name, dice)}"
            self.by_hand[name](path)
        else:
            name, path = self.damage(dice)
        return name, self.place(path)

    def place(self, path: Path) -> Path:
        """Put a file that was written where it is looked for."""
        return path

    def ending(self, name: str, dice: random.Random) -> str:
        """How the file of an input made by hand is called."""
        return ".safetensors"

    @abstractmethod
    def damage(self, dice: random.Random) -> tuple[str, Path]:
        """Write a damaged file: (what was done, its path)."""

    @abstractmethod
    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        """Read the file as the project does: sentences that it was refused with, none where it was read.

        A `Problem` may just as well be raised. Raises Silent where something was lost that nobody is told of.
        """

    def warm(self) -> None:
        """What reading and refusing import late is imported now, the codecs of zip's names and of JSON included."""
        for codec in ("cp437", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-8-sig"):
            "".encode(codec)
        for ending, data in self.whole:
            for broken in (data, data[:-1], data[: len(data) // 2], b"x", b"\x80\x04N.", b"PK\x03\x04broken", b"{}"):
                for turn in range(6):
                    path = self.folder / f"hostile{ending}"
                    path.write_bytes(broken)
                    with suppress(Exception):
                        self.read("warm", self.place(path), random.Random(turn))


def write_bytes(data: bytes) -> Callable[[Path], None]:
    """Writes an input that was made before."""

    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


# ---------------------------------------------------------------------------------------------------------------- bytes


def damaged_bytes(data: bytes, dice: random.Random, edge: int = 3000) -> tuple[str, bytes]:
    """(what was done, damaged copy); most of the changes are within `edge` bytes of the beginning or the end."""
    data, kind = bytearray(data), dice.choice(("flip", "byte", "number", "truncate", "delete", "repeat", "zeros"))
    for _ in range(dice.choice((1, 1, 2, 8))):
        if not data:
            break
        near = min(len(data), edge)
        at = dice.choice((dice.randrange(near), len(data) - 1 - dice.randrange(near), dice.randrange(len(data))))
        if kind == "flip":
            data[at] ^= 1 << dice.randrange(8)
        elif kind == "byte":
            data[at] = dice.randrange(256)
        elif kind == "number":
            number = struct.pack(dice.choice("<>") + "i", dice.choice((0, 1, -1, 2**16, 2**31 - 1, -(2**31))))
            data[at : at + 4] = number
        elif kind == "truncate":
            data = data[:at]
        elif kind == "delete":
            del data[at : at + dice.choice((1, 4, 30, 512))]
        elif kind == "zeros":
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        else:
            data[at:at] = data[at : at + dice.choice((1, 4, 30, 512))]
    return kind, bytes(data)


# ----------------------------------------------------------------------------------------------------------------- JSON

# What hostile JSON may hold in the place of a value, as it is written.
NASTY = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "half": "0.5",
    "minus zero": "-0.0",
    "2 ** 31": str(2**31),
    "2 ** 63": str(2**63),
    "-2 ** 63 - 1": str(-(2**63) - 1),
    "2 ** 64": str(2**64),
    "1e308": "1e308",
    "1e309": "1e309",
    "-1e999": "-1e999",
    "tiny": "1e-320",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "310 digits": "9" * 310,
    "5,000 digits": "9" * 5000,
    "310 digits as text": '"' + "9" * 310 + '"',
    "empty text": '""',
    "empty list": "[]",
    "empty object": "{}",
    "text": '"x"',
    "number as text": '"1"',
    "half a character": '"\\ud800"',
    "half a character in a path": '"/tmp/evil\\udfff"',
    "nul": '"\\u0000"',
    "escape sequence": '"\\u001b[31m\\u0007"',
    "newlines": '"a\\n\\nb"',
    "right to left": '"\\u202egnp"',
    "200,000 letters": '"' + "a" * 200_000 + '"',
    "path upwards": '"../../../etc/passwd"',
    "device": '"/dev/zero"',
    "home of nobody": '"~nobody-here/x"',
    "home with nul": '"~\\u0000"',
    "windows path": '"C:\\\\evil"',
    "share": '"\\\\\\\\host\\\\share"',
    "braces": '"{0..99999999}"',
    "long name": '"' + "n" * 300 + '"',
    "con": '"con"',
    "dots": '".."',
    "list of lists": "[[[[1]]]]",
    "list of nulls": "[null, null]",
    "list of texts": '["a", "b"]',
    "list of objects": "[{}, {}]",
    "nested object": '{"a": {"a": {"a": 1}}}',
    "20,000 numbers": "[" + "0," * 19_999 + "0]",
    "900 brackets": "[" * 900 + "]" * 900,
    "100,000 brackets": "[" * 100_000 + "]" * 100_000,
    "100,000 open brackets": "[" * 100_000,
    "100,000 braces": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "key twice": '{"a": 1, "a": 2}',
    "10,000 keys": "{" + ",".join(f'"k{n}":0' for n in range(10_000)) + "}",
}


def damaged_json(value: Any, dice: random.Random, nasty: Mapping[str, str] = NASTY) -> tuple[str, bytes]:
    """(what was done, text): a value of `value` replaced, left out, renamed or added, or its text damaged."""
    if dice.random() < 0.25:
        kind, data = damaged_bytes(json.dumps(value).encode(), dice)
        return f"text: {kind}", data
    if dice.random() < 0.04:
        text = json.dumps(value)
        wrapped = {
            "UTF-16": text.encode("utf-16"),
            "byte order mark": b"\xef\xbb\xbf" + text.encode(),
            "no UTF-8": text.encode()[:-1] + b"\xff}",
            "a second one": (text + text).encode(),
            "within a list": f"[{text}]".encode(),
            "nothing": b"",
            "spaces": b" " * 100_000,
            "nul bytes": bytes(1000),
            "comment": b"// x\n" + text.encode(),
        }
        kind = dice.choice(list(wrapped))
        return kind, wrapped[kind]
    return written(_changed(json.loads(json.dumps(value)), dice, nasty, kinds := []), kinds, nasty)


def written(value: Any, kinds: Sequence[str], nasty: Mapping[str, str]) -> tuple[str, bytes]:
    """JSON in which the names of nasty values, marked, are replaced by what they stand for."""
    text = json.dumps(value)
    for name in set(kinds):
        text = text.replace(json.dumps(_mark(name)), nasty[name]) if name in nasty else text
    return ", ".join(kinds), text.encode()


def _mark(name: str) -> str:
    return f"<<{name}>>"


def _changed(value: Any, dice: random.Random, nasty: Mapping[str, str], kinds: list[str]) -> Any:
    places: list[tuple[Any, Any]] = []

    def walk(one: Any) -> None:
        if isinstance(one, dict):
            places.extend((one, key) for key in one)
            for part in list(one.values()):
                walk(part)
        elif isinstance(one, list):
            places.extend((one, index) for index in range(len(one)))
            for part in one:
                walk(part)

    walk(value)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        if not places or dice.random() < 0.02:
            kinds.append(kind := dice.choice(list(nasty)))
            return _mark(kind)
        owner, key = dice.choice(places)
        what = dice.random()
        if what < 0.8:
            kinds.append(kind := dice.choice(list(nasty)))
            owner[key] = _mark(kind)
        elif isinstance(owner, dict) and key in owner:
            kinds.append("left out" if what < 0.9 else "renamed")
            old = owner.pop(key)
            if what >= 0.9:
                owner[dice.choice(("", "x", "\ud800", "a" * 1000, f"{key}s", str(key).upper()))] = old
    return value
