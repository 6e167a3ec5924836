"""Pickle streams read as plain data: an interpreter of pickle's instructions that has nothing to execute.

Python's unpicklers turn names into objects by importing them and then call what they found. Here a name stays a pair
of strings. Calling looks the name up in a table that the reader of one format brings; a name that is not in the table
ends the reading. No module is imported and no attribute is read. Only instructions of protocols 2 to 5 that model files
contain are understood, and the work and memory they cause stay in proportion to the file.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, cast

from ..errors import Problem

# One byte can make a set of 216 bytes, so this bounds memory as well. SDXL's checkpoint takes 95 thousand steps, a
# trainer's with its optimizer twice that.
MAX_STEPS = 1_000_000
MAX_MARKS = 1000
MAX_NAME = 200  # characters of a module or class name
# Python places numbers in a dictionary by their lowest bits, and a file can choose numbers so that each one meets all
# before it: 160,000 such keys take most of a minute, 10,000 a tenth of a second.
MAX_NUMBER_KEYS = 10_000
FREE_KEYS = 2**10  # smaller numbers are not counted: there are too few of them to do harm
KEY_RANGE = 2**57  # larger whole numbers may have the same hash; torch 1.0 to 1.5 used memory addresses as keys
MAX_KEY_TUPLE = 8
_TUPLE_COST = 10  # numbers that a tuple counts as: tuples can be made to have one hash, and compare slowly
# Kept values are numbered in turn (by Python 2 from 1 on): numbers that a file may choose could collide like keys.
MAX_SKIPPED = 16
_ORDERED = ("collections", "OrderedDict")


class Refused(Problem):
    """What was found in a stream that is not read, as a clause that follows "found"."""


class Name(NamedTuple):
    """A global name of the stream: two strings, never an object."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


@dataclass(frozen=True, slots=True)
class Placeholder:
    """Stands for an object that nobody needs: the name it was made by."""

    name: Name


@dataclass
class ReadingBudget:
    """What reading one file may cost, nested streams included.

    steps: pickle instructions. decoded: bytes that `_codecs.encode` may make. number_keys: numbers as keys.
    """

    decoded: int = 0
    steps: int = MAX_STEPS
    number_keys: int = MAX_NUMBER_KEYS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise Refused(f"a pickle of more than {MAX_STEPS} steps, which no network needs")

    def count_keys(self, keys: int) -> None:
        self.number_keys -= keys
        if self.number_keys < 0:
            raise Refused(f"more than {MAX_NUMBER_KEYS} numbers as keys")


Call = Callable[[Name, tuple, ReadingBudget], Any]


@dataclass(frozen=True)
class Vocabulary:
    """All names that one kind of stream may mention, as (module, name).

    reduce, new: what takes the place of calling and of instantiating a name; gets the name, its arguments, the budget.
    build: names whose objects may be given a state, which is dropped. inert: names that may only be mentioned.
    persistent: what takes the place of a persistent id (None: such ids are refused). explain: (module, name) -> a
    clause for a name that is not listed, or None.
    """

    reduce: Mapping[tuple[str, str], Call] = field(default_factory=dict)
    new: Mapping[tuple[str, str], Call] = field(default_factory=dict)
    build: frozenset[tuple[str, str]] = frozenset()
    inert: frozenset[tuple[str, str]] = frozenset()
    persistent: Callable[[Any], Any] | None = None
    explain: Callable[[str, str], str | None] = lambda module, name: None

    def name(self, module: Any, name: Any) -> Name:
        """The name, if it is listed."""
        if type(module) is not str or type(name) is not str:
            raise Refused("a name that is no text")
        found = Name(module, name)
        if found in self.reduce or found in self.new or found in self.inert:
            return found
        known = self.explain(module, name)
        raise Refused(known or f"the name {found}, which is not on the list of allowed names")


