"""The compared ways of adapting, as settings of `training.adaptation.config.AdaptConfig`, and the critics they ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ....guidance.distillation.objective import WAY_BACK as SHARE_BACK
from ...mini_world.first_runs import FIRST_ADAPTATION
from .tasks import SOURCE_PROMPT, Task

# What all have in common. The released code trains the convolutions from 8 px on; the source draws grey with colour
# layers whose three channels are equal, so that no change of its convolutions makes a colour: they train too.
COMMON: dict[str, Any] = {
    "generator": "mini_world",
    "base": "mini_world",
    "train": "synthesis",
    "freeze_bias": False,
    "batch_size": 4,
    "learning_rate": 0.004,
    "schedule": "constant",
    "warmup": 0,
    "ema": 0.95,
    "truncation": 1.0,
    "precision": "fp32",
    "device": "cpu",
    "t_min": 10,
}
RELEASED_SCALE = 100.0
SCALE = 5.0
# The released update: each gradient on latents clamped to 1, the image gradient at its 95th percentile. Its scale of
# 100 drives this prior's guided predictions out of what it learned; rows with it stand beside those with SCALE.
RELEASED: dict[str, Any] = {"method": "sds", "scale": SCALE, "mode": "sgf", "latent_clamp": 1.0, "image_quantile": 0.95}
# Pixels beyond white and black keep a hundredth of the gradient that leads back; the released update gives them none.
BACK: dict[str, Any] = {"way_back": SHARE_BACK}
# One noise for all terms, one pass back through the encoder, no clamps of gradients.
OURS: dict[str, Any] = {"mode": "shared", "scale": SCALE, "latent_clamp": 0.0, "image_quantile": 0.0, **BACK}
# Only high noise levels, where this prior decides colours; the released update asks about low ones too.
NOISY: dict[str, Any] = {"t_min": 300, "t_max": 900}
# What `indomain adapt --config mini_world` sets: CSD with a directional regularizer, high noise levels, and a rate of
# its own, twice the common one.
FIRST: dict[str, Any] = {
    name: FIRST_ADAPTATION[name] for name in ("method", "scale", "t_min", "t_max", "directional", "learning_rate")
}


@dataclass(frozen=True)
class Recipe:
    """A way of adapting. critic: "prompt" (the prior alone), "domain" (the shipped coloured handwriting's model judges
    too) or "fine_tune" (the prior fine-tuned on that handwriting, as DreamBooth would be). changes: what it sets."""

    name: str
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    critic: str = "prompt"
    released: bool = False

    def settings(self, task: Task) -> dict[str, Any]:
        """Everything that decides the training of this recipe on a task, but for its length and seed."""
        found = {**COMMON, "prompt": task.prompt, "t_max": task.t_max, **self.changes}
        if found["method"] in ("dds", "bridge"):
            found["source_prompt"] = SOURCE_PROMPT
        if found["method"] == "nfsd":
            found["negative"] = SOURCE_PROMPT
        return found


def _released(name: str, title: str, critic: str = "prompt", **changes: Any) -> Recipe:
    return Recipe(name, title, {**RELEASED, **changes}, critic, released=True)


def _ours(name: str, title: str, critic: str = "prompt", **changes: Any) -> Recipe:
    return Recipe(name, title, {**OURS, **changes}, critic)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _released("sds", "SDS alone"),
        _released("sds_directional", "SDS + directional 1", directional=1.0),
        _released("sds_reconstruction", "SDS + reconstruction 1", reconstruction=1.0),
        _released("sds_directional_weak", "SDS + directional 0.2", directional=0.2),
        _released("sds_reconstruction_weak", "SDS + reconstruction 0.2", reconstruction=0.2),
        _released("sds_directional_faint", "SDS + directional 0.05", directional=0.05),
        _released("sds_reconstruction_faint", "SDS + reconstruction 0.05", reconstruction=0.05),
        _released("sds_directional_noisy", "SDS + directional 0.2, t 300 to 900", directional=0.2, **NOISY),
        _released("sds_reconstruction_noisy", "SDS + reconstruction 0.2, t 300 to 900", reconstruction=0.2, **NOISY),
        _released("sds_layers_6", "SDS, 6 layers", layers=6),
        _released("sds_layers_3", "SDS, 3 layers", layers=3),
        _released("sds_layers_1", "SDS, 1 layer", layers=1),
        _released("sds_directional_layers_3", "SDS + directional 1, 3 layers", directional=1.0, layers=3),
        _released("sds_100", "SDS alone, scale 100", scale=RELEASED_SCALE),
        _released("sds_100_directional", "SDS + directional 1, scale 100", scale=RELEASED_SCALE, directional=1.0),
        # The released update with nothing but the way back.
        *(
            Recipe(f"{name}_back", f"{title}, way back", {**RELEASED, **BACK, **changes})
            for name, title, changes in (
                ("sds", "SDS alone", {}),
                ("sds_directional_weak", "SDS + directional 0.2", {"directional": 0.2}),
                ("sds_reconstruction_weak", "SDS + reconstruction 0.2", {"reconstruction": 0.2}),
            )
        ),
        # The same terms in this project's update.
        Recipe(
            "shared_directional",
            "SDS + directional 1, shared noise",
            {**RELEASED, **BACK, "mode": "shared", "directional": 1.0},
        ),
        Recipe(
            "shared_reconstruction",
            "SDS + reconstruction 1, shared noise",
            {**RELEASED, **BACK, "mode": "shared", "reconstruction": 1.0},
        ),
        Recipe(
            "shared_directional_weak",
            "SDS + directional 0.2, shared noise",
            {**RELEASED, **BACK, "mode": "shared", "directional": 0.2},
        ),
        _ours("csd", "CSD", method="csd"),
        _ours("csd_directional", "CSD + directional 0.2", method="csd", directional=0.2),
        _ours("csd_directional_noisy", "CSD + directional 0.2, t 300 to 900", method="csd", directional=0.2, **NOISY),
        _ours("first", "`adapt --config mini_world`", **FIRST),
        _ours("nfsd", "NFSD", method="nfsd"),
        _ours("bridge", "SDS-Bridge", method="bridge"),
        _ours("dds", "DDS", method="dds"),
        _ours("ism", "ISM", method="ism"),
        _ours("vsd", "VSD", method="vsd"),
        _ours("sds_unclamped", "SDS, no clamps", method="sds"),
        # A domain that no prompt describes.
        _released("domain", "SDS, domain model as critic", "domain", domain_weight=SCALE),
        _released("domain_mild", "SDS, domain model at weight 1.5", "domain", domain_weight=1.5),
        _released("fine_tune", "SDS, fine-tuned critic", "fine_tune"),
        _released(
            "domain_directional", "SDS + directional 1, domain model", "domain", domain_weight=SCALE, directional=1.0
        ),
        *(
            Recipe(f"{name}_back", f"{title}, way back", {**RELEASED, **BACK, **changes}, critic)
            for name, title, critic, changes in (
                ("domain", "SDS, domain model as critic", "domain", {"domain_weight": SCALE}),
                ("domain_mild", "SDS, domain model at weight 1.5", "domain", {"domain_weight": 1.5}),
                ("fine_tune", "SDS, fine-tuned critic", "fine_tune", {}),
                (
                    "domain_directional",
                    "SDS + directional 1, domain model",
                    "domain",
                    {"domain_weight": SCALE, "directional": 1.0},
                ),
            )
        ),
    )
}
# What stands behind each claim.
DIRECTIONAL = ("sds_directional", "sds_directional_weak", "sds_directional_faint", "sds_directional_noisy")
RECONSTRUCTION = (
    "sds_reconstruction",
    "sds_reconstruction_weak",
    "sds_reconstruction_faint",
    "sds_reconstruction_noisy",
)
LAYERS = ("sds_layers_6", "sds_layers_3", "sds_layers_1")
SGF = ("sds", "sds_directional", "sds_reconstruction")
WEAK = ("sds_directional_weak", "sds_reconstruction_weak")
FAINT = ("sds_directional_faint", "sds_reconstruction_faint")
NOISIER = ("sds_directional_noisy", "sds_reconstruction_noisy")
WAY_BACK = ("sds_back", "sds_directional_weak_back", "sds_reconstruction_weak_back")
BEYOND = (
    *WAY_BACK,
    "shared_directional",
    "shared_reconstruction",
    "shared_directional_weak",
    "csd",
    "csd_directional",
    "csd_directional_noisy",
    "first",
    "nfsd",
    "bridge",
    "dds",
    "ism",
    "vsd",
    "sds_unclamped",
)
GUIDED = ("domain", "domain_mild", "fine_tune", "domain_directional")
GUIDED_BACK = ("domain_back", "domain_mild_back", "fine_tune_back", "domain_directional_back")
