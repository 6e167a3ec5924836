"""Generator files: StyleGAN2 from NVIDIA's pickles, rosinality's checkpoints and this project's safetensors.

Whatever the file is called, its first bytes decide how it is read, and nothing in it is ever executed. What is written
is safetensors: NVIDIA's tensor names, the architecture and the file's history in the string metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Problem
from ..networks.stylegan2 import GeneratorConfig, StyleGAN2, generator_config_from_state_dict
from ..plain_json import parse_json
from . import rosinality
from .inert_pickle import Refused, shown
from .nested import AVERAGED, MARKS, ROUGH, Ambiguous, FoundGenerator, all_names, find_generator
from .network_pickle import read_network_pickle, recognise
from .recognise import GENERATOR, Kind, refusal, refusal_of
from .tensors import (
    FileProblem,
    ModelFile,
    _existing,
    _first_line,
    _read_header,
    check_finite,
    file_tensors,
    load_checkpoint,
    names_part,
    write_safetensors,
)

FORMAT = "indomain_guidance.generator"
VERSION = "1"
LIMIT_BYTES = 2**31  # the largest published StyleGAN2 files, optimizers included, take half of it
MAX_RESOLUTION = 2**14
MEAN_SAMPLES = 10_000  # latents that the mean style is measured on where a file has none
MAX_FEATURES = 2**15  # of a latent and its label on their way to a style, all layers together, for measuring it
_FULL = ("can't allocate memory", "not enough memory")  # what torch says on the CPU, where it has no error for it
NOISE_SEED = 0  # of the constant noise where a file has none
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number's pickle


@dataclass(frozen=True)
class GeneratorMetadata:
    """What a generator file says about itself; empty where it does not say.

    source_format: "NVIDIA pickle", "rosinality checkpoint" or "safetensors", what the weights were first read from;
    source_sha256: of that file; class_name: as NVIDIA calls the network's class; source_code_sha256: of the source text
    in the pickle. history: what was done to the weights, oldest first, JSON-able mappings (an adaptation states prompt,
    steps, parent). extra: further string metadata, kept as it is.
    """

    name: str = ""
    licence: str = ""
    class_name: str = ""
    source_format: str = ""
    source_sha256: str = ""
    source_code_sha256: str = ""
    history: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)

    _TEXTS = ("name", "licence", "class_name", "source_format", "source_sha256", "source_code_sha256")

    def to_strings(self, config: GeneratorConfig) -> dict[str, str]:
        """The metadata of the file: strings only, absent fields left out; `from_strings` inverts it."""
        values = {"format": FORMAT, "version": VERSION, "config": config.to_json()}
        values |= {name: getattr(self, name) for name in self._TEXTS if getattr(self, name)}
        if self.history:
            # ASCII: it names files, and a file's name in Python may hold what UTF-8 cannot.
            values["history"] = json.dumps([dict(entry) for entry in self.history])
        values |= self._modelspec(config)
        clashes = [key for key in self.extra if key in values and not key.startswith("modelspec.")]
        if clashes:
            raise Problem(f"Generator file: the extra metadata {clashes[0]!r} is a field of the format; set the field.")
        return values | dict(self.extra)

    def _modelspec(self, config: GeneratorConfig) -> dict[str, str]:
        """Fields of Stability's ModelSpec 1.0.1, which other tools show."""
        spec = {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "stylegan2/generator",
            "modelspec.implementation": "https://github.com/NVlabs/stylegan2-ada-pytorch",
            "modelspec.title": self.name or "generator",
            "modelspec.resolution": f"{config.width}x{config.height}",
        }
        return spec | ({"modelspec.license": self.licence} if self.licence else {})

    @classmethod
    def from_strings(
        cls, values: Mapping[str, str], source: str | os.PathLike
    ) -> tuple[GeneratorMetadata, GeneratorConfig]:
        """Inverse of `to_strings`; `source` names the file. Raises FileProblem for other or newer formats."""
        if values.get("format") != FORMAT:
            raise FileProblem(
                f"{source}: expected metadata of the format {FORMAT}, found {shown(values.get('format', 'none'))}; "
                "make the file with this project."
            )
        if values.get("version") != VERSION:
            raise FileProblem(
                f"{source}: expected version {VERSION} of the generator format, found "
                f"{shown(values.get('version', 'none'))}; update In-Domain Guidance."
            )
        if "config" not in values:
            raise FileProblem(f"{source}: expected the architecture in the metadata field config, found none.")
        try:
            config = GeneratorConfig.from_json(values["config"])
            history = parse_json(values.get("history", "[]"))
            if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
                raise Problem("the history is no list of objects")
        except ValueError as error:
            raise FileProblem(
                f"{source}: the metadata cannot be read ({_first_line(error)}); the file is damaged, make it again."
            ) from error
        described = cls(**{name: values.get(name, "") for name in cls._TEXTS}, history=tuple(history))
        derived = described.to_strings(config)
        return replace(described, extra={key: text for key, text in values.items() if key not in derived}), config


