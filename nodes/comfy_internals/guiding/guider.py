"""Multi-guidance (arXiv 2312.08195) as a ComfyUI guider: several models and conditionings in one sampling run.

The prior is the guider's own model, exactly as in core's `CFGGuider`; every other model is a `Branch`. Where only the
prior's own control conditioning is left to guide, core's `predict_noise` runs, so that the result is core's to the last
bit. Where the conditioning of a term covers nothing (`coverage`), its prediction is its reference's.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.combination import Guidance, Step
from ....guidance.errors import logger
from ....guidance.schedules import Constant, GuidanceError, Interval, WeightLike
from ....guidance.shaping import Shaping
from ....guidance.terms import BASE, Source, Term
from . import compatibility, remarks
from . import gaps as coverage
from . import sampling_hooks as effective_condition
from .branch import Branch, own_copies
from .calls import NEGATIVE, POSITIVE, Calls, Conditionings, controls, entries, forget_adapter_outputs
from .cost import Cost
from .latents import check_latent, large_enough, sample_latent
from .shared_weights import on_own_weights, same_weights

LOG = logger(__name__)

__all__ = ["MultiGuidanceGuider", "TermInput", "in_domain_guider", "sample_latent"]

_ADDITIONAL_MODELS = "indomain_guidance"
_MORE_MODELS = "indomain_guidance more models"


@dataclass(frozen=True)
class TermInput:
    """One term as the user wired it. No model means the prior, no conditioning the base's, no reference the base, no
    shaping the direction as it is.
    """

    name: str
    weight: WeightLike
    model: ModelPatcher | None = None
    conditioning: list | None = None
    reference: str | None = None
    shaping: Shaping | None = None


class MultiGuidanceGuider(comfy.samplers.CFGGuider):
    """D = D_u + sum_i w_i(sigma) S_i(D_i - R_i), arXiv 2312.08195 with shapings S_i; D_u: the prior on the base.

    A term says nothing where its conditioning covers nothing: D_i is R_i there. A run that is core's CFG, the prior's
    base and control with nothing else, is core's there too.

    Refuses at construction, with a GuidanceError of one sentence: no terms, names and references that do not fit,
    weights that are not finite, models of another latent space or another way of adding noise; and at the start of
    sampling a model whose sigma range does not cover the steps it is active in.

    To everybody else it is core's guider. `cfg` is the total weight, at its largest in the course of sampling; set from
    outside, for a run or a single call, it is the total weight there: D = D_u + cfg (c_eff - D_u), which is core's
    meaning where the guidance is core's. Conditionings, model and options that are replaced between runs count.

    After a run, `samples_per_step` is the number of predictions per image and step, `evaluations` the number of
    predictions for each term, as far as they were made (`cost`).
    """

    def __init__(self, prior: ModelPatcher, base: list | None = None, terms: Sequence[TermInput] = ()) -> None:
        bare = base is None and not terms
        if bare:  # somebody makes one of the same type as another, and sets on it what there is to set on core's
            LOG.warning("Multi-guidance: a guider was made of a model alone, not copied: it is core's CFG, no terms.")
            base, terms = [], [TermInput("control", 1.0, conditioning=[])]
        given = [(term, prior if term.model is None else term.model) for term in terms]
        for term, model in given:
            if model is not prior:
                compatibility.check_same_latents(prior, model, term.name)
                compatibility.check_same_noise(prior, model, term.name)
                compatibility.check_same_text_width(prior, model, term.name)
        self.guidance = Guidance(
            Source(prior, base),
            [
                Term(term.name, model, conditioning, term.weight, term.reference, term.shaping)
                for (term, model), conditioning in zip(given, _conditionings(given, base))
            ],
        )
        self._given_prior = prior
        remarks.on_models(self.guidance, prior)

        super().__init__(prior.clone())
        self._keys: dict[Source, str] = {}
        self._branch_conds: Conditionings = {}
        self._control = self._name_conditionings()
        if bare:
            self.original_conds.clear()
        self._given_conds = dict(self.original_conds)
        self._is_core = self._is_cores_cfg()
        self._add_branches()
        if self._loaded_branches:
            self.model_patcher.set_additional_models(
                _ADDITIONAL_MODELS, [branch.patcher for branch in self._loaded_branches]
            )
        self._active: dict[int, tuple[ModelPatcher, object]] = {}
        self._memory_required = 0.0
        self._percent_to_sigma = self._percent_scale()
        self._own_scale = self.guidance.largest_total(self._percent_to_sigma)
        self.set_cfg(self._own_scale)
        self._remarks = remarks.Remarks()
        self._given_entries: dict[str, int] = {}
        self._start_counting(0)

    def _name_conditionings(self) -> Source | None:
        """Name every source as core would: the base is "negative", the prior's first own conditioning "positive".

        Conditionings of the prior go through core; the others are only for their branches. One that no weight asks for
        stays out: core would give its areas and ControlNets to the others. Returns the control source.
        """
        needed = self._sources_ever_needed()
        own_texts = [
            source
            for source in self.guidance.sources
            if source.model is self._given_prior and source.cond is not self.guidance.base.cond
        ]
        if not any(source in needed for source in own_texts):  # hooks ask for the control whatever its weight
            needed += own_texts[:1]
        names: dict[int, str] = {id(self.guidance.base.cond): NEGATIVE}
        own: dict[str, list] = {NEGATIVE: self.guidance.base.cond}
        control = None
        for source in (source for source in self.guidance.sources if source in needed):
            if source.model is self._given_prior and id(source.cond) not in names:
                key = POSITIVE if control is None else f"term {self.guidance.names(source)[0]}"
                control = control or source
                names[id(source.cond)] = key
                own[key] = source.cond
        for source in (source for source in self.guidance.sources if source in needed):
            if id(source.cond) not in names:
                key = names[id(source.cond)] = f"term {self.guidance.names(source)[0]}"
                self._branch_conds[key] = comfy.sampler_helpers.convert_cond(source.cond)
            self._keys[source] = names[id(source.cond)]
        compatibility.check_spreading(
            own.get(POSITIVE, ()),
            {
                " and ".join(self.guidance.names(source)): source.cond
                for source in self._keys
                if self._keys[source] != POSITIVE
            },
        )
        self.inner_set_conds(own)
        return control

    def _is_cores_cfg(self) -> bool:
        """Whether nothing but base and control ever guides, as in core's own sampling."""
        shaped = any(term.shaping is not None for term in self.guidance.terms if term.weight != Constant(0.0))
        return not shaped and all(s in (self._control, self.guidance.base) for s in self._sources_ever_needed())

    def _add_branches(self) -> None:
        """One branch for each model that can ever be needed; core loads them together with the prior, in one call.

        Models on one module with the same weights need no loading of their own. With different weights each gets its
        own copy of the module, or, where that is not possible, they take turns in it.
        """
        self._made_for, self._weights = self.model_patcher, object()
        self._branches: dict[ModelPatcher, Branch] = {}
        self._loaded_branches: list[Branch] = []
        holders: dict[int, tuple[ModelPatcher, object]] = {
            id(self.model_patcher.model): (self.model_patcher, self._weights)
        }
        for source in self._sources_ever_needed():
            if source.model is self._given_prior or source.model in self._branches:
                continue
            patcher = _static_if_hooked(source.model, [self.original_conds, self._branch_conds])
            name = self._term_names(source)
            of_prior = {id(options.get("control")) for entries in self.original_conds.values() for options in entries}
            compatibility.check_control_loras(source.model, source.cond, of_prior, name)
            holder, weights = holders.get(id(patcher.model), (None, object()))
            if holder is not None and not same_weights(patcher, holder):
                weights = object()
                patcher, holder = _apart(patcher, holder, name)
            keys = [key for other, key in self._keys.items() if other.model is source.model]
            branch = self._branches[source.model] = Branch(patcher, name, weights, keys)
            if holder is None:
                holders[id(patcher.model)] = (patcher, weights)
                self._loaded_branches.append(branch)

    def _term_names(self, source: Source) -> str:
        return " and ".join(self.guidance.names(source))

    def _sources_ever_needed(self) -> list[Source]:
        needed = [self.guidance.base]
        for term in self.guidance.terms:
            if term.weight != Constant(0.0):
                needed += [term.source, self.guidance.reference(term)]
        return list(dict.fromkeys(needed))

    def _percent_scale(self) -> Callable[[float], float]:
        return functools.lru_cache(maxsize=4096)(self.model_patcher.get_model_object("model_sampling").percent_to_sigma)

    # ---- one sampling run -------------------------------------------------------------------------------------------

    @property
    def samples_per_step(self) -> float:
        """Predictions per image and step of the last run, all models together."""
        return self.cost.per_step

    @property
    def evaluations(self) -> Counter[str]:
        """Predictions of the last run, by term."""
        return self.cost.evaluations

    def report(self) -> str:
        """The cost of the last run in words."""
        return str(self.cost)

    def _start_counting(self, steps: int) -> None:
        self.cost = Cost(steps)
        self._calls = Calls(list(self.original_conds), "the prior")
        self._began_with: dict[str, int] = {}

    def outer_sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Core's run of the prior, with the branches prepared around it and tidied up whatever happens."""
        check_latent(latent_image)
        self._start_counting(max(len(sigmas) - 1, 0))
        self._notice_changes()
        self._percent_to_sigma = self._percent_scale()
        compatibility.check_sigma_ranges(
            self.guidance, sigmas.tolist()[:-1], self._percent_to_sigma, self._given_prior, self.model_patcher
        )
        # Newer versions may have replaced the prior, and the models that hang on it, by another kind of patcher.
        for branch, patcher in zip(
            self._loaded_branches, self.model_patcher.get_additional_models_with_key(_ADDITIONAL_MODELS)
        ):
            branch.patcher = patcher
        with contextlib.ExitStack() as stack:
            self._active = {}
            stack.callback(self._active.clear)
            for branch in self._branches.values():
                stack.callback(branch.finish)
                branch.prepare(own_copies({**self.conds, **self._branch_conds}, self.original_conds))
            self.conds = self._visible_to_loading()
            with large_enough(latent_image):
                output = super().outer_sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        LOG.info("Multi-guidance: %s", self.report())
        return output

    def _notice_changes(self) -> None:
        """Take over what was set from outside since the last run, and say what of it can have no effect."""
        changed = [key for key, found in self.original_conds.items() if found is not self._given_conds.get(key)]
        self._remarks.on_conditionings(changed, list(self._branch_conds), self._control is not None)
        missing = [key for key in self._given_conds if key not in self.conds]
        if missing and not self._is_core:
            raise GuidanceError(
                f"Expected the guider's conditionings {', '.join(self._given_conds)}, found "
                f"{', '.join(self.conds) or 'none'}; something took conditionings away that its terms need."
            )
        if self.model_patcher is not self._made_for:
            for source in self.guidance.sources:
                if source.model is not self._given_prior:
                    compatibility.check_same_latents(self.model_patcher, source.model, self._term_names(source))
                    compatibility.check_same_noise(self.model_patcher, source.model, self._term_names(source))
            self._add_branches()

    def _visible_to_loading(self) -> Conditionings:
        """The prior's conditionings, and whatever makes core load the branches' ControlNets and further models."""
        visible: Conditionings = dict(self.conds)
        for branch in self._branches.values():
            for key in self._branch_conds:
                visible[key] = branch.conds[key]
        more = [model for branch in self._branches.values() for model in branch.additional_models()]
        at_hand = self.model_patcher.get_additional_models()
        more += [branch.patcher for branch in self._loaded_branches if branch.patcher not in at_hand]
        if more:
            visible[_MORE_MODELS] = [{"additional_models": more, "model_conds": {}}]
        return visible

    def inner_sample(
        self,
        noise: Tensor,
        latent_image: Tensor | None,
        device: Any,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None,
        callback: Any,
        disable_pbar: bool,
        seed: int | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Core's inner run, once each branch has processed its conditionings; models are loaded here."""
        for branch in self._branches.values():
            branch.check_prepared()
        self.conds = {key: found for key, found in self.conds.items() if key in self.original_conds}
        all_conds = [self.conds, *(branch.conds for branch in self._branches.values())]
        self._given_entries = {key: len(found) for conds in all_conds for key, found in conds.items()}
        shared_options, self.model_options = self.model_options, self.cost.watch(self.inner_model, self.model_options)
        holders = [(self.model_patcher, self._weights), *((b.patcher, b.weights) for b in self._loaded_branches)]
        self._active = {id(patcher.model): (patcher, weights) for patcher, weights in holders}
        self._memory_required = self.inner_model.memory_required([2 * noise.shape[0], *noise.shape[1:]])
        latent = latent_image
        if self._branches and latent is not None and torch.count_nonzero(latent) > 0:
            latent = self.inner_model.process_latent_in(latent)
        for branch in self._branches.values():
            self._activate(branch.patcher, branch.weights)
            branch.start(
                noise,
                latent,
                device,
                sigmas,
                denoise_mask,
                seed,
                kwargs.get("latent_shapes"),
                set(controls(self.conds)),
                shared_options,
                self.cost,
            )
        self._activate(self.model_patcher, self._weights)
        self._calls.prime(self.inner_model, self.model_options)
        all_calls = [self._calls, *(branch.calls for branch in self._branches.values())]
        for calls in all_calls:
            calls.watch(all_calls)
        return super().inner_sample(
            noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, *args, **kwargs
        )

    def _activate(self, patcher: ModelPatcher, weights: object) -> None:
        """Have the module of `patcher` hold its weights and answer for it."""
        module = patcher.model
        current, held = self._active.get(id(module), (patcher, weights))
        if current is not patcher:
            if current.current_hooks is not None:
                # Hooked weights are in the module, but only the patcher that put them there knows.
                current.patch_hooks(None)
            if held is not weights:
                beside = [m for m in [self.model_patcher, *self.loaded_models] if m.model is not module]
                comfy.model_management.load_models_gpu([patcher, *beside], memory_required=self._memory_required)
        self._active[id(module)] = (patcher, weights)
        module.current_patcher = patcher

    # ---- one prediction ---------------------------------------------------------------------------------------------

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] = {},  # noqa: B006
        seed: int | None = None,
    ) -> Tensor:
        """The combined denoised prediction [B, C, ...] for x [B, C, ...] at the sigma `timestep` [B]."""
        for branch in self._branches.values():
            branch.check_prepared()
        self._began_with = self._began_with or {key: id(found) for key, found in self.conds.items()}
        self._remarks.on_conditionings_of_a_run(self._began_with, self.conds, bool(self._branches))
        hooked = effective_condition.has_hooks(model_options)
        always_base = bool(model_options.get("disable_cfg1_optimization", False))
        sigma = float(timestep.flatten()[0])
        total = None if self.cfg == self._own_scale else float(self.cfg)
        step = self.guidance.at(sigma, self._percent_to_sigma, keep_base=hooked or always_base, total=total)
        gaps = {} if self._is_core else self._gaps(step.needed, x, timestep)
        plain = not step.shaped and not gaps and all(s in (self._control, self.guidance.base) for s in step.needed)
        if plain and self._control in step.coefficients:
            prediction = self._predict_as_core(step.coefficients[self._control], x, timestep, model_options, seed)
        elif total is not None and self._is_core and self._control is not None:
            prediction = self._predict_as_core(total, x, timestep, model_options, seed)
        else:
            if total is not None:
                self._remarks.on_scale(total, step.total_weight)
            needed = dict.fromkeys([*step.needed, *(reference for _, reference in gaps.values())])
            predictions = self._predict(list(needed), x, timestep, model_options)
            guiding = coverage.without_gaps(predictions, gaps)
            if effective_condition.has_prediction_hooks(model_options):
                prediction = self._apply_hooks(step, guiding, predictions, x, timestep, model_options)
            else:
                prediction = step.combine(guiding)
        self.cost.close_step()
        return prediction

    def _predict_as_core(
        self, scale: float, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None
    ) -> Tensor:
        """Core's own prediction, of control and base at that scale."""
        always_base = bool(model_options.get("disable_cfg1_optimization", False))
        alone = math.isclose(scale, 1.0) and not always_base
        evaluated = [self._control] if alone else [self._control, self.guidance.base]
        self._ask(evaluated)
        self._calls.tell_caches([self._keys[source] for source in evaluated], model_options)
        if not self._is_core:
            forget_adapter_outputs(self.conds)
        if scale == self.cfg:
            return super().predict_noise(x, timestep, model_options, seed)
        seen, self.cfg = self.cfg, scale
        try:
            return super().predict_noise(x, timestep, model_options, seed)
        finally:
            self.cfg = seen

    def _gaps(self, sources: Sequence[Source], x: Tensor, timestep: Tensor) -> coverage.Gaps:
        """Where these sources, and the references that fill their gaps, do not cover the picture."""

        def given(source: Source) -> list[dict[str, Any]]:
            # Only what the source was given: core appends others' areas, without the source's own limits.
            conds = self.conds if source.model is self._given_prior else self._branches[source.model].conds
            return conds[self._keys[source]][: self._given_entries[self._keys[source]]]

        return coverage.gaps(self.guidance, sources, given, x, timestep)

    def _predict(
        self, sources: Sequence[Source], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> dict[Source, Tensor]:
        """Denoised predictions [B, C, ...] of all `sources`, the prior last so that it stays active."""
        self._ask(sources)
        predictions: dict[Source, Tensor] = {}
        for model, branch in self._branches.items():
            wanted = [source for source in sources if source.model is model]
            if wanted:
                self._activate(branch.patcher, branch.weights)
                outputs = branch.run([self._keys[source] for source in wanted], x, timestep)
                predictions.update({source: outputs[self._keys[source]] for source in wanted})
        self._activate(self.model_patcher, self._weights)
        own = [source for source in sources if source.model is self._given_prior]
        if own:
            keys = [self._keys[source] for source in own]
            self._calls.tell_caches(keys, model_options)
            outputs = effective_condition.run_prior(
                self._calls, self.inner_model, self.conds, keys, x, timestep, model_options
            )
            predictions.update({source: outputs[self._keys[source]] for source in own})
        return predictions

    def _apply_hooks(
        self,
        step: Step,
        guiding: dict[Source, Tensor],
        predictions: dict[Source, Tensor],
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any],
    ) -> Tensor:
        effective, base, scale = step.effective(guiding)
        # Without a control conditioning the base's stands in, as a list of its own so that the two can be told apart.
        control = self.guidance.base if self._control is None else self._control
        control_cond = list(self.conds[NEGATIVE]) if self._control is None else self.conds[POSITIVE]

        # With its gaps, as the prior answers a hook that runs it again.
        def control_prediction() -> Tensor:
            if control not in predictions:
                predictions.update(self._predict([control], x, timestep, model_options))
            return predictions[control]

        return effective_condition.apply_hooks(
            self.inner_model,
            effective,
            base,
            scale,
            control_prediction,
            control_cond,
            self.conds[NEGATIVE],
            x,
            timestep,
            model_options,
        )

    def _ask(self, sources: Sequence[Source]) -> None:
        for source in sources:
            branch, key = self._branches.get(source.model), self._keys[source]
            model, conds = (self.inner_model, self.conds) if branch is None else (branch.model, branch.conds)
            self.cost.ask(model, self._term_names(source), conds.get(key) or ())


