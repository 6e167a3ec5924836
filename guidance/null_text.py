"""Text-free UNets: the cross-attention of a prior replaced by what it does on the empty prompt.

Section 3.2 of arXiv 2312.08195 (in-domain generation): the domain model is the prior's UNet with its text input frozen
to the null text. Two forms, both functions of (x, t) alone:

* `constant` (the paper's): the output of each block's cross-attention becomes its mean over pixels and probes, folded
  into the bias of the self-attention before it; cross-attention and its norm disappear. An approximation, measured.
* `cached`: the keys and values of the empty prompt are stored and stay trainable; equal to the prior up to rounding.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .errors import Problem
from .networks.unet import UNet
from .networks.unet_config import UNetConfig
from .probes import Probes, measure_cross_attention

TEXT_PARTS = ("attn2", "norm2")
BLOCK = re.compile(r"(.*\.transformer_blocks\.\d+)\.(\w+)\.(.*)")
# The vector conditioning of SDXL and of its refiner starts with the pooled text; that of other models holds no text.
POOLED_TEXT_ADM = (2816, 2560)
FLOAT8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name))


@dataclass(frozen=True, eq=False)
class NullContext:
    """The empty prompt as a prior sees it.

    tensor: the encoded text [1, T, D]. pooled: SDXL's pooled text vector [1, P], else None. description: strings that
    say where it comes from (text encoder, layer, "encoded" or zeros); `to_dict` adds shape and hash for the file.
    """

    tensor: Tensor
    description: Mapping[str, str] = field(default_factory=dict)
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tensor.ndim != 3 or self.tensor.shape[0] != 1 or 0 in self.tensor.shape:
            raise Problem(f"Null context: expected encoded text [1, T, D], got {list(self.tensor.shape)}.")
        if self.pooled is not None and (self.pooled.ndim != 2 or self.pooled.shape[0] != 1):
            raise Problem(f"Null context: expected a pooled vector [1, P], got {list(self.pooled.shape)}.")
        for tensor in (self.tensor, self.pooled):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise Problem("Null context: expected finite numbers, got NaN or infinity; encode the prompt again.")

    def to_dict(self) -> dict[str, str | int]:
        """The description with token count, width and SHA-256 of the fp32 numbers."""
        values = dict(self.description, tokens=self.tensor.shape[1], width=self.tensor.shape[2])
        values["sha256"] = _digest(self.tensor)
        if self.pooled is not None:
            values["pooled_sha256"] = _digest(self.pooled)
        return values


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def build_cached(
    state_dict: Mapping[str, Tensor], config: UNetConfig, context: NullContext
) -> tuple[dict[str, Tensor], UNetConfig]:
    """The `cached` text-free form: null_k = W_k c, null_v = W_v c for the empty prompt's context c.

    state_dict: a prior's UNet, LDM keys without prefix. Returns weights and configuration of the text-free UNet;
    tensors that do not change are shared with the input, fp8 ones upcast to fp16 (exactly). Raises Problem for a UNet
    that takes no text or whose text cannot be frozen in.
    """
    result = _prepare(state_dict, config, context)
    for block in _blocks(state_dict):
        for part in "kv":
            weight = result.pop(f"{block}.attn2.to_{part}.weight")
            null = context.tensor[0].float().to(weight.device) @ weight.float().t()
            result[f"{block}.attn2.null_{part}"] = null.to(weight.dtype)
    return result, replace(config, null_text="cached", null_tokens=context.tensor.shape[1])


def build_constant(
    state_dict: Mapping[str, Tensor],
    config: UNetConfig,
    context: NullContext,
    probes: Probes,
    *,
    held_out: Probes | None = None,
    unet: nn.Module | None = None,
    on_probe: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[dict[str, Tensor], UNetConfig, dict[str, float]]:
    """The paper's `constant` text-free form: weights, configuration, and the error it makes per block.

    Each block's constant is the mean of its cross-attention over `probes`; the error is RMS(attention - constant) /
    RMS(attention) on `held_out` (on `probes` themselves when None, which flatters a little; with a one-token context
    attention is constant and the error 0). unet: the prior as a module, for instance ComfyUI's; None builds one in fp32
    from the weights. on_probe(done, of) is called after each probe. Raises Problem as `build_cached` does.
    """
    _prepare(state_dict, config, context)  # refuse before the expensive part
    unet = load_unet(state_dict, config) if unet is None else unet
    of = len(probes) + (0 if held_out is None else len(held_out))
    measured = measure_cross_attention(unet, context.tensor, probes, on_probe=lambda done, _: on_probe(done, of))
    constants = {block: statistics.mean for block, statistics in measured.items()}
    if held_out is not None:
        measured = measure_cross_attention(
            unet, context.tensor, held_out, on_probe=lambda done, _: on_probe(len(probes) + done, of)
        )
    report = {block: measured[block].relative_error(constant) for block, constant in constants.items()}
    folded, text_free = fold_constants(state_dict, config, context, constants)
    return folded, text_free, report


def fold_constants(
    state_dict: Mapping[str, Tensor], config: UNetConfig, context: NullContext, constants: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], UNetConfig]:
    """Remove cross-attention and its norm, adding each block's constant [C] to the bias of attn1's output projection.

    The residual stream is x + attn1 + constant + ff(...), and attn1 ends in that projection, so this is exact.
    """
    result = _prepare(state_dict, config, context)
    blocks = _blocks(state_dict)
    if set(constants) != set(blocks):
        different = sorted(set(constants) ^ set(blocks))
        raise Problem(f"Text-free UNet: expected one constant per transformer block, differing in {different[0]}.")
    for block in blocks:
        key = f"{block}.attn1.to_out.0.bias"
        bias = result[key]
        result[key] = (bias.double() + constants[block].double().to(bias.device)).to(bias.dtype)
    result = {key: tensor for key, tensor in result.items() if not _is_text_part(key)}
    return result, replace(config, null_text="constant")


def load_unet(state_dict: Mapping[str, Tensor], config: UNetConfig, dtype: torch.dtype = torch.float32) -> UNet:
    """A UNet in evaluation mode with these weights; those already in `dtype` are shared, not copied."""
    with torch.device("meta"):
        unet = UNet(config)
    unet.load_state_dict({key: tensor.to(dtype) for key, tensor in state_dict.items()}, strict=True, assign=True)
    return unet.eval().requires_grad_(False)


def _blocks(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names of the transformer blocks, in the order of the state dict."""
    matches = (BLOCK.fullmatch(key) for key in state_dict)
    return list(dict.fromkeys(match[1] for match in matches if match))


