"""Everything that touches ComfyUI's internals: what a new ComfyUI version is checked against, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .loading import DomainInfo


def domain_info(patcher: ModelPatcher) -> DomainInfo | None:
    """What a MODEL from this project's loaders knows about itself; None for any other MODEL."""
    return getattr(patcher.model, "indomain_domain", None)
