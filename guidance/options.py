"""Options of distillation methods and shapings: dataclass fields with help, range and choices.

Settings, command line and nodes build their inputs from these fields, so that an option is described once, in the class
that has it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .errors import GuidanceError


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that users can set: a bool, int, float or str with its help text.

    limits: `min` and `max` of a number's widget (both inclusive and required; Python may go beyond), `choices` for
    texts, `step` of a number's widget.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def options_of(kind: type) -> tuple[dataclasses.Field, ...]:
    """The fields of a dataclass that were made with `option`, in their order."""
    return tuple(field for field in dataclasses.fields(kind) if "help" in field.metadata)


def check_options(made: Any) -> None:
    """Raise GuidanceError for an option of the dataclass object `made` that has no value of its kind.

    Numbers are not NaN, and whole where the default is; `inf` is for whoever gives it a meaning to allow.
    """
    for field in options_of(type(made)):
        value, kind, choices = getattr(made, field.name), type(field.default), field.metadata.get("choices")
        if kind in (int, float):
            fits = isinstance(value, (kind, int)) and not isinstance(value, bool) and value == value
        elif choices:
            fits = value in choices
        else:
            fits = kind is not bool or isinstance(value, bool)
        if not fits:
            expected = f"one of {', '.join(choices)}" if choices else f"a {kind.__name__}"
            raise GuidanceError(f"Expected {field.name} to be {expected}, got {value!r}.")
