"""Writes pickle streams instruction by instruction: networks as NVIDIA's code saves them, attacks on readers, damage.

Nothing here is taken from NVIDIA's code, and no stream that is written here executes anything when it is read as data;
read by Python's own pickle, most of the attacks would.
"""

from __future__ import annotations

import io
import random
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from indomain_guidance.guidance.networks.stylegan2 import StyleGAN2, random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig
from torch import Tensor


@dataclass(frozen=True)
class Name:
    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """REDUCE, NEWOBJ where `new`, then BUILD where there is a `state` and SETITEMS where there are `items`."""

    function: Name
    arguments: tuple
    new: bool = False
    state: Any = None
    items: tuple = ()


@dataclass(frozen=True)
class Raw:
    """Instructions as they are; they have to leave one value."""

    code: bytes


@dataclass(frozen=True)
class Keep:
    """A value, kept to be referred to by a name."""

    value: Any
    name: str


@dataclass(frozen=True)
class Again:
    """The value that was kept under a name."""

    name: str


@dataclass(frozen=True)
class Filled:
    """A dictionary that is there already, with further items."""

    value: Any
    items: dict


PERSISTENT = Name("torch_utils.persistence", "_reconstruct_persistent_obj")
TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
PARAMETER = Name("torch._utils", "_rebuild_parameter")
FROM_BYTES = Name("torch.storage", "_load_from_bytes")
ORDERED = Name("collections", "OrderedDict")
EASY = Name("dnnlib.util", "EasyDict")
SYSTEM = Name("os", "system")


class Writer:
    """One stream of protocol 2 to 5. Equal texts and the same containers are written once, then referred to."""

    def __init__(self, protocol: int) -> None:
        self.protocol, self.out, self.kept, self.alive = protocol, io.BytesIO(), {}, []

    def dump(self, value: Any) -> bytes:
        self.out.write(bytes([0x80, self.protocol]))
        self.write(value)
        return self.out.getvalue() + b"."

    def keep(self, key: Any, value: Any = None) -> None:
        self.alive.append(value)  # an id is unique only while its object lives
        self.kept[key] = index = len(self.kept)
        if self.protocol >= 4:
            self.out.write(b"\x94")
        else:
            self.out.write(b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index))

    def known(self, key: Any) -> bool:
        if key not in self.kept:
            return False
        index = self.kept[key]
        self.out.write(b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index))
        return True

    def name(self, name: Name) -> None:
        if self.known(name):
            return
        if self.protocol >= 4:
            self.write(name.module)
            self.write(name.name)
            self.out.write(b"\x93")
        else:
            self.out.write(b"c" + f"{name.module}\n{name.name}\n".encode())
        self.keep(name)

    def text(self, value: str) -> None:
        if self.known(("text", value)):
            return
        data = value.encode()
        short = self.protocol >= 4 and len(data) < 256
        self.out.write((b"\x8c" + bytes([len(data)]) if short else b"X" + struct.pack("<I", len(data))) + data)
        self.keep(("text", value))

    def binary(self, value: bytes) -> None:
        if self.protocol == 2:
            self.write(Call(Name("_codecs", "encode"), (value.decode("latin-1"), "latin1")))
            return
        size = b"C" + bytes([len(value)]) if len(value) < 256 else b"B" + struct.pack("<I", len(value))
        self.out.write(size + value)

    def write(self, value: Any) -> None:
        simple = {None: b"N", True: b"\x88", False: b"\x89"}
        if value is None or value is True or value is False:
            self.out.write(simple[value])
        elif isinstance(value, Raw):
            self.out.write(value.code)
        elif isinstance(value, Keep):
            self.write(value.value)
            self.keep(("kept", value.name))
        elif isinstance(value, Again):
            if not self.known(("kept", value.name)):
                raise ValueError(f"Expected a value that was kept as {value.name} before.")
        elif isinstance(value, Filled):
            self.write(value.value)
            self.items(tuple(value.items.items()))
        elif isinstance(value, Name):
            self.name(value)
        elif isinstance(value, Call):
            self.call(value)
        elif isinstance(value, str):
            self.text(value)
        elif isinstance(value, bytes):
            self.binary(value)
        elif isinstance(value, float):
            self.out.write(b"G" + struct.pack(">d", value))
        elif isinstance(value, int):
            self.integer(value)
        else:
            self.container(value)

    def integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.out.write(b"K" + bytes([value]))
        elif -(2**31) <= value < 2**31:
            self.out.write(b"J" + struct.pack("<i", value))
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out.write(b"\x8a" + bytes([len(data)]) + data)

    def container(self, value: Any) -> None:
        key = ("id", id(value))
        if self.known(key):
            return
        if isinstance(value, tuple):
            if 0 < len(value) <= 3:
                for item in value:
                    self.write(item)
                self.out.write(bytes([0x84 + len(value)]))
            else:
                self.marked(value, b"t")
            return
        if isinstance(value, set) and self.protocol < 4:
            module = "builtins" if self.protocol == 3 else "__builtin__"
            self.write(Call(Name(module, "set"), (sorted(value),)))
            return
        self.out.write({list: b"]", dict: b"}", set: b"\x8f"}[type(value)])
        self.keep(key, value)
        if isinstance(value, dict):
            self.items(tuple(value.items()))
        elif value:
            self.marked(value, b"e" if isinstance(value, list) else b"\x90")

    def marked(self, items: Any, end: bytes) -> None:
        self.out.write(b"(")
        for item in items:
            self.write(item)
        self.out.write(end)

    def items(self, items: tuple) -> None:
        if items:
            self.marked([part for item in items for part in item], b"u")

    def call(self, call: Call) -> None:
        self.name(call.function)
        self.write(call.arguments)
        self.out.write(b"\x81" if call.new else b"R")
        self.items(call.items)
        if call.state is not None:
            self.write(call.state)
            self.out.write(b"b")


