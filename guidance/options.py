"""Options of distillation methods and shapings: dataclass fields with help, range and choices.

Settings, command line and nodes build their inputs from these fields, so that an option is described once, in the class
that has it.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that users can set: a bool, int, float or str with its help text.

    limits: `min` and `max` (both inclusive; required for numbers), `choices` for texts, `step` of a number's widget.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def options_of(kind: type) -> tuple[dataclasses.Field, ...]:
    """The fields of a dataclass that were made with `option`, in their order."""
    return tuple(field for field in dataclasses.fields(kind) if "help" in field.metadata)
