"""Predictions of a guidance's sources within one run of core's guider: on the prior, and on the models beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.samplers
from torch import Tensor

from ....guidance.combination import Guidance
from ....guidance.terms import Source
from . import sampling_hooks
from .branches import Branches
from .calls import Calls
from .conditionings import NamedConditionings
from .cost import Cost
from .gaps import Gaps, find_gaps


class SourceGuider(comfy.samplers.CFGGuider):
    """Core's guider, whose model is the prior, with branches for the other models. A subclass combines predictions.

    entries_given: how many entries each conditioning had when the run began; core appends others.
    """

    guidance: Guidance
    conditionings: NamedConditionings
    branches: Branches
    cost: Cost
    calls: Calls
    entries_given: dict[str, int]

    def gaps(self, sources: Sequence[Source], x: Tensor, timestep: Tensor) -> Gaps:
        """Where these sources, and the references that fill their gaps, do not cover the picture."""

        def given(source: Source) -> list[dict[str, Any]]:
            # Only what the source was given: core appends others' areas, without the source's own limits.
            name, branch = self.conditionings.names[source], self.branches.get(source.model)
            return (self.conds if branch is None else branch.conds)[name][: self.entries_given[name]]

        return find_gaps(self.guidance, sources, given, x, timestep)

    def predict_sources(
        self, sources: Sequence[Source], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> dict[Source, Tensor]:
        """Denoised predictions [B, C, ...] of all `sources`, the prior last so that it stays active."""
        self.count_predictions(sources)
        names = self.conditionings.names
        predictions: dict[Source, Tensor] = {}
        for branch in self.branches:
            wanted = [source for source in sources if self.branches.get(source.model) is branch]
            if wanted:
                self.branches.activate(branch)
                outputs = branch.run([names[source] for source in wanted], x, timestep)
                predictions.update({source: outputs[names[source]] for source in wanted})
        self.branches.activate(None)
        own = [source for source in sources if source.model is self.guidance.base.model]
        if own:
            keys = [names[source] for source in own]
            self.calls.tell_caches(keys, model_options)
            outputs = sampling_hooks.run_prior(
                self.calls, self.inner_model, self.conds, keys, x, timestep, model_options
            )
            predictions.update({source: outputs[names[source]] for source in own})
        return predictions

    def count_predictions(self, sources: Sequence[Source]) -> None:
        """Tell the cost which predictions are being made."""
        for source in sources:
            branch = self.branches.get(source.model)
            model, conds = (self.inner_model, self.conds) if branch is None else (branch.model, branch.conds)
            entries = conds.get(self.conditionings.names[source]) or ()
            self.cost.ask(model, self.term_names(source), entries)

    def term_names(self, source: Source) -> str:
        """The names of the terms that a source belongs to, for messages."""
        return " and ".join(self.guidance.names(source))


def with_references(sources: Sequence[Source], gaps: Gaps) -> list[Source]:
    """The sources to evaluate, with those that fill gaps."""
    return list(dict.fromkeys([*sources, *(reference for _, reference in gaps.values())]))
