"""Warnings about what a guider ignores or what works against its terms, each logged once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from comfy.model_patcher import ModelPatcher

from ....guidance.combination import Guidance
from ....guidance.errors import logger
from ....guidance.schedules import Constant
from . import compatibility
from .branch import Branch
from .calls import NEGATIVE, POSITIVE, Conditionings

LOG = logger(__name__)


def on_models(guidance: Guidance, prior: ModelPatcher) -> None:
    """Warn of what on the MODELs of a guidance has no effect, or works against it."""
    for source in guidance.sources:
        if source.model is prior:
            continue
        names = " and ".join(guidance.names(source))
        ignored = Branch(source.model, names).ignored_hooks(prior)
        if ignored:
            LOG.warning(
                "Multi-guidance: %s on the model of term '%s' is ignored; methods that change the sampling "
                "function belong on the prior.",
                ", ".join(ignored),
                names,
            )
    for term in guidance.terms:
        against_prior = guidance.reference(term).model is prior
        if term.model is prior or not against_prior or term.weight == Constant(0.0):
            continue
        lacking = compatibility.missing_model_patches(prior, term.model)
        if compatibility.missing_weight_patches(prior, term.model):
            lacking = ["weights (LoRAs)", *lacking]
        if lacking:
            LOG.warning(
                "Multi-guidance: the prior carries patches that the model of term '%s' lacks (%s), so this term "
                "pushes against them; add the prior without them as a term of weight 0 and make it this term's "
                "reference, or, which comes near, put the same LoRA or node on that model.",
                term.name,
                ", ".join(lacking),
            )


class Remarks:
    """Warnings about what other code sets on a guider, each given once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            LOG.warning("Multi-guidance: %s", sentence)

    def on_conditionings(self, changed: Sequence[str], of_branches: Sequence[str], has_control: bool) -> None:
        """changed: names of conditionings that were replaced. of_branches: of those that only other models have."""
        if changed and of_branches:
            others = " and ".join(repr(key.removeprefix("term ")) for key in of_branches)
            self._say(f"conditionings were set from outside; that of term {others}, for another model, stays as it is.")
        if POSITIVE in changed and not has_control:
            self._say("a positive conditioning was set from outside, but no term guides with one: it has no effect.")

    def on_conditionings_of_a_run(self, began_with: Mapping[str, int], conds: Conditionings, branches: bool) -> None:
        """began_with: identities of the conditionings, by name, that the run's first prediction saw."""
        shared = [key for key in began_with if key != POSITIVE]
        if branches and any(id(conds.get(key)) != began_with[key] for key in shared or [NEGATIVE]):
            self._say(
                "conditionings were replaced within a run; the prior sees the new ones, other models those that the "
                "run began with."
            )

    def on_scale(self, wanted: float, total: float) -> None:
        """A scale was set beside terms that are more than a plain CFG; total: the weights' sum with it."""
        if math.isclose(wanted, total, abs_tol=1e-12):
            self._say(
                "the scale of this guider (cfg) was set from outside; it is the total weight here, and scales all "
                "terms alike."
            )
        else:
            self._say(
                "the scale of this guider (cfg) was set from outside; it has no effect where the weights of its terms "
                "cancel each other."
            )