@dataclass(frozen=True)
class LoadedGenerator:
    """A generator on the CPU (float32, evaluation mode, no gradients), its metadata, and remarks worth showing."""

    generator: StyleGAN2
    metadata: GeneratorMetadata
    notes: tuple[str, ...] = ()


def read_generator(
    path: str | os.PathLike, *, limit_bytes: int = LIMIT_BYTES, prefer_converted: bool = True
) -> LoadedGenerator:
    """The StyleGAN2 generator in a file: safetensors, an NVIDIA `.pkl`, or a rosinality / StyleGAN-NADA `.pt`.

    The moving average is taken where a file has one. limit_bytes: larger files are refused. prefer_converted: where a
    conversion (`convert_generator`) of exactly this file lies beside it under its name with .safetensors, unrounded
    and unchanged, read that.
    Raises FileProblem, naming the reason, for every file that is no such generator.
    """
    path = _existing(path)
    kind = _kind(path)
    size = path.stat().st_size
    if size > limit_bytes:
        raise FileProblem(
            f"{path}: expected a generator of at most {limit_bytes} bytes, found {size}; raise the limit if you trust "
            "the file."
        )
    try:
        if kind == "safetensors":
            return _read_safetensors(path)
        if kind == "torch":
            return _converted(path, None, prefer_converted) or _read_torch(path)
        data = path.read_bytes()
        if len(data) > limit_bytes:
            raise FileProblem(f"{path}: the file grows while it is read; wait until it is complete.")
        return _converted(path, data, prefer_converted) or _read_network_pickle(path, data)
    except (RecursionError, MemoryError, OverflowError, OSError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(sign in str(error) for sign in _FULL):
            raise
        raise FileProblem(
            f"{path}: the file could not be read ({_first_line(error)}); it is damaged or too large for this computer."
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
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: str = "fp32",
    name: str = "",
    limit_bytes: int = LIMIT_BYTES,
) -> Path:
    """Write the generator of any readable file as safetensors, one way, with the source's hash. Returns `target`."""
    target = Path(target)
    if target.exists() and target.samefile(source):
        raise FileProblem(f"{target}: expected another file to write than the one to read; choose another name.")
    loaded = read_generator(source, limit_bytes=limit_bytes, prefer_converted=False)
    metadata = replace(loaded.metadata, name=name) if name else loaded.metadata
    return write_generator(target, loaded.generator, metadata, dtype)


def holds_generator(path: str | os.PathLike) -> bool:
    """Whether a file seems to be a generator, by its first bytes and names alone; `read_generator` says for certain.

    Raises FileProblem for what is no model file at all.
    """
    path = _existing(path)
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


# ------------------------------------------------------------------------------------------------------ the four kinds


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(200)
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith((b"PK\x03\x04", _LEGACY_TORCH)):
        return "torch"
    if start[:1] == b"\x80" and len(start) > 1:
        return "network pickle"
    if start[:1] in (b"(", b"c", b"]", b"}") and b"\n" in start:
        raise FileProblem(
            f"{path}: expected a generator, found what seems to be a pickle of protocol 0 or 1, which networks are "
            "never saved in; use the original file."
        )
    raise FileProblem(f"{path}: expected a generator (.safetensors, .pkl or .pt), found something else.")


def _read_network_pickle(path: Path, data: bytes) -> LoadedGenerator:
    try:
        pickled = read_network_pickle(data)
        tensors = pickled.load(len(data))
    except Refused as problem:
        family = recognise(data)
        if family is not None:
            raise FileProblem(
                f"{path}: expected a StyleGAN2 generator, found {family[0]}; {family[1]} (reading stopped at "
                f"{problem})."
            ) from None
        if b"_modules" in data and b"torch_utils" not in data:
            raise FileProblem(
                f"{path}: expected a StyleGAN2 network pickle, found a whole module, which only the code that saved it "
                f"can read ({problem}); save its state_dict() there with torch.save."
            ) from None
        raise FileProblem(
            f"{path}: expected a StyleGAN2 network pickle, found {problem}; nothing of it was executed, use the "
            "original file from its authors."
        ) from None
    metadata = GeneratorMetadata(
        name=path.stem,
        class_name=pickled.class_name,
        source_format="NVIDIA pickle",
        source_sha256=hashlib.sha256(data).hexdigest(),
        source_code_sha256=pickled.source_sha256,
    )
    return _finish(path, tensors, metadata, list(pickled.notes), **pickled.hints)


def _read_torch(path: Path) -> LoadedGenerator:
    try:
        content = load_checkpoint(path, "use the original file from its authors")
    except FileProblem as problem:
        family = recognise(names_part(path)) if "found a whole module" in str(problem) else None
        if family is None:
            raise
        raise FileProblem(f"{path}: expected a StyleGAN2 generator, found {family[0]}; {family[1]}.") from None
    stated = {"format": content.get("format")} if isinstance(content, Mapping) else {}
    loaded = _read_content(path, content, GeneratorMetadata(name=path.stem, class_name="Generator"), stated)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(2**20), b""):
            digest.update(piece)
    return replace(loaded, metadata=replace(loaded.metadata, source_sha256=digest.hexdigest()))


