"""What a generator file says about itself, as the string metadata of its safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..networks.configuration import Rule
from ..networks.stylegan2_config import GeneratorConfig
from .file_metadata import VERSION, json_field, modelspec, read_fields, with_extra

FORMAT = "indomain_guidance.generator"
_TEXTS = ("name", "licence", "class_name", "source_format", "source_sha256", "source_code_sha256")
_HISTORY = Rule(
    lambda value: isinstance(value, list) and all(isinstance(entry, dict) for entry in value), "a list of objects"
)


@dataclass(frozen=True)
class GeneratorMetadata:
    """What a generator file says about itself; empty where it does not say.

    source_format: "NVIDIA pickle", "rosinality checkpoint" or "safetensors", what the weights were first read from;
    source_sha256: of that file; class_name: as NVIDIA calls the network's class; source_code_sha256: of the source text
    in the pickle. history: what was done to the weights, oldest first, JSON-able mappings (an adaptation states prompt,
    steps, parent). extra: further string metadata, kept as it is.
    """

    name: str = ""
    licence: str = ""
    class_name: str = ""
    source_format: str = ""
    source_sha256: str = ""
    source_code_sha256: str = ""
    history: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)

    def to_strings(self, config: GeneratorConfig) -> dict[str, str]:
        """The metadata of the file: strings only, absent fields left out; `from_strings` inverts it."""
        values = {"format": FORMAT, "version": VERSION, "config": config.to_json()}
        values |= {name: getattr(self, name) for name in _TEXTS if getattr(self, name)}
        if self.history:
            # ASCII: it names files, and a file's name in Python may hold what UTF-8 cannot.
            values["history"] = json.dumps([dict(entry) for entry in self.history])
        return with_extra(values | self._modelspec(config), self.extra, "Generator file")

    def _modelspec(self, config: GeneratorConfig) -> dict[str, str]:
        code = "https://github.com/NVlabs/stylegan2-ada-pytorch"
        size = (config.width, config.height)
        return modelspec("stylegan2/generator", code, self.name or "generator", self.licence, size)

    @classmethod
    def from_strings(
        cls, values: Mapping[str, str], source: str | os.PathLike
    ) -> tuple[GeneratorMetadata, GeneratorConfig]:
        """Inverse of `to_strings`; `source` names the file. Raises FileProblem for other or newer formats."""
        readers = {"config": GeneratorConfig.from_json, **dict.fromkeys(_TEXTS, str), "history": json_field(_HISTORY)}
        fields, rest = read_fields(values, FORMAT, "generator", source, readers)
        config = fields.pop("config")
        described = cls(**{**fields, "history": tuple(fields.get("history", ()))})
        derived = described._modelspec(config)
        return replace(described, extra={key: text for key, text in rest.items() if key not in derived}), config
