"""What a domain model file says about itself, as the string metadata of its safetensors file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..diffusion import PREDICTION_TYPES
from ..errors import FileProblem, Problem
from ..networks.configuration import TRUTH_VALUE, Rule, is_number, whole_number
from ..networks.unet_config import UNetConfig
from ..plain_json import parse_json
from .file_metadata import TRAINING, VERSION, json_field, modelspec, read_fields, with_extra

FORMAT = "indomain_guidance.domain_unet"
LATENT_FORMATS = ("sd15", "sdxl", "mini_world")
_ARCHITECTURES = {
    768: "stable-diffusion-v1",
    1024: "stable-diffusion-v2",
    2048: "stable-diffusion-xl-v1-base",
    1280: "stable-diffusion-xl-v1-refiner",
}


@dataclass(frozen=True)
class DomainMetadata:
    """What a domain model file says about itself; None or empty where it does not say.

    config: the architecture, with the text-free form (`config.null_text`). latent_format: "sd15" (1.x and 2.x),
    "sdxl", "mini_world". prediction_type: "epsilon", "v_prediction" or "sample"; zero_snr: the noise schedule ends in
    zero signal. null_text_error: per block, for the constant form. null_context: description of the empty prompt.
    prior_hash: `prior_content_hash` of the prior. ema: decay of the weight average. resolution in pixels.
    extra: further metadata, kept as it is (keys of this format's own fields are refused).
    """

    config: UNetConfig
    latent_format: str | None = None
    prediction_type: str | None = None
    zero_snr: bool = False
    null_text_error: Mapping[str, float] = field(default_factory=dict)
    null_context: Mapping[str, str | int] = field(default_factory=dict)
    prior_hash: str | None = None
    domain_name: str = ""
    dataset_size: int | None = None
    dataset_hash: str | None = None
    steps: int = 0
    ema: float | None = None
    resolution: int | None = None
    licence: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prediction_type is not None and self.prediction_type not in PREDICTION_TYPES:
            kinds = ", ".join(PREDICTION_TYPES)
            raise Problem(f"Domain model: expected a prediction type out of {kinds}, found {self.prediction_type!r}.")
        if any(not math.isfinite(error) for error in self.null_text_error.values()):
            raise Problem("Domain model: expected finite errors of the constant form, found NaN or infinity.")

    @property
    def null_text(self) -> str:
        """ "constant", "cached", or "none" for a UNet that takes text."""
        return self.config.null_text

    @property
    def caption(self) -> str | None:
        """The caption that a UNet which takes text was trained with; None where that is the empty prompt or unknown."""
        if self.null_text != "none":
            return None
        try:
            caption = parse_json(self.extra.get(TRAINING, "{}")).get("caption")
        except (ValueError, AttributeError):
            return None
        return caption if isinstance(caption, str) and caption else None

    def to_strings(self) -> dict[str, str]:
        """The metadata of the file: strings only, absent fields left out; `from_strings` inverts it."""
        values: dict[str, str] = {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_json(),
            "null_text": self.null_text,
            "zero_snr": json.dumps(self.zero_snr),
            "steps": str(self.steps),
        }
        values |= {name: getattr(self, name) for name in _TEXTS if getattr(self, name)}
        for name in ("dataset_size", "ema", "resolution"):
            if getattr(self, name) is not None:
                values[name] = json.dumps(getattr(self, name))
        for name in ("null_text_error", "null_context"):
            if getattr(self, name):
                values[name] = json.dumps(dict(getattr(self, name)), separators=(",", ":"))
        return with_extra(values | self._modelspec(), self.extra, "Domain model")

    def _modelspec(self) -> dict[str, str]:
        width = self.config.context_dim or 0
        family = "mini-world" if self.latent_format == "mini_world" else _ARCHITECTURES.get(width, "latent-diffusion")
        variant = "unet" if self.null_text == "none" else f"text-free-unet-{self.null_text}"
        size = None if self.resolution is None else (self.resolution, self.resolution)
        code = "https://github.com/CompVis/latent-diffusion"
        fields = modelspec(f"{family}/{variant}", code, self.domain_name or "domain model", self.licence, size)
        if self.prediction_type in ("epsilon", "v_prediction"):
            fields["modelspec.prediction_type"] = "epsilon" if self.prediction_type == "epsilon" else "v"
        return fields

    @classmethod
    def from_strings(cls, values: Mapping[str, str], source: str | os.PathLike) -> DomainMetadata:
        """Inverse of `to_strings`; `source` names the file. Raises FileProblem for other or newer formats."""
        fields, rest = read_fields(values, FORMAT, "domain model", source, _READERS)
        rest.pop("null_text", None)  # the configuration states it
        try:
            described = cls(**fields)
        except ValueError as error:
            raise FileProblem(f"{source}: {error}") from error
        derived = described._modelspec()
        return replace(described, extra={key: text for key, text in rest.items() if derived.get(key) != text})


def _are_errors(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def _is_description(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(entry, (list, dict)) for entry in value.values())


_TEXTS = ("latent_format", "prediction_type", "prior_hash", "domain_name", "dataset_hash", "licence")
_READERS: dict[str, Callable[[str], Any]] = {
    "config": UNetConfig.from_json,
    **dict.fromkeys(_TEXTS, str),
    "zero_snr": json_field(TRUTH_VALUE),
    "null_text_error": json_field(Rule(_are_errors, "numbers by name")),
    "null_context": json_field(Rule(_is_description, "texts and numbers by name")),
    "dataset_size": json_field(whole_number(0)),
    "steps": json_field(whole_number(0)),
    "ema": json_field(Rule(lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")),
    "resolution": json_field(whole_number(1, 65536)),
}
