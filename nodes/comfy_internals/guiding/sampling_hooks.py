"""Hooks of the sampling function under multi-guidance: they are given one plain CFG of the same result.

A multi-guidance step equals a CFG of scale W = sum w_i on the effective condition c_eff = D_u + sum w_i (D_i - R_i) /
W. Core's hooks know a (cond, uncond, scale) triple, so they get (c_eff, D_u, W). What that means for each kind:

* `sampler_calc_cond_batch_function` replaces the evaluation of the prior: called with [control, base], as core does.
* `sampler_pre_cfg_function`, `sampler_cfg_function`, `sampler_post_cfg_function`: called with c_eff as the conditional
  prediction, D_u as the unconditional one and W as the scale; `cond` and `uncond` are the control and base
  conditionings.
* a hook that runs the model again on `cond` (PAG, SLG) compares the result with c_eff, while the model itself would
  predict D_control. Inside hooks the prediction is therefore moved by c_eff - D_control: an undisturbed run gives
  exactly c_eff, a disturbed one differs from it by the model's own difference. Runs on `uncond` (SAG) are left as they
  are, since D_u is the prior's own prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_patcher
import comfy.samplers
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from .calls import KEY, NEGATIVE, POSITIVE, Calls, Conditionings

PREDICTION_HOOKS = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function")
CALC_COND_BATCH = "sampler_calc_cond_batch_function"


def has_prediction_hooks(model_options: dict[str, Any]) -> bool:
    """Whether a hook wants to see (cond, uncond, scale)."""
    return any(model_options.get(key) for key in PREDICTION_HOOKS)


def has_hooks(model_options: dict[str, Any]) -> bool:
    """Whether any of the four kinds of hooks is set."""
    return CALC_COND_BATCH in model_options or has_prediction_hooks(model_options)


def run_prior(
    calls: Calls, model: Any, conds: Conditionings, keys: Sequence[str], x: Tensor, timestep: Tensor, options: dict
) -> dict[str, Tensor]:
    """The prior's denoised predictions [B, C, ...]; control and base through a hook that replaces this."""
    hook = options.get(CALC_COND_BATCH)
    if hook is None:
        return calls.run(model, conds, keys, x, timestep, options)
    pair = [conds[key] if key in keys else None for key in (POSITIVE, NEGATIVE)]
    others = [key for key in keys if key not in (POSITIVE, NEGATIVE)]
    outputs = calls.run(model, conds, others, x, timestep, options) if others else {}
    if any(cond is not None for cond in pair):
        hooked = hook({"conds": pair, "input": x, "sigma": timestep, "model": model, "model_options": options})
        outputs.update(zip((POSITIVE, NEGATIVE), hooked))
    return outputs


def apply_hooks(
    model: Any,
    as_cfg: tuple[Tensor, Tensor, float],
    control_prediction: Callable[[], Tensor],
    conds: tuple[list, list],
    x: Tensor,
    timestep: Tensor,
    model_options: dict[str, Any],
) -> Tensor:
    """The denoised result [B, C, ...] after the pre-cfg, cfg and post-cfg hooks of `model_options`.

    as_cfg: (c_eff, D_u, W) of `Step.effective`. control_prediction: gives D_control, where a hook runs the model again
    on `control_cond`, which then answers around c_eff. conds: the processed conditionings of control and base.
    """
    (effective, base, scale), (control_cond, base_cond) = as_cfg, conds

    def translate(executor: Any, ran: Any, conds: list, x_in: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        outputs = executor(ran, conds, x_in, *args, **kwargs)
        if ran is model and x_in.shape == x.shape and any(cond is control_cond for cond in conds):
            shift = effective - control_prediction()
            outputs = [out + shift if cond is control_cond else out for cond, out in zip(conds, outputs)]
        return outputs

    options = comfy.model_patcher.create_model_options_clone(model_options)
    add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, translate, options, is_model_options=True)
    predictions = [effective, base]
    for hook in model_options.get("sampler_pre_cfg_function", []):
        predictions = hook(
            {
                "conds": [*conds],
                "conds_out": predictions,
                "cond_scale": scale,
                "timestep": timestep,
                "input": x,
                "sigma": timestep,
                "model": model,
                "model_options": options,
            }
        )
    given = {"model_options": options, "cond": control_cond, "uncond": base_cond}
    return comfy.samplers.cfg_function(model, predictions[0], predictions[1], scale, x, timestep, **given)
