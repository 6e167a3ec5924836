"""The prior of a training run: a checkpoint by its name, or the graph's MODEL, CLIP and VAE as plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....guidance.errors import Problem
from ....guidance.null_text import POOLED_TEXT_ADM
from ....training.mini_world import MINI_WORLD
from ..models import export
from ..models.folders import CHECKPOINTS
from ..progress import ProgressBar

if TYPE_CHECKING:
    from ....training.domain.config import TrainConfig
    from ....training.prior.prior import Prior

NODE = CHECKPOINTS.node
CONNECTED = "connected"


def list_checkpoints() -> list[str]:
    """The choices for the prior: what is connected, the mini world, ComfyUI's checkpoints."""
    return [CONNECTED, MINI_WORLD, *CHECKPOINTS.listed()]


def find_checkpoint(name: str) -> str:
    """The path of a listed checkpoint, "mini_world" or "connected". Raises FileProblem naming the folders."""
    return name if name in (CONNECTED, MINI_WORLD) else str(CHECKPOINTS.find(name))


def checkpoint_fingerprint(name: str | None) -> str:
    """Changes when the file behind a listed checkpoint changes; for ComfyUI's cache of node outputs."""
    return "" if name in (None, CONNECTED, MINI_WORLD) else CHECKPOINTS.fingerprint(name)


@torch.no_grad()
def prior_of_models(model, clip, vae, prompts: Sequence[str], node: str = NODE) -> Prior:
    """MODEL, CLIP and VAE as a prior to train from, weight patches (LoRA) baked in; call it outside inference mode.

    prompts: those that the run will need, encoded here. node: whose messages they are. Raises Problem for models that
    cannot be trained from.
    """
    from ....training.prior.opening import prior_from_tensors

    config = export.exported_config(model, node)
    prediction_type, zero_snr = export.exported_prediction(model, node)
    null_context = export.encode_empty_prompt(clip, config.adm_in_channels in POOLED_TEXT_ADM)
    prior = prior_from_tensors(
        export.exported_state_dict(model, exported_dtype(model)),
        config,
        latent_format=export.exported_latent_format(model, node),
        latent_scale=float(model.model.latent_format.scale_factor),
        prediction_type=prediction_type,
        zero_snr=zero_snr,
        null_context=null_context,
        autoencoder=exported_autoencoder(vae, config.out_channels, node),
        name=f"the connected {type(model.model.model_config).__name__} model",
    )
    encode_prompts(prior, clip, prompts)
    return prior


@torch.no_grad()
def encode_prompts(prior: Prior, clip, prompts: Sequence[str]) -> None:
    """Encode the prompts that a run will need; from then on the prior knows these, the empty one, and no others."""
    from ....training.prior.encoded_prompts import EncodedPrompts

    has_pooled = prior.config.adm_in_channels in POOLED_TEXT_ADM
    encoded = {"": (prior.null_context.tensor, prior.null_context.pooled)}
    wanted = [prompt for prompt in dict.fromkeys(prompts) if prompt]
    progress = ProgressBar(len(wanted))
    for prompt in wanted:
        encoded[prompt] = export.encode_prompt(clip, prompt, has_pooled)
        progress.update(1)
    prior.text_encoder = EncodedPrompts(encoded, prior.name)


def exported_dtype(model) -> torch.dtype:
    """What keeps all that the MODEL knows: fp32 once patches are baked in, fp16 for quantised weights."""
    dtype = model.model.get_dtype()
    if model.patches or dtype == torch.float32:
        return torch.float32
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def exported_autoencoder(vae, latent_channels: int, node: str = NODE) -> dict[str, Tensor]:
    """A VAE's weights on the CPU under LDM keys. Raises Problem for other kinds of VAE."""
    stage = getattr(vae, "first_stage_model", None)
    weights = {} if stage is None else {key: t.detach().to("cpu", copy=True) for key, t in stage.state_dict().items()}
    channels = getattr(weights.get("post_quant_conv.weight"), "shape", (0, 0))[1]
    if "encoder.conv_in.weight" not in weights or channels != latent_channels:
        found = "no VAE" if stage is None else f"{type(stage).__name__} with {channels or 'other'} latent channels"
        raise Problem(
            f"{node}: expected the VAE of a Stable Diffusion model with {latent_channels} latent channels, found "
            f"{found}; connect the VAE that belongs to the model."
        )
    # Core gives every autoencoder a middle attention; all-zero output weights mean that the file has none.
    for side in ("encoder.mid.attn_1.", "decoder.mid.attn_1."):
        if f"{side}proj_out.weight" in weights and not weights[f"{side}proj_out.weight"].any():
            weights = {key: tensor for key, tensor in weights.items() if not key.startswith(side)}
    return weights


def base_name(model, clip, vae, checkpoint: str) -> str:
    """The configuration's `base`: a checkpoint's file, or that the prior is connected. Raises Problem for both."""
    from ....training.engine.settings import CONNECTED_PREFIX

    connected = {"model": model, "clip": clip, "vae": vae}
    missing = [name for name, value in connected.items() if value is None]
    if checkpoint != CONNECTED:
        if len(missing) < 3:
            raise Problem(
                f"{NODE}: expected either a checkpoint or connected inputs, found both ('{checkpoint}' and "
                f"{', '.join(name for name in connected if name not in missing)}); set checkpoint to '{CONNECTED}' or "
                "disconnect them."
            )
        return find_checkpoint(checkpoint)
    if missing:
        raise Problem(
            f"{NODE}: expected a prior, found no {', no '.join(missing)}; connect model, clip and vae, or choose a "
            "checkpoint."
        )
    return f"{CONNECTED_PREFIX} {type(model.model.model_config).__name__}"


def connected_prior(model, clip, vae, config: TrainConfig) -> Prior | None:
    """The connected prior, None where it is `config.base`. Raises Problem for a prediction that is not the MODEL's."""
    if model is None:
        return None
    prior = prior_of_models(model, clip, vae, [*config.sample_prompts, config.caption])
    said = f"{prior.prediction_type}_zero_snr" if prior.zero_snr else prior.prediction_type
    if config.prediction not in ("auto", said):
        raise Problem(
            f"{NODE}: expected prediction auto or {said}, as the connected model predicts, found {config.prediction}; "
            "set it on the model with ModelSamplingDiscrete, or choose the checkpoint by its name."
        )
    return prior
