"""Checks of what a prompt sends, against the node's own inputs.

Core checks the ranges of values in a prompt, not of values that come over a link, and, depending on its version, no
choices at all; NaN passes everywhere, and so does a text or a number in place of a link.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from comfy_api.latest import io

from ..guidance.errors import Problem, printable
from .comfy_internals.sockets import expected_of_socket

LONGEST_TEXT = 100_000  # characters of one input
LONGEST_LIST = 100_000  # values of one input of a node that takes lists
MOST_SHOWN = 12  # choices
LONGEST_FOREIGN = 20_000  # characters of a message that is not ours, such as torch's about memory


def checked(*files: str) -> Callable[[Callable], Callable]:
    """Decorator for a node's `execute`: raise Problem for input values that the node's schema does not allow.

    An optional input that gets None, as over a link, has its default. Errors are made safe to print, since core writes
    them into its log. files: inputs that list files, whose choices change; only that they are text is checked.
    """

    def decorate(execute: Callable) -> Callable:
        signature = inspect.signature(execute)

        @functools.wraps(execute)
        def run(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(cls, *args, **kwargs).arguments
            check_inputs(cls, {**bound, **kwargs}, files)
            optional = {entry.id for entry in (cls.SCHEMA or cls.GET_SCHEMA()).inputs if entry.optional}
            kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in optional}
            try:
                return execute(cls, *args, **kwargs)
            except Exception as error:
                chain = list(_chain(error))
                if all(map(_can_be_shown, chain)):
                    raise
                if _can_be_shown(error):
                    raise error from None
                raise Problem(f"{type(error).__name__}: {error}") from None

        return run

    return decorate


def found(name: Any, find: Callable[[str], Any]) -> bool | str:
    """For `validate_inputs`: True where `find` finds a file of that name, else its message. None comes over a link."""
    if name is None:
        return True
    if not isinstance(name, str) or len(name) > LONGEST_TEXT:
        return f"expected the name of a file, found {printable(f'{name!r:.120}')}."
    try:
        find(name)
    except Problem as problem:
        return str(problem)
    return True


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, as Python shows them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _can_be_shown(error: BaseException) -> bool:
    text = str(error)
    return len(text) <= LONGEST_FOREIGN and printable(text, len(text)) == text


def check_inputs(node: type[io.ComfyNode], values: Mapping[str, Any], files: tuple[str, ...] = ()) -> None:
    """Raise Problem for a value of another type, out of its range, too long, or none of its choices."""
    schema = node.SCHEMA or node.GET_SCHEMA()
    for entry in schema.inputs:
        given = values.get(entry.id)
        several = given if schema.is_input_list and isinstance(given, list) else [given]
        if len(several) > LONGEST_LIST:
            expected = f"expected at most {LONGEST_LIST:,} values of {entry.id}"
            raise Problem(f"{schema.display_name}: {expected}, found {len(several):,}.")
        for value in several:
            # An input that is left out has its default; None over a link is allowed only for optional inputs.
            left_out = value is None and (entry.optional or entry.id not in values)
            expected = None if left_out else _expected(entry, value, entry.id in files)
            if expected is not None:
                raise Problem(f"{schema.display_name}: expected {entry.id} to be {expected}, found {value!r:.120}.")


def _expected(entry: io.Input, value: Any, is_file: bool) -> str | None:
    """What an input's value should be, where it is not; None where it is."""
    if isinstance(entry, (io.Int.Input, io.Float.Input)):
        whole = isinstance(entry, io.Int.Input)
        number = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
        if number and math.isfinite(value) and entry.min <= value <= entry.max:
            return None
        return f"a {'whole' if whole else 'finite'} number from {entry.min:,} to {entry.max:,}"
    if isinstance(entry, io.Boolean.Input):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(entry, io.String.Input) or (isinstance(entry, io.Combo.Input) and is_file):
        short = isinstance(value, str) and len(value) <= LONGEST_TEXT
        return None if short else f"a text of at most {LONGEST_TEXT:,} characters"
    if isinstance(entry, io.Combo.Input):
        more = ", ..." if len(entry.options) > MOST_SHOWN else ""
        return None if value in entry.options else f"one of {', '.join(map(str, entry.options[:MOST_SHOWN]))}{more}"
    return expected_of_socket(entry, value)
