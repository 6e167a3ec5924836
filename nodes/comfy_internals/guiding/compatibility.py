"""Which models may be combined: refusals and warnings that name both models, and what a guider ignores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import comfy.controlnet
import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....guidance.combination import Guidance
from ....guidance.errors import GuidanceError, logger
from ....guidance.schedules import Constant
from ..models.text_free import domain_info, is_text_free
from .calls import NEGATIVE, POSITIVE, Conditionings
from .gaps import limited_to_area

LOG = logger(__name__)

# Options that core's sampling loop reads and single predictions do not: these, and all that begin with `sampler_`.
_LOOP_OPTIONS = ("denoise_mask_function", "disable_cfg1_optimization")
_SAMPLER_OPTION = "sampler_"
# Wrappers around the sampling loop, which is the prior's.
_LOOP_WRAPPERS = (
    WrappersMP.OUTER_SAMPLE,
    WrappersMP.SAMPLER_SAMPLE,
    WrappersMP.PREDICT_NOISE,
    WrappersMP.PREPARE_SAMPLING,
)

# Core's patches that leave the prediction on the base as it is, by function: Self-Attention Guidance only records in
# the network and acts in a sampling hook; Normalized Attention Guidance changes the positive's half of a pair.
_LEAVE_THE_BASE = {"attn_and_record", "nag_attention_output_patch"}

# Schedules of one family differ by rounding (fp16 buffers, interpolated sigmas); this much is no difference.
_SIGMA_TOLERANCE = 0.01


def display_name(patcher: ModelPatcher) -> str:
    """How messages call a MODEL: the domain model's own name, else the architecture core detected."""
    info = domain_info(patcher)
    if info is not None:
        return f"domain model '{info.name}'"
    config = getattr(patcher.model, "model_config", None)
    return f"{type(config).__name__ if config is not None else type(patcher.model).__name__} model"


def check_models(prior: ModelPatcher, other: ModelPatcher, term: str) -> None:
    """Refuse a model of another latent space, noise or width of text. Raises GuidanceError naming both."""
    ours, theirs = (patcher.get_model_object("latent_format") for patcher in (prior, other))
    if _latent_identity(ours) != _latent_identity(theirs):
        raise GuidanceError(
            f"Term {term!r}: expected a model in the latent space of the prior ({_latent_words(ours)}), but the "
            f"{display_name(other)} works in another one ({_latent_words(theirs)}); use models of one family."
        )
    ours, theirs = (noise_family(patcher.get_model_object("model_sampling")) for patcher in (prior, other))
    if ours != theirs:
        raise GuidanceError(
            f"Term {term!r}: expected a model that adds noise as the prior does ({ours}), but the "
            f"{display_name(other)} is of the {theirs} kind; a flow model and an eps- or v-model cannot be combined."
        )
    widths = [patcher.model.model_config.unet_config.get("context_dim") for patcher in (prior, other)]
    if not is_text_free(other) and all(isinstance(width, int) for width in widths) and widths[0] != widths[1]:
        raise GuidanceError(
            f"Term {term!r}: expected a model that reads text conditionings of width {widths[0]} as the prior does, "
            f"but the {display_name(other)} reads width {widths[1]}; use a model of the prior's family or a text-free "
            "one."
        )


def check_spreading(positive: Iterable[tuple[Any, dict]], others: Mapping[str, Iterable[tuple[Any, dict]]]) -> None:
    """Refuse Apply ControlNet (OLD) or GLIGEN boxes on the prompt beside a conditioning that is for areas alone.

    Core gives them to every conditioning, and fails on that one. others: conditionings by their terms.
    """
    spread = [
        "Apply ControlNet (OLD)" if options.get("control_apply_to_uncond") else "GLIGEN"
        for _, options in positive
        if not limited_to_area(options)
        and (options.get("control_apply_to_uncond") or options.get("gligen") is not None)
    ]
    for names, conditioning in others.items():
        entries = [options for _, options in conditioning]
        if spread and entries and all(map(limited_to_area, entries)):
            raise GuidanceError(
                f"Term {names!r}: expected a conditioning that is not for an area alone beside {spread[0]} on the "
                "prompt, which ComfyUI gives to every conditioning; use Apply ControlNet, or combine the term's "
                "conditioning with one for the whole picture."
            )


