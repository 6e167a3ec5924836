"""What descriptions of architectures share: rules for their fields, and the way to JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from ..errors import Problem
from ..plain_json import parse_json

Config = TypeVar("Config", bound="Configuration")


@dataclass(frozen=True)
class Rule:
    """What values a field takes, and how to say so after "must be"."""

    accepts: Callable[[Any], bool]
    words: str

    def or_none(self) -> Rule:
        return Rule(lambda value: value is None or self.accepts(value), f"{self.words} or none")


def whole_number(least: int, most: int = 2**63 - 1) -> Rule:
    words = f"a whole number from {least}" + (f" to {most}" if most < 2**63 - 1 else "")
    return Rule(lambda value: type(value) is int and least <= value <= most, words)


def whole_numbers(least: int) -> Rule:
    def accepts(values: Any) -> bool:
        return isinstance(values, tuple) and all(type(value) is int and value >= least for value in values)

    return Rule(accepts, f"a list of whole numbers from {least}")


def one_of(options: Collection[str]) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in options, f"one of {', '.join(options)}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


TRUTH_VALUE = Rule(lambda value: isinstance(value, bool), "true or false")
POSITIVE = Rule(lambda value: is_number(value) and value > 0, "a positive number")
_RULES_BY_TYPE = {
    "int": whole_number(1),
    "int | None": whole_number(1).or_none(),
    "tuple[int, ...]": whole_numbers(1),
    "bool": TRUTH_VALUE,
}


@dataclass(frozen=True)
class Configuration:
    """Base of the dataclasses that describe an architecture. Fields that hold lists become tuples.

    What a field takes follows from its type: whole numbers are positive. `_RULES` names the fields that differ, `_NAME`
    begins every message. Raises Problem for other values.
    """

    _NAME: ClassVar[str]
    _RULES: ClassVar[Mapping[str, Rule]] = {}

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            rule = self._RULES.get(field.name) or _RULES_BY_TYPE[str(field.type)]
            if not rule.accepts(value):
                raise self._problem(f"{field.name} must be {rule.words}, got {value!r:.100}")

    def _problem(self, text: str) -> Problem:
        return Problem(f"{self._NAME} configuration: {text}.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary; `from_dict` inverts it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Inverse of `to_dict`. Raises Problem for unknown, missing and impossible fields."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise Problem(f"{cls._NAME} configuration: unknown fields {', '.join(unknown)}; this file may be newer.")
        try:
            return cls(**values)
        except TypeError as error:
            raise Problem(f"{cls._NAME} configuration is incomplete: {error}.") from None

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls: type[Config], text: str) -> Config:
        """Inverse of `to_json`. Raises Problem."""
        try:
            values = parse_json(text)
        except ValueError as error:
            raise Problem(f"{cls._NAME} configuration is not JSON: {error}.") from None
        if not isinstance(values, dict):
            raise Problem(f"{cls._NAME} configuration must be a JSON object, got {type(values).__name__}.")
        return cls.from_dict(values)
