"""The string metadata of this project's safetensors files: what domain models and generators have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import FileProblem, Problem, first_line
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


class MetadataReader:
    """Takes the fields out of a file's metadata; `rest` is what is left. Raises FileProblem for another format.

    `source` is what to call the file; format_: the name that its field "format" must have; what: of its format in
    messages.
    """

    def __init__(self, values: Mapping[str, str], format_: str, what: str, source: str | os.PathLike) -> None:
        self.rest, self.source = dict(values), source
        found, version = (shown(self.rest.pop(name, "none")) for name in ("format", "version"))
        if found != format_:
            raise FileProblem(
                f"{source}: expected metadata of the format {format_}, found '{found}'; make the file with this "
                "project."
            )
        if version != VERSION:
            raise FileProblem(
                f"{source}: expected version {VERSION} of the {what} format, found '{version}'; update In-Domain "
                "Guidance."
            )
        if "config" not in self.rest:
            raise FileProblem(f"{source}: expected the architecture in the metadata field config, found none.")

    def take(self, readers: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
        """The fields that the file has, as their readers make them of their texts. Raises FileProblem."""
        fields = {}
        for name, read in readers.items():
            if name not in self.rest:
                continue
            try:
                fields[name] = read(self.rest.pop(name))
            except (ValueError, TypeError, AttributeError) as error:
                raise FileProblem(
                    f"{self.source}: the metadata field {name} cannot be read ({first_line(error)}); the file is "
                    "damaged, make it again."
                ) from error
        return fields