def check_control_loras(
    model: ModelPatcher, conditioning: Iterable[tuple[Any, dict]], of_prior: set, term: str
) -> None:
    """Refuse Control-LoRAs on a text-free model: they are made of the model's own weights, text layers included.

    of_prior: identities of the controls that the prior prepares, with its weights.
    """
    if not is_text_free(model):
        return
    for _, options in conditioning:
        control = options.get("control")
        while control is not None and id(options["control"]) not in of_prior:
            if isinstance(control, comfy.controlnet.ControlLora):
                raise GuidanceError(
                    f"Term {term!r}: expected a ControlNet with a network of its own, found a Control-LoRA, which is "
                    f"made of the model's weights; the {display_name(model)} has no text layers to make it of. Put the "
                    "same Control-LoRA on the base's conditioning too, or use a ControlNet."
                )
            control = control.previous_controlnet


def _latent_identity(latent_format: Any) -> tuple:
    return (
        type(latent_format).__name__,
        latent_format.latent_channels,
        latent_format.latent_dimensions,
        getattr(latent_format, "scale_factor", None),
    )


def _latent_words(latent_format: Any) -> str:
    scale = getattr(latent_format, "scale_factor", None)
    scale = f", scale {scale:g}" if isinstance(scale, (int, float)) else ""
    return f"{type(latent_format).__name__}, {latent_format.latent_channels} channels{scale}"


def noise_family(model_sampling: Any) -> str:
    """The way a model mixes signal and noise: denoised latents combine within one family only."""
    families = {
        "flow": comfy.model_sampling.CONST,
        "Cosmos flow": comfy.model_sampling.COSMOS_RFLOW,
        "image-to-image": comfy.model_sampling.IMG_TO_IMG,
        "diffusion": comfy.model_sampling.EPS,
    }
    found = [name for name, kind in families.items() if isinstance(model_sampling, kind)]
    bases = [base.__name__ for base in type(model_sampling).__mro__[1:-1] if base is not torch.nn.Module]
    return found[0] if found else "/".join(bases) or type(model_sampling).__name__


def check_sigma_ranges(
    guidance: Guidance, sigmas: Iterable[float], percent_to_sigma: Callable[[float], float], prior: ModelPatcher
) -> None:
    """Refuse a model that is asked for noise levels it was not trained on, while the prior was.

    Core clamps noise levels beyond the prior's range, and so they are clamped first.
    """
    own = _sigma_range(prior)
    for sigma in sigmas:
        if sigma <= 0.0:
            continue
        asked = min(max(sigma, own[0]), own[1])
        for source in guidance.at(sigma, percent_to_sigma).needed:
            other = source.model
            if other is guidance.base.model:
                continue
            low, high = _sigma_range(other)
            if low * (1 - _SIGMA_TOLERANCE) <= asked <= high * (1 + _SIGMA_TOLERANCE):
                continue
            term = " and ".join(guidance.names(source))
            remedy = (
                "start the term later (its start percent), or make both models zero-SNR or neither"
                if asked > high
                else "end the term earlier (its end percent)"
            )
            raise GuidanceError(
                f"Term {term!r}: expected a model that covers noise level sigma {asked:.4g} of this run, but the "
                f"{display_name(other)} covers sigma {low:.4g} to {high:.4g} (the prior {own[0]:.4g} to {own[1]:.4g}); "
                f"{remedy}."
            )


