"""Domain model files: a UNet in LDM keys as safetensors, with what is needed to use it in the string metadata."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion import PREDICTION_TYPES
from ..errors import FileProblem, Problem
from ..networks.unet_config import UNetConfig, unet_config_from_state_dict
from ..plain_json import parse_json
from .file_metadata import TRAINING, VERSION, MetadataReader, modelspec, with_extra
from .layouts import check_unet, check_unet_shapes, stated_prediction, strip_unet_prefix, unet_layout, unet_prefix
from .model_file import ModelFile
from .recognise import UNET, recognise_names, refusal_of
from .safetensors_file import write_safetensors
from .weights import check_finite

FORMAT = "indomain_guidance.domain_unet"
MOST_PIXELS = 65536  # of a side that a model says it was trained at
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
            raise Problem(
                f"Domain model: expected a prediction type out of {', '.join(PREDICTION_TYPES)}, found "
                f"{self.prediction_type!r}."
            )
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
            return parse_json(self.extra.get(TRAINING, "{}")).get("caption") or None
        except (ValueError, AttributeError):
            return None

    def to_strings(self) -> dict[str, str]:
        """The metadata of the file: strings only, absent fields left out; `from_strings` inverts it."""
        values: dict[str, str] = {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_json(),
            "null_text": self.null_text,
            "zero_snr": "true" if self.zero_snr else "false",
            "steps": str(self.steps),
        }
        for name in ("latent_format", "prediction_type", "prior_hash", "domain_name", "dataset_hash", "licence"):
            if getattr(self, name):
                values[name] = getattr(self, name)
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
        reader = MetadataReader(values, FORMAT, "domain model", source)
        reader.rest.pop("null_text", None)  # the configuration states it
        config = reader.take("config", UNetConfig.from_json, None)
        assert config is not None  # MetadataReader refuses a file without it
        try:
            described = cls(
                config=config,
                latent_format=reader.take("latent_format", str, None),
                prediction_type=reader.take("prediction_type", str, None),
                zero_snr=reader.take("zero_snr", _flag, False),
                null_text_error=reader.take("null_text_error", _errors, {}),
                null_context=reader.take("null_context", _context, {}),
                prior_hash=reader.take("prior_hash", str, None),
                domain_name=reader.take("domain_name", str, ""),
                dataset_size=reader.take("dataset_size", _whole, None),
                dataset_hash=reader.take("dataset_hash", str, None),
                steps=reader.take("steps", _whole, 0),
                ema=reader.take("ema", _share, None),
                resolution=reader.take("resolution", _side, None),
                licence=reader.take("licence", str, ""),
            )
        except FileProblem:
            raise
        except ValueError as error:
            raise FileProblem(f"{source}: {error}") from error
        derived = described._modelspec()
        return replace(described, extra={key: text for key, text in reader.rest.items() if derived.get(key) != text})


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise Problem(f"expected true or false, found {text!r}")
    return text == "true"


def _errors(text: str) -> dict[str, float]:
    return {str(block): float(error) for block, error in parse_json(text).items()}


def _whole(text: str) -> int:
    number = parse_json(text)
    if type(number) is not int or not 0 <= number < 2**63:
        raise Problem(f"expected a whole number, found {text!r:.40}")
    return number


def _share(text: str) -> float:
    number = parse_json(text)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
        raise Problem(f"expected a number from 0 to 1, found {text!r:.40}")
    return float(number)


def _side(text: str) -> int:
    side = _whole(text)
    if not 0 < side <= MOST_PIXELS:
        raise Problem(f"expected a side of 1 to {MOST_PIXELS} pixels, found {text!r:.40}")
    return side


def _context(text: str) -> dict[str, str | int]:
    found = parse_json(text)
    if not isinstance(found, dict) or any(isinstance(value, (list, dict)) for value in found.values()):
        raise Problem("expected texts and numbers by name")
    return found


def read_domain_file(
    path: str | os.PathLike, *, latent_format: str | None = None, device: str = "cpu"
) -> tuple[dict[str, Tensor], DomainMetadata]:
    """A domain model: the UNet's tensors (LDM keys without prefix) and its metadata, checked in every respect.

    Text-free files of both forms, and full UNets (alone or inside a checkpoint, keys with or without their prefix).
    Without this project's metadata the architecture is read from the weights and the rest is left at None.
    latent_format: the latent space it has to work in; None accepts any. Raises FileProblem.
    """
    file = ModelFile(path)
    metadata, keys = file.metadata, file.keys
    layout = unet_layout(keys, path, metadata=metadata)
    kind = recognise_names(keys, metadata)
    if kind.group == "quantised":
        raise FileProblem(refusal_of(path, UNET, kind))
    own = metadata.get("format") == FORMAT
    described = DomainMetadata.from_strings(metadata, path) if own else None
    if described is not None:
        check_latent_format(described, latent_format, path)
        _check_form(described, layout, path)
        shapes = {key: shape for key, (shape, _) in file.shapes().items()}
        check_unet_shapes(strip_unet_prefix(shapes), described.config, path)
    state_dict = strip_unet_prefix(file.tensors(unet_prefix(keys), device))
    if described is None:
        try:
            config = unet_config_from_state_dict(state_dict)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise FileProblem(
                f"{path}: its architecture cannot be read from its weights ({str(error).rstrip('.')}); use a file with "
                "metadata, or a UNet of a published family."
            ) from error
        described = DomainMetadata(
            config,
            latent_format=_published_latent_format(config),
            prediction_type=stated_prediction(keys, metadata),
            zero_snr="ztsnr" in keys,
            domain_name=Path(path).stem,
            licence=metadata.get("modelspec.license", ""),
        )
        check_latent_format(described, latent_format, path)
        _check_form(described, layout, path)
        check_unet(state_dict, described.config, path)
    check_finite(state_dict, path)
    return state_dict, described


def _check_form(described: DomainMetadata, layout: str, path: str | os.PathLike) -> None:
    form = "none" if layout == "full" else layout
    if described.null_text != form:
        raise FileProblem(
            f"{path}: its metadata says text-free form '{described.null_text}', its weights are of form '{form}'; make "
            "the file again."
        )


def write_domain_file(path: str | os.PathLike, state_dict: Mapping[str, Tensor], metadata: DomainMetadata) -> Path:
    """Write a domain model atomically, after checking that weights and metadata belong together and are finite."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise FileProblem(f"{path}: expected a name that ends in .safetensors; domain models are safetensors files.")
    check_unet(state_dict, metadata.config, path)
    check_finite(state_dict, path)
    return write_safetensors(path, state_dict, metadata.to_strings())


