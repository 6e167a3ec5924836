"""The models of a guidance besides the prior, and whose weights are in the modules that they share.

`CFGGuider` handles exactly one model. A branch does the same for another model, with core's own functions and in core's
order, and undoes all of it after the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.combination import Guidance
from ....guidance.errors import GuidanceError, logger
from ....guidance.terms import Source
from .calls import POSITIVE, Calls, Conditionings, controls, entries
from .compatibility import check_control_loras, loop_wrapper_keys
from .conditionings import NamedConditionings
from .cost import Cost
from .patch_copies import PatchCopies, share_code
from .shared_weights import on_own_weights, same_weights

LOG = logger(__name__)

_ADDITIONAL_MODELS = "indomain_guidance"
# Clones of the prior on other devices; with them in its options a branch would run the prior instead of its own model.
_PRIOR_ONLY_OPTIONS = ("multigpu_clones", "multigpu_thread_pool")
# Key of a conditioning's entry under which a ControlNet is hidden from core.
_LEFT_OUT = "indomain_guidance left out"


def _without_controls(conds: Conditionings, left_out: set[int]) -> None:
    """Take the ControlNets of those identities out of `conds`, in place; `_with_controls` puts them back."""
    for entry in entries(conds):
        if id(entry.get("control")) in left_out:
            entry[_LEFT_OUT] = entry.pop("control")


def _with_controls(conds: Conditionings) -> None:
    """Put them back, and spread them as core does: Apply ControlNet (OLD) acts on the other conditionings too."""
    for entry in entries(conds):
        if _LEFT_OUT in entry:
            entry["control"] = entry.pop(_LEFT_OUT)
    spread = [entry for entry in conds.get(POSITIVE, ()) if entry.get("control_apply_to_uncond", False)]
    for key, others in conds.items():
        if key != POSITIVE:
            comfy.samplers.apply_empty_x_to_equal_area(spread, others, "control", lambda found, index: found[index])


class Branch:
    """A model besides the prior.

    patcher: the MODEL; newer versions of ComfyUI may replace it between runs. name: of its terms, for messages.
    weights: a token that models share whose weights in one module are the same. keys: names of its conditionings.
    """

    def __init__(self, patcher: ModelPatcher, name: str, weights: object, keys: Sequence[str]) -> None:
        self.patcher = patcher
        self.name = name
        self.weights = weights
        self.keys = keys
        self.calls = Calls(keys, f"the model of term '{name}'")
        self.conds: Conditionings = {}
        self.options: dict[str, Any] = {}
        self._hook_mode: Any = None
        self._own_controls: list[Any] = []

    @property
    def model(self) -> Any:
        return self.patcher.model

    def prepare(self, conds: Conditionings) -> None:
        """Do what `CFGGuider.sample` does before models are loaded. conds: this branch's own copies."""
        self.conds = conds
        self.options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
        self._hook_mode = self.patcher.hook_mode
        comfy.samplers.preprocess_conds_hooks(conds)
        _own_hooks(conds)
        if comfy.samplers.get_total_hook_groups_in_conds(conds) <= 1:
            self.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
        comfy.sampler_helpers.prepare_model_patcher(self.patcher, conds, self.options)
        comfy.samplers.filter_registered_hooks_on_conds(conds, self.options)
        for key in _PRIOR_ONLY_OPTIONS:
            self.options.pop(key, None)
        unusable = loop_wrapper_keys(self.patcher) - {None}
        for wrappers in self.options["transformer_options"].get("wrappers", {}).values():
            for key in unusable:
                wrappers.pop(key, None)

    def start(
        self,
        process: Callable[[Any, Conditionings], Conditionings],
        device: Any,
        sigmas: Tensor,
        latent_shapes: Any,
        controls_of_prior: set[int],
        options_of_prior: dict[str, Any],
        cost: Cost,
    ) -> None:
        """Do what `CFGGuider.outer_sample` and `inner_sample` do once models are loaded, up to the sampler.

        process: core's `process_conds` for a model and its conditionings.
        """
        comfy.samplers.cast_to_load_options(self.options, device=device, dtype=self.patcher.model_dtype())
        self.patcher.pre_run()
        self.model.latent_shapes = latent_shapes
        own_controls = [control for key, control in controls(self.conds).items() if key not in controls_of_prior]
        # A ControlNet is prepared once, by the prior, whose noise schedule it follows.
        _without_controls(self.conds, controls_of_prior)
        self.conds = process(self.model, self.conds)
        self._own_controls = own_controls
        _with_controls(self.conds)
        self.options = comfy.model_patcher.create_model_options_clone(self.options)
        self.options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        if share_code(self.options, options_of_prior):
            self.options = PatchCopies().of(self.options)
        self.options = cost.watch(self.model, self.options)
        self.calls = Calls(self.keys, f"the model of term '{self.name}'")
        self.calls.prime(self.model, self.options)

    def finish(self) -> None:
        """Undo `prepare` and `start`, also where they failed halfway."""
        try:
            self.patcher.cleanup()
            comfy.sampler_helpers.cleanup_additional_models(self._own_controls)
            comfy.samplers.cast_to_load_options(self.options, device=self.patcher.offload_device)
        finally:
            self.patcher.restore_hook_patches()
            if self._hook_mode is not None:
                self.patcher.hook_mode = self._hook_mode
            self.conds, self.options, self._hook_mode, self._own_controls = {}, {}, None, []


