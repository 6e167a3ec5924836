"""A MODEL's UNet as plain weights with every patch baked in, and as a text-free domain model in a file."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_sampling
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from ....guidance.diffusion import Denoiser, NoiseSchedule
from ....guidance.errors import Problem
from ....guidance.files import DTYPES, DomainMetadata, FileProblem, prior_content_hash, read_metadata, write_domain_file
from ....guidance.networks.unet_config import UNetConfig
from ....guidance.null_text import POOLED_TEXT_ADM, NullContext, build_cached, build_constant
from ....guidance.probes import Probes, collect_probes, unconditional_error
from ..progress import ProgressBar
from .folders import DOMAIN_UNETS
from .loading import LATENT_FORMATS, SAME_LISTS, SAME_NUMBERS, load_domain_unet
from .text_free import domain_info

NODE = "Text-Free UNet"
PREFIX = "diffusion_model."
# Keys that quantised layers keep beside their weights; they are used to turn the weights back into numbers.
QUANTISATION_KEYS = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale", ".comfy_quant")


def exported_config(model, node: str = NODE) -> UNetConfig:
    """The architecture of a MODEL. Raises Problem, which names `node`, where it is no Stable Diffusion UNet."""
    unet = model.model.diffusion_model
    info = domain_info(model)
    if info is not None and info.form != "full":
        raise Problem(
            f"{node}: expected a model that takes text, found the text-free model '{info.name}'; connect the prior."
        )
    if not isinstance(unet, UNetModel) or model.model.model_config.unet_config.get("context_dim") is None:
        raise Problem(
            f"{node}: expected a Stable Diffusion UNet (1.x, 2.x, SDXL), found {type(unet).__name__} "
            f"({type(model.model.model_config).__name__}); models of other families, flow models among them, have no "
            "text-free form and cannot be trained here, connect a Stable Diffusion model."
        )
    core = model.model.model_config.unet_config
    if core.get("use_temporal_attention") or core.get("use_temporal_resblock"):
        raise Problem(f"{node}: expected a UNet for images, found one for video; connect an image model.")
    same: dict[str, Any] = {name: core[name] for name in SAME_NUMBERS}
    same |= {name: tuple(core[name]) for name in SAME_LISTS}
    heads, channels = core.get("num_heads", -1), core.get("num_head_channels", -1)
    return UNetConfig(
        **same, num_heads=-1 if channels > 0 else heads, num_head_channels=channels if channels > 0 else -1
    )


def exported_prediction(model, node: str = NODE) -> tuple[str, bool]:
    """("epsilon" | "v_prediction", zero terminal SNR?) of a MODEL, patches such as Model Sampling Discrete included.

    Raises Problem for samplings that a domain file cannot describe (flow, EDM, other noise schedules).
    """
    sampling = model.get_model_object("model_sampling")
    sigmas = getattr(sampling, "sigmas", None)
    kinds = type(sampling).__mro__
    unusual = (comfy.model_sampling.EDM, comfy.model_sampling.X0)
    if isinstance(sigmas, Tensor) and comfy.model_sampling.EPS in kinds and not any(kind in kinds for kind in unusual):
        prediction = "v_prediction" if comfy.model_sampling.V_PREDICTION in kinds else "epsilon"
        for is_zero_snr in (False, True):
            reference = comfy.model_sampling.ModelSamplingDiscrete(zsnr=is_zero_snr).sigmas
            if sigmas.shape == reference.shape and torch.allclose(sigmas.cpu(), reference, rtol=1e-3):
                return prediction, is_zero_snr
    raise Problem(
        f"{node}: expected an eps- or v-prediction model on Stable Diffusion's noise schedule (with or without "
        f"zero terminal SNR), found {', '.join(kind.__name__ for kind in kinds[1:3])}; give it the model without "
        "sampling patches, or another prior."
    )


def exported_latent_format(model, node: str = NODE) -> str:
    """The name of a MODEL's latent space in a domain file. Raises Problem for one without a name."""
    found = type(model.model.latent_format)
    names = [name for name, kind in LATENT_FORMATS.items() if found is kind]
    if names:
        return names[0]
    raise Problem(
        f"{node}: expected a latent space out of {', '.join(LATENT_FORMATS)}, found {found.__name__}; this "
        "prior is not supported."
    )


