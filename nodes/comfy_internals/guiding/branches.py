"""The models of a guidance besides the prior, and whose weights are in the modules that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher

from ....guidance.combination import Guidance
from ....guidance.errors import logger
from ....guidance.terms import Source
from . import compatibility
from .branch import Branch
from .calls import Conditionings, entries
from .conditionings import NamedConditionings
from .shared_weights import on_own_weights, same_weights

LOG = logger(__name__)

_ADDITIONAL_MODELS = "indomain_guidance"


class Branches:
    """One `Branch` for each model besides the prior that is ever needed, and the order in which they use a module.

    prior: the MODEL that runs as the prior, a clone of the one that was given. needed: the sources that are ever
    evaluated. conds: the prior's own conditionings. Models on one module with the same weights need no loading of their
    own. With different weights each gets its own copy of the module, or, where that is not possible, they take turns in
    it.
    """

    def __init__(
        self,
        prior: ModelPatcher,
        guidance: Guidance,
        needed: Sequence[Source],
        conditionings: NamedConditionings,
        conds: Conditionings,
    ) -> None:
        self.prior = prior
        self.loaded: list[Branch] = []
        self._by_model: dict[ModelPatcher, Branch] = {}
        # By the identity of a module: the MODEL that answers for it, and a token for the weights in it.
        self._in_module: dict[int, tuple[ModelPatcher, object]] = {}
        self._prior_weights = object()
        self._beside: list[ModelPatcher] = []
        self._memory_required = 0.0
        controls_of_prior = {id(options.get("control")) for options in entries(conds)}
        holders = {id(prior.model): (prior, self._prior_weights)}
        for source in needed:
            if source.model is guidance.base.model or source.model in self._by_model:
                continue
            patcher = _static_if_hooked(source.model, [conds, conditionings.of_others])
            term = " and ".join(guidance.names(source))
            compatibility.check_control_loras(source.model, source.cond, controls_of_prior, term)
            holder, weights = holders.get(id(patcher.model), (None, object()))
            if holder is not None and not same_weights(patcher, holder):
                weights = object()
                patcher, holder = _apart(patcher, holder, term)
            names = [name for other, name in conditionings.names.items() if other.model is source.model]
            branch = self._by_model[source.model] = Branch(patcher, term, weights, names)
            if holder is None:
                holders[id(patcher.model)] = (patcher, weights)
                self.loaded.append(branch)

    def __iter__(self) -> Iterator[Branch]:
        return iter(self._by_model.values())

    def __len__(self) -> int:
        return len(self._by_model)

    def get(self, model: ModelPatcher) -> Branch | None:
        """The branch of a MODEL of the guidance; None for the prior."""
        return self._by_model.get(model)

    def hang_on_prior(self) -> None:
        """Have core load these models together with the prior, in one call."""
        if self.loaded:
            self.prior.set_additional_models(_ADDITIONAL_MODELS, [branch.patcher for branch in self.loaded])

    def take_over_replaced(self) -> None:
        """Newer versions may have replaced the prior, and the models that hang on it, by another kind of patcher."""
        for branch, patcher in zip(self.loaded, self.prior.get_additional_models_with_key(_ADDITIONAL_MODELS)):
            branch.patcher = patcher

    def models_to_load(self) -> list[ModelPatcher]:
        """What core would not load by itself: models that hooks want, and the branches where the prior was replaced."""
        at_hand = self.prior.get_additional_models()
        more = [model for branch in self for model in branch.additional_models()]
        return more + [branch.patcher for branch in self.loaded if branch.patcher not in at_hand]

    def check_prepared(self) -> None:
        """Refuse to be run without what core's `sample` prepares. Raises GuidanceError."""
        for branch in self:
            branch.check_prepared()

    # ---- one run: which weights are in a module ---------------------------------------------------------------------

    def begin(self, loaded_models: Sequence[ModelPatcher], memory_required: float) -> None:
        """Core has loaded the models: each module holds the weights of the MODEL that was loaded for it."""
        self._beside, self._memory_required = [self.prior, *loaded_models], memory_required
        holders = [(self.prior, self._prior_weights), *((branch.patcher, branch.weights) for branch in self.loaded)]
        self._in_module = {id(patcher.model): (patcher, weights) for patcher, weights in holders}

    def start(self, *inputs: Any) -> None:
        """Start each branch (`Branch.start`) with its weights in place; afterwards the prior's are."""
        for branch in self:
            self.activate(branch)
            branch.start(*inputs)
        self.activate(None)

    def end(self) -> None:
        self._in_module, self._beside = {}, []

    def activate(self, branch: Branch | None) -> None:
        """Have a module hold the weights of a branch's MODEL (None: the prior) and answer for it."""
        patcher, weights = (self.prior, self._prior_weights) if branch is None else (branch.patcher, branch.weights)
        module: Any = patcher.model
        current, held = self._in_module.get(id(module), (patcher, weights))
        if current is not patcher:
            if current.current_hooks is not None:
                # Hooked weights are in the module, but only the patcher that put them there knows.
                current.patch_hooks(None)
            if held is not weights:
                beside = [model for model in self._beside if model.model is not module]
                comfy.model_management.load_models_gpu([patcher, *beside], memory_required=self._memory_required)
        self._in_module[id(module)] = (patcher, weights)
        module.current_patcher = patcher


def _static_if_hooked(patcher: ModelPatcher, conditionings: Sequence[Conditionings]) -> ModelPatcher:
    """Newer versions page weights in dynamically, and swap in a static model where hooks patch weights."""
    is_dynamic = getattr(patcher, "is_dynamic", None)
    hooked = any("hooks" in entry for conds in conditionings for entry in entries(conds))
    return patcher.get_non_dynamic_delegate() if hooked and is_dynamic is not None and is_dynamic() else patcher


def _apart(patcher: ModelPatcher, holder: ModelPatcher, term: str) -> tuple[ModelPatcher, ModelPatcher | None]:
    """The MODEL of a term on weights of its own, without a holder; or as it is, where it takes turns with `holder`."""
    own = on_own_weights(patcher)
    if own is not None:
        LOG.info(
            "Multi-guidance: the model of term '%s' shares its checkpoint with another model but is patched "
            "differently; it gets its own copy of the weights (%.2f GB).",
            term,
            own.model_size() / 2**30,
        )
        return own, None
    LOG.warning(
        "Multi-guidance: the model of term '%s' shares its checkpoint with another model but is patched "
        "differently, and there is no room or way for a second copy; the weights are patched anew twice a step, "
        "which is slow. Loading the checkpoint for it from a second file avoids that.",
        term,
    )
    return patcher, holder
