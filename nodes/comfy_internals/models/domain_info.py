"""The domain model behind a MODEL from this pack's loaders: its name, file, form and metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....guidance.files import DomainMetadata

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class DomainInfo:
    """The domain model in a MODEL."""

    name: str
    path: str
    form: str  # "constant" or "cached" (text-free), "full" (a fine-tuned UNet that still takes text)
    metadata: DomainMetadata | None


def domain_info(patcher: ModelPatcher) -> DomainInfo | None:
    """The domain model in a MODEL from this pack's loaders; None for any other MODEL."""
    return getattr(patcher.model, "indomain_domain", None)


def is_text_free(patcher: ModelPatcher) -> bool:
    """Whether a MODEL from this pack's loaders takes no text."""
    info = domain_info(patcher)
    return info is not None and info.form != "full"
