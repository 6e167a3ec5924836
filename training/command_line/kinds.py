"""The kinds of run there are, by what their config.json calls them; a new kind is listed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..adaptation.config import AdaptConfig
from ..baking.config import BakeConfig
from ..domain.config import TrainConfig
from ..engine.settings import ConfigProblem
from ..prior.settings import PriorSettings

KINDS: dict[str, type[PriorSettings]] = {kind.kind: kind for kind in (TrainConfig, BakeConfig, AdaptConfig)}


def kind_of(values: Mapping[str, Any], source: str = "configuration") -> type[PriorSettings]:
    """The kind of run whose settings these are, by their field "kind". Raises ConfigProblem without a known one."""
    kind = KINDS.get(str(values.get("kind")))
    if kind is None:
        raise ConfigProblem(
            f"{source}: expected the kind of run ({', '.join(KINDS)}) in the field kind, found "
            f"{values.get('kind')!r:.40}; name a run's config.json."
        )
    return kind
