"""Pickle streams read as plain data: an interpreter of the opcodes that has nothing to execute.

Python's unpicklers turn names into objects by importing them and then call what they found. Here a name stays a pair
of strings, calling looks it up in a table that the reader of one format brings (exact names, nothing is imported, no
attribute is walked), and whatever the table does not know ends the reading. Only opcodes of protocols 2 to 5 that
such files contain are understood. Work and memory are bounded by what the file's own bytes can justify.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import Problem

MAX_OPCODES = 500_000  # a network of 1024 pixels with its discriminator takes 50 thousand
MAX_MARKS = 1000
MAX_NAME = 200  # characters of a module or class name
LONG_TEXT = 2**20  # bytes; longer texts stay undecoded (protocol 2 writes binary data as text)
MAX_TEXT = 2**26  # bytes of all decoded texts together
_ORDERED = ("collections", "OrderedDict")
KEY_RANGE = 2**31  # of whole numbers as keys
# Python spreads whole numbers in a dictionary by their lowest bits, so that a file can choose ones of which every
# further one meets all before: 160,000 such keys take most of a minute, 10,000 a tenth of a second.
MAX_NUMBER_KEYS = 10_000
_TUPLE_COST = 10  # tuples can be made to have one hash, and are then compared one by one
MAX_KEY_TUPLE = 8
FREE_KEYS = 2**10  # smaller ones are not counted: there are too few of them
# Kept values are numbered in turn, by Python 2 from 1 on: numbers that may be chosen could collide, here and in torch.
MAX_SKIPPED = 16
_CONTAINERS = (tuple, list, dict)


class Refused(Problem):
    """What was found in a stream that is not read, as a clause that follows "found"."""


@dataclass(frozen=True)
class Name:
    """A global name of the stream: two strings, never an object."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


class Placeholder:
    """What stands for an object that nobody needs: the name it was made by."""

    __slots__ = ("name",)

    def __init__(self, name: Name) -> None:
        self.name = name


@dataclass(frozen=True)
class LongText:
    """A text of more than LONG_TEXT bytes, undecoded."""

    data: memoryview

    def latin1(self) -> bytes:
        """The bytes of a text whose characters all are U+0000 to U+00FF."""
        if re.search(rb"[\xc4-\xff]", self.data):  # the first bytes of every character beyond
            raise Refused("binary data written as text with characters beyond U+00FF")
        try:
            return str(self.data, "utf-8").encode("latin-1")
        except UnicodeError:
            raise Refused("a text that is no UTF-8") from None


@dataclass
class Budget:
    """What one load may spend, nested streams included."""

    opcodes: int = MAX_OPCODES
    text: int = MAX_TEXT
    decoded: int = 0  # bytes that `_codecs.encode` may make
    depth: int | None = None  # of containers in containers, as far as known when one is put into another
    number_keys: int = MAX_NUMBER_KEYS

    def __post_init__(self) -> None:
        self.allowed = self.opcodes

    def spend(self, opcodes: int) -> None:
        self.opcodes -= opcodes
        if self.opcodes < 0:
            raise Refused(f"a pickle of more than {self.allowed} steps, which no network needs")

    def count_keys(self, cost: int) -> None:
        self.number_keys -= cost
        if self.number_keys < 0:
            raise Refused(f"more than {MAX_NUMBER_KEYS} numbers as keys")


Call = Callable[[Name, tuple, Budget], Any]


@dataclass(frozen=True)
class Vocabulary:
    """All names that one kind of stream may mention, as (module, name).

    reduce, new: what takes the place of calling and of instantiating a name, with its name, arguments and the budget.
    build: names whose placeholders may be given a state, which is dropped after `check_state` (target, state) saw it.
    inert: names that may only be mentioned. persistent: what takes the place of a persistent id (None: such ids are
    refused). explain: (module, name) -> a clause for a name that is not listed, or None. key_range: what whole numbers
    as keys lie below. other_keys: whether None, truth values, numbers with a fraction and flat tuples may be keys.
    surrogates: whether texts may have halves of characters.
    """

    reduce: Mapping[tuple[str, str], Call] = field(default_factory=dict)
    new: Mapping[tuple[str, str], Call] = field(default_factory=dict)
    build: frozenset[tuple[str, str]] = frozenset()
    inert: frozenset[tuple[str, str]] = frozenset()
    persistent: Callable[[Any], Any] | None = None
    check_state: Callable[[Any, Any], None] = lambda target, state: None
    explain: Callable[[str, str], str | None] = lambda module, name: None
    key_range: int = KEY_RANGE
    other_keys: bool = False
    surrogates: bool = False

    def name(self, module: Any, name: Any) -> Name:
        if type(module) is not str or type(name) is not str:
            raise Refused("a name that is no text")
        if (module, name) in self.reduce or (module, name) in self.new or (module, name) in self.inert:
            return Name(module, name)
        known = self.explain(module, name)
        raise Refused(known or f"the name {shown(f'{module}.{name}')}, which is not on the list of allowed names")

    def key(self, key: Any, budget: Budget, container: Container = ()) -> Any:
        """`key`, if `container` may get it: anything else may be nested, and hashing it recurses without a limit.

        All but texts come once: each repetition would meet all keys that collide with it again.
        """
        if type(key) in (str, Name):
            return key
        self._check_key(key, budget)
        if key in container:
            raise Refused("one key twice in a dictionary or set")
        return key

    def _check_key(self, key: Any, budget: Budget) -> None:
        if type(key) is int and -KEY_RANGE <= key < self.key_range:
            if not 0 <= key < FREE_KEYS:
                budget.count_keys(1)
            return
        if self.other_keys:
            if key is None or type(key) is bool:
                return
            if type(key) is float and key == key:  # a NaN equals nothing, itself included
                budget.count_keys(1)
                return
            if type(key) is tuple and len(key) <= MAX_KEY_TUPLE and not any(type(one) is tuple for one in key):
                budget.count_keys(_TUPLE_COST)
                for one in key:
                    self.key(one, budget)
                return
        raise Refused(f"a key that is {article(key)}")