def dump(value: Any, protocol: int = 4) -> bytes:
    return Writer(protocol).dump(value)


# ------------------------------------------------------------------------------------------------------------- networks


def storage_bytes(tensor: Tensor) -> bytes:
    """What torch itself puts into a pickle for the tensor's storage."""
    _, arguments = tensor.detach().__reduce_ex__(2)[1][0].__reduce__()
    return arguments[0]


def tensor(value: Tensor, *, parameter: bool = False, **changed: Any) -> Call:
    """A tensor as torch pickles it; `changed`: other claims (data, offset, size, stride, hooks) than true ones."""
    true = {
        "data": storage_bytes(value),
        "offset": value.storage_offset(),
        "size": tuple(value.shape),
        "stride": tuple(value.stride()),
        "requires_grad": False,
        "hooks": Call(ORDERED, ()),
    }
    data, *rest = (true | changed).values()
    made = Call(TENSOR, (Call(FROM_BYTES, (data,)), *rest))
    return Call(PARAMETER, (made, True, Call(ORDERED, ()))) if parameter else made


SOURCE = "# The original keeps the source text of its module here.\nraise SystemExit('this text was executed')\n"


def persistent(class_name: str, state: dict, **changed: Any) -> Call:
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state} | changed
    return Call(PERSISTENT, ({key: value for key, value in meta.items() if value is not ...},))


def scalar(value: float) -> Call:
    """A number as numpy pickles its own."""
    dtype = Call(Name("numpy", "dtype"), ("f8", False, True), state=(3, "<", None, None, None, -1, -1, 0))
    return Call(Name("numpy._core.multiarray", "scalar"), (dtype, struct.pack("<d", value)))


def easy(values: dict) -> Call:
    return Call(EASY, (), new=True, items=tuple(values.items()))