def exported_state_dict(model, dtype: torch.dtype) -> dict[str, Tensor]:
    """The UNet's weights on the CPU in `dtype`, LDM keys, quantisation undone, weight patches baked in at fp32."""
    weights = {}
    entries = model.get_key_patches(PREFIX)
    progress = ProgressBar(len(entries))
    for key, (base, *patches) in entries.items():
        progress.update(1)
        if key.endswith(QUANTISATION_KEYS):
            continue
        weight, convert = base
        weight = convert(weight.detach(), inplace=False).to(device="cpu", dtype=torch.float32, copy=bool(patches))
        if patches:
            weight = comfy.lora.calculate_weight(patches, weight, key)
        weights[key.removeprefix(PREFIX)] = weight.to(dtype=dtype, copy=True)
    return weights


def encode_prompt(clip, prompt: str, has_pooled: bool) -> tuple[Tensor, Tensor | None]:
    """(context [1, T, D], pooled vector [1, P]) of a prompt in float32 on the CPU; no vector unless has_pooled."""
    context, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    pooled = pooled.detach().float().cpu().clone() if has_pooled and pooled is not None else None
    return context.detach().float().cpu().clone(), pooled


def encode_empty_prompt(clip, has_pooled: bool) -> NullContext:
    """The empty prompt as this CLIP encodes it; with its pooled vector when the UNet takes one (SDXL)."""
    context, pooled = encode_prompt(clip, "", has_pooled)
    description = {
        "text_encoder": type(clip.cond_stage_model).__name__,
        "layer": "default" if clip.layer_idx is None else str(clip.layer_idx),
        "empty": "encoded empty prompt",
    }
    return NullContext(context, description, pooled)


