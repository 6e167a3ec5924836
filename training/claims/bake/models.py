"""The models of `claims.models`, and baked ones, made by the production baker."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ...baking.bake import bake
from ...baking.config import BakeConfig
from ...mini_world import assets
from ..keeping import file_hash
from ..models import Models
from ..points import ModelSpec
from .recipes import BAKING, BakedSpec


class BakeModels(Models):
    def settings(self, spec: ModelSpec) -> dict[str, Any]:
        if not isinstance(spec, BakedSpec):
            return super().settings(spec)
        own = {"name": spec.run_name, "batch_size": spec.batch, "seed": spec.seed}
        return {**BAKING, **spec.changes, **own}

    def facts(self, spec: ModelSpec) -> dict[str, Any]:
        if not isinstance(spec, BakedSpec):
            return super().facts(spec)
        prior = file_hash(assets.weights_dir() / "prior_unet.safetensors")
        domain = [self.facts(spec.of_domain), spec.domain_steps]
        length = {"steps": spec.steps, "images": self.images}
        return {"settings": self.settings(spec), "prior": prior, "domain": domain, **length}

    def train(self, spec: ModelSpec, place: Path, step: int) -> Any:
        if not isinstance(spec, BakedSpec):
            return super().train(spec, place, step)
        domain = self.file(spec.of_domain)
        print(f"baking {spec.run_name}", file=sys.stderr, flush=True)
        places = {**self.places(spec, place, step), "domain": str(domain)}
        return bake(BakeConfig.from_mapping({**self.settings(spec), **places}))
