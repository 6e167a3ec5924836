"""Published guidance methods as term lists: plain functions that return a Guidance.

All of them are the one sum of `combination` with different models in the roles of base and terms, so weights over noise
level (`schedules`), references and the cost rule apply to each. Models and conditionings are opaque, as in `terms`: for
`MultiGuidance` a model is a callable `model(x, sigma, **cond)` and a conditioning a dict. Every scale is a number or a
Weight; for methods of the form base + s (strong - base), 1 is plain sampling from the strong prediction and 0 from the
base. A new preset is a function here, with its name in `PRESETS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .combination import Guidance
from .errors import GuidanceError
from .schedules import WeightLike
from .terms import Source, Term


def cfg(model: Any, uncond: Any, cond: Any, scale: WeightLike = 7.5) -> Guidance:
    """Classifier-free guidance (arXiv 2207.12598) in the form u + s (c - u).

    scale: typically 1.5 to 15; 1 is neutral and costs one prediction instead of two. Limited to an interval of noise
    levels (arXiv 2404.07724): `Interval(s, start, end, unit, outside=1.0)`. One term, "control".
    """
    return Guidance(Source(model, uncond), [Term("control", model, cond, scale)])


def in_domain(
    prior: Any, domain: Any, uncond: Any, cond: Any, domain_weight: WeightLike = 2.5, control_weight: WeightLike = 2.5
) -> Guidance:
    """In-domain generation (arXiv 2312.08195): D_u + w_d (D_domain - D_u) + w_c (D_control - D_u).

    prior predicts the unconditional (on `uncond`, the empty prompt) and the control (on `cond`); domain is the
    text-free model. It gets the same `uncond`, whose text it ignores, so that everything else in it, such as a spatial
    control, acts on base and domain alike. Released defaults 2.5 and 2.5; typically 0 to 5 each. A weight of 0
    switches its part off and saves its prediction: domain_weight 0 is classifier-free guidance of the prior,
    control_weight 0 is domain guidance. Terms "domain" and "control".
    """
    terms = [Term("domain", domain, uncond, domain_weight), Term("control", prior, cond, control_weight)]
    return Guidance(Source(prior, uncond), terms)


def domain_guidance(prior: Any, domain: Any, uncond: Any, cond: Any = None, scale: WeightLike = 2.5) -> Guidance:
    """Domain guidance (arXiv 2504.01521): D_u of the pre-trained model + s (D of the fine-tuned model - D_u).

    cond: what the fine-tuned model is conditioned on; None is `uncond`, right for a text-free model. scale: 1 is the
    fine-tuned model alone, 0 the pre-trained one. One term, "domain".
    """
    return Guidance(Source(prior, uncond), [Term("domain", domain, cond, scale)])


def unconditional_prior(base: Any, finetuned: Any, uncond: Any, cond: Any, scale: WeightLike = 7.5) -> Guidance:
    """Unconditional priors (arXiv 2503.20240): D_base(empty) + s (D_finetuned(c) - D_base(empty)).

    Classifier-free guidance of a fine-tuned model whose unconditional prediction comes from its base model, or from
    another model of the same latent space. scale: as in `cfg`; 1 is the fine-tuned model's conditional prediction
    alone. One term, "control".
    """
    return Guidance(Source(base, uncond), [Term("control", finetuned, cond, scale)])


def autoguidance(good: Any, bad: Any, cond: Any, scale: WeightLike = 2.0, bad_cond: Any = None) -> Guidance:
    """Autoguidance (arXiv 2406.02507): D_bad(c) + s (D_good(c) - D_bad(c)), guidance by a worse version of the model.

    bad_cond: for a bad model that needs another conditioning; None is `cond`. scale: typically 1 to 3; 1 is the good
    model alone and never runs the bad one. One term, "good".
    """
    return Guidance(Source(bad, cond if bad_cond is None else bad_cond), [Term("good", good, cond, scale)])


def personalization(weak: Any, finetuned: Any, uncond: Any, cond: Any, scale: WeightLike = 7.5) -> Guidance:
    """Personalization guidance (arXiv 2508.00319): D_weak(empty) + s (D_finetuned(c) - D_weak(empty)).

    weak is a third model: its *weights* lie between those of the pre-trained and the fine-tuned model
    (`interpolate_weights`), which is not the same as mixing the two models' predictions. scale: 1 is the fine-tuned
    model's conditional prediction alone. One term, "control".
    """
    return Guidance(Source(weak, uncond), [Term("control", finetuned, cond, scale)])


def dual_cfg(
    model: Any, uncond: Any, middle: Any, cond: Any, middle_scale: WeightLike = 8.0, cond_scale: WeightLike = 8.0
) -> Guidance:
    """Guidance from two conditions (InstructPix2Pix, arXiv 2211.09800, eq. 3): u + s_m (m - u) + s_c (c - m).

    ComfyUI's DualCFGGuider, style regular: middle_scale is its cfg_cond2_negative, cond_scale its cfg_conds. At equal
    scales the middle prediction cancels and is not evaluated. Terms "middle" and "control", which refers to "middle".
    """
    terms = [Term("middle", model, middle, middle_scale), Term("control", model, cond, cond_scale, reference="middle")]
    return Guidance(Source(model, uncond), terms)


PRESETS: dict[str, Callable[..., Guidance]] = {
    preset.__name__: preset
    for preset in (
        cfg,
        in_domain,
        domain_guidance,
        unconditional_prior,
        autoguidance,
        personalization,
        dual_cfg,
        # New presets at the end.
    )
}
"""The presets by name."""


def interpolate_weights(
    pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], omega: float
) -> dict[str, Tensor]:
    """The weak model of personalization guidance (arXiv 2508.00319): (1 - omega) pretrained + omega finetuned.

    Both are state dicts. omega 0 is the pre-trained model, 1 the fine-tuned one; tensors keep the fine-tuned model's
    dtype, those that are not floating point are taken from it. Raises GuidanceError when the two differ in keys or
    shapes.
    """
    if not math.isfinite(omega):
        raise GuidanceError(f"Expected omega to be finite, got {omega}.")
    if pretrained.keys() != finetuned.keys():
        differing = sorted(pretrained.keys() ^ finetuned.keys())
        raise GuidanceError(
            f"Expected two models of one architecture to interpolate, got {len(differing)} keys in only one of them, "
            f"such as {differing[0]!r}."
        )
    result = {}
    for key, target in finetuned.items():
        start = pretrained[key]
        if start.shape != target.shape:
            raise GuidanceError(
                f"Expected two models of one architecture to interpolate, got {key!r} as {list(start.shape)} and "
                f"{list(target.shape)}."
            )
        if not target.is_floating_point():
            result[key] = target.clone()
            continue
        wide = torch.float64 if target.dtype == torch.float64 else torch.float32  # fp8 does not promote
        result[key] = torch.lerp(start.to(target.device, wide), target.to(wide), omega).to(target.dtype)
    return result
