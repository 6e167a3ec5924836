"""NVIDIA's network pickles of StyleGAN2, from stylegan2-ada-pytorch and from stylegan3, read without their code.

Such a file is a dictionary of networks. A network is a call of `_reconstruct_persistent_obj` with its class's name, the
source text of its module (which the original loader executes; here only its hash is kept) and the state of a torch
module, tensors as nested storage streams. The architecture is read from shapes and checked against what the
constructor was told; nothing that the file computed, such as gains, is used.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inert_pickle import MAX_NAME, Name, ReadingBudget, Refused, Vocabulary, article, read_pickle, shown
from .storage_stream import COMMON_CALLS, NUMPY_NAMES, StoredTensor, empty_dict, load_from_bytes, rebuild_tensor

PERSISTENCE_VERSION = 6
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_ONLY = "only StyleGAN2 generators are read"
# What the pickles of other families contain somewhere, the more specific first: (mark, family, what to do).
OTHER_FAMILIES = (
    (
        b"dnnlib.tflib",
        "a TensorFlow network (StyleGAN, or StyleGAN2 before its PyTorch version)",
        "convert it with legacy.py of NVIDIA's stylegan3 repository, then read its result here",
    ),
    (b"tfutil", "a TensorFlow network (Progressive GAN)", _ONLY),
    (b"SuperresGenerator", "a StyleGAN-XL network", _ONLY),
    (b"pg_modules", "a StyleGAN-XL or Projected GAN network", _ONLY),
    (b"TriPlaneGenerator", "an EG3D network (three-dimensional, tri-plane)", _ONLY),
    (b"training.volumetric_rendering", "an EG3D network", _ONLY),
    (b"networks.generator", "a StyleGAN-T network", _ONLY),
    (b"SynthesisInput", "a StyleGAN3 network (Fourier features)", _ONLY),
)


@dataclass(frozen=True)
class Network:
    """A persistent object of the file: class, hash of its module's source, state of its torch module."""

    class_name: str
    source_sha256: str
    state: dict


@dataclass(frozen=True)
class PickledGenerator:
    """What the file says about its generator: tensors by their names, hints for the configuration, remarks."""

    tensors: dict[str, StoredTensor]
    hints: dict[str, Any]
    class_name: str
    source_sha256: str
    notes: tuple[str, ...]

    def load(self, limit_bytes: int) -> dict[str, Tensor]:
        """All tensors in float32; what is copied for them together may not take more than `limit_bytes` (as stored)."""
        needed = sum(max(tensor.numel, tensor.extent) * tensor.dtype.itemsize for tensor in self.tensors.values())
        if needed > limit_bytes:
            raise Refused(f"tensors of {needed} bytes in a file of {limit_bytes}")
        return {name: tensor.load(torch.float32) for name, tensor in self.tensors.items()}


def other_family(data: bytes | memoryview) -> tuple[str, str] | None:
    """(the family that a refused file seems to belong to, what to do), or None."""
    found = ((family, advice) for mark, family, advice in OTHER_FAMILIES if re.search(re.escape(mark), data))
    return next(found, None)


def read_network_pickle(data: bytes) -> PickledGenerator:
    """The generator of an NVIDIA pickle, its moving average `G_ema` where there is one. Raises Refused."""
    content, end = read_pickle(memoryview(data), 0, _vocabulary(), ReadingBudget(decoded=len(data)))
    if end != len(data):
        raise Refused(f"{len(data) - end} bytes after the end of the pickle")
    if type(content) is Network:
        content = {"G_ema": content}
    if type(content) is not dict:
        raise Refused(f"{article(content)} at the top of the pickle, where NVIDIA writes a dictionary of networks")
    notes = []
    generator = content.get("G_ema")
    if type(generator) is not Network and type(content.get("G")) is Network:
        generator = content["G"]
        notes.append("The file has no averaged generator (G_ema); its G is used, whose images are rougher.")
    if type(generator) is not Network:
        keys = ", ".join(sorted(shown(key) for key in list(content)[:8] if type(key) is str)) or "none"
        raise Refused(f"no generator (G_ema or G) among the keys {keys}")
    return _read_generator(generator, notes)


# ------------------------------------------------------------------------------------------------ the allowed names


def _vocabulary() -> Vocabulary:
    hashes: dict[str, str] = {}

    def reconstruct(name: Name, arguments: tuple, budget: ReadingBudget) -> Network:
        return _network(arguments, hashes)

    return Vocabulary(
        reduce=COMMON_CALLS
        | {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): reconstruct,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch.storage", "_load_from_bytes"): load_from_bytes,
        },
        new={("dnnlib.util", "EasyDict"): empty_dict},
        inert=frozenset((("numpy", "ndarray"),)),
        build=NUMPY_NAMES,
        explain=_explain,
    )


