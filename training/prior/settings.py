"""The settings of runs that need a prior: which checkpoint, with which VAE and tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ..engine.run_settings import RunSettings
from ..engine.settings import CONNECTED_PREFIX, group
from ..mini_world import MINI_WORLD

what = group("what")


@dataclass(frozen=True, kw_only=True)
class PriorSettings(RunSettings, ABC):
    """A run's settings with the prior's."""

    base: str = what(
        "",
        "the prior: a checkpoint (.safetensors in LDM layout: SD 1.x, 2.x, SDXL) or mini_world",
        path=True,
        model=True,
        free=True,
        names=(MINI_WORLD, CONNECTED_PREFIX),
    )
    vae: str = what(
        "", "file with another VAE than the checkpoint's own; empty: the checkpoint's", path=True, model=True, free=True
    )
    tokenizer: str = what(
        "", "folder with CLIP's vocab.json and merges.txt, which prompts of published models need", path=True, free=True
    )

    @property
    @abstractmethod
    def prompts(self) -> tuple[str, ...]:
        """The prompts that the run encodes, of which any may be empty."""

    @property
    def needs_tokenizer(self) -> bool:
        """Whether a published prior needs a tokenizer for the run."""
        return any(self.prompts)