def _is_text_part(key: str) -> bool:
    match = BLOCK.fullmatch(key)
    return match is not None and match[2] in TEXT_PARTS


def _prepare(state_dict: Mapping[str, Tensor], config: UNetConfig, context: NullContext) -> dict[str, Tensor]:
    """Check that the weights can be made text-free; a copy of the dict with fp8 upcast and the pooled text frozen."""
    if config.null_text != "none":
        raise Problem(f"Text-free UNet: expected a prior that takes text, got text-free form {config.null_text!r}.")
    blocks = _blocks(state_dict)
    if not blocks:
        raise Problem("Text-free UNet: expected a UNet with transformer blocks, found none; it takes no text.")
    if context.tensor.shape[-1] != config.context_dim:
        found = context.tensor.shape[-1]
        raise Problem(f"Text-free UNet: expected a null context of width {config.context_dim}, found {found}.")
    for block in blocks:
        for part in ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_out.0.bias", "attn2.to_k.weight"):
            key = f"{block}.{part}"
            if key not in state_dict:
                raise Problem(f"Text-free UNet: expected a complete Stable Diffusion UNet, {key} is missing.")
        queries, keys = (state_dict[f"{block}.attn1.to_{part}.weight"].shape[1] for part in "qk")
        if queries != keys:
            raise Problem(
                f"Text-free UNet: attn1 of {block} reads the text (disable_self_attentions); use another prior."
            )
    result = {key: tensor.half() if tensor.dtype in FLOAT8 else tensor for key, tensor in state_dict.items()}
    if context.pooled is None:
        if config.adm_in_channels in POOLED_TEXT_ADM:
            raise Problem("Text-free UNet: this prior (SDXL) also takes the pooled text; give its pooled vector too.")
        return result
    return _freeze_pooled(result, config, context.pooled)


def _freeze_pooled(result: dict[str, Tensor], config: UNetConfig, pooled: Tensor) -> dict[str, Tensor]:
    """Freeze the pooled text: its product with label_emb's first layer joins that layer's bias, its columns turn 0.

    y starts with the pooled text and goes on with sizes and crops, which stay live. Whatever pooled vector is given
    later has no effect, and every loader of SDXL reads the result.
    """
    width = pooled.shape[1]
    if config.adm_in_channels is None or width > config.adm_in_channels:
        raise Problem(f"Text-free UNet: the prior takes no pooled vector of width {width}; leave it out.")
    weight, bias = result["label_emb.0.0.weight"], result["label_emb.0.0.bias"]
    added = weight[:, :width].double() @ pooled[0].double().to(weight.device)
    result["label_emb.0.0.bias"] = (bias.double() + added.to(bias.device)).to(bias.dtype)
    weight = weight.clone()
    weight[:, :width] = 0
    result["label_emb.0.0.weight"] = weight
    return result
