"""Which models may be combined: checks before anything is loaded, with messages that name both models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.controlnet
import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher

from ....guidance.combination import Guidance
from ....guidance.errors import GuidanceError
from ..models.domain_info import domain_info
from .gaps import limited_to_area

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
    """Refuse a model of another latent space, and flow models beside variance-preserving ones.

    Raises GuidanceError naming both.
    """
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


def check_spreading(positive: Iterable[tuple[Any, dict]], others: Mapping[str, Iterable[tuple[Any, dict]]]) -> None:
    """Refuse Apply ControlNet (OLD) or GLIGEN boxes on the prompt beside a conditioning that is for areas alone: core
    gives them to every conditioning, and fails on that one.

    others: conditionings by the terms that they belong to. Raises GuidanceError.
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

    of_prior: identities of the controls that the prior prepares, with its weights. Raises GuidanceError.
    """
    info = domain_info(model)
    if info is None or info.form == "full":
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
    for name, kind in (
        ("flow", getattr(comfy.model_sampling, "CONST", None)),
        ("Cosmos flow", getattr(comfy.model_sampling, "COSMOS_RFLOW", None)),
        ("image-to-image", getattr(comfy.model_sampling, "IMG_TO_IMG", None)),
        ("diffusion", comfy.model_sampling.EPS),
    ):
        if kind is not None and isinstance(model_sampling, kind):
            return name
    bases = [base.__name__ for base in type(model_sampling).__mro__[1:-1] if base is not torch.nn.Module]
    return "/".join(bases) or type(model_sampling).__name__


def check_same_text_width(prior: ModelPatcher, other: ModelPatcher, term: str) -> None:
    """Refuse a model that reads text of another width than the prior's conditioning has. Raises GuidanceError."""
    info = domain_info(other)
    if info is not None and info.form != "full":
        return
    widths = [p.model.model_config.unet_config.get("context_dim") for p in (prior, other)]
    if all(isinstance(width, int) for width in widths) and widths[0] != widths[1]:
        raise GuidanceError(
            f"Term {term!r}: expected a model that reads text conditionings of width {widths[0]} as the prior does, "
            f"but the {display_name(other)} reads width {widths[1]}; use a model of the prior's family or a text-free "
            f"one."
        )


def check_sigma_ranges(
    guidance: Guidance, sigmas: Iterable[float], percent_to_sigma: Callable[[float], float], prior: ModelPatcher
) -> None:
    """Refuse a model that is asked for noise levels it was not trained on, while the prior was. Raises GuidanceError.

    prior: the MODEL that runs as the prior. Core clamps noise levels beyond its range, and so they are clamped first.
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
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    return (low, high) if math.isfinite(high) else (low, math.inf)


def missing_weight_patches(prior: ModelPatcher, other: ModelPatcher) -> bool:
    """Whether the prior carries weight patches (LoRAs) that `other` has the weights for, but not the patches."""
    changed = [key for key, patches in prior.patches.items() if any(map(_changes_weights, patches))]
    lacking = [_weight_key(key) for key in changed if key not in other.patches]
    if not lacking:
        return False
    weights = other.model_state_dict().keys()
    return any(key in weights for key in lacking)


def _changes_weights(patch: tuple) -> bool:
    """Whether one of core's weight patches (strength, patch, strength of the model, ...) does anything."""
    strength, _, of_model, *_ = patch
    return strength != 0.0 or of_model != 1.0


def missing_model_patches(prior: ModelPatcher, other: ModelPatcher) -> list[str]:
    """The places in the UNet where the prior carries patches (FreeU, IPAdapter, ...) and `other` carries none."""
    ours, theirs = (_patched_places(patcher) for patcher in (prior, other))
    return [place for place in ours if place not in theirs]


def _patched_places(patcher: ModelPatcher) -> list[str]:
    options = patcher.model_options.get("transformer_options", {})
    places = [*options.get("patches", {}).items()]
    places += [(place, found.values()) for place, found in options.get("patches_replace", {}).items()]
    return [place for place, patches in places if any(_name(patch) not in _LEAVE_THE_BASE for patch in patches)]


def _name(patch: Any) -> str:
    return getattr(patch, "__name__", type(patch).__name__)


def _weight_key(key: Any) -> str:
    return key if isinstance(key, str) else key[0]