def network(generator: StyleGAN2, changed: dict[str, Call | None] | None = None, **states: dict) -> Call:
    """The generator as NVIDIA's `persistence` pickles it. changed: other tensors by name (None: left out).

    states: what to change in the states of modules, by path with _ for the dots ("" is the generator's, as `top`).
    """
    changed, config = changed or {}, generator.config

    def module(
        path: str, class_name: str, children: dict[str, Call], tensors: dict[str, Tensor], **public: Any
    ) -> Call:
        groups: dict[str, dict] = {"_parameters": {}, "_buffers": {}}
        for name, value in tensors.items():
            key = f"{path}.{name}" if path else name
            is_parameter = name not in ("noise_const", "w_avg", "resample_filter")
            made = changed.get(key, tensor(value, parameter=is_parameter))
            if made is not None:
                groups["_parameters" if is_parameter else "_buffers"][name] = made
        state = {
            "training": False,
            **groups,
            "_non_persistent_buffers_set": set(),
            "_forward_hooks": Call(ORDERED, ()),
            "_modules": children,
            "_init_args": (),
            "_init_kwargs": {},
            **public,
        }
        return persistent(class_name, state | states.get(path.replace(".", "_") or "top", {}))

    def dense(path: str, owner: Any, activation: str = "linear") -> Call:
        multiplier = owner.lr_multiplier
        gain = scalar(multiplier / owner.weight.shape[1] ** 0.5)
        return module(
            path,
            "FullyConnectedLayer",
            {},
            {"weight": owner.weight, "bias": owner.bias},
            activation=activation,
            weight_gain=gain,
            bias_gain=multiplier,
            _init_kwargs={"activation": activation, "lr_multiplier": multiplier},
        )

    row = torch.tensor(config.resample_filter)
    taps = torch.outer(row, row) / row.sum() ** 2
    clamp = config.conv_clamp
    blocks = {}
    for resolution in config.block_resolutions:
        block, at = getattr(generator.synthesis, f"b{resolution}"), f"synthesis.b{resolution}"
        children = {}
        for name in ("conv0", "conv1", "torgb"):
            layer = getattr(block, name, None)
            if layer is None:
                continue
            affine = {"affine": dense(f"{at}.{name}.affine", layer.affine)}
            own = {"weight": layer.weight, "bias": layer.bias}
            if name == "torgb":
                children[name] = module(f"{at}.{name}", "ToRGBLayer", affine, own, conv_clamp=clamp)
                continue
            if config.use_noise:
                own |= {"noise_strength": layer.noise_strength, "noise_const": layer.noise_const}
            children[name] = module(
                f"{at}.{name}",
                "SynthesisLayer",
                affine,
                own | {"resample_filter": taps},
                conv_clamp=clamp,
                activation="lrelu",
                up=2 if name == "conv0" else 1,
                use_noise=config.use_noise,
                act_gain=scalar(2**0.5),
            )
        if hasattr(block, "skip"):
            children["skip"] = module(
                f"{at}.skip",
                "Conv2dLayer",
                {},
                {"weight": block.skip.weight, "resample_filter": taps},
                up=2,
                activation="linear",
                conv_clamp=None,
            )
        own = {"const": block.const} if resolution == 4 else {}
        blocks[f"b{resolution}"] = module(
            at,
            "SynthesisBlock",
            children,
            own | {"resample_filter": taps},
            architecture=config.architecture,
            use_fp16=False,
        )
    mapping = {
        f"fc{index}": dense(f"mapping.fc{index}", getattr(generator.mapping, f"fc{index}"), "lrelu")
        for index in range(config.mapping_layers)
    }
    if config.c_dim:
        mapping["embed"] = dense("mapping.embed", generator.mapping.embed)
    public = {"z_dim": config.z_dim, "c_dim": config.c_dim, "w_dim": config.w_dim, "num_ws": config.num_ws}
    parts = {
        "synthesis": module("synthesis", "SynthesisNetwork", blocks, {}, w_dim=config.w_dim),
        "mapping": module(
            "mapping", "MappingNetwork", mapping, {"w_avg": generator.mapping.w_avg}, num_layers=config.mapping_layers
        ),
    }
    told = easy({"class_name": "training.networks.Generator", "z_dim": config.z_dim})
    return module(
        "",
        "Generator",
        parts,
        {},
        img_resolution=config.resolution,
        img_channels=config.img_channels,
        _init_kwargs=told,
        **public,
    )


TINY = GeneratorConfig(resolution=8, channels=(6, 4), z_dim=5, w_dim=7, mapping_layers=2)


def filled(config: GeneratorConfig = TINY, seed: int = 0) -> StyleGAN2:
    """A generator none of whose tensors is constant, so that a mistaken one shows."""
    generator = random_generator(config, seed)
    random_ = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, value in (*generator.named_parameters(), *generator.named_buffers()):
            if name.endswith(("bias", "noise_strength", "w_avg")):
                value.add_(torch.randn(value.shape, generator=random_) * 0.3)
    return generator.eval().requires_grad_(False)


def snapshot(generator: StyleGAN2 | None = None, **more: Any) -> dict:
    """The dictionary at the top of such a file."""
    return {
        "G": None,
        "D": None,
        "G_ema": network(generator or filled()),
        "augment_pipe": None,
        "training_set_kwargs": easy({"path": "images.zip"}),
        **more,
    }


# -------------------------------------------------------------------------------------------------------------- attacks


