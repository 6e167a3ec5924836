"""Multi-guidance (arXiv 2312.08195) as a ComfyUI guider: several models and conditionings in one sampling run.

The prior is the guider's own model, exactly as in core's `CFGGuider`; every other model is a `Branch`. Where only the
prior's own control conditioning is left to guide, core's `predict_noise` runs, so that the result is core's to the last
bit. Where the conditioning of a term leaves pixels out (`gaps`), its prediction there is its reference's.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.combination import Guidance, Step
from ....guidance.errors import GuidanceError, logger
from ....guidance.schedules import Constant, Interval, WeightLike
from ....guidance.terms import Source, Term
from . import sampling_hooks
from .branches import Branches, own_copies
from .calls import NEGATIVE, POSITIVE, Calls, Conditionings, controls, forget_adapter_outputs
from .compatibility import Remarks, check_models, check_sigma_ranges, warn_of_models
from .conditionings import NamedConditionings, ever_needed, filled_in, name_conditionings
from .cost import Cost
from .gaps import Gaps, find_gaps, with_references, without_gaps
from .latents import check_latent, large_enough

LOG = logger(__name__)

_MORE_MODELS = "indomain_guidance more models"


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
            # Core appends others' areas, without the source's own limits.
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
                keys = [names[source] for source in wanted]
                outputs = branch.calls.run(branch.model, branch.conds, keys, x, timestep, branch.options)
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


class TermGuider(SourceGuider):
    """D = D_u + sum_i w_i(sigma) S_i(D_i - R_i), arXiv 2312.08195 with shapings S_i; D_u: the prior on the base.

    terms: a term's model None means the prior, its conditioning None the base's. always: names of terms that may be
    asked for although their weight is 0.

    Raises GuidanceError for terms that do not fit together, and at the start of sampling for a model whose sigma range
    does not cover the steps it is active in.

    To other code it is core's guider. `cfg` is the total weight, at its largest in the course of sampling; set from
    outside, it is the total weight there: D = D_u + cfg (c_eff - D_u), which is core's meaning where the guidance is
    core's. Conditionings, model and options may be replaced between runs.
    """

    def __init__(
        self, prior: ModelPatcher, base: list | None = None, terms: Sequence[Term] = (), always: Sequence[str] = ()
    ) -> None:
        bare = base is None and not terms
        if bare:  # other code makes a second guider of our type and sets on it what core's has
            LOG.warning("Multi-guidance: a guider was made of a model alone, not copied: it is core's CFG, no terms.")
            base, terms = [], [Term("control", None, [], 1.0)]
        assert base is not None
        terms = filled_in(terms, Source(prior, base))
        for term in terms:
            if term.model is not prior:
                check_models(prior, term.model, term.name)
        self.guidance = Guidance(Source(prior, base), terms)
        warn_of_models(self.guidance, prior)

        super().__init__(prior.clone())
        self._needed = ever_needed(self.guidance, always)
        self.conditionings = name_conditionings(self.guidance, self._needed)
        self._control = self.conditionings.control
        self.inner_set_conds(self.conditionings.of_prior)
        if bare:
            self.original_conds.clear()
        self._given_conds = dict(self.original_conds)
        shaped = any(term.shaping is not None and term.weight != Constant(0.0) for term in terms)
        self._is_core = not shaped and self._is_cfg(self._needed)
        self.branches = self._make_branches()
        self.branches.hang_on_prior()
        self.percent_to_sigma = self._percent_scale()
        self._own_scale = self.guidance.largest_total(self.percent_to_sigma)
        self.set_cfg(self._own_scale)
        self._remarks = Remarks()
        self.entries_given = {}
        self._start_counting(0)

    def _is_cfg(self, sources: Sequence[Source]) -> bool:
        """Whether these are control and base alone, as in core's own sampling."""
        return all(source in (self._control, self.guidance.base) for source in sources)

    def _make_branches(self) -> Branches:
        return Branches(self.model_patcher, self.guidance, self._needed, self.conditionings, self.original_conds)

    def _percent_scale(self) -> Callable[[float], float]:
        return functools.lru_cache(maxsize=4096)(self.model_patcher.get_model_object("model_sampling").percent_to_sigma)

    # ---- one sampling run -------------------------------------------------------------------------------------------

    @property
    def samples_per_step(self) -> float:
        """Predictions per image and step of the last run, all models together, as far as they were made (`cost`)."""
        return self.cost.per_step

    @property
    def evaluations(self) -> Counter[str]:
        """Predictions of the last run, by term."""
        return self.cost.evaluations

    def _start_counting(self, steps: int) -> None:
        self.cost = Cost(steps)
        self.calls = Calls(list(self.original_conds), "the prior")
        self._began_with: dict[str, int] = {}

    def outer_sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Core's run of the prior, with the branches prepared around it and tidied up whatever happens."""
        check_latent(latent_image)
        self._start_counting(max(len(sigmas) - 1, 0))
        self._notice_changes()
        self.percent_to_sigma = self._percent_scale()
        check_sigma_ranges(self.guidance, sigmas.tolist()[:-1], self.percent_to_sigma, self.model_patcher)
        self.branches.take_over_replaced()
        with contextlib.ExitStack() as stack:
            stack.callback(self.branches.end)
            for branch in self.branches:
                stack.callback(branch.finish)
                branch.prepare(own_copies({**self.conds, **self.conditionings.of_others}, self.original_conds))
            self.conds = self._visible_to_loading()
            with large_enough(latent_image):
                output = super().outer_sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        LOG.info("Multi-guidance: %s", self.cost)
        return output

    def _notice_changes(self) -> None:
        """Take over what was set from outside since the last run, and warn of what can have no effect."""
        changed = [name for name, found in self.original_conds.items() if found is not self._given_conds.get(name)]
        self._remarks.on_conditionings(changed, list(self.conditionings.of_others), self._control is not None)
        missing = [name for name in self._given_conds if name not in self.conds]
        if missing and not self._is_core:
            raise GuidanceError(
                f"Expected the guider's conditionings {', '.join(self._given_conds)}, found "
                f"{', '.join(self.conds) or 'none'}; something took conditionings away that its terms need."
            )
        if self.model_patcher is not self.branches.prior:
            for source in self.guidance.sources:
                if source.model is not self.guidance.base.model:
                    check_models(self.model_patcher, source.model, self.term_names(source))
            self.branches = self._make_branches()

    def _visible_to_loading(self) -> Conditionings:
        """The prior's conditionings, and whatever makes core load the branches' ControlNets and further models."""
        visible: Conditionings = dict(self.conds)
        for branch in self.branches:
            visible.update({name: branch.conds[name] for name in self.conditionings.of_others})
        more = self.branches.models_to_load()
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
        self.branches.check_prepared()
        self.conds = {name: found for name, found in self.conds.items() if name in self.original_conds}
        all_conds = [self.conds, *(branch.conds for branch in self.branches)]
        self.entries_given = {name: len(found) for conds in all_conds for name, found in conds.items()}
        shared_options, self.model_options = self.model_options, self.cost.watch(self.inner_model, self.model_options)
        memory = self.inner_model.memory_required([2 * noise.shape[0], *noise.shape[1:]])
        self.branches.begin(self.loaded_models, memory)
        latent = latent_image
        if len(self.branches) and latent is not None and torch.count_nonzero(latent) > 0:
            latent = self.inner_model.process_latent_in(latent)
        shapes = kwargs.get("latent_shapes")

        def process(model: Any, conds: Conditionings) -> Conditionings:
            return comfy.samplers.process_conds(
                model, noise, conds, device, latent, denoise_mask, seed, latent_shapes=shapes
            )

        own_controls = set(controls(self.conds))
        self.branches.start(process, device, sigmas, shapes, own_controls, shared_options, self.cost)
        self.calls.prime(self.inner_model, self.model_options)
        all_calls = [self.calls, *(branch.calls for branch in self.branches)]
        for calls in all_calls:
            calls.watch(all_calls)
        return super().inner_sample(
            noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, *args, **kwargs
        )

    # ---- one prediction ---------------------------------------------------------------------------------------------

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] = {},  # noqa: B006
        seed: int | None = None,
    ) -> Tensor:
        """The combined denoised prediction [B, C, ...] for x [B, C, ...] at the sigma `timestep` [B]."""
        self.branches.check_prepared()
        self._began_with = self._began_with or {name: id(found) for name, found in self.conds.items()}
        self._remarks.on_conditionings_of_a_run(self._began_with, self.conds, bool(len(self.branches)))
        keep_base = sampling_hooks.has_hooks(model_options) or _wants_base(model_options)
        total = None if self.cfg == self._own_scale else float(self.cfg)
        step = self.guidance.at(float(timestep.flatten()[0]), self.percent_to_sigma, keep_base, total)
        gaps = {} if self._is_core else self.gaps(step.needed, x, timestep)
        scale = None
        if self._control is not None and not step.shaped and not gaps and self._is_cfg(step.needed):
            scale = step.coefficients.get(self._control)
        if scale is None and self._is_core and self._control is not None:
            scale = total
        if scale is not None:
            prediction = self._predict_as_core(scale, x, timestep, model_options, seed)
        else:
            if total is not None:
                self._remarks.on_scale(total, step.total_weight)
            prediction = self._predict_terms(step, gaps, x, timestep, model_options)
        self.cost.close_step()
        return prediction

    def _predict_as_core(
        self, scale: float, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None
    ) -> Tensor:
        """Core's own prediction, of control and base at that scale."""
        assert self._control is not None
        alone = math.isclose(scale, 1.0) and not _wants_base(model_options)
        evaluated = [self._control] if alone else [self._control, self.guidance.base]
        self.count_predictions(evaluated)
        self.calls.tell_caches([self.conditionings.names[source] for source in evaluated], model_options)
        if not self._is_core:
            forget_adapter_outputs(self.conds)
        seen, self.cfg = self.cfg, scale
        try:
            return super().predict_noise(x, timestep, model_options, seed)
        finally:
            self.cfg = seen

    def _predict_terms(
        self, step: Step, gaps: Gaps, x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> Tensor:
        """The step's combination of all predictions that it needs, after the hooks of the sampling function."""
        predictions = self.predict_sources(with_references(step.needed, gaps), x, timestep, model_options)
        guiding = without_gaps(predictions, gaps)
        if not sampling_hooks.has_prediction_hooks(model_options):
            return step.combine(guiding)
        # Without a control conditioning the base's stands in, as a list of its own so that the two can be told apart.
        control = self.guidance.base if self._control is None else self._control
        base_cond = self.conds[NEGATIVE]
        control_cond = list(base_cond) if self._control is None else self.conds[POSITIVE]

        def control_prediction() -> Tensor:
            """With its gaps, as the prior answers a hook that runs it again."""
            if control not in predictions:
                predictions.update(self.predict_sources([control], x, timestep, model_options))
            return predictions[control]

        as_cfg, conds = step.effective(guiding), (control_cond, base_cond)
        return sampling_hooks.apply_hooks(
            self.inner_model, as_cfg, control_prediction, conds, x, timestep, model_options
        )


def _wants_base(model_options: dict[str, Any]) -> bool:
    """Whether a sampler or node wants the base's prediction even where the guidance does without it."""
    return bool(model_options.get("disable_cfg1_optimization", False))


def in_domain_guider(
    prior: ModelPatcher,
    domain: ModelPatcher,
    positive: list,
    negative: list,
    domain_weight: float = 2.5,
    control_weight: float = 2.5,
    domain_start_percent: float = 0.0,
    domain_end_percent: float = 1.0,
) -> TermGuider:
    """D_u + w_d (D_domain - D_u) + w_c (D_control - D_u) of arXiv 2312.08195.

    The percents, 0 to 1, are the part of sampling in which the domain term acts. Weights of 0 cost nothing.
    """
    weight: WeightLike = domain_weight
    interval = (domain_start_percent, domain_end_percent)
    if weight != 0 and interval != (0.0, 1.0):
        weight = Interval(domain_weight, *interval)
    return TermGuider(
        prior, negative, [Term("domain", domain, None, weight), Term("control", None, positive, control_weight)]
    )