def _sigma_range(patcher: ModelPatcher) -> tuple[float, float]:
    sampling = patcher.get_model_object("model_sampling")
    if noise_family(sampling) != "diffusion":
        # A flow's lowest sigma is only where its table starts; the model is defined down to 0.
        return 0.0, float(sampling.sigma_max)
    return float(sampling.sigma_min), float(sampling.sigma_max)


def loop_wrapper_keys(patcher: ModelPatcher) -> set:
    """The keys of a MODEL's wrappers around the sampling loop."""
    of_options = patcher.model_options.get("transformer_options", {}).get("wrappers", {})
    wrappers = [found.get(kind, {}) for found in (patcher.wrappers, of_options) for kind in _LOOP_WRAPPERS]
    return {key for found in wrappers for key, functions in found.items() if functions}


def warn_of_models(guidance: Guidance, prior: ModelPatcher) -> None:
    """Warn of what on the MODELs of a guidance has no effect, or works against it."""
    for source in guidance.sources:
        ignored = [] if source.model is prior else _ignored_hooks(source.model, prior)
        if ignored:
            LOG.warning(
                "Multi-guidance: %s on the model of term '%s' is ignored; methods that change the sampling "
                "function belong on the prior.",
                ", ".join(ignored),
                " and ".join(guidance.names(source)),
            )
    for term in guidance.terms:
        against_prior = guidance.reference(term).model is prior
        if term.model is prior or not against_prior or term.weight == Constant(0.0):
            continue
        lacking = _lacking_patches(prior, term.model)
        if lacking:
            LOG.warning(
                "Multi-guidance: the prior carries patches that the model of term '%s' lacks (%s), so this term "
                "pushes against them; add the prior without them as a term of weight 0 and make it this term's "
                "reference, or, which comes near, put the same LoRA or node on that model.",
                term.name,
                ", ".join(lacking),
            )


def _ignored_hooks(patcher: ModelPatcher, prior: ModelPatcher) -> list[str]:
    """Hooks and wrappers of the sampling loop, which act on the prior only; without those the prior has too."""
    options, of_prior = patcher.model_options, prior.model_options
    own = [key for key in options if key.startswith(_SAMPLER_OPTION) or key in _LOOP_OPTIONS]
    own = [key for key in own if options[key] and options[key] != of_prior.get(key)]
    found = sorted(key for key in own if key.startswith(_SAMPLER_OPTION))
    found += [key for key in _LOOP_OPTIONS if key in own and not (found and options[key] is True)]
    return found + sorted("a sampling wrapper" if key is None else str(key) for key in loop_wrapper_keys(patcher))


def _lacking_patches(prior: ModelPatcher, other: ModelPatcher) -> list[str]:
    """Patches of the prior that `other` has the weights for, but not the patches: LoRAs, FreeU, IPAdapter, ..."""
    # Core's weight patches are (strength, patch, strength of the model, ...).
    changed = [key for key, patches in prior.patches.items() if any(p[0] != 0.0 or p[2] != 1.0 for p in patches)]
    names = {key if isinstance(key, str) else key[0] for key in changed if key not in other.patches}
    weights = ["weights (LoRAs)"] if names and not names.isdisjoint(other.model_state_dict()) else []
    theirs = _patched_places(other)
    return weights + [place for place in _patched_places(prior) if place not in theirs]


def _patched_places(patcher: ModelPatcher) -> list[str]:
    options = patcher.model_options.get("transformer_options", {})
    places = [*options.get("patches", {}).items()]
    places += [(place, found.values()) for place, found in options.get("patches_replace", {}).items()]
    return [place for place, patches in places if any(_name(patch) not in _LEAVE_THE_BASE for patch in patches)]


def _name(patch: Any) -> str:
    return getattr(patch, "__name__", type(patch).__name__)


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
        effect = "it has no effect where the weights of its terms cancel each other"
        if math.isclose(wanted, total, abs_tol=1e-12):
            effect = "it is the total weight here, and scales all terms alike"
        self._say(f"the scale of this guider (cfg) was set from outside; {effect}.")
