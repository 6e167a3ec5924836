"""ComfyUI's networks with gradients: a VAE's encoder, and weights that were made in inference mode."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ....guidance.distillation.image_encoder import ImageEncoder
from ..guiding.predictions import to_the_end


def gradient_encoder(
    vae: Any,
    model: ModelPatcher,
    device: torch.device,
    side_px: int,
    cancelled: Callable[[BaseException], None] | None = None,
) -> ImageEncoder:
    """Images [B, 3 or 1, H, W], judged at `side_px` -> the MODEL's latents [B, C, h, w], float32, differentiable.

    The latent is the mean of the VAE's posterior, from a private copy of its encoder half: core's own `vae.encode`
    writes into another tensor, crops, and has a tiled fallback, and gradients get lost in all three. Half precision
    becomes float32, which small gradients (and SDXL's encoder) need; bf16 stays. Call it outside inference mode.
    cancelled: told of a cancel, which then does not interrupt it (`to_the_end`).
    """
    stage = vae.first_stage_model
    encoder = copy.copy(stage)
    encoder._modules = {name: part for name, part in stage._modules.items() if "decoder" not in name}
    encoder = copy.deepcopy(encoder)
    for holder, name, tensor in _inference_tensors(encoder):
        holder[name] = _like(tensor, tensor.detach().clone())
    dtype = torch.bfloat16 if vae.vae_dtype == torch.bfloat16 else torch.float32
    encoder = encoder.to(device=device, dtype=dtype).eval().requires_grad_(False)
    process_in = model.model.process_latent_in

    def encode(images: Tensor) -> Tensor:
        images = images.to(device).float()
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        pixels = vae.process_input(images * 0.5 + 0.5)
        return process_in(encoder.encode(pixels.to(dtype)).float())

    return ImageEncoder(encode if cancelled is None else to_the_end(encode, cancelled), side_px)


@contextlib.contextmanager
def ordinary_weights(module: nn.Module) -> Iterator[None]:
    """Inside the block, a module's weights can take part in autograd although they were made in inference mode.

    They are replaced by ordinary tensors in the same memory, and put back afterwards. Call it outside inference mode.
    """
    taken = _inference_tensors(module)
    try:
        for holder, name, tensor in taken:
            alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
            holder[name] = _like(tensor, alias)
        yield
    finally:
        for holder, name, tensor in taken:
            holder[name] = tensor


def _inference_tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """(the dictionary that holds it, its name there, the tensor) of all that were made in inference mode."""
    holders = [holder for part in module.modules() for holder in (part._parameters, part._buffers)]
    return [
        (holder, name, tensor)
        for holder in holders
        for name, tensor in holder.items()
        if tensor is not None and tensor.is_inference()
    ]


def _like(original: Tensor, tensor: Tensor) -> Tensor:
    """A parameter where the original is one."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(original, nn.Parameter) else tensor
