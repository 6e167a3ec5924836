"""Generator files: StyleGAN2 read from NVIDIA's pickles, rosinality's checkpoints and safetensors; written; converted.

Whatever the file is called, its first bytes decide how it is read, and nothing in it is ever executed. What is written
is safetensors: NVIDIA's tensor names, the architecture and the file's history in the string metadata.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import FileProblem, first_line
from ..networks.stylegan2 import StyleGAN2
from .file_check import existing_file
from .generator_metadata import FORMAT, GeneratorMetadata
from .generator_weights import LoadedGenerator, assemble_generator, generator_in
from .inert_pickle import Refused
from .model_file import ModelFile, load_checkpoint
from .nested import MARKS
from .network_pickle import other_family, read_network_pickle
from .safetensors_file import write_safetensors
from .torch_pickle import names_part
from .weights import file_tensors

LIMIT_BYTES = 2**31  # the largest published StyleGAN2 files, optimizers included, take half of it
_FULL = ("can't allocate memory", "not enough memory")  # what torch says on the CPU, where it has no error for it
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickle of torch's magic number


def read_generator(path: str | os.PathLike) -> LoadedGenerator:
    """The StyleGAN2 generator in a file: safetensors, an NVIDIA `.pkl`, or a rosinality / StyleGAN-NADA `.pt`.

    The moving average is taken where a file has one. Raises FileProblem, naming the reason, for every file that is no
    such generator.
    """
    path = existing_file(path)
    kind = _kind(path)
    size = path.stat().st_size
    if size > LIMIT_BYTES:
        raise FileProblem(f"{path}: expected a generator of at most {LIMIT_BYTES} bytes, found {size}; give it alone.")
    try:
        if kind == "safetensors":
            return _read_safetensors(path)
        return _read_torch(path) if kind == "torch" else _read_network_pickle(path)
    except (RecursionError, MemoryError, OverflowError, OSError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(sign in str(error) for sign in _FULL):
            raise
        raise FileProblem(
            f"{path}: the file could not be read ({first_line(error)}); it is damaged or too large for this computer."
        ) from error


def write_generator(
    path: str | os.PathLike, generator: StyleGAN2, metadata: GeneratorMetadata | None = None, dtype: str = "fp32"
) -> Path:
    """Write a generator atomically as safetensors, in "fp32", "fp16" or "bf16". Returns the path.

    Raises FileProblem for weights that are not finite, or that fp16 cannot hold, and for another file name.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise FileProblem(f"{path}: expected a name that ends in .safetensors; generators are safetensors files.")
    metadata = metadata or GeneratorMetadata()
    if not metadata.name:
        metadata = replace(metadata, name=path.stem)
    tensors = file_tensors(generator.state_dict(), dtype, path)
    return write_safetensors(path, tensors, metadata.to_strings(generator.config))


def convert_generator(
    source: str | os.PathLike, target: str | os.PathLike, *, dtype: str = "fp32", name: str = ""
) -> Path:
    """Write the generator of any readable file as safetensors, with the source's hash. Returns `target`."""
    target = Path(target)
    if target.exists() and target.samefile(source):
        raise FileProblem(f"{target}: expected another file to write than the one to read; choose another name.")
    loaded = read_generator(source)
    metadata = replace(loaded.metadata, name=name) if name else loaded.metadata
    return write_generator(target, loaded.generator, metadata, dtype)


def holds_generator(path: str | os.PathLike) -> bool:
    """Whether a file seems to be a generator, by its first bytes and names alone; `read_generator` says for certain.

    Raises FileProblem for what is no model file at all.
    """
    path = existing_file(path)
    try:
        kind = _kind(path)
    except FileProblem:
        return False
    if kind == "network pickle":
        return True
    if kind == "safetensors":
        file = ModelFile(path)
        return file.metadata.get("format") == FORMAT or any(key.endswith(tuple(MARKS)) for key in file.keys)
    names = names_part(path)
    return any(mark.encode() in names for mark in MARKS)


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(200)
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith((b"PK\x03\x04", _LEGACY_TORCH)):
        return "torch"
    if start[:1] == b"\x80" and len(start) > 1:
        return "network pickle"
    raise FileProblem(f"{path}: expected a generator (.safetensors, .pkl or .pt), found something else.")


def _read_safetensors(path: Path) -> LoadedGenerator:
    file = ModelFile(path)
    values, tensors = file.metadata, file.tensors()
    if values.get("format") == FORMAT:
        metadata, config = GeneratorMetadata.from_strings(values, path)
        return assemble_generator(path, tensors, metadata, [], config=config)
    licence = values.get("modelspec.license", "")
    metadata = GeneratorMetadata(name=path.stem, source_format="safetensors", licence=licence)
    return generator_in(path, tensors, metadata, values)


def _read_torch(path: Path) -> LoadedGenerator:
    try:
        content = load_checkpoint(path, "use the original file from its authors")
    except FileProblem as problem:
        family = other_family(names_part(path)) if "found a whole module" in str(problem) else None
        if family is None:
            raise
        raise FileProblem(f"{path}: expected a StyleGAN2 generator, found {family[0]}; {family[1]}.") from None
    stated = {"format": content.get("format")} if isinstance(content, Mapping) else {}
    metadata = GeneratorMetadata(name=path.stem, class_name="Generator", source_sha256=_sha256(path))
    return generator_in(path, content, metadata, stated)


def _read_network_pickle(path: Path) -> LoadedGenerator:
    data = path.read_bytes()
    try:
        pickled = read_network_pickle(data)
        tensors = pickled.load(len(data))
    except Refused as problem:
        family = other_family(data)
        if family is not None:
            found = f"a StyleGAN2 generator, found {family[0]}; {family[1]} (reading stopped at {problem})"
        elif b"_modules" in data and b"torch_utils" not in data:
            found = (
                f"a StyleGAN2 network pickle, found a whole module, which only the code that saved it can read "
                f"({problem}); save its state_dict() there with torch.save"
            )
        else:
            found = (
                f"a StyleGAN2 network pickle, found {problem}; nothing of it was executed, use the original file from "
                "its authors"
            )
        raise FileProblem(f"{path}: expected {found}.") from None
    metadata = GeneratorMetadata(
        name=path.stem,
        class_name=pickled.class_name,
        source_format="NVIDIA pickle",
        source_sha256=hashlib.sha256(data).hexdigest(),
        source_code_sha256=pickled.source_sha256,
    )
    return assemble_generator(path, tensors, metadata, list(pickled.notes), **pickled.hints)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
