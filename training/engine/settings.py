"""Settings: flat, validated, frozen dataclasses whose fields say everything about themselves.

Command line, node tooltips and documentation are generated from the metadata of the fields (`option`): `help`, `group`,
`choices`, `min`, `max` (both inclusive), `path` (a local path, left out of published files), `names` (values of a path
that are none; one that ends in ":" stands for all that begin so) and `free` (may differ when a run is resumed, because
it does not change the numbers that are trained).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ...guidance.errors import Problem
from ...guidance.files.atomic import write_text
from .paths import is_of_windows, meant_path
from .small_files import read_values

# Characters that some file system refuses in a name, control characters, and those that make a text read backwards; the
# name becomes NAME.safetensors.
FORBIDDEN_IN_NAMES = (
    set('<>:"/\\|?*')
    | {chr(code) for code in (*range(32), *range(127, 160))}
    | set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
)
# Names of devices, with any ending, on Windows.
RESERVED_NAMES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789\u00b9\u00b2\u00b3"
}
# What Python, and ComfyUI for a node's text, make of JSON's true, false, null and of nothing in brackets: never a name.
WORDS_OF_JSON = {"True", "False", "None", "{}", "[]"}
# File systems take 255; the finished file's ending and temporary names of it need some.
LONGEST_NAME = 200


# A model that begins so is no file: the models of a graph, which only the program that holds them can give again.
CONNECTED_PREFIX = "connected:"
# Fields that name a model's file.
MODELS = ("base", "generator", "domain", "vae")


class ConfigProblem(Problem):
    """A configuration that cannot be trained, in one sentence that names the field."""


def option(default: Any, group: str, help: str, **more: Any) -> Any:
    """A field of a configuration with its metadata; default MISSING: it must be given."""
    metadata = {"help": help, "group": group, "free": False, "path": False, **more}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


Own = TypeVar("Own", bound="Settings")


class Settings:
    """What the configurations of all kinds of run have in common; each is a frozen dataclass of `option` fields.

    They have at least name, output, export_to and steps. Raises ConfigProblem (a ValueError) for a field out of its
    range.
    """

    command: ClassVar[str] = "indomain"  # whose --help lists the fields
    # Fields without a default: what is expected in them, and what that is to the run.
    required: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            object.__setattr__(self, one.name, _checked(one, getattr(self, one.name)))
        for name, (what, role) in self.required.items():
            if not getattr(self, name):
                raise ConfigProblem(f"{name}: expected {what}, found nothing; name {role}.")
        check_name(self.name)
        if not _plausible_device(self.device):
            raise ConfigProblem(f"device: expected auto, cpu, cuda, cuda:N, mps or xpu, found {self.device!r}.")

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its files."""
        return Path(self.output) if self.output else Path("runs") / self.name

    @classmethod
    def from_mapping(cls: type[Own], values: Mapping[str, Any], source: str = "configuration") -> Own:
        """From a mapping of field names to values; lists become tuples, a single string a tuple of one.

        `source` says in errors where the values come from. Raises ConfigProblem for unknown fields (with the nearest
        name), missing ones and values out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigProblem(f"{source}: expected fields with values, found {type(values).__name__}.")
        known = [one.name for one in dataclasses.fields(cls)]
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

    def absolute(self: Own) -> Own:
        """A copy with absolute paths, as `meant_path` understands them, so that a run goes on from any folder.

        Raises ConfigProblem for a path of another system.
        """
        changes: dict[str, Any] = {}
        for one in dataclasses.fields(self):
            if one.metadata["path"]:
                value = getattr(self, one.name)
                parts = tuple(_absolute(one, part) for part in (value if isinstance(value, tuple) else (value,)))
                changes[one.name] = parts if isinstance(value, tuple) else parts[0]
        changes["output"] = changes["output"] or os.path.abspath(self.run_folder)
        return self.with_changes(**changes)

    def check_files(self) -> None:
        """Raise ConfigProblem where a model's file that a run began with is not where it was."""
        for one in dataclasses.fields(self):
            path = getattr(self, one.name)
            if one.name in MODELS and path and not _is_name(one, path) and not os.path.exists(meant_path(path)):
                raise ConfigProblem(
                    f"{one.name}: expected the file that the run began with, found nothing at {path}; if it was moved, "
                    f"say where it is with --{one.name}."
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, tuples as lists; `from_mapping` inverts it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def public_dict(self) -> dict[str, Any]:
        """`to_dict` for published files: of local paths only the last part stays."""
        values = self.to_dict()
        for one in dataclasses.fields(self):
            if one.metadata["path"]:
                value = values[one.name]
                values[one.name] = [_last(part) for part in value] if isinstance(value, list) else _last(value)
        return values

    def write_json(self, path: str | os.PathLike) -> None:
        """Write the fields as JSON, complete or not at all."""
        # ASCII: a path in Python may hold what UTF-8 cannot.
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def with_changes(self: Own, **changes: Any) -> Own:
        """A copy with some fields replaced, validated again; unknown fields are refused as in `from_mapping`."""
        return self.from_mapping({**vars(self), **changes})

    def binding(self) -> dict[str, Any]:
        """The fields that decide the trained numbers, which a resumed run must share."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if not one.metadata["free"]}

    def binding_hash(self) -> str:
        """SHA-256 of `binding`."""
        return hashlib.sha256(json.dumps(self.binding(), sort_keys=True).encode()).hexdigest()

    def differences(self: Own, other: Own) -> dict[str, tuple[Any, Any]]:
        """The binding fields in which two configurations differ: name -> (own value, the other's)."""
        theirs = other.binding()
        return {name: (value, theirs[name]) for name, value in self.binding().items() if theirs[name] != value}


def kinds_of(settings: type[Settings]) -> dict[str, type]:
    """Field name -> bool, int, float, str or tuple (of strings), for whoever builds an interface from the fields."""
    return {one.name: _kind(one) for one in dataclasses.fields(settings)}


def _kind(one: dataclasses.Field) -> type:
    return {"str": str, "int": int, "float": float, "bool": bool}.get(one.type, tuple)


def _checked(one: dataclasses.Field, value: Any) -> Any:
    """The value in the field's type, or ConfigProblem."""
    kind, limits = _kind(one), one.metadata
    if kind is tuple:
        value = (value,) if isinstance(value, (str, os.PathLike)) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(part, (str, os.PathLike)) for part in value):
            raise ConfigProblem(f"{one.name}: expected a list of strings, found {_shown(value)}.")
        if len(value) > limits.get("max", len(value)):
            raise ConfigProblem(f"{one.name}: expected at most {limits['max']}, found {len(value)}; leave some out.")
        return tuple(_checked_text(one, os.fsdecode(part)) for part in value)
    if kind is str:
        if not isinstance(value, (str, os.PathLike)):
            raise ConfigProblem(f"{one.name}: expected text, found {_shown(value)}.")
        value = _checked_text(one, os.fsdecode(value))
        if "choices" in limits and value not in limits["choices"]:
            near = difflib.get_close_matches(value[:100], limits["choices"], n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            choices = ", ".join(limits["choices"])
            raise ConfigProblem(f"{one.name}: expected one of {choices}, found {_shown(value)}{hint}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigProblem(f"{one.name}: expected true or false, found {_shown(value)}.")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ConfigProblem(f"{one.name}: expected a number, found {_shown(value)}.")
    # Compared first: a whole number of 310 digits is no float.
    if not limits["min"] <= value <= limits["max"]:
        raise ConfigProblem(
            f"{one.name}: expected a number from {limits['min']} to {limits['max']}, found {_shown(value)}."
        )
    if kind is int and value != int(value):
        raise ConfigProblem(f"{one.name}: expected a whole number, found {_shown(value)}.")
    return kind(value)


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python shows no number of more than 4,300 digits
        return f"something that cannot be shown ({type(value).__name__})"


def _checked_text(one: dataclasses.Field, text: str) -> str:
    """A text, or a path, that can be written down and be opened; or ConfigProblem."""
    if not one.metadata["path"]:
        if not _is_unicode(text):
            raise ConfigProblem(f"{one.name}: expected text, found {text!r}, which UTF-8 cannot hold; write it anew.")
        return text
    if not text.strip() and _kind(one) is tuple:
        # Path("") is the current folder, which is hardly what an unset variable of a script meant.
        raise ConfigProblem(f"{one.name}: expected paths, found an empty one; name a folder, or . for this one.")
    if re.search(r"[\x00-\x1f\x7f]", text.strip()):
        raise ConfigProblem(
            f"{one.name}: expected a path, found {text!r} with a special character; in settings and scripts write a "
            "backslash twice, or / in its place."
        )
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigProblem(f"{one.name}: expected a path, found {text!r}, which no file is called.") from None
    return text


def _is_name(one: dataclasses.Field, path: str) -> bool:
    """Whether a value of a path is one of those that are none."""
    names = one.metadata.get("names", ())
    return any(path == name or (name.endswith(":") and path.startswith(name)) for name in names)


def _absolute(one: dataclasses.Field, path: str) -> str:
    bare = path.strip()
    if not bare or _is_name(one, bare):
        return bare
    meant = meant_path(path)
    if is_of_windows(path) and not os.path.lexists(meant):
        raise ConfigProblem(
            f"{one.name}: expected a path of this system, found one of Windows, {path!r}; give the place where it lies "
            f"here (in a terminal: --{one.name.replace('_', '-')})."
        )
    return os.path.abspath(meant)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # halves of characters, as a terminal of another encoding hands them over
        return False
    return True


def check_name(name: Any) -> None:
    """Raise ConfigProblem for a name that some system cannot give to a file, and for what is no text."""
    if not isinstance(name, str) or not _is_unicode(name):
        raise ConfigProblem(f"name: expected a plain file name, found {name!r:.80}; use letters, digits, - and _.")
    if name in WORDS_OF_JSON:
        raise ConfigProblem(f"name: expected a plain file name, found {name}, a value of another kind; use a text.")
    if not name.strip() or set(name) & FORBIDDEN_IN_NAMES or name.strip(". ") != name:
        raise ConfigProblem(
            f"name: expected a plain file name without folders or ending, found {name!r:.80}; use letters, "
            "digits, - and _."
        )
    if name.partition(".")[0].strip().lower() in RESERVED_NAMES:
        raise ConfigProblem(
            f"name: expected a plain file name, found {name!r}, which is a device on Windows; choose another."
        )
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > LONGEST_NAME:
        raise ConfigProblem(
            f"name: expected a plain file name of at most {LONGEST_NAME} bytes, found {size}; choose a shorter one."
        )


def _plausible_device(name: str) -> bool:
    kind, _, index = name.partition(":")
    return kind in ("auto", "cpu", "cuda", "mps", "xpu") and (":" not in name or (index.isdigit() and kind != "auto"))


def _last(path: str) -> str:
    """The last part of a path of any platform."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]