def _read_content(path: Path, content: Any, metadata: GeneratorMetadata, stated: Mapping[str, Any]) -> LoadedGenerator:
    """The generator somewhere within the plain tensors of a file, wherever a tool has put it. stated: its metadata."""
    try:
        found = find_generator(content)
    except Ambiguous as problem:
        raise FileProblem(
            f"{path}: expected one StyleGAN2 generator, found {problem}; save the wanted one alone."
        ) from None
    if found is None and not isinstance(content, Mapping):
        raise FileProblem(refusal_of(path, GENERATOR, Kind(f"a {type(content).__name__}")))
    if found is None:
        raise FileProblem(refusal(path, GENERATOR, all_names(content), stated))
    notes = []
    if found.place in ROUGH:
        notes.append(
            f"The file has no averaged generator (g_ema); its {found.place} is used, whose images are rougher."
        )
    elif not found.alone and found.place not in AVERAGED:
        notes.append(f"Read from {shown(found.place)} of the file; what else it holds is left out.")
    metadata = replace(metadata, source_format=metadata.source_format or f"{found.layout} checkpoint")
    if found.layout == "NVIDIA":
        notes.append(
            "The file says nothing of its architecture; activations are taken as unbounded and the mapping's "
            "learning rate multiplier as 0.01."
        )
        return _finish(path, _plain(path, found.tensors), metadata, notes)
    return _from_rosinality(path, found, metadata, notes)