def checked_key(key: Any, budget: ReadingBudget, container: Container = ()) -> Any:
    """`key`, if it may become one of `container`: others may be nested, and hashing those recurses without a limit.

    Keys other than texts come once: each repetition would meet all keys that collide with it again.
    """
    if type(key) in (str, Name):
        return key
    usable = key is None or type(key) is bool
    if type(key) is int and abs(key) < KEY_RANGE:
        usable = True
        budget.count_keys(0 if 0 <= key < FREE_KEYS else 1)
    elif type(key) is float and key == key:  # a NaN equals nothing, itself included
        usable = True
        budget.count_keys(1)
    elif type(key) is tuple and len(key) <= MAX_KEY_TUPLE and not any(type(part) is tuple for part in key):
        usable = True
        budget.count_keys(_TUPLE_COST)
        for part in key:
            checked_key(part, budget)
    if not usable:
        raise Refused(f"a key that is {article(key)}")
    if key in container:
        raise Refused("one key twice in a dictionary or set")
    return key


def shown(text: str) -> str:
    """A text of the stream for an error message: short, printable ASCII."""
    text = ascii(text[:MAX_NAME])[1:-1]
    return text if len(text) <= 80 else text[:77] + "..."


def article(value: Any) -> str:
    """What kind of value it is, for an error message: "a dict", "an int"."""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def read_pickle(data: memoryview, start: int, vocabulary: Vocabulary, budget: ReadingBudget) -> tuple[Any, int]:
    """The value of the pickle that begins at byte `start`, and the position after it. Raises Refused.

    Values are None, bool, int, float, str, memoryview (bytes), tuple, list, dict, set, `Name` and what the vocabulary
    made. Containers may be shared and may contain themselves.
    """
    if data[start : start + 1] != b"\x80":
        raise Refused("no protocol at the beginning")
    stream, machine = _Stream(data, start), _Machine(vocabulary, budget)
    place, name = start, ""
    try:
        while name != "STOP":
            place = stream.position
            code = bytes(stream.read(1))
            if not code:
                raise Refused("a truncated stream: no end of the pickle")
            instruction = _INSTRUCTIONS.get(code)
            name = instruction.name if instruction else f"0x{code.hex()}"
            if instruction is None or not (name in _CONSTANTS or name in _ARGUMENTS or name in _ACTIONS):
                raise Refused(f"the pickle instruction {name}, which no network file contains")
            budget.spend(1)
            machine.run(name, instruction.arg.reader(cast(IO[bytes], stream)) if instruction.arg else None)
        return machine.result(), stream.position
    except Refused as problem:
        raise Refused(f"{problem} (byte {place})") from None
    except ValueError as problem:  # what pickletools says of an argument that is cut off or damaged
        raise Refused(f"a truncated stream ({shown(str(problem))}) (byte {place})") from None


_INSTRUCTIONS = {instruction.code.encode("latin-1"): instruction for instruction in pickletools.opcodes}


class _Stream:
    """What pickletools' readers need of a file, over a part of memory; long pieces are not copied."""

    def __init__(self, data: memoryview, position: int) -> None:
        self.data, self.position = data, position

    def read(self, count: int) -> memoryview:
        piece = self.data[self.position : self.position + count]
        self.position += len(piece)
        return piece

    def readline(self) -> bytes:
        line = bytes(self.data[self.position : self.position + MAX_NAME + 1]).partition(b"\n")
        self.position += len(line[0]) + len(line[1])
        return line[0] + line[1]