def check_latent_format(metadata: DomainMetadata, expected: str | None, source: str | os.PathLike) -> None:
    """Raise FileProblem when a file was made for another latent space than `expected` (None accepts any)."""
    found = metadata.latent_format
    if expected is not None and found is not None and found != expected:
        raise FileProblem(
            f"{source}: expected a domain model for the latent space '{expected}', found one for '{found}'; use "
            "a domain model that was made from the same family as the prior."
        )


def _published_latent_format(config: UNetConfig) -> str | None:
    if config.model_channels not in (320, 384):
        return None
    return {768: "sd15", 1024: "sd15", 2048: "sdxl", 1280: "sdxl"}.get(config.context_dim or 0)


def prior_content_hash(state_dict: Mapping[str, Tensor], between: Callable[[], None] = lambda: None) -> str:
    """SHA-256 (hex) over sorted key, shape and fp16 bytes of the UNet's tensors, prefix and other parts ignored.

    So one UNet has one hash whether it lies alone or in a checkpoint, in fp32 or fp16. between is called before each
    tensor; what it raises ends the hashing, which takes seconds for each GB. Raises Problem where there is no UNet to
    hash.
    """
    digest = hashlib.sha256()
    unet = strip_unet_prefix(state_dict)
    if not unet:
        found = next(iter(state_dict), "none")
        raise Problem(f"Prior: expected the weights of a UNet in LDM layout to hash, found keys such as {found}.")
    for key in sorted(unet):
        between()
        tensor = unet[key]
        digest.update(f"{key}\n{','.join(str(size) for size in tensor.shape)}\n".encode())
        half = tensor.detach().to(device="cpu", dtype=torch.float16).contiguous()
        digest.update(half.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