def own_copies(conds: Conditionings, originals: Conditionings) -> Conditionings:
    """Copies for one branch, with the hooks of the originals: the prior removes from its own what it cannot use."""
    hooks = {entry["uuid"]: entry.get("hooks") for entry in entries(originals)}
    copies = {key: [entry.copy() for entry in found] for key, found in conds.items()}
    for entry in entries(copies):
        if hooks.get(entry.get("uuid")) is not None:
            entry["hooks"] = hooks[entry["uuid"]]
    return copies


def _own_hooks(conds: Conditionings) -> None:
    """Give a branch its own hooks: their keyframes report a change of strength once, to the model that asks first.

    Copies of one hook stay equal, which registration and caching rely on.
    """
    groups: dict[int, Any] = {}
    keyframes: dict[int, Any] = {}
    for entry in entries(conds):
        group = entry.get("hooks")
        if group is None:
            continue
        if id(group) not in groups:
            own = group.clone()
            for hook in own.hooks:
                shared = hook.hook_keyframe
                hook.hook_keyframe = keyframes.setdefault(id(shared), shared.clone())
            groups[id(group)] = own
        entry["hooks"] = groups[id(group)]


class Branches:
    """One `Branch` for each model besides the prior, and the order in which they use a module.

    needed: the sources that are ever evaluated. conds: the prior's own conditionings. Models on one module with the
    same weights need no loading of their own. With different weights each gets its own copy of the module, or, where
    that is not possible, they take turns in it.
    """

    def __init__(
        self,
        prior: ModelPatcher,
        guidance: Guidance,
        needed: list[Source],
        named: NamedConditionings,
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
            patcher = _static_if_hooked(source.model, [conds, named.of_others])
            term = " and ".join(guidance.names(source))
            check_control_loras(source.model, source.cond, controls_of_prior, term)
            holder, weights = holders.get(id(patcher.model), (None, object()))
            if holder is not None and not same_weights(patcher, holder):
                weights = object()
                patcher, holder = _apart(patcher, holder, term)
            names = [name for other, name in named.names.items() if other.model is source.model]
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
        find = comfy.sampler_helpers.get_additional_models_from_model_options
        more = [model for branch in self for model in find(branch.options)]
        return more + [branch.patcher for branch in self.loaded if branch.patcher not in at_hand]

    def check_prepared(self) -> None:
        """Refuse predictions without what core's `sample` prepares. Raises GuidanceError."""
        for branch in self:
            if not branch.options:
                raise GuidanceError(
                    f"Term '{branch.name}': expected a guider that prepares its models in its own sample(), found one "
                    "whose predictions were asked for without; run it with a sampler node that calls the guider's "
                    "sample()."
                )

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
    said = "Multi-guidance: the model of term '%s' shares its checkpoint with another model but is patched differently"
    own = on_own_weights(patcher)
    if own is not None:
        LOG.info(f"{said}; it gets its own copy of the weights (%.2f GB).", term, own.model_size() / 2**30)
        return own, None
    LOG.warning(
        f"{said}, and there is no room or way for a second copy; the weights are patched anew twice a step, which is "
        "slow. Loading the checkpoint for it from a second file avoids that.",
        term,
    )
    return patcher, holder