def _static_if_hooked(patcher: ModelPatcher, conditionings: Sequence[Conditionings]) -> ModelPatcher:
    """Newer versions page weights in dynamically, and swap in a static model where hooks patch weights."""
    is_dynamic = getattr(patcher, "is_dynamic", None)
    hooked = any("hooks" in entry for conds in conditionings for entry in entries(conds))
    return patcher.get_non_dynamic_delegate() if hooked and is_dynamic is not None and is_dynamic() else patcher


def _apart(patcher: ModelPatcher, holder: ModelPatcher, name: str) -> tuple[ModelPatcher, ModelPatcher | None]:
    """The MODEL of a term on weights of its own, without a holder, or as it is where it takes turns with `holder`."""
    own = on_own_weights(patcher)
    if own is not None:
        LOG.info(
            "Multi-guidance: the model of term '%s' shares its checkpoint with another model but is patched "
            "differently; it gets its own copy of the weights (%.2f GB).",
            name,
            own.model_size() / 2**30,
        )
        return own, None
    LOG.warning(
        "Multi-guidance: the model of term '%s' shares its checkpoint with another model but is patched "
        "differently, and there is no room or way for a second copy; the weights are patched anew twice a step, "
        "which is slow. Loading the checkpoint for it from a second file avoids that.",
        name,
    )
    return patcher, holder


