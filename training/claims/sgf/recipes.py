"""The compared ways of adapting, a row each: settings of `training.adaptation.config.AdaptConfig` and the critic.

Another method or rival is a row in RECIPES and its runs in `sweep.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
SCALE, RELEASED_SCALE = 5.0, 100.0
# The released update: each gradient on latents clamped to 1, the image gradient at its 95th percentile. Its scale of
# 100 drives this prior's guided predictions out of what it learned; rows with it stand beside those with SCALE.
RELEASED: dict[str, Any] = {"method": "sds", "scale": SCALE, "mode": "sgf", "latent_clamp": 1.0, "image_quantile": 0.95}
AT_100: dict[str, Any] = {**RELEASED, "scale": RELEASED_SCALE}
# Pixels beyond white and black keep a hundredth of the gradient that leads back; the released update gives them none.
WITH_WAY_BACK: dict[str, Any] = {**RELEASED, "way_back": SHARE_BACK}
# One noise for all terms and one pass back through the encoder.
SHARED: dict[str, Any] = {**WITH_WAY_BACK, "mode": "shared"}
# The same without clamps of gradients.
OURS: dict[str, Any] = {**SHARED, "latent_clamp": 0.0, "image_quantile": 0.0}
# Only high noise levels, where this prior decides colours; the released update asks about low ones too.
NOISY: dict[str, Any] = {"t_min": 300, "t_max": 900}
# What `indomain adapt --config mini_world` sets: CSD with a directional regularizer, high noise levels and a rate of
# its own, twice the common one.
FIRST = {key: FIRST_ADAPTATION[key] for key in ("method", "scale", "t_min", "t_max", "directional", "learning_rate")}


class Recipe(NamedTuple):
    """A way of adapting. update: the settings it shares with others, changes: its own. critic: "prompt" (the prior
    alone), "domain" (the shipped model of coloured handwriting judges too) or "fine_tune" (the prior fine-tuned on that
    handwriting, as DreamBooth would be)."""

    name: str
    title: str
    update: Mapping[str, Any]
    changes: Mapping[str, Any] = {}
    critic: str = "prompt"

    @property
    def released(self) -> bool:
        """Whether it is the paper's update as its code computes it."""
        return self.update in (RELEASED, AT_100)

    def settings(self, task: Task) -> dict[str, Any]:
        """Everything that decides the training of this recipe on a task, but for its length and seed."""
        found = {**COMMON, "prompt": task.prompt, "t_max": task.t_max, **self.update, **self.changes}
        if found["method"] in ("dds", "bridge"):
            found["source_prompt"] = SOURCE_PROMPT
        if found["method"] == "nfsd":
            found["negative"] = SOURCE_PROMPT
        return found


def with_way_back(*recipes: Recipe) -> tuple[Recipe, ...]:
    """The released update with nothing but the way back."""
    return tuple(
        recipe._replace(name=f"{recipe.name}_back", title=f"{recipe.title}, way back", update=WITH_WAY_BACK)
        for recipe in recipes
    )


TERMS = ("directional", "reconstruction")
STRENGTHS = {"": ("1", 1.0, {}), "_weak": ("0.2", 0.2, {}), "_faint": ("0.05", 0.05, {})}
STRENGTHS["_noisy"] = ("0.2, t 300 to 900", 0.2, NOISY)
_SDS = Recipe("sds", "SDS alone", RELEASED)
_REGULARIZED = {
    f"sds_{term}{name}": Recipe(f"sds_{term}{name}", f"SDS + {term} {title}", RELEASED, {term: weight, **more})
    for name, (title, weight, more) in STRENGTHS.items()
    for term in TERMS
}
DIRECTIONAL, RECONSTRUCTION = (tuple(f"sds_{term}{name}" for name in STRENGTHS) for term in TERMS)
WEAK, FAINT, NOISIER = (tuple(f"sds_{term}_{name}" for term in TERMS) for name in ("weak", "faint", "noisy"))
_DIRECTIONAL_CSD = {"method": "csd", "directional": 0.2}
# For a domain that no prompt describes.
_GUIDED = (
    Recipe("domain", "SDS, domain model as critic", RELEASED, {"domain_weight": SCALE}, "domain"),
    Recipe("domain_mild", "SDS, domain model at weight 1.5", RELEASED, {"domain_weight": 1.5}, "domain"),
    Recipe("fine_tune", "SDS, fine-tuned critic", RELEASED, {}, "fine_tune"),
    Recipe("domain_directional", "SDS + directional 1, domain model", RELEASED)._replace(
        changes={"domain_weight": SCALE, "directional": 1.0}, critic="domain"
    ),
)
_ROWS = (
    _SDS,
    *_REGULARIZED.values(),
    Recipe("sds_layers_6", "SDS, 6 layers", RELEASED, {"layers": 6}),
    Recipe("sds_layers_3", "SDS, 3 layers", RELEASED, {"layers": 3}),
    Recipe("sds_layers_1", "SDS, 1 layer", RELEASED, {"layers": 1}),
    Recipe("sds_directional_layers_3", "SDS + directional 1, 3 layers", RELEASED, {"directional": 1.0, "layers": 3}),
    Recipe("sds_100", "SDS alone, scale 100", AT_100),
    Recipe("sds_100_directional", "SDS + directional 1, scale 100", AT_100, {"directional": 1.0}),
    *with_way_back(_SDS, *(_REGULARIZED[name] for name in WEAK)),
    # The same terms in this project's update.
    Recipe("shared_directional", "SDS + directional 1, shared noise", SHARED, {"directional": 1.0}),
    Recipe("shared_reconstruction", "SDS + reconstruction 1, shared noise", SHARED, {"reconstruction": 1.0}),
    Recipe("shared_directional_weak", "SDS + directional 0.2, shared noise", SHARED, {"directional": 0.2}),
    Recipe("csd", "CSD", OURS, {"method": "csd"}),
    Recipe("csd_directional", "CSD + directional 0.2", OURS, _DIRECTIONAL_CSD),
    Recipe("csd_directional_noisy", "CSD + directional 0.2, t 300 to 900", OURS, {**_DIRECTIONAL_CSD, **NOISY}),
    Recipe("first", "`adapt --config mini_world`", OURS, FIRST),
    Recipe("nfsd", "NFSD", OURS, {"method": "nfsd"}),
    Recipe("bridge", "SDS-Bridge", OURS, {"method": "bridge"}),
    Recipe("dds", "DDS", OURS, {"method": "dds"}),
    Recipe("ism", "ISM", OURS, {"method": "ism"}),
    Recipe("vsd", "VSD", OURS, {"method": "vsd"}),
    Recipe("sds_unclamped", "SDS, no clamps", OURS),
    *_GUIDED,
    *with_way_back(*_GUIDED),
)
RECIPES = {recipe.name: recipe for recipe in _ROWS}
# What the claims and the sweep speak of together.
SGF = ("sds", "sds_directional", "sds_reconstruction")
LAYERS = ("sds_layers_6", "sds_layers_3", "sds_layers_1")
WAY_BACK = ("sds_back", *(f"{name}_back" for name in WEAK))
GUIDED = tuple(recipe.name for recipe in _GUIDED)
GUIDED_BACK = tuple(f"{name}_back" for name in GUIDED)
BEYOND = tuple(recipe.name for recipe in _ROWS if recipe.critic == "prompt" and not recipe.released)