class CoreUNet:
    """Core's UNet of a loaded MODEL, patches and offloading included, called as the library calls its own."""

    def __init__(self, model) -> None:
        self.unet: nn.Module = model.model.diffusion_model
        self.device = model.load_device
        self.dtype = model.model.manual_cast_dtype or model.model.get_dtype()

    def parameters(self) -> Iterator[Tensor]:
        """One empty tensor on the device and in the dtype to compute in: weights may be cast on the fly."""
        yield torch.empty(0, device=self.device, dtype=self.dtype)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return self.unet.named_modules()

    def __call__(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        cond = {} if y is None else {"y": y.to(self.device, self.dtype)}
        if context is not None:
            cond["context"] = context.to(self.device, self.dtype)
        x = x.to(self.device, self.dtype)
        return self.unet(x, timesteps.to(self.device).float(), transformer_options={}, **cond).float()


def vector_conditioning(model, pooled: Tensor | None, side_px: int) -> Tensor | None:
    """SDXL's y [1, A] for the empty prompt on a square image without crop; None for models that take none."""
    if model.model.adm_channels == 0:
        return None
    noise = torch.zeros(1, 4, side_px // 8, side_px // 8)
    size = {"width": side_px, "height": side_px, "noise": noise}
    return model.model.encode_adm(pooled_output=pooled, device=model.load_device, **size).float().cpu()


def output_path(filename: str) -> Path:
    """Where a new domain model goes. Raises FileProblem for names that cannot be, or are those of trained models."""
    path = DOMAIN_UNETS.new_file(filename, NODE)
    if path.exists() and not is_untrained(path):
        raise FileProblem(
            f"{path}: expected no file or an untrained text-free UNet under this name, found a trained or foreign "
            "model; choose another file name or move the file away."
        )
    return path


def is_untrained(path: Path) -> bool:
    """Whether a file's metadata say that it is a domain model of 0 training steps, which may be replaced."""
    try:
        return int(read_metadata(path).get("steps", "-1")) == 0
    except ValueError:
        return False


def make_text_free(model, clip, form: str, path: Path, file_dtype: str, probe_side_px: int = 0):
    """Write the text-free form of a MODEL's UNet to `path`; (the new file as a MODEL, report as text).

    probe_side_px: of the images that the constants of `constant` are measured on, 0: what the prior was made for.
    """
    config, latent_format = exported_config(model), exported_latent_format(model)
    prediction_type, zero_snr = exported_prediction(model)
    if form == "constant" and config.in_channels != config.out_channels:
        raise Problem(
            f"Text-Free UNet: expected a prior with as many input as output channels, found {config.in_channels} and "
            f"{config.out_channels} (an inpainting model); use the form 'cached'."
        )
    context = encode_empty_prompt(clip, has_pooled=config.adm_in_channels in POOLED_TEXT_ADM)
    if not probe_side_px:
        from ....training.prior.families import native_resolution

        is_v = prediction_type == "v_prediction"
        probe_side_px = native_resolution(latent_format, config.context_dim, is_v) or 0
    if probe_side_px < 64:
        raise Problem(f"Text-Free UNet: expected a probe_size of 0 or at least 64, found {probe_side_px}; set it.")
    y = vector_conditioning(model, context.pooled, probe_side_px)
    weights = exported_state_dict(model, DTYPES[file_dtype])
    cancelled = comfy.model_management.throw_exception_if_processing_interrupted
    prior_hash = prior_content_hash(weights, cancelled)

    comfy.model_management.load_models_gpu([model])
    prior: Any = CoreUNet(model)
    errors: dict[str, float] = {}
    if form == "constant":
        denoiser = Denoiser(prior, NoiseSchedule.scaled_linear(zero_snr=zero_snr), prediction_type)
        text_free, config, errors, unseen = _constant(denoiser, weights, config, context, y, probe_side_px // 8)
    else:
        text_free, config = build_cached(weights, config, context)
        noise = torch.randn(2, config.in_channels, 32, 32, generator=torch.Generator().manual_seed(1))
        unseen = Probes(noise, torch.tensor([999.0, 500.0]), None if y is None else y.expand(2, -1))

    metadata = DomainMetadata(
        config,
        latent_format=latent_format,
        prediction_type=prediction_type,
        zero_snr=zero_snr,
        null_text_error=errors,
        null_context=context.to_dict(),
        prior_hash=prior_hash,
        domain_name=path.stem,
    )
    write_domain_file(path, text_free, metadata)
    made = load_domain_unet(str(path))
    comfy.model_management.load_models_gpu([model, made])
    text_free_unet: Any = CoreUNet(made)
    output_error = unconditional_error(prior, text_free_unet, context.tensor, unseen)
    return made, _report(path, form, model.model_size(), made.model_size(), errors, output_error)


def _constant(
    denoiser: Denoiser, weights: dict[str, Tensor], config: UNetConfig, empty: NullContext, y: Tensor | None, side: int
) -> tuple[dict[str, Tensor], UNetConfig, dict[str, float], Probes]:
    """(weights, architecture, error by block, probes) of the `constant` form; side: of the square latents.

    The error is measured on a second trajectory of the prior that the constants never saw; the probes are of it.
    """
    prior: Any = denoiser.unet
    progress = ProgressBar(2 * 20 + 2 * 8)
    shape = (1, config.in_channels, side, side)

    def moved(done: int, total: int) -> None:
        progress.update(1)

    probes, unseen = (
        collect_probes(denoiser, empty.tensor, shape, y=y, seed=seed, device=prior.device, on_step=moved)
        for seed in (0, 1)
    )
    text_free, config, errors = build_constant(
        weights, config, empty, probes, held_out=unseen, unet=prior, on_probe=moved
    )
    few = Probes(unseen.x[::4], unseen.timesteps[::4], None if unseen.y is None else unseen.y[::4])
    return text_free, config, errors, few


def _report(
    path: Path, form: str, prior_bytes: int, made_bytes: int, errors: dict[str, float], output_error: float
) -> str:
    lines = [
        f"{path}",
        f"form: {form}, untrained",
        f"in memory: {made_bytes / 2**20:.1f} MiB, the prior {prior_bytes / 2**20:.1f} MiB",
        f"output error against the prior on the empty prompt: {output_error:.2e} (relative)",
    ]
    if errors:
        worst = max(errors, key=lambda block: errors[block])
        lines += [
            "error of the constants, RMS(attention - constant) / RMS(attention) on unseen probes:",
            f"median {statistics.median(errors.values()):.3f}, worst {errors[worst]:.3f} in {worst}",
            *(f"  {block}: {error:.3f}" for block, error in errors.items()),
        ]
    return "\n".join(lines)
