"""One model of a guidance besides the prior: its conditionings, options and hooks during one sampling run.

`CFGGuider` handles exactly one model. A branch does the same for another model, with core's own functions and in core's
order, and undoes all of it after the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....guidance.errors import GuidanceError
from .calls import POSITIVE, Calls, Conditionings, controls, entries
from .cost import Cost
from .patch_copies import PatchCopies, share_code

# Options that core's sampling loop reads and single predictions do not: these, and all that begin with `sampler_`.
_LOOP_OPTIONS = ("denoise_mask_function", "disable_cfg1_optimization")
_SAMPLER_OPTION = "sampler_"
# Wrappers around the sampling loop, which is the prior's.
_LOOP_WRAPPERS = tuple(
    getattr(WrappersMP, name)
    for name in ("OUTER_SAMPLE", "SAMPLER_SAMPLE", "PREDICT_NOISE", "PREPARE_SAMPLING")
    if hasattr(WrappersMP, name)
)
# Clones of the prior on other devices; with them in its options a branch would run the prior instead of its own model.
_PRIOR_ONLY_OPTIONS = ("multigpu_clones", "multigpu_thread_pool")
# Key of a conditioning's entry under which a ControlNet is hidden from core.
_LEFT_OUT = "indomain_guidance left out"


def without_controls(conds: Conditionings, left_out: set[int]) -> None:
    """Take the ControlNets of those identities out of `conds`, in place; `with_controls` puts them back."""
    for entry in entries(conds):
        if id(entry.get("control")) in left_out:
            entry[_LEFT_OUT] = entry.pop("control")


def with_controls(conds: Conditionings) -> None:
    """Put back what `without_controls` took, also in copies that core made of an entry, and spread it as core does: the
    prompt's Apply ControlNet (OLD) acts on the other conditionings too.
    """
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

    def __init__(self, patcher: ModelPatcher, name: str, weights: object = None, keys: Sequence[str] = ()) -> None:
        self.patcher = patcher
        self.name = name
        self.weights = weights
        self.keys = tuple(keys)
        self.calls = Calls(self.keys, f"the model of term '{name}'")
        self.conds: Conditionings = {}
        self.options: dict[str, Any] = {}
        self._hook_mode: Any = None
        self._own_controls: list[Any] = []

    @property
    def model(self) -> Any:
        return self.patcher.model

    def ignored_hooks(self, prior: ModelPatcher | None = None) -> list[str]:
        """Hooks and wrappers of the sampling loop, which act on the prior only; without those the prior has too."""
        options, of_prior = self.patcher.model_options, {} if prior is None else prior.model_options
        own = [key for key in options if key.startswith(_SAMPLER_OPTION) or key in _LOOP_OPTIONS]
        own = [key for key in own if options[key] and options[key] != of_prior.get(key)]
        found = sorted(key for key in own if key.startswith(_SAMPLER_OPTION))
        found += [key for key in _LOOP_OPTIONS if key in own and not (found and options[key] is True)]
        return found + sorted("a sampling wrapper" if key is None else str(key) for key in self._loop_wrapper_keys())

    def _loop_wrapper_keys(self) -> set:
        of_options = self.patcher.model_options.get("transformer_options", {}).get("wrappers", {})
        wrappers = [found.get(kind, {}) for found in (self.patcher.wrappers, of_options) for kind in _LOOP_WRAPPERS]
        return {key for found in wrappers for key, functions in found.items() if functions}

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
        unusable = self._loop_wrapper_keys() - {None}
        for wrappers in self.options["transformer_options"].get("wrappers", {}).values():
            for key in unusable:
                wrappers.pop(key, None)

    def check_prepared(self) -> None:
        """Refuse predictions without the preparations of `sample`. Raises GuidanceError."""
        if not self.options:
            raise GuidanceError(
                f"Term '{self.name}': expected a guider that prepares its models in its own sample(), found one whose "
                "predictions were asked for without; run it with a sampler node that calls the guider's sample()."
            )

    def additional_models(self) -> list[Any]:
        """Models that this branch's hooks want loaded."""
        return comfy.sampler_helpers.get_additional_models_from_model_options(self.options)

    def start(
        self,
        noise: Tensor,
        latent_image: Tensor | None,
        device: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None,
        seed: int | None,
        latent_shapes: Any,
        controls_of_prior: set[int],
        options_of_prior: dict[str, Any],
        cost: Cost,
    ) -> None:
        """Do what `CFGGuider.outer_sample` and `inner_sample` do once models are loaded, up to the sampler."""
        comfy.samplers.cast_to_load_options(self.options, device=device, dtype=self.patcher.model_dtype())
        self.patcher.pre_run()
        self.model.latent_shapes = latent_shapes
        own_controls = [control for key, control in controls(self.conds).items() if key not in controls_of_prior]
        # A ControlNet is prepared once, by the prior, whose noise schedule it follows.
        without_controls(self.conds, controls_of_prior)
        self.conds = comfy.samplers.process_conds(
            self.model, noise, self.conds, device, latent_image, denoise_mask, seed, latent_shapes=latent_shapes
        )
        self._own_controls = own_controls
        with_controls(self.conds)
        self.options = comfy.model_patcher.create_model_options_clone(self.options)
        self.options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        if share_code(self.options, options_of_prior):
            self.options = PatchCopies().of(self.options)
        self.options = cost.watch(self.model, self.options)
        self.calls = Calls(self.keys, f"the model of term '{self.name}'")
        self.calls.prime(self.model, self.options)

    def run(self, keys: Sequence[str], x: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """Denoised predictions [B, C, ...] on this branch's conditionings of those names."""
        return self.calls.run(self.model, self.conds, keys, x, timestep, self.options)

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
    """Copies of the conditionings for one branch, with the hooks of the originals: the prior removes from its own what
    it cannot use.
    """
    hooks = {entry["uuid"]: entry.get("hooks") for entry in entries(originals)}
    copies = {key: [entry.copy() for entry in found] for key, found in conds.items()}
    for entry in entries(copies):
        if hooks.get(entry.get("uuid")) is not None:
            entry["hooks"] = hooks[entry["uuid"]]
    return copies


def _own_hooks(conds: Conditionings) -> None:
    """Give a branch its own hook objects.

    A hook's keyframes report a change of strength once. Shared with the prior, the model that asks second would miss it
    and keep its old weights. Copies of one hook stay equal, which registration and caching rely on.
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