class _Machine:
    """Pickle's stack machine."""

    def __init__(self, vocabulary: Vocabulary, budget: ReadingBudget) -> None:
        self.vocabulary, self.budget = vocabulary, budget
        self.stack: list = []
        self.outer: list[list] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """One instruction, by pickletools' name for it."""
        if name in _CONSTANTS:
            self.push(_CONSTANTS[name]())
        elif name in _ARGUMENTS:
            self.push(argument)
        else:
            _ACTIONS[name](self, argument)

    def result(self) -> Any:
        if self.outer or len(self.stack) != 1:
            raise Refused("a pickle that ends with more or less than one value")
        return self.stack[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise Refused("an instruction that takes a value where there is none")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        """The container that an instruction fills."""
        if not self.stack or type(self.stack[-1]) is not kind:
            found = article(self.stack[-1]) if self.stack else "nothing"
            raise Refused(f"filling of a {kind.__name__} on {found}")
        return self.stack[-1]

    def items(self) -> list:
        """What lies above the last mark, which goes."""
        if not self.outer:
            raise Refused("an instruction that needs a mark where there is none")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def protocol(self, version: int) -> None:
        if not 2 <= version <= 5:
            raise Refused(f"pickle protocol {version}, where 2 to 5 are read")

    def mark(self) -> None:
        if len(self.outer) >= MAX_MARKS:
            raise Refused(f"more than {MAX_MARKS} open marks")
        self.outer.append(self.stack)
        self.stack = []

    def remember(self, index: int) -> None:
        if index > len(self.memo) + MAX_SKIPPED:
            raise Refused(f"a value kept under the number {index} after {len(self.memo)} others")
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Refused(f"a reference to the value {index}, which was not kept")
        self.push(self.memo[index])

    def tuple_of(self, count: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(count)])))

    def extend(self, items: list) -> None:
        self.top(list).extend(items)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.fill([key, value])

    def fill(self, items: list) -> None:
        if len(items) % 2:
            raise Refused("a key without a value")
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2]):
            target[checked_key(key, self.budget, target)] = value

    def add(self, items: list) -> None:
        target = self.top(set)
        for item in items:
            target.add(checked_key(item, self.budget, target))

    def global_(self, module: Any, name: Any) -> None:
        self.push(self.vocabulary.name(module, name))

    def call(self, table: Mapping[tuple[str, str], Call], doing: str) -> None:
        arguments, name = self.pop(), self.pop()
        if type(name) is not Name:
            raise Refused(f"{doing} of {article(name)}, which is no name")
        if type(arguments) is not tuple:
            raise Refused(f"{doing} of {name} with arguments that are no tuple")
        if name not in table:
            raise Refused(f"{doing} of {name}, which is not done to it")
        self.push(table[name](name, arguments, self.budget))

    def build(self) -> None:
        """Drop the state of an object: attributes of an OrderedDict, such as a state dict's _metadata, and others."""
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        name = _ORDERED if type(target) is dict else target.name if isinstance(target, Placeholder) else None
        if name not in self.vocabulary.build:
            found = str(target) if type(target) is Name else article(target)
            raise Refused(f"a state (BUILD) for {found}, which has none")
        if type(state) not in (dict, tuple):
            raise Refused(f"a state (BUILD) that is {article(state)}")

    def persistent(self) -> None:
        if self.vocabulary.persistent is None:
            raise Refused("the pickle instruction BINPERSID, which no network file contains")
        self.push(self.vocabulary.persistent(self.pop()))


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_ARGUMENTS = frozenset(
    (
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    )
)
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "FRAME": lambda machine, argument: None,
    "STOP": lambda machine, argument: None,
    "MARK": lambda machine, argument: machine.mark(),
    "MEMOIZE": lambda machine, argument: machine.remember(len(machine.memo)),
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "TUPLE": lambda machine, argument: machine.push(tuple(machine.items())),
    "TUPLE1": lambda machine, argument: machine.tuple_of(1),
    "TUPLE2": lambda machine, argument: machine.tuple_of(2),
    "TUPLE3": lambda machine, argument: machine.tuple_of(3),
    "APPEND": lambda machine, argument: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, argument: machine.extend(machine.items()),
    "SETITEM": lambda machine, argument: machine.set_item(),
    "SETITEMS": lambda machine, argument: machine.fill(machine.items()),
    "ADDITEMS": lambda machine, argument: machine.add(machine.items()),
    "GLOBAL": lambda machine, argument: machine.global_(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, argument: machine.global_(*reversed((machine.pop(), machine.pop()))),
    "REDUCE": lambda machine, argument: machine.call(machine.vocabulary.reduce, "a call"),
    "NEWOBJ": lambda machine, argument: machine.call(machine.vocabulary.new, "an instance"),
    "BUILD": lambda machine, argument: machine.build(),
    "BINPERSID": lambda machine, argument: machine.persistent(),
}