def attacks() -> dict[str, tuple[bytes, str]]:
    """(stream, what the refusal has to say) of everything that is known to have worked somewhere, by name."""
    tiny = filled()
    const = tiny.synthesis.b4.const  # 6 * 16 numbers
    numbers = storage_bytes(const)
    evil = Call(SYSTEM, ("echo attacked",))
    empty = Call(ORDERED, ())

    def top(value: Any, protocol: int = 4) -> bytes:
        return dump(snapshot(tiny, extra=value), protocol)

    def with_const(protocol: int = 4, **claims: Any) -> bytes:
        made = network(tiny, {"synthesis.b4.const": tensor(const, parameter=True, **claims)})
        return dump({"G_ema": made}, protocol)

    def raw(code: bytes, protocol: int = 4) -> bytes:
        return top(Raw(code), protocol)

    def meta(**changed: Any) -> bytes:
        whole = {"class_name": "Generator", "state": {"_parameters": {}, "_buffers": {}, "_modules": {}}} | changed
        return dump({"G_ema": persistent(**whole)})

    def state(where: str, **changed: Any) -> bytes:
        return dump({"G_ema": network(tiny, **{where: changed})})

    huge = len(numbers) - 8 - const.numel() * 4  # where the count of the numbers lies
    lie = numbers[:huge] + struct.pack("<q", 2**40) + numbers[huge + 8 :]
    found: dict[str, tuple[bytes, str]] = {
        # Code.
        "os.system by REDUCE": (top(evil), "the name os.system"),
        "os.system in protocol 2": (top(evil, 2), "the name os.system"),
        "os.system in protocol 3": (top(evil, 3), "the name os.system"),
        "builtins.eval": (top(Call(Name("builtins", "eval"), ("1",))), "the name builtins.eval"),
        "builtins.getattr": (top(Call(Name("builtins", "getattr"), (empty, "x"))), "the name builtins.getattr"),
        "runpy": (top(Call(Name("runpy", "_run_code"), ("1", {}))), "the name runpy._run_code"),
        "marshal": (top(Call(Name("marshal", "loads"), (b"x",))), "the name marshal.loads"),
        "cProfile": (top(Call(Name("cProfile", "run"), ("1",))), "the name cProfile.run"),
        "ctypes": (top(Call(Name("ctypes", "CDLL"), ("libc",))), "the name ctypes.CDLL"),
        "torch.load": (top(Call(Name("torch", "load"), ("x",))), "the name torch.load"),
        "torch.hub": (top(Call(Name("torch.hub", "load"), ("x",))), "the name torch.hub.load"),
        "numpy's import of a test runner": (
            top(Call(Name("numpy.testing._private.utils", "runstring"), ("1", {}))),
            "the name numpy.testing",
        ),
        "dotted name": (top(Call(Name("torch.storage", "_load_from_bytes.__globals__"), ())), "the name torch.storage"),
        "dotted name of a module": (top(Name("collections.OrderedDict", "__init__")), "the name collections.Ordered"),
        "name that is no text": (raw(b"K\x01K\x02\x93"), "a name that is no text"),
        "name without end": (raw(b"cos" + b"x" * 300), "no newline found"),
        "name in another alphabet": (top(Name("\u043es", "system")), r"the name \\u043es.system"),
        "call of a text": (raw(b"\x8c\x01a)R"), "a call of a str, which is no name"),
        "call of a tensor": (top(Raw(Writer(4).dump(tensor(const))[2:-1] + b")R")), "which is no name"),
        "call of a name that is only mentioned": (top(Call(Name("numpy", "ndarray"), ())), "which is not done to it"),
        "call without a tuple": (raw(b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93]R"), "arguments that are no tuple"),
        "instance of a function": (top(Call(FROM_BYTES, (b"",), new=True)), "an instance of torch.storage"),
        "persistent id": (raw(b"\x8c\x01aQ"), "BINPERSID"),
        "persistent id as text": (raw(b"Pabc\n"), "PERSID"),
        "EXT1": (raw(b"\x82\x01"), "EXT1"),
        "EXT2": (raw(b"\x83\x01\x00"), "EXT2"),
        "EXT4": (raw(b"\x84\x01\x00\x00\x00"), "EXT4"),
        "INST": (raw(b"(\x8c\x01aios\nsystem\n"), "INST"),
        "OBJ": (raw(b"(cos\nsystem\n\x8c\x01ao"), "the name os.system"),
        "OBJ of an allowed name": (raw(b"(ccollections\nOrderedDict\no"), "instruction OBJ"),
        "NEWOBJ_EX": (raw(b"cdnnlib.util\nEasyDict\n)}\x92"), "NEWOBJ_EX"),
        "POP and DUP": (raw(b"N20"), "DUP"),
        "POP": (raw(b"NN0"), "POP"),
        "out-of-band buffer": (raw(b"\x97", 5), "NEXT_BUFFER"),
        "protocol 0 integer": (raw(b"I01\n"), "instruction INT"),
        "protocol 0 text": (raw(b"S'a'\n"), "instruction STRING"),
        "protocol 0 name": (raw(b"Vos\nVsystem\n\x93"), "instruction UNICODE"),
        "BUILD on a class": (
            raw(b"ccollections\nOrderedDict\n}\x8c\x01aK\x01sb"),
            r"a state \(BUILD\) for collections",
        ),
        "BUILD on a function": (raw(b"ctorch._utils\n_rebuild_parameter\n}b"), r"a state \(BUILD\) for torch._utils"),
        "BUILD on a dictionary": (raw(b"}}b"), r"a state \(BUILD\) for a dict"),
        "BUILD on a network": (
            top(
                Call(
                    PERSISTENT,
                    ({"type": "class", "version": 6, "module_src": "", "class_name": "Generator", "state": {}},),
                    state={"x": 1},
                )
            ),
            r"a state \(BUILD\) for a Network",
        ),
        "BUILD with a text": (top(Call(Name("numpy", "dtype"), ("f8",), state="x")), "that is a str"),
        "setattr by BUILD": (
            top(Call(Name("numpy", "dtype"), ("f8",), state=(None, {"__reduce__": 1}))),
            "^$",
        ),  # dropped, so harmless
        "encode with another codec": (top(Call(Name("_codecs", "encode"), ("a", "rot13")), 2), "the codec 'rot13'"),
        "encode with a codec that packs": (top(Call(Name("_codecs", "encode"), (b"a", "zlib")), 3), "the codec 'zlib'"),
        "encode beyond latin1": (
            top(Call(Name("_codecs", "encode"), ("\u0416", "latin1")), 2),
            r"characters beyond U\+00FF",
        ),
        "encode beyond latin1, long": (
            top(Call(Name("_codecs", "encode"), ("\u0416" * 2**20, "latin1")), 2),
            r"characters beyond U\+00FF",
        ),
        "source text that would run": (dump(snapshot(tiny)), "^$"),  # every network's does; it is not run
        # Nested streams.
        "nested payload": (with_const(data=dump(evil, 2)), "the name os.system"),
        "nested payload in protocol 4": (with_const(data=dump(evil, 4)), "the name os.system"),
        "nested payload behind the numbers": (with_const(data=numbers + dump(evil, 2)), "claims 96 numbers"),
        "nested payload as the persistent id": (
            with_const(data=numbers.replace(b"ctorch\nFloatStorage\n", b"cos\nsystem\n")),
            "the name os.system",
        ),
        "nested zip": (with_const(data=b"PK\x03\x04" + bytes(100)), "no protocol at the beginning"),
        "nested tar": (with_const(data=b"storages" + bytes(600)), "no protocol at the beginning"),
        "nested network": (with_const(data=dump(snapshot(tiny), 2)), "in a tensor's storage"),
        "nested storage of another magic": (with_const(data=b"\x80\x02K\x01." + numbers[15:]), "another magic number"),
        "nested storage of another version": (
            with_const(data=numbers.replace(b"M\xe9\x03.", b"M\xea\x03.", 1)),
            "version 1002",
        ),
        "big-endian numbers": (
            with_const(data=numbers.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")),
            "not little-endian",
        ),
        "bytes that are a text": (
            dump({"G_ema": network(tiny, {"synthesis.b4.const": Call(TENSOR, (Call(FROM_BYTES, ("x",)),))})}),
            "without bytes",
        ),
        # Lies about numbers.
        "count of numbers too large": (with_const(data=lie), "counts 1099511627776"),
        "count of numbers negative": (
            with_const(data=numbers[:huge] + struct.pack("<q", -1) + numbers[huge + 8 :]),
            "counts -1",
        ),
        "size too large": (with_const(size=(6, 4, 5)), "a tensor that reaches|out of bounds"),
        "size of terabytes": (with_const(size=(2**40, 4, 4), stride=(0, 0, 0)), "in a storage of 96"),
        "size that is no number": (with_const(size=(6, 4, "4")), "impossible sizes"),
        "truth value as a size": (with_const(size=(6, 4, True), stride=(16, 4, 1)), "impossible sizes"),
        "stride out of bounds": (with_const(stride=(1000, 4, 1)), "out of bounds"),
        "size of 5000 digits": (with_const(size=(2**2030,) * 8, stride=(0,) * 8), "impossible sizes or strides"),
        "stride of 600 digits": (with_const(stride=(2**2030, 4, 1)), "impossible sizes or strides"),
        "stride that repeats": (with_const(size=(96, 96), stride=(0, 1)), "a tensor of 9216 numbers"),
        "negative stride": (with_const(stride=(-16, 4, 1)), "negative"),
        "negative offset": (with_const(offset=-1), "negative"),
        "offset out of bounds": (with_const(offset=1), "out of bounds"),
        "offset of 2 ** 62": (with_const(offset=2**62), "out of bounds"),
        "sizes and strides that differ": (with_const(stride=(16, 4)), "do not belong together"),
        "too many dimensions": (with_const(size=(1,) * 40, stride=(1,) * 40), "impossible sizes"),
        "empty tensor of impossible size": (with_const(size=(0, 2**62), stride=(1, 1)), "impossible sizes"),
        "hooks on a tensor": (with_const(hooks={"a": 1}), "other arguments than torch writes"),
        "whole numbers as weights": (
            dump({"G_ema": network(tiny, {"synthesis.b4.const": tensor(torch.ones(6, 4, 4, dtype=torch.int64))})}),
            "numbers of the type int64",
        ),
        "one storage for all": (_one_storage(), "tensors of .* bytes in a file of"),
        "numbers far apart": (_one_storage(step=500), "tensors of .* bytes in a file of"),
        "infinite weights": (
            dump({"G_ema": network(tiny, {"synthesis.b4.const": tensor(torch.full((6, 4, 4), float("inf")))})}),
            "found NaN or infinity",
        ),
        # Shapes of data.
        "cycle of modules": (_cycle(), "where StyleGAN2 has SynthesisNetwork|within itself"),
        "module in two places": (_shared(), "in two places"),
        "list within itself": (raw(b"]\x94h\x00a"), "filling of a list|^$"),
        "deep nest of tuples": (top(Raw(b")" + b"\x85" * 60_000)), "^$"),
        "deep nest as the network": (dump({"G_ema": Raw(b")" + b"\x85" * 60_000)}), r"no generator \(G_ema or G\)"),
        "deep nest as a key": (raw(b"}" + b")" + b"\x85" * 60_000 + b"Ns"), "a key that is a tuple"),
        "deep nest in a set": (raw(b"\x8f(" + b")" + b"\x85" * 60_000 + b"\x90"), "a key that is a tuple"),
        "deep nest of lists as the top": (dump(Raw(b"]" * 60_000 + b"a" * 59_999)), "a list at the top"),
        "open marks": (raw(b"(" * 5000 + b"N" + b"t" * 5000), "open marks"),
        "doubling list": (top(_doubling(60)), "^$"),
        "doubling list as the modules": (state("synthesis", _modules=_doubling(60)), "without _modules"),
        "too many steps": (raw(b"N" + b"\x85" * 1_000_001), "more than 1000000 steps"),
        "keys that collide": (
            raw(
                b"}("
                + b"".join(b"\x8a\x0a" + ((2**61 - 1) * n).to_bytes(10, "little") + b"N" for n in range(1, 50))
                + b"u"
            ),
            "a key that is an int",
        ),
        "list as a key": (raw(b"}]Ns"), "a key that is a list"),
        "decoded again and again": (
            top([Call(Name("_codecs", "encode"), ("a" * 2**19, "latin1"))] * 3000, 2),
            "more binary data written as text",
        ),
        "reference to nothing": (raw(b"j\xff\xff\xff\x7f"), "which was not kept"),
        "memo of 2 ** 31": (raw(b"Nr\xff\xff\xff\x7f"), r"kept under the number 2147483647 after \d+ others"),
        "memo that collides": (
            raw(b"N" + b"".join(b"r" + struct.pack("<I", n) for n in colliding(10, 400))),
            "kept under the number",
        ),
        "one key again and again": (raw(b"}(" + b"K\x01N" * 3 + b"u"), "one key twice"),
        "set of one number": (raw(b"\x8f(" + b"K\x01" * 3 + b"\x90"), "one key twice"),
        "append to a tuple": (raw(b")Na"), "filling of a list on a tuple"),
        "set items of a network": (raw(b"NNNs"), "filling of a dict on a NoneType"),
        "take from nothing": (b"\x80\x04.", "more or less than one value"),
        "tuple of nothing": (b"\x80\x04\x87.", "takes a value where there is none"),
        "no mark": (b"\x80\x04t.", "needs a mark"),
        # Other files.
        "wrong version": (meta(version=7), "version 7 of NVIDIA's persistent objects"),
        "version that is a text": (meta(version="6"), "version unknown"),
        "missing key": (meta(module_src=...), "without its field module_src"),
        "further key": (meta(other=1), "unknown fields"),
        "another type": (meta(type="module"), "that is no class"),
        "state that is a list": (meta(state=[]), "other types than NVIDIA writes"),
        "source that is a number": (meta(module_src=1), "other types than NVIDIA writes"),
        "unknown class": (meta(class_name="MyGenerator"), "the class MyGenerator"),
        "unknown class inside": (
            state("synthesis", _modules={"b4": persistent("AttentionBlock", {})}),
            "the unknown class AttentionBlock",
        ),
        "class in the wrong place": (
            state("synthesis", _modules={"b4": persistent("Generator", {})}),
            "where StyleGAN2 has SynthesisBlock",
        ),
        "module that is a tensor": (
            state("synthesis", _modules={"b4": tensor(const)}),
            "something else than a network",
        ),
        "tensor that is a text": (state("mapping", _buffers={"w_avg": "abc"}), "something else than a tensor"),
        "no parameters": (state("mapping", _parameters=None), "without _parameters"),
        "another activation": (state("mapping_fc0", activation="relu"), "activation relu in mapping.fc0"),
        "gains that disagree": (state("mapping_fc0", bias_gain=1.0), "do not agree on"),
        "clamps that disagree": (state("synthesis_b8_conv1", conv_clamp=256), "conv_clamp 256.0"),
        "clamp that is a text": (state("synthesis_b8_conv1", conv_clamp="x"), "no usable number"),
        "another resolution": (state("top", img_resolution=16), "resolution was said to be 16"),
        "another latent": (state("top", z_dim=512), "z_dim was said to be 512"),
        "another architecture": (
            dump({"G_ema": network(tiny, **{f"synthesis_b{n}": {"architecture": "orig"} for n in (4, 8)})}),
            "architecture was said to be 'orig'",
        ),
        "architecture of 60 kB": (
            dump({"G_ema": network(tiny, synthesis_b8={"architecture": "\x1b[31m" * 10_000})}),
            "no usable value",
        ),
        "resolution of 600 digits": (
            dump({"G_ema": network(tiny, top={"img_resolution": 2**2030})}),
            "no usable value as img_resolution",
        ),
        "missing tensor": (
            dump({"G_ema": network(tiny, {"synthesis.b8.conv1.bias": None})}),
            "missing synthesis.b8.conv1.bias",
        ),
        "tensor of another shape": (
            dump({"G_ema": network(tiny, {"synthesis.b8.conv1.bias": tensor(torch.ones(5))})}),
            r"found \[5\]",
        ),
        "filter of another shape": (
            dump({"G_ema": network(tiny, {"synthesis.b8.conv0.resample_filter": tensor(torch.ones(3, 4) / 12)})}),
            "not separable",
        ),
        "filter of 20000 taps": (
            dump({"G_ema": network(tiny, {"synthesis.b8.conv0.resample_filter": tensor(torch.ones(20_000))})}),
            "no resampling filter of at most 64 taps",
        ),
        "another filter of 20000 taps": (
            dump({"G_ema": network(tiny, {"synthesis.b8.resample_filter": tensor(torch.ones(20_000))})}),
            "no resampling filter of at most 64 taps",
        ),
        "classes without a mean style": (_many_classes(), "at most 32768 features in all layers"),
        "nothing": (dump({}), "no generator"),
        "a number": (dump(1), "an int at the top"),
        "protocol 1": (b"\x80\x01}.", "pickle protocol 1"),
        "protocol 6": (b"\x80\x06}.", "pickle protocol 6"),
        "bytes after the end": (dump(snapshot(tiny)) + b"x", "1 bytes after the end"),
        "two pickles": (dump(snapshot(tiny)) + dump(evil), "bytes after the end"),
        "truncated": (dump(snapshot(tiny))[:-400], "a truncated stream"),
        "truncated inside a tensor": (with_const(data=numbers[:-5]), "claims 96 numbers"),
        "frame beyond the end": (b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"}.", "no generator"),
        "text beyond the end": (b"\x80\x04X\xff\xff\xff\xffabc", "a truncated stream"),
        "bytes of exabytes": (b"\x80\x04\x8e" + b"\xff" * 8 + b"abc", "a truncated stream"),
        "text that is no UTF-8": (raw(b"\x8c\x02\xff\xfe"), "codec can't decode"),
        # Other families, as their files look where they differ.
        "StyleGAN3": (
            state("synthesis", _modules={"input": persistent("SynthesisInput", {})}),
            "found a StyleGAN3 network",
        ),
        "StyleGAN-XL": (
            dump({"G_ema": persistent("SuperresGenerator", {"_parameters": {}})}),
            "found a StyleGAN-XL network",
        ),
        "StyleGAN-T": (top(Call(Name("networks.generator", "Generator"), (), new=True)), "found a StyleGAN-T network"),
        "another module": (
            dump({"G_ema": Call(Name("model", "Generator"), (), new=True, state={"_modules": {}})}),
            "found a whole module",
        ),
        "Projected GAN": (
            top(Call(Name("pg_modules.discriminator", "ProjectedDiscriminator"), (), new=True)),
            "found a StyleGAN-XL or Projected GAN network",
        ),
        "EG3D": (
            dump(
                {
                    "G_ema": persistent(
                        "TriPlaneGenerator",
                        {"renderer": Call(Name("training.volumetric_rendering.renderer", "Renderer"), (), new=True)},
                    )
                }
            ),
            "found an EG3D network",
        ),
        "TensorFlow": (
            dump((Call(Name("dnnlib.tflib.network", "Network"), (), new=True, state={"version": 4}),) * 3),
            "found a TensorFlow network .* legacy.py",
        ),
        "Progressive GAN": (dump((Call(Name("tfutil", "Network"), (), new=True),) * 3), "found a TensorFlow network"),
    }
    return found


def colliding(bits: int, run: int) -> list[int]:
    """Keys that fill slot after slot of a dictionary's table of 2**bits, then one that walks along those slots."""
    mask, slot, filled = 2**bits - 1, 1, {}
    for place in range(run):
        filled[slot] = place
        slot = (5 * slot + 1) & mask
    for key in range(2**bits, 2**31):
        rest, slot = key, key & mask
        while slot in filled and rest:
            rest >>= 5
            slot = (5 * slot + rest + 1) & mask
        if filled.get(slot, run) < run // 4:
            return [*filled, *[key] * run]
    raise AssertionError("no such key")


def _doubling(levels: int) -> list:
    """A list of 2 ** levels empty lists, in a few bytes per level."""
    made: list = []
    for _ in range(levels):
        made = [made, made]
    return made


def _cycle() -> bytes:
    """A network whose modules come to contain the network itself, after it was made."""
    made = persistent("Generator", {"_parameters": {}, "_buffers": {}, "_modules": Keep({}, "modules")})
    return dump({"G_ema": Keep(made, "whole"), "x": Filled(Again("modules"), {"synthesis": Again("whole")})}, 3)


def _shared() -> bytes:
    layer = persistent("FullyConnectedLayer", {"_parameters": {}, "_buffers": {}, "_modules": {}})
    layers = {"fc0": Keep(layer, "layer"), "fc1": Again("layer")}
    mapping = persistent("MappingNetwork", {"_parameters": {}, "_buffers": {}, "_modules": layers})
    state = {"_parameters": {}, "_buffers": {}, "_modules": {"mapping": mapping}}
    return dump({"G_ema": persistent("Generator", state)}, 3)


def _many_classes() -> bytes:
    """A network of 60,000 classes whose mean style would have to be measured, in a file of 240 kB."""
    config = GeneratorConfig(resolution=8, channels=(6, 4), z_dim=5, w_dim=1, c_dim=60_000, mapping_layers=2)
    return dump({"G_ema": network(filled(config), {"mapping.w_avg": None})})


def _one_storage(step: int = 1) -> bytes:
    """Every tensor of a network a view of one storage: little to read, much to copy. step: between a bias's numbers."""
    config = GeneratorConfig(resolution=8, channels=(64, 64), z_dim=64, w_dim=64, mapping_layers=8)
    generator = StyleGAN2(config)
    weights = {**dict(generator.named_parameters()), **dict(generator.named_buffers())}
    storage = torch.zeros(max(value.numel() for value in weights.values()), dtype=torch.float16)
    if step > 1:
        weights = {key: value for key, value in weights.items() if value.ndim == 1}
    claims = {}
    for key, value in weights.items():
        stride = tuple(step * one for one in value.stride())
        claims[key] = Call(TENSOR, (Again("storage"), 0, tuple(value.shape), stride, False, Call(ORDERED, ())))
    owner = Keep(Call(FROM_BYTES, (storage_bytes(storage),)), "storage")
    return dump({"storage": owner, "G_ema": network(generator, claims)}, 3)


# --------------------------------------------------------------------------------------------------------------- damage

# Instructions that a shuffle puts in the place of others: all that exist, dangerous or not.
_CODES = bytes(sorted({*b"(.0123BCFGIJKLMNPQRSTUVXabcdeghijlopqrstu]})", *range(0x80, 0x99)}))


def damaged(streams: list[bytes], dice: random.Random) -> tuple[str, bytes]:
    """(what was done, one of the streams): flipped and changed bytes, truncations, shuffled and spliced parts."""
    stream = dice.choice(streams)
    data, code = bytearray(stream), instruction_positions(stream)
    kind = dice.choice(("flip", "byte", "truncate", "opcode", "number", "swap", "delete", "repeat", "splice"))
    if kind == "truncate":
        data = data[: dice.randrange(len(data))]
    elif kind in ("flip", "byte", "opcode", "number"):
        for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
            at = dice.choice(code) if kind in ("opcode", "number") else dice.randrange(len(data))
            if kind == "flip":
                data[at] ^= 1 << dice.randrange(8)
            elif kind == "byte":
                data[at] = dice.randrange(256)
            elif kind == "opcode":
                data[at] = dice.choice(_CODES)
            else:
                number = dice.choice((0, 1, -1, 255, 2**16, 2**31 - 1, -(2**31)))
                data[at + 1 : at + 5] = struct.pack("<i", number)
    else:
        first, second = sorted(dice.sample(range(len(code) - 1), 2))
        a, b = data[code[first] : code[first + 1]], data[code[second] : code[second + 1]]
        if kind == "swap":
            data[code[second] : code[second + 1]] = a
            data[code[first] : code[first + 1]] = b
        elif kind == "delete":
            del data[code[first] : code[first + 1]]
        elif kind == "repeat":
            data[code[second] : code[second]] = a * dice.choice((1, 2, 100))
        else:
            other = dice.choice(streams)
            data[code[first] :] = other[dice.randrange(len(other)) :]
    return kind, bytes(data)


@lru_cache(maxsize=16)
def instruction_positions(data: bytes) -> tuple[int, ...]:
    """Where the instructions begin, those of the nested streams included."""
    import pickletools

    found = []
    for opcode, argument, position in pickletools.genops(data):
        found.append(position)
        if opcode.name == "BINBYTES" and argument[:2] == b"\x80\x02":
            start, at = position + 5, 0
            for _ in range(5):  # the pickles before the numbers
                stream = io.BytesIO(argument[at:])
                found += [start + at + inner for _, _, inner in pickletools.genops(stream)]
                at += stream.tell()
    return tuple(found)