def _conditionings(given: Sequence[tuple[TermInput, ModelPatcher]], base: list) -> list[list]:
    """Every term's conditioning; of terms that share a prediction with gaps, but not what fills them, each its own."""
    found, references = [], {}
    for term, model in given:
        conditioning = base if term.conditioning is None else term.conditioning
        if coverage.may_have_gaps(options for _, options in conditioning):
            reference = term.reference or BASE
            if references.setdefault((id(model), id(conditioning)), reference) != reference:
                conditioning = list(conditioning)
        found.append(conditioning)
    return found


def in_domain_guider(
    prior: ModelPatcher,
    domain: ModelPatcher,
    positive: list,
    negative: list,
    domain_weight: float = 2.5,
    control_weight: float = 2.5,
    domain_start: float = 0.0,
    domain_end: float = 1.0,
) -> MultiGuidanceGuider:
    """D_u + w_d (D_domain - D_u) + w_c (D_control - D_u) of arXiv 2312.08195, the domain term within an interval of
    sampling.

    domain_start, domain_end: sampling percent, 0 to 1; (0, 1) is the whole run. Weights of 0 are neutral and cost
    nothing.
    """
    weight: WeightLike = domain_weight
    if weight != 0 and (domain_start, domain_end) != (0.0, 1.0):
        weight = Interval(domain_weight, domain_start, domain_end)
    return MultiGuidanceGuider(
        prior,
        negative,
        [TermInput("domain", weight, model=domain), TermInput("control", control_weight, conditioning=positive)],
    )