def _explain(module: str, name: str) -> str | None:
    text = f"{module}.{name}"
    family = other_family(text.encode("utf-8", "replace"))
    return f"the name {shown(text)}, which belongs to {family[0]}" if family else None


def _network(arguments: tuple, hashes: dict[str, str]) -> Network:
    """The object that NVIDIA's `_reconstruct_persistent_obj(meta)` would make; hashes: of source texts, kept."""
    if len(arguments) != 1 or type(arguments[0]) is not dict:
        raise Refused("a persistent object that is not described by one dictionary")
    meta = arguments[0]
    fields = {"type": str, "version": int, "module_src": str, "class_name": str, "state": dict}
    for name in fields:
        if name not in meta:
            raise Refused(f"a persistent object without its field {name}")
    if len(meta) != len(fields):
        raise Refused("a persistent object with unknown fields")
    version, source, class_name = meta["version"], meta["module_src"], meta["class_name"]
    if type(version) is not int or version != PERSISTENCE_VERSION:
        found = version if type(version) is int and 0 <= version < 10**6 else "unknown"
        raise Refused(f"version {found} of NVIDIA's persistent objects, where {PERSISTENCE_VERSION} is read")
    if any(type(meta[name]) is not kind for name, kind in fields.items()):
        raise Refused("a persistent object whose fields have other types than NVIDIA writes")
    if meta["type"] != "class":
        raise Refused("a persistent object that is no class")
    if source not in hashes:
        hashes[source] = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
    return Network(class_name, hashes[source], meta["state"])


# ------------------------------------------------------------------------------------------------------ the generator

# Which class stands where. Names are those of the attributes; a class that is not listed is refused by its name.
_CHILDREN = {
    "Generator": (("mapping", "MappingNetwork"), ("synthesis", "SynthesisNetwork")),
    "MappingNetwork": (("embed", "FullyConnectedLayer"), (r"fc\d{1,3}", "FullyConnectedLayer")),
    "SynthesisNetwork": ((r"b\d{1,5}", "SynthesisBlock"),),
    "SynthesisBlock": (("conv[01]", "SynthesisLayer"), ("torgb", "ToRGBLayer"), ("skip", "Conv2dLayer")),
    "SynthesisLayer": (("affine", "FullyConnectedLayer"),),
    "ToRGBLayer": (("affine", "FullyConnectedLayer"),),
    "FullyConnectedLayer": (),
    "Conv2dLayer": (),
}
_MISSING = object()


def _read_generator(network: Network, notes: list[str]) -> PickledGenerator:
    if network.class_name != "Generator":
        raise Refused(f"a network of the class {shown(network.class_name)}, where only StyleGAN2's Generator is known")
    tensors: dict[str, StoredTensor] = {}
    modules: dict[str, Network] = {}
    for path, module in _modules(network):
        modules[path] = module
        prefix = f"{path}." if path else ""
        for group in ("_parameters", "_buffers"):
            for name, value in _dictionary(module, group, path).items():
                if value is None:
                    continue
                if type(value) is not StoredTensor or not re.fullmatch(r"[A-Za-z_]\w{0,63}", name, re.ASCII):
                    raise Refused(f"something else than a tensor as {shown(prefix + name)}")
                if value.dtype not in NUMBERS:
                    raise Refused(f"numbers of the type {str(value.dtype)[6:]} in {prefix}{name}")
                if prefix + name in tensors:
                    raise Refused(f"two tensors named {prefix}{name}")
                tensors[prefix + name] = value
    hints = _hints(modules)
    if any(_attribute(module, "use_fp16") is True for module in modules.values()):
        notes.append(
            "NVIDIA's code computes the largest blocks of this network in half precision on GPUs; here all "
            "are computed in the weights' precision."
        )
    return PickledGenerator(tensors, hints, network.class_name, network.source_sha256, tuple(notes))


