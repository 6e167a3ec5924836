"""The string metadata of this project's safetensors files: what domain models and generators have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import FileProblem, Problem, first_line
from ..networks.configuration import Rule
from ..plain_json import parse_json
from .inert_pickle import shown

VERSION = "1"
# The field with the settings of the run that made a file, as JSON (ASCII: paths may hold what UTF-8 cannot).
TRAINING = "training"


def modelspec(architecture: str, code: str, title: str, licence: str, size: tuple[int, int] | None) -> dict[str, str]:
    """Fields of Stability's ModelSpec 1.0.1, which other tools show. size: width and height in pixels."""
    fields = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": code,
        "modelspec.title": title,
    }
    if licence:
        fields["modelspec.license"] = licence
    if size is not None:
        fields["modelspec.resolution"] = f"{size[0]}x{size[1]}"
    return fields


def with_extra(values: Mapping[str, str], extra: Mapping[str, str], what: str) -> dict[str, str]:
    """`values` and the further metadata, which may overrule modelspec alone. Raises Problem for other fields."""
    for key in extra:
        if key in values and not key.startswith("modelspec."):
            raise Problem(f"{what}: the extra metadata {key!r} is a field of the format; set the field.")
    return {**values, **extra}


def json_field(rule: Rule) -> Callable[[str], Any]:
    """The reader of a field that holds JSON which a rule accepts."""

    def read(text: str) -> Any:
        value = parse_json(text)
        if not rule.accepts(value):
            raise Problem(f"expected {rule.words}, found {text!r:.40}")
        return value

    return read


def read_fields(
    values: Mapping[str, str],
    format_: str,
    what: str,
    source: str | os.PathLike,
    readers: Mapping[str, Callable[[str], Any]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields that a file's metadata has, as their readers make them of their texts, and what is left of it.

    format_: what the field "format" must say; what: its name in messages; source: what to call the file. Raises
    FileProblem for another or a newer format, a missing architecture and fields that cannot be read.
    """
    rest = dict(values)
    found, version = (shown(rest.pop(name, "none")) for name in ("format", "version"))
    if found != format_:
        raise FileProblem(f"{source}: expected metadata of the format {format_}, found '{found}'; use another file.")
    if version != VERSION:
        raise FileProblem(
            f"{source}: expected version {VERSION} of the {what} format, found '{version}'; update In-Domain Guidance."
        )
    if "config" not in rest:
        raise FileProblem(f"{source}: expected the architecture in the metadata field config, found none.")
    fields = {}
    for name in [name for name in readers if name in rest]:
        try:
            fields[name] = readers[name](rest.pop(name))
        except ValueError as error:
            raise FileProblem(
                f"{source}: the metadata field {name} cannot be read ({first_line(error)}); the file is damaged, make "
                "it again."
            ) from error
    return fields, rest
