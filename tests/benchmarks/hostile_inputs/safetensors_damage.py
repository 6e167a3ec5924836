"""Safetensors files with headers that lie: entries, offsets, metadata, nesting, sizes; and files of large holes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import NASTY, _mark, damaged_bytes, damaged_json, written

DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "C64",
    "X",
    "",
)
NUMBERS = (0, 1, -1, 2, 7, 2**16, 2**31 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, numbers) of a whole file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def settled(data: bytes) -> bytes:
    """The file with its metadata in order: safetensors writes them in any, and an input follows from its number."""
    header, numbers = split(data)
    metadata = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items()))}
    text = json.dumps({**metadata, **header}).encode()
    return joined(text + b" " * (-len(text) % 8), numbers)


def joined(header: bytes, numbers: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header's text. length: what the file says it is."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + numbers


def damaged(data: bytes, dice: random.Random) -> tuple[str, bytes]:
    """(what was done, a damaged copy of the file `data`)."""
    what = dice.random()
    if what < 0.35:
        return damaged_bytes(data, dice)
    header, numbers = split(data)
    if what < 0.55:
        kind, text = damaged_metadata(header, dice)
        return f"metadata: {kind}", joined(text, numbers)
    if what < 0.65:
        kind, text = damaged_json(header, dice)
        return f"header: {kind}", joined(text, numbers)
    kinds = [_damage_entry(header, dice) for _ in range(dice.choice((1, 1, 2, 6)))]
    return "entry: " + ", ".join(kinds), joined(json.dumps(header).encode(), numbers)


def damaged_metadata(header: dict[str, Any], dice: random.Random) -> tuple[str, bytes]:
    """A field of the string metadata replaced, or damaged as the JSON that it is."""
    metadata = header.setdefault("__metadata__", {})
    if not metadata or dice.random() < 0.1:
        header["__metadata__"] = _mark(kind := dice.choice(list(NASTY)))
        return written(header, [kind], NASTY)
    name = dice.choice(list(metadata))
    try:
        inner = json.loads(metadata[name])
    except (ValueError, RecursionError):
        inner = None
    if isinstance(inner, (dict, list)) and dice.random() < 0.8:
        kind, text = damaged_json(inner, dice)
        metadata[name] = text.decode("utf-8", "replace")
    elif dice.random() < 0.7:
        kind = dice.choice(list(NASTY))
        metadata[name] = NASTY[kind].strip('"') if dice.random() < 0.5 else NASTY[kind]
    else:
        kind = dice.choice(("left out", "not a text", "emptied"))
        if kind == "left out":
            del metadata[name]
        else:
            metadata[name] = "" if kind == "emptied" else dice.choice((1, None, [], {}, True))
    return f"{name} {kind}", json.dumps(header).encode()


def _damage_entry(header: dict[str, Any], dice: random.Random) -> str:
    names = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
    if not names:
        return "nothing"
    name, other = dice.choice(names), dice.choice(names)
    entry = header[name]
    kind = dice.choice(
        ("dtype", "size", "sizes", "offset", "swap", "rename", "left out", "copy", "transpose", "flatten")
    )
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if kind == "dtype":
        entry["dtype"] = dice.choice(DTYPES)
    elif kind in ("size", "sizes") and isinstance(shape, list):
        if kind == "sizes" or not shape:
            entry["shape"] = dice.choice(
                ([], [0], [1] * 70, [0, 2**62], [2**31, 2**31, 4], [-1, -1], ["1"], None, 7, [1.5], [True])
            )
        else:
            shape[dice.randrange(len(shape))] = dice.choice(NUMBERS)
    elif kind == "offset" and isinstance(offsets, list) and offsets:
        offsets[dice.randrange(len(offsets))] = dice.choice(NUMBERS)
    elif kind == "swap":
        header[name], header[other] = header[other], header[name]
    elif kind == "rename":
        fresh = dice.choice(
            (
                "",
                "x",
                "a" * 3000,
                "\ud800",
                f"{name}.weight",
                name.replace(".", "/"),
                "__class__",
                f"model.diffusion_model.{name}",
                "../../x",
                "\x1b[31m",
            )
        )
        header[fresh] = header.pop(name)
    elif kind == "left out":
        del header[name]
    elif kind == "copy":
        header[name] = dict(header[other])
    elif kind == "transpose" and isinstance(shape, list):
        shape.reverse()
    elif kind == "flatten" and isinstance(shape, list) and all(isinstance(one, int) for one in shape):
        product = 1
        for one in shape:
            product *= one
        entry["shape"] = [product]
    return kind


def hole(header: dict[str, Any] | bytes, size: int) -> Callable[[Path], None]:
    """Writes a file whose numbers are a hole of `size` bytes, which takes no room on most disks."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def write(path: Path) -> None:
        path.write_bytes(joined(text))
        with open(path, "r+b") as file:
            file.truncate(8 + len(text) + size)

    return write