def _modules(network: Network) -> Iterator[tuple[str, Network]]:
    """All modules with their paths, parents first; every class in its place (so none within itself), none twice."""
    seen: set[int] = set()
    waiting = [("", network)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen or id(module.state) in seen:
            raise Refused(f"the module {path or 'Generator'} in two places, or within itself")
        seen |= {id(module), id(module.state)}
        yield path, module
        for name, child in _dictionary(module, "_modules", path).items():
            if child is None:
                continue
            place = f"{path}.{name}" if path else name
            if type(child) is not Network:
                raise Refused(f"something else than a network as the module {shown(place)}")
            expected = next(
                (kind for pattern, kind in _CHILDREN[module.class_name] if re.fullmatch(pattern, name, re.ASCII)), None
            )
            if child.class_name not in _CHILDREN:
                raise Refused(f"a module of the unknown class {shown(child.class_name)} as {shown(place)}")
            if child.class_name != expected:
                raise Refused(
                    f"a module of the class {shown(child.class_name)} as {shown(place)}, where StyleGAN2 has "
                    f"{expected or 'none'}"
                )
            waiting.append((place, child))


def _dictionary(module: Network, name: str, path: str) -> dict:
    found = module.state.get(name)
    if type(found) is not dict or any(type(key) is not str for key in found):
        raise Refused(f"a state without {name} in the module {shown(path or 'Generator')}")
    return found


def _plain(value: Any, name: str) -> Any:
    """None, a truth value, a number or a text of a module; `_MISSING` for anything else."""
    if (type(value) is str and len(value) > MAX_NAME) or (type(value) is int and not abs(value) < 1e9):
        raise Refused(f"no usable value as {name} of a module")  # and none that an error message could repeat
    return value if value is None or type(value) in (bool, int, float, str) else _MISSING


def _attribute(module: Network, name: str) -> Any:
    return _plain(module.state.get(name, _MISSING), name)


def _number(value: Any, name: str, path: str) -> Any:
    if value is None or value is _MISSING:
        return value
    if type(value) not in (int, float) or not abs(value) < 1e9 or not math.isfinite(value):
        raise Refused(f"no usable number as {name} of {path}")
    return float(value)


# Attributes that state a field of GeneratorConfig, by class.
_STATED = {
    "Generator": ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels"),
    "SynthesisBlock": ("architecture",),
    "SynthesisLayer": ("conv_clamp", "use_noise"),
    "ToRGBLayer": ("conv_clamp",),
}


def _hints(modules: dict[str, Network]) -> dict[str, Any]:
    """Fields of `GeneratorConfig` that the file states; the caller compares those that shapes show as well."""
    hints: dict[str, Any] = {}

    def state(name: str, value: Any, where: str) -> None:
        if value is _MISSING:
            return
        if name in hints and (type(hints[name]) is not type(value) or hints[name] != value):
            raise Refused(f"{name} {shown(str(value))} in {where}, where other modules have {shown(str(hints[name]))}")
        hints[name] = value

    for path, module in modules.items():
        kind = module.class_name
        for attribute in _STATED.get(kind, ()):
            name = "resolution" if attribute == "img_resolution" else attribute
            value = _attribute(module, attribute)
            state(name, _number(value, name, path) if name == "conv_clamp" else value, path or "Generator")
        if kind == "SynthesisLayer":
            _expect(module, path, up=2 if path.endswith("conv0") else 1, activation="lrelu")
        elif kind == "Conv2dLayer":
            _expect(module, path, up=2, activation="linear")
        elif kind == "FullyConnectedLayer":
            in_mapping = path.startswith("mapping.fc")
            _expect(module, path, activation="lrelu" if in_mapping else "linear")
            multiplier = _multiplier(module, path)
            if in_mapping:
                state("mapping_lr_multiplier", multiplier, path)
            elif multiplier != 1:
                raise Refused(f"a learning rate multiplier of {multiplier:g} in {path}, where StyleGAN2 has 1")
    return hints


def _multiplier(module: Network, path: str) -> float:
    """A dense layer's learning rate multiplier, which scales its weights: as constructed, and its bias's gain."""
    arguments = module.state.get("_init_kwargs")
    gain = _number(_attribute(module, "bias_gain"), "bias_gain", path)
    if type(arguments) is dict:
        given = _number(_plain(arguments.get("lr_multiplier", 1.0), "lr_multiplier"), "lr", path)
    else:
        given = gain
    if given is _MISSING or given is None or given <= 0 or (gain not in (_MISSING, None) and gain != given):
        raise Refused(f"a learning rate multiplier in {path} that its parts do not agree on")
    return given


def _expect(module: Network, path: str, **expected: Any) -> None:
    for name, value in expected.items():
        found = _attribute(module, name)
        if found is not _MISSING and (type(found) is not type(value) or found != value):
            raise Refused(f"{name} {shown(str(found))} in {path}, where StyleGAN2 has {value}")