def shown(text: str) -> str:
    """A text of the stream for an error message: short, printable ASCII."""
    text = ascii(text[:MAX_NAME])[1:-1]
    return text if len(text) <= 80 else text[:77] + "..."


def article(value: Any) -> str:
    """What kind of value it is, for an error message: "a dict", "an int"."""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def read_pickle(data: memoryview, start: int, vocabulary: Vocabulary, budget: Budget) -> tuple[Any, int]:
    """The value of the pickle that begins at byte `start` and the position after it. Raises Refused.

    Values are None, bool, int, float, str, `LongText`, memoryview (bytes), tuple, list, dict, set, `Name` and what the
    vocabulary made. Containers may be shared and may contain themselves.
    """
    machine = _Machine(data, start, vocabulary, budget)
    try:
        return machine.run()
    except Refused as problem:
        raise Refused(f"{problem} (byte {machine.at})") from None


class _Machine:
    def __init__(self, data: memoryview, start: int, vocabulary: Vocabulary, budget: Budget) -> None:
        self.data, self.position, self.at = data, start, start
        self.vocabulary, self.budget = vocabulary, budget
        self.stack: list = []
        self.outer: list[list] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}
        self.depths: dict[int, int] = {}  # of containers that hold containers, by id

    def run(self) -> tuple[Any, int]:
        if self.take(1)[0] != 0x80:
            raise Refused("no protocol at the beginning")
        protocol = self.take(1)[0]
        if not 2 <= protocol <= 5:
            raise Refused(f"pickle protocol {protocol}, where 2 to 5 are read")
        while True:
            self.at = self.position
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                break
            action = _ACTIONS.get(code)
            if action is None:
                raise Refused(f"the pickle instruction {_opcode_name(code)}, which no network file contains")
            self.budget.spend(1)
            action(self)
        if self.outer or len(self.stack) != 1:
            raise Refused("a pickle that ends with more or less than one value")
        return self.stack[0], self.position

    # ------------------------------------------------------------------------------------------------------- reading

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise Refused(f"a truncated stream: {count} bytes expected at byte {self.position} of {len(self.data)}")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        piece = bytes(self.data[self.position : self.position + MAX_NAME + 1])
        length = piece.find(b"\n")
        if length < 0:
            raise Refused("a name without end")
        self.position += length + 1
        return self.decode(piece[:length])

    def decode(self, data: bytes | memoryview) -> str:
        self.budget.text -= len(data)
        if self.budget.text < 0:
            raise Refused(f"more than {MAX_TEXT >> 20} MiB of text")
        try:
            return str(data, "utf-8", "surrogatepass" if self.vocabulary.surrogates else "strict")
        except UnicodeDecodeError:
            raise Refused("a text that is no UTF-8") from None

    # --------------------------------------------------------------------------------------------------------- stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise Refused("an instruction that takes a value where there is none")
        return self.stack.pop()

    def top(self, kind: type, doing: str) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            found = article(self.stack[-1]) if self.stack else "nothing"
            raise Refused(f"{doing} of a {kind.__name__} on {found}")
        return self.stack[-1]

    def items(self) -> list:
        """What lies above the last mark, which goes."""
        if not self.outer:
            raise Refused("an instruction that needs a mark where there is none")
        items, self.stack = self.stack, self.outer.pop()
        return items

    # ------------------------------------------------------------------------------------------------------- opcodes

    def frame(self) -> None:
        if self.number("<Q") > len(self.data) - self.position:
            raise Refused("a truncated stream: a frame that goes beyond the end")

    def mark(self) -> None:
        if len(self.outer) >= MAX_MARKS:
            raise Refused(f"more than {MAX_MARKS} open marks")
        self.outer.append(self.stack)
        self.stack = []

    def text(self, length: int) -> None:
        piece = self.take(length)
        self.push(LongText(piece) if length > LONG_TEXT else self.decode(piece))

    def remember(self, index: int) -> None:
        if not self.stack:
            raise Refused("an instruction that keeps a value where there is none")
        if index > len(self.memo) + MAX_SKIPPED:
            raise Refused(f"a value kept under the number {index} after {len(self.memo)} others")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Refused(f"a reference to the value {index}, which was not kept")
        self.push(self.memo[index])

    def fresh(self, container: Any) -> None:
        self.depths.pop(id(container), None)  # of a dead one that lay there
        self.push(container)

    def nest(self, container: Any, items: Iterable[Any]) -> None:
        """Count how deep `container` has become by `items`."""
        if self.budget.depth is None:
            return
        depth = max((self.depths.get(id(item), 0) + 1 for item in items if type(item) in _CONTAINERS), default=0)
        if depth > self.budget.depth:
            raise Refused(f"values nested more than {self.budget.depth} deep")
        if depth > self.depths.get(id(container), 0):
            self.depths[id(container)] = depth

    def make_tuple(self, items: list) -> None:
        self.fresh(tuple(items))
        self.nest(self.stack[-1], items)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise Refused("an instruction that takes a value where there is none")
        items = self.stack[-count:]
        del self.stack[-count:]
        self.make_tuple(items)

    def append(self) -> None:
        value = self.pop()
        target = self.top(list, "filling")
        target.append(value)
        self.nest(target, (value,))

    def appends(self) -> None:
        items = self.items()
        target = self.top(list, "filling")
        target.extend(items)
        self.nest(target, items)

    def fill(self, target: dict, key: Any, value: Any) -> None:
        target[self.vocabulary.key(key, self.budget, target)] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        target = self.top(dict, "filling")
        self.fill(target, key, value)
        self.nest(target, (value,))

    def set_items(self) -> None:
        items = self.items()
        if len(items) % 2:
            raise Refused("a key without a value")
        target = self.top(dict, "filling")
        for key, value in zip(items[::2], items[1::2]):
            self.fill(target, key, value)
        self.nest(target, items[1::2])

    def add_items(self) -> None:
        items = self.items()
        target = self.top(set, "filling")
        for item in items:
            target.add(self.vocabulary.key(item, self.budget, target))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.vocabulary.name(module, name))

    def global_(self) -> None:
        module = self.line()
        self.push(self.vocabulary.name(module, self.line()))

    def call(self, table: Mapping[tuple[str, str], Call], doing: str) -> None:
        arguments, name = self.pop(), self.pop()
        if type(name) is not Name:
            raise Refused(f"{doing} of {article(name)}, which is no name")
        if type(arguments) is not tuple:
            raise Refused(f"{doing} of {name} with arguments that are no tuple")
        made = table.get((name.module, name.name))
        if made is None:
            raise Refused(f"{doing} of {name}, which is not done to it")
        self.fresh(made(name, arguments, self.budget))

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        if type(target) is dict and _ORDERED in self.vocabulary.build and type(state) is dict:
            self.vocabulary.check_state(target, state)
            self.nest(target, (state,))
            return  # attributes of an OrderedDict, such as a state dict's _metadata
        if not isinstance(target, Placeholder) or (target.name.module, target.name.name) not in self.vocabulary.build:
            found = str(target) if type(target) is Name else article(target)
            raise Refused(f"a state (BUILD) for {found}, which has none")
        if type(state) not in (dict, tuple):
            raise Refused(f"a state (BUILD) that is {article(state)}")
        self.vocabulary.check_state(target, state)

    def persistent(self) -> None:
        if self.vocabulary.persistent is None:
            raise Refused("the pickle instruction BINPERSID, which no network file contains")
        self.push(self.vocabulary.persistent(self.pop()))


def _opcode_name(code: int) -> str:
    import pickletools

    found = pickletools.code2op.get(chr(code))
    return found.name if found else f"0x{code:02x}"


_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    0x94: lambda m: m.remember(len(m.memo)),
    ord("q"): lambda m: m.remember(m.number("<B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    ord("G"): lambda m: m.push(m.number(">d")),
    ord("X"): lambda m: m.text(m.number("<I")),
    0x8C: lambda m: m.text(m.number("<B")),
    ord("B"): lambda m: m.push(m.take(m.number("<I"))),
    ord("C"): lambda m: m.push(m.take(m.number("<B"))),
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),
    ord("}"): lambda m: m.fresh({}),
    ord("]"): lambda m: m.fresh([]),
    ord(")"): lambda m: m.push(()),
    0x8F: lambda m: m.fresh(set()),
    ord("t"): lambda m: m.make_tuple(m.items()),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    0x90: _Machine.add_items,
    ord("c"): _Machine.global_,
    0x93: _Machine.stack_global,
    ord("R"): lambda m: m.call(m.vocabulary.reduce, "a call"),
    0x81: lambda m: m.call(m.vocabulary.new, "an instance"),
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
}