def _plain(path: Path, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Named tensors in float32 that are no larger together than the file. Raises FileProblem for anything else."""
    size = path.stat().st_size
    needed = 0
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise FileProblem(f"{path}: expected a StyleGAN2 generator, found no tensor as {shown(str(key))}.")
        if not value.is_floating_point() or value.is_sparse:
            raise FileProblem(f"{path}: expected weights as plain numbers, found {value.dtype} in {shown(key)}.")
        needed += value.numel() * value.element_size()
    if needed > size:  # strides of 0, or one storage under many names
        raise FileProblem(
            f"{path}: expected at most {size} bytes of weights, found tensors that claim {needed}; the file is damaged."
        )
    return {key: tensor.detach().to(torch.float32).contiguous() for key, tensor in weights.items()}


def _from_rosinality(
    path: Path, found: FoundGenerator, metadata: GeneratorMetadata, notes: list[str]
) -> LoadedGenerator:
    size = path.stat().st_size
    weights = _plain(path, found.tensors)
    try:
        if found.layout == "BasicSR":
            weights = rosinality.from_basicsr(weights)
        tensors = rosinality.to_nvidia(weights, found.mean)
    except ValueError as problem:
        raise FileProblem(
            f"{path}: expected a StyleGAN2 generator in the layout of {found.layout}, found that {problem}; use a "
            "checkpoint of the unchanged network."
        ) from problem
    lacking = rosinality.noise_without_constants(tensors)
    if 4 * sum(height * width for height, width in lacking.values()) > size:
        raise FileProblem(
            f"{path}: expected a StyleGAN2 generator of rosinality's layout, found strengths of noise for more pixels "
            "than the file has weights; the file is damaged."
        )
    if lacking:
        random = torch.Generator().manual_seed(NOISE_SEED)
        for key in sorted(lacking):
            tensors[key] = torch.randn(lacking[key], generator=random)
        notes = [
            *notes,
            "The file has no constant noise; it was drawn from a fixed seed, so that images differ in "
            "details from others of this network.",
        ]
    return _finish(path, tensors, metadata, notes, img_channels=3, architecture="skip")


def _read_safetensors(path: Path) -> LoadedGenerator:
    file = ModelFile(path)
    values, tensors = file.metadata, file.tensors()
    if values.get("format") == FORMAT:
        metadata, config = GeneratorMetadata.from_strings(values, path)
        return _finish(path, tensors, metadata, [], config=config)
    metadata = GeneratorMetadata(
        name=path.stem, source_format="safetensors", licence=values.get("modelspec.license", "")
    )
    return _read_content(path, tensors, metadata, values)


def _finish(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: GeneratorMetadata,
    notes: list[str],
    config: GeneratorConfig | None = None,
    **hints: Any,
) -> LoadedGenerator:
    """Compare names and shapes with what the architecture needs, then make the generator of the tensors themselves."""
    odd = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if odd:
        raise FileProblem(f"{path}: expected weights as plain numbers, found {tensors[odd[0]].dtype} in {odd[0]}.")
    check_finite(tensors, path)
    try:
        if config is None:
            config = generator_config_from_state_dict(tensors, **hints)
        if config.resolution > MAX_RESOLUTION or config.mapping_layers > len(tensors):
            raise Problem(f"{config.mapping_layers} mapping layers, {len(config.channels)} resolutions")
        with torch.device("meta"):
            generator = StyleGAN2(config)
    except (ValueError, TypeError, RuntimeError) as problem:
        raise FileProblem(
            f"{path}: expected a StyleGAN2 generator, found another network ({_first_line(problem)}); use a file of "
            "the unchanged architecture."
        ) from problem
    expected = {key: tuple(tensor.shape) for key, tensor in generator.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items() if not key.endswith(".resample_filter")}
    if "mapping.w_avg" not in found:
        expected.pop("mapping.w_avg")
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise FileProblem(
            f"{path}: expected the {len(expected)} tensors of a StyleGAN2 generator, found "
            f"{_listed('missing', missing)}{' and ' if missing and unexpected else ''}"
            f"{_listed('unexpected', unexpected)}; the file is damaged or of another network."
        )
    for key, shape in expected.items():
        if found[key] != shape:
            raise FileProblem(
                f"{path}: expected {key} of the shape {list(shape)}, found {list(found[key])}; the file is damaged."
            )
    averaged = "mapping.w_avg" in found
    plain = {key: tensor.to(torch.float32).contiguous() for key, tensor in tensors.items()}
    if not averaged:
        plain["mapping.w_avg"] = torch.zeros(config.w_dim)
    try:
        generator.load_state_dict(plain, assign=True)
    except (ValueError, RuntimeError) as problem:
        raise FileProblem(f"{path}: expected a StyleGAN2 generator, found that {_first_line(problem)}.") from problem
    generator.eval().requires_grad_(False)
    if not averaged:
        features = config.c_dim + sum(generator.mapping.widths)
        if features > MAX_FEATURES:
            raise FileProblem(
                f"{path}: expected a mean style (mapping.w_avg), or at most {MAX_FEATURES} features in all layers of "
                f"the mapping to measure it on, found {features}; the file is damaged or of another network."
            )
        with torch.no_grad():
            generator.mapping.w_avg.copy_(generator.mean_style(MEAN_SAMPLES))
        notes = [*notes, f"The file has no mean style for all layers; it was measured on {MEAN_SAMPLES} latents."]
    return LoadedGenerator(generator, metadata, tuple(notes))


def _listed(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{what} {', '.join(shown(key) for key in keys[:3])}{more}"


def _converted(path: Path, data: bytes | None, wanted: bool) -> LoadedGenerator | None:
    """The conversion of exactly this file that lies beside it, if there is one."""
    beside = path.with_suffix(".safetensors")
    if not wanted or beside == path or not beside.is_file():
        return None
    try:
        header = _read_header(beside)
        stated = header.pop("__metadata__", {})
        if any(entry.get("dtype") != "F32" for entry in header.values()):  # smaller, for being chosen by its own name
            return None
        if stated.get("format") != FORMAT or stated.get("history") or not stated.get("source_sha256"):
            return None
        digest = hashlib.sha256(path.read_bytes() if data is None else data).hexdigest()
        if digest != stated["source_sha256"]:
            return None
        loaded = _read_safetensors(beside)
    except FileProblem:
        return None
    return replace(loaded, notes=(*loaded.notes, f"Read from its conversion {beside.name}."))