def hostile_headers(metadata: dict[str, str]) -> dict[str, bytes]:
    """Files by hand that have little to do with one another but a header. metadata: of a good file."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    deep = {**metadata, "config": "[" * 100_000 + "]" * 100_000}
    digits = {**metadata, "config": '{"a": ' + "9" * 5000 + "}"}
    with_metadata = {"weight": entry, "__metadata__": metadata}

    def tensors(text: str, count: int) -> bytes:
        return b"{" + b",".join(b'"t%d":' % number + text.encode() for number in range(count)) + b"}"

    return {
        "1,000,000 empty lists": joined(b'{"a":[' + b"[]," * 999_999 + b"[]]}"),
        "3 MB of empty lists as a shape": joined(
            b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + b"[]," * 999_999 + b"[]]}}", bytes(4)
        ),
        "300,000 entries that are empty lists": joined(tensors("[]", 300_000)),
        "100,000 empty tensors": joined(tensors('{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', 100_000)),
        "100,000 brackets": joined(b"{" + b'"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "100,000 braces": joined(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "open brackets": joined(b'{"a":' + b"[" * 100_000),
        "config of 100,000 brackets": joined(json.dumps({"weight": entry, "__metadata__": deep}).encode(), bytes(4)),
        "config with 5,000 digits": joined(json.dumps({"weight": entry, "__metadata__": digits}).encode(), bytes(4)),
        "metadata alone": joined(json.dumps({"__metadata__": metadata}).encode()),
        "metadata of 3 MB": joined(
            json.dumps({**with_metadata, "__metadata__": {**metadata, "note": "x" * 3_000_000}}).encode(), bytes(4)
        ),
        "metadata of 100,000 fields": joined(
            json.dumps(
                {**with_metadata, "__metadata__": {**metadata, **{f"k{n}": "" for n in range(100_000)}}}
            ).encode(),
            bytes(4),
        ),
        "metadata that is a list": joined(json.dumps({"weight": entry, "__metadata__": []}).encode(), bytes(4)),
        "header of 2 ** 63 bytes": joined(b"{}", length=2**63),
        "header of 100 MB, 2 bytes there": joined(b"{}", length=100_000_000),
        "header of nothing": joined(b"{}"),
        "header of no bytes": joined(b"", length=0),
        "header of spaces": joined(b"{" + b" " * 2_000_000 + b"}"),
        "number of 2,000,000 digits": joined(b'{"a":' + b"9" * 2_000_000 + b"}"),
        "offsets that are 5,000 digits": joined(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}"
        ),
        "offsets that are infinite": joined(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}', bytes(4)),
        "offsets that are true": joined(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[false,true]}}', bytes(4)),
        "offsets backwards": joined(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', bytes(4)),
        "name of a megabyte": joined(json.dumps({"n" * 1_000_000: entry}).encode(), bytes(4)),
        "name with escape sequences": joined(json.dumps({"\x1b[31m\x07\n": entry}).encode(), bytes(4)),
        "shape of a petabyte": joined(
            b'{"a":{"dtype":"F32","shape":[1000000,1000000,250],"data_offsets":[0,4]}}', bytes(4)
        ),
        "empty file": b"",
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "web page": b"<!DOCTYPE html><html><body>404</body></html>",
        "GGUF": b"GGUF" + bytes(1000),
        "zip without anything": b"PK\x05\x06" + bytes(18),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
    }
