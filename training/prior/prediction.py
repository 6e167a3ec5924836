"""What a checkpoint's UNet predicts, and to which noise schedule: asked for, stated by the file, or measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...guidance.diffusion import PREDICTION_TYPES
from ...guidance.errors import Problem
from ...guidance.files import stated_prediction
from ...guidance.networks.unet_config import UNetConfig
from ...guidance.null_text import load_unet

V_ZERO_SNR = "v_prediction_zero_snr"
PREDICTIONS = ("auto", *PREDICTION_TYPES, V_ZERO_SNR)


def check_prediction(asked: str) -> None:
    """Raise ValueError for a `prediction` that is none of PREDICTIONS."""
    if asked not in PREDICTIONS:
        raise Problem(f"Expected prediction to be one of {', '.join(PREDICTIONS)}, got {asked!r}.")


def resolve_prediction(
    asked: str,
    name: str,
    keys: Sequence[str],
    metadata: Mapping[str, str],
    weights: Mapping[str, Tensor],
    config: UNetConfig,
    empty: Tensor,
) -> tuple[str, bool, list[str]]:
    """(prediction type, zero terminal SNR?, notes for the user) of a checkpoint's UNet.

    asked: one of PREDICTIONS; "auto" believes the markers among the file's `keys` and `metadata`. Where a 2.x file has
    none its UNet is measured; all others count as epsilon, as in ComfyUI, with a note where a 1.x file measures
    otherwise. name: of the file; weights, config: its UNet's; empty: the empty prompt's context [1, T, D].
    """
    is_marked_zero_snr = "ztsnr" in keys
    prediction = asked.removesuffix("_zero_snr")
    notes: list[str] = []
    if asked == "auto":
        stated = stated_prediction(keys, metadata)
        prediction, notes = (stated, notes) if stated else _unstated_prediction(name, weights, config, empty)
    zero_snr = asked == V_ZERO_SNR or (asked == "auto" and is_marked_zero_snr)
    if is_marked_zero_snr and not zero_snr:
        notes.append(
            f"{name} is marked as trained to zero terminal SNR (ztsnr), but prediction asks for {prediction} on the "
            "plain schedule; set prediction to v_prediction_zero_snr to follow the marker."
        )
    elif zero_snr and prediction == "epsilon":
        # The last step of zero SNR shows the noise itself: there an epsilon model has nothing to predict.
        zero_snr = False
        notes.append(
            f"{name} has the marker of zero terminal SNR (ztsnr) but not that of v-prediction (v_pred): it is used as "
            "an epsilon model on the plain schedule. Set prediction to v_prediction_zero_snr if it is a v-model."
        )
    return prediction, zero_snr, notes


def _unstated_prediction(
    name: str, weights: Mapping[str, Tensor], config: UNetConfig, empty: Tensor
) -> tuple[str, list[str]]:
    """(prediction type, notes) of a file that does not state it."""
    if config.adm_in_channels is not None:
        return "epsilon", []  # SDXL: its v-models are marked, and measuring one takes 10 GB
    measured, agreement = measured_prediction(weights, config, empty)
    why = f"its output on pure noise agrees with the noise to {agreement:.2f}; near 1 is epsilon"
    if config.context_dim == 1024:
        return measured, [
            f"{name} does not state its prediction type; measured {measured} ({why}). Set prediction to overrule it."
        ]
    if measured == "epsilon":
        return "epsilon", []
    # Unmarked 1.x files count as epsilon in ComfyUI, which draws with what is trained here.
    return "epsilon", [
        f"{name} does not state its prediction type and is taken for an epsilon model, as ComfyUI takes it, "
        f"but looks like {measured} ({why}). Set prediction to {measured} if it is such a model."
    ]


@torch.no_grad()
def measured_prediction(
    weights: Mapping[str, Tensor], config: UNetConfig, context: Tensor, side: int = 16
) -> tuple[str, float]:
    """("epsilon" | "v_prediction", how well the output on pure noise agrees with that noise).

    At the last timestep an epsilon model is asked for the very noise it sees, so the cosine of input and output is
    near 1; a v-model (arXiv 2202.00512) is asked for minus the image, which has nothing to do with the noise. One
    forward pass over 4 latents of `side` squared; for models without vector conditioning.
    """
    unet = load_unet(weights, config)
    noise = torch.randn(4, config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    output = unet(noise, torch.full((4,), 999.0), context=context.float().expand(4, -1, -1))
    agreement = float(torch.nn.functional.cosine_similarity(output.flatten(), noise.flatten(), dim=0))
    return ("epsilon" if agreement > 0.5 else "v_prediction"), agreement
