"""Settings: flat, validated, frozen dataclasses whose fields say everything about themselves.

Command line, node tooltips and documentation are generated from the metadata of the fields (see `option`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar, TypeVar

from ...guidance.errors import Problem
from ...guidance.files.atomic import write_text
from .paths import meant_path, path_here
from .small_files import read_values

# A path that begins so is no file: models that were connected in ComfyUI, which only that program can give again.
CONNECTED_PREFIX = "connected:"


class ConfigProblem(Problem):
    """A configuration that cannot be trained, in one sentence that names the field."""


def option(default: Any, group: str, help: str, **more: Any) -> Any:
    """A field of a configuration with its metadata.

    help: one sentence without its capital and full stop. group: the heading it stands under. more: `choices`; `min` and
    `max` (both inclusive); `path` (a local path, left out of published files); `names` (values of a path that are no
    files; one that ends in ":" stands for all that begin so); `model` (a path that must lead somewhere for the run to
    go on); `free` (may differ when a run is resumed: it does not change the numbers that are trained).
    """
    return field(default=default, metadata={"help": help, "group": group, "free": False, "path": False, **more})


def group(name: str) -> Callable[..., Any]:
    """`option` for the fields of one group."""
    return lambda default, help="", **more: option(default, name, help, **more)


def changed(settings: type[Settings], name: str, default: Any, **more: Any) -> Any:
    """The field `name` of a base class with another default and, by `more`, other metadata."""
    return field(default=default, metadata={**settings.__dataclass_fields__[name].metadata, **more})


Own = TypeVar("Own", bound="Settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of frozen dataclasses of `option` fields.

    Raises ConfigProblem (a ValueError) for a value out of its field's range.
    """

    command: ClassVar[str] = "indomain"  # whose --help lists the fields
    groups: ClassVar[tuple[str, ...]] = ()  # the fields' groups, in the order they are shown
    # Fields that must be given: what is expected in them, and what that is to the run.
    required: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def __post_init__(self) -> None:
        for known in dataclasses.fields(self):
            object.__setattr__(self, known.name, _checked(known, getattr(self, known.name)))
        for name, (what, role) in self.required.items():
            if not getattr(self, name):
                raise ConfigProblem(f"{name}: expected {what}, found nothing; name {role}.")

    @classmethod
    def from_mapping(cls: type[Own], values: Mapping[str, Any], source: str = "configuration") -> Own:
        """From a mapping of field names to values; lists become tuples, a single string a tuple of one.

        `source` says in errors where the values come from. Raises ConfigProblem for unknown fields (with the nearest
        name), missing ones and values out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigProblem(f"{source}: expected fields with values, found {type(values).__name__}.")
        known = [own.name for own in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name)[:100].replace("-", "_").lower(), known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else f"{cls.command} --help lists the fields."
                raise ConfigProblem(f"{source}: {name!r} is no field of the configuration; {hint}")
        for name, (what, role) in cls.required.items():
            if name not in values:
                raise ConfigProblem(f"{source}: expected a field {name}, {role} ({what}), found none.")
        try:
            return cls(**values)
        except ConfigProblem as problem:
            if source == "configuration":
                raise
            raise ConfigProblem(f"{source}: {problem}") from None

    @classmethod
    def read(cls: type[Own], path: str | os.PathLike, **overrides: Any) -> Own:
        """From a .toml or .json file; `overrides` replace its fields. Raises FileProblem for an unreadable file."""
        return cls.from_mapping({**read_values(path), **overrides}, source=str(path))

    def with_changes(self: Own, **changes: Any) -> Own:
        """A copy with some fields replaced, validated again; unknown fields are refused as in `from_mapping`."""
        return self.from_mapping({**vars(self), **changes})

    def absolute(self: Own) -> Own:
        """A copy with absolute paths, as `meant_path` understands them, so that a run goes on from any folder.

        Raises ConfigProblem for a path of another system.
        """
        changes: dict[str, Any] = {}
        for own in _paths_of(self):
            value = getattr(self, own.name)
            many = isinstance(value, tuple)
            changes[own.name] = tuple(_absolute(own, part) for part in value) if many else _absolute(own, value)
        return self.with_changes(**changes)

    def check_files(self) -> None:
        """Raise ConfigProblem where a model's file that a run began with is not where it was."""
        for own in _paths_of(self):
            path = getattr(self, own.name)
            if own.metadata.get("model") and path and not _is_name(own, path) and not os.path.exists(meant_path(path)):
                raise ConfigProblem(
                    f"{own.name}: expected the file that the run began with, found nothing at {path}; if it was moved, "
                    f"say where it is with --{own.name}."
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, tuples as lists; `from_mapping` inverts it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def public_dict(self) -> dict[str, Any]:
        """`to_dict` for published files: of local paths only the last part stays."""
        values = self.to_dict()
        for own in _paths_of(self):
            value = values[own.name]
            values[own.name] = [_last(part) for part in value] if isinstance(value, list) else _last(value)
        return values

    def write_json(self, path: str | os.PathLike) -> None:
        """Write the fields as JSON, complete or not at all."""
        # ASCII: a path in Python may hold what UTF-8 cannot.
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def binding(self) -> dict[str, Any]:
        """The fields that decide the trained numbers, which a resumed run must share."""
        return {own.name: getattr(self, own.name) for own in dataclasses.fields(self) if not own.metadata["free"]}

    def differences(self: Own, other: Own) -> dict[str, tuple[Any, Any]]:
        """The binding fields in which two configurations differ: name -> (own value, the other's)."""
        theirs = other.binding()
        return {name: (value, theirs[name]) for name, value in self.binding().items() if theirs[name] != value}


def check_multiple(name: str, value: int, step: int, least: int = 0) -> None:
    """Raise ConfigProblem for a number of pixels that is no multiple of `step`; least: the smallest to propose."""
    if value % step:
        nearest = max(round(value / step) * step, least)
        raise ConfigProblem(f"{name}: expected a multiple of {step} pixels, found {value}; the nearest is {nearest}.")


def fields_of(settings: type[Settings]) -> list[dataclasses.Field]:
    """The fields by groups, those that must be given first."""
    groups, required = settings.groups, settings.required
    return sorted(
        dataclasses.fields(settings), key=lambda own: (groups.index(own.metadata["group"]), own.name not in required)
    )


def kinds_of(settings: type[Settings]) -> dict[str, type]:
    """Field name -> bool, int, float, str or tuple (of strings), for interfaces that are built from the fields."""
    return {own.name: _kind(own) for own in dataclasses.fields(settings)}


def _kind(own: dataclasses.Field) -> type:
    return {"str": str, "int": int, "float": float, "bool": bool}.get(str(own.type), tuple)


def _paths_of(settings: Settings) -> list[dataclasses.Field]:
    return [own for own in dataclasses.fields(settings) if own.metadata["path"]]


def _checked(own: dataclasses.Field, value: Any) -> Any:
    """The value in the field's type, or ConfigProblem."""
    kind, limits = _kind(own), own.metadata
    if kind is tuple:
        value = (value,) if isinstance(value, (str, os.PathLike)) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(part, (str, os.PathLike)) for part in value):
            raise ConfigProblem(f"{own.name}: expected a list of strings, found {shown(value)}.")
        if len(value) > limits.get("max", len(value)):
            raise ConfigProblem(f"{own.name}: expected at most {limits['max']}, found {len(value)}; leave some out.")
        return tuple(_checked_text(own, os.fsdecode(part)) for part in value)
    if kind is str:
        if not isinstance(value, (str, os.PathLike)):
            raise ConfigProblem(f"{own.name}: expected text, found {shown(value)}.")
        value = _checked_text(own, os.fsdecode(value))
        if "choices" in limits and value not in limits["choices"]:
            near = difflib.get_close_matches(value[:100], limits["choices"], n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            choices = ", ".join(limits["choices"])
            raise ConfigProblem(f"{own.name}: expected one of {choices}, found {shown(value)}{hint}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigProblem(f"{own.name}: expected true or false, found {shown(value)}.")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ConfigProblem(f"{own.name}: expected a number, found {shown(value)}.")
    # Compared first: a whole number of 310 digits is no float.
    if not limits["min"] <= value <= limits["max"]:
        raise ConfigProblem(
            f"{own.name}: expected a number from {limits['min']} to {limits['max']}, found {shown(value)}."
        )
    if kind is int and value != int(value):
        raise ConfigProblem(f"{own.name}: expected a whole number, found {shown(value)}.")
    return kind(value)


def shown(value: Any) -> str:
    """A value for an error message."""
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python shows no number of more than 4,300 digits
        return f"something that cannot be shown ({type(value).__name__})"


def _checked_text(own: dataclasses.Field, text: str) -> str:
    """A text, or a path, that can be written down and be opened; or ConfigProblem."""
    if not own.metadata["path"]:
        if not is_unicode(text):
            raise ConfigProblem(f"{own.name}: expected text, found {text!r}, which UTF-8 cannot hold; write it anew.")
        return text
    if not text.strip() and _kind(own) is tuple:
        # Path("") is the current folder, which is hardly what an unset variable of a script meant.
        raise ConfigProblem(f"{own.name}: expected paths, found an empty one; name a folder, or . for this one.")
    if re.search(r"[\x00-\x1f\x7f]", text.strip()):
        raise ConfigProblem(
            f"{own.name}: expected a path, found {text!r} with a special character; in settings and scripts write a "
            "backslash twice, or / in its place."
        )
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigProblem(f"{own.name}: expected a path, found {text!r}, which no file is called.") from None
    return text


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text; it cannot hold halves of characters, which some terminals hand over."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_name(own: dataclasses.Field, path: str) -> bool:
    """Whether the value of a path is a name that stands for no file."""
    names = own.metadata.get("names", ())
    return any(path == name or (name.endswith(":") and path.startswith(name)) for name in names)


def _absolute(own: dataclasses.Field, path: str) -> str:
    bare = path.strip()
    if not bare or _is_name(own, bare):
        return bare
    try:
        return os.path.abspath(path_here(path))
    except Problem as problem:
        option_name = own.name.replace("_", "-")
        raise ConfigProblem(f"{own.name}: {problem} (in a terminal: --{option_name}).") from None


def _last(path: str) -> str:
    """The last part of a path of any platform."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]
