"""The compared ways of adapting, a row each: settings of `training.adaptation.config.AdaptConfig` and the critic.

Another method or rival is a row in RECIPES and its runs in `sweep.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ....guidance.distillation.objective import WAY_BACK as SHARE_BACK
from ...mini_world.first_runs import FIRST_ADAPTATION
from .tasks import SOURCE_PROMPT, Task

Settings = dict[str, Any]
# What all have in common. The released code trains the convolutions from 8 px on; the source draws grey with colour
# layers whose three channels are equal, so that no change of its convolutions makes a colour: they train too.
COMMON: Settings = {
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
RELEASED: Settings = {"method": "sds", "scale": SCALE, "mode": "sgf", "latent_clamp": 1.0, "image_quantile": 0.95}
AT_100: Settings = {**RELEASED, "scale": RELEASED_SCALE}
# Pixels beyond white and black keep a hundredth of the gradient that leads back; the released update gives them none.
WITH_WAY_BACK: Settings = {**RELEASED, "way_back": SHARE_BACK}
# One noise for all terms and one pass back through the encoder.
SHARED: Settings = {**WITH_WAY_BACK, "mode": "shared"}
# The same without clamps of gradients.
OURS: Settings = {**SHARED, "latent_clamp": 0.0, "image_quantile": 0.0}
# Only high noise levels, where this prior decides colours; the released update asks about low ones too.
NOISY: Settings = {"t_min": 300, "t_max": 900}
# What `indomain adapt --config mini_world` sets: CSD with a directional regularizer, high noise levels and a rate of
# its own, twice the common one.
FIRST = {key: FIRST_ADAPTATION[key] for key in ("method", "scale", "t_min", "t_max", "directional", "learning_rate")}


class Recipe(NamedTuple):
    """A way of adapting. changes: its own settings, update: those that it shares with others. critic: "prompt" (the
    prior alone), "domain" (the shipped model of coloured handwriting judges too) or "fine_tune" (the prior fine-tuned
    on that handwriting, as DreamBooth would be)."""

    title: str
    changes: Mapping[str, Any] = {}
    update: Mapping[str, Any] = RELEASED
    critic: str = "prompt"

    @property
    def released(self) -> bool:
        """Whether it is the paper's update as its code computes it."""
        return self.update in (RELEASED, AT_100)

    def settings(self, task: Task) -> Settings:
        """Everything that decides the training of this recipe on a task, but for its length and seed."""
        found = {**COMMON, "prompt": task.prompt, "t_max": task.t_max, **self.update, **self.changes}
        if found["method"] in ("dds", "bridge"):
            found["source_prompt"] = SOURCE_PROMPT
        if found["method"] == "nfsd":
            found["negative"] = SOURCE_PROMPT
        return found


def with_way_back(*names: str) -> tuple[str, ...]:
    """Adds the same recipes with the way back to RECIPES; their names."""
    for name in names:
        recipe = RECIPES[name]
        RECIPES[f"{name}_back"] = recipe._replace(title=f"{recipe.title}, way back", update=WITH_WAY_BACK)
    return tuple(f"{name}_back" for name in names)


TERMS = ("directional", "reconstruction")
STRENGTHS: dict[str, tuple[str, float, Settings]] = {
    "": ("1", 1.0, {}),
    "_weak": ("0.2", 0.2, {}),
    "_faint": ("0.05", 0.05, {}),
    "_noisy": ("0.2, t 300 to 900", 0.2, NOISY),
}
# What the claims and the sweep speak of together.
SGF, LAYERS = ("sds", "sds_directional", "sds_reconstruction"), ("sds_layers_6", "sds_layers_3", "sds_layers_1")
DIRECTIONAL, RECONSTRUCTION = (tuple(f"sds_{term}{ending}" for ending in STRENGTHS) for term in TERMS)
WEAK, FAINT, NOISIER = (tuple(f"sds_{term}_{name}" for term in TERMS) for name in ("weak", "faint", "noisy"))
GUIDED = ("domain", "domain_mild", "fine_tune", "domain_directional")  # for a domain that no prompt describes

RECIPES = {"sds": Recipe("SDS alone")}
for _ending, (_title, _weight, _more) in STRENGTHS.items():
    for _term in TERMS:
        RECIPES[f"sds_{_term}{_ending}"] = Recipe(f"SDS + {_term} {_title}", {_term: _weight, **_more})
RECIPES |= {
    "sds_layers_6": Recipe("SDS, 6 layers", {"layers": 6}),
    "sds_layers_3": Recipe("SDS, 3 layers", {"layers": 3}),
    "sds_layers_1": Recipe("SDS, 1 layer", {"layers": 1}),
    "sds_directional_layers_3": Recipe("SDS + directional 1, 3 layers", {"directional": 1.0, "layers": 3}),
    "sds_100": Recipe("SDS alone, scale 100", {}, AT_100),
    "sds_100_directional": Recipe("SDS + directional 1, scale 100", {"directional": 1.0}, AT_100),
}
WAY_BACK = with_way_back("sds", *WEAK)
_CSD = {"method": "csd", "directional": 0.2}
RECIPES |= {
    # The same terms in this project's update.
    "shared_directional": Recipe("SDS + directional 1, shared noise", {"directional": 1.0}, SHARED),
    "shared_reconstruction": Recipe("SDS + reconstruction 1, shared noise", {"reconstruction": 1.0}, SHARED),
    "shared_directional_weak": Recipe("SDS + directional 0.2, shared noise", {"directional": 0.2}, SHARED),
    "csd": Recipe("CSD", {"method": "csd"}, OURS),
    "csd_directional": Recipe("CSD + directional 0.2", _CSD, OURS),
    "csd_directional_noisy": Recipe("CSD + directional 0.2, t 300 to 900", {**_CSD, **NOISY}, OURS),
    "first": Recipe("`adapt --config mini_world`", FIRST, OURS),
    "nfsd": Recipe("NFSD", {"method": "nfsd"}, OURS),
    "bridge": Recipe("SDS-Bridge", {"method": "bridge"}, OURS),
    "dds": Recipe("DDS", {"method": "dds"}, OURS),
    "ism": Recipe("ISM", {"method": "ism"}, OURS),
    "vsd": Recipe("VSD", {"method": "vsd"}, OURS),
    "sds_unclamped": Recipe("SDS, no clamps", {}, OURS),
    "domain": Recipe("SDS, domain model as critic", {"domain_weight": SCALE}, critic="domain"),
    "domain_mild": Recipe("SDS, domain model at weight 1.5", {"domain_weight": 1.5}, critic="domain"),
    "fine_tune": Recipe("SDS, fine-tuned critic", critic="fine_tune"),
    "domain_directional": Recipe(
        "SDS + directional 1, domain model", {"domain_weight": SCALE, "directional": 1.0}, critic="domain"
    ),
}
GUIDED_BACK = with_way_back(*GUIDED)
BEYOND = tuple(name for name, recipe in RECIPES.items() if recipe.critic == "prompt" and not recipe.released)
