"""Text-free models in ComfyUI: core's own classes, with a few methods of ours in front, and what is known of a MODEL.

Core's `BasicTransformerBlock` keeps its `attn2`, changed in place, because `attn2 = None` makes core add the
self-attention twice. Every weight sits in a leaf module that core's loader knows how to cast, move and patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.ops
import torch
from comfy.ldm.modules import attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ....guidance.errors import Problem, logger
from ....guidance.files import DomainMetadata
from ....guidance.null_text import POOLED_TEXT_ADM

if TYPE_CHECKING:
    from comfy.ldm.modules.attention import CrossAttention
    from comfy.model_base import BaseModel
else:
    # The mixins below are put in front of the class that an object has (`mixed`), whichever of core's it is.
    CrossAttention = BaseModel = object

LOG = logger(__name__)
POOLED_TEXT_WIDTH = 1280
_MIXED: dict[tuple[type, type], type] = {}


@dataclass(frozen=True)
class DomainInfo:
    """The domain model in a MODEL."""

    name: str
    path: str
    form: str  # "constant" or "cached" (text-free), "full" (a fine-tuned UNet that still takes text)
    metadata: DomainMetadata | None


def domain_info(patcher: ModelPatcher) -> DomainInfo | None:
    """The domain model in a MODEL from this pack's loaders; None for any other MODEL."""
    return getattr(patcher.model, "indomain_domain", None)


def is_text_free(patcher: ModelPatcher) -> bool:
    """Whether a MODEL from this pack's loaders takes no text."""
    info = domain_info(patcher)
    return info is not None and info.form != "full"


class FrozenTokens(nn.Module, comfy.ops.CastWeightBiasOp):
    """Keys or values [T, C] of a frozen prompt, in a leaf module so that ComfyUI casts and offloads them by itself."""

    def __init__(self, tokens: int, channels: int, dtype: torch.dtype | None, device: torch.device | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, channels, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", None)

    def forward(self, like: Tensor, batch: int) -> Tensor:
        """The tokens [B, T, C] in the dtype and on the device of `like`."""
        weight, bias, stream = comfy.ops.cast_bias_weight(self, like, offloadable=True)
        # A copy, because attention kernels of other packs may not take a batch stride of zero, and because an offloaded
        # weight may be reused as soon as it is given back.
        tokens = weight.repeat(batch, 1, 1)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return tokens


class CachedText(CrossAttention):
    """The `cached` form, mixed into core's cross-attention: `to_k` and `to_v` answer with the frozen tokens."""

    absent = ("attn2.to_k.weight", "attn2.to_v.weight")

    def freeze(self, tokens: int) -> None:
        """Take the layers that read text out, in place, and put room for frozen tokens in."""
        for layer, frozen in (("to_k", "null_k"), ("to_v", "null_v")):
            weight = self._modules.pop(layer).weight
            setattr(self, frozen, FrozenTokens(tokens, weight.shape[0], weight.dtype, weight.device))

    def to_k(self, context: Tensor) -> Tensor:
        return self.null_k(context, context.shape[0])

    def to_v(self, context: Tensor) -> Tensor:
        return self.null_v(context, context.shape[0])

    def forward(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, mask: Tensor | None = None, **more
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]. `context`, `value` and `mask` belong to text, and are ignored."""
        return super().forward(x, **more)


class NoText(CrossAttention):
    """The `constant` form, mixed into core's cross-attention: it adds nothing, the constant is in the bias of attn1.

    The projections exist for patches that replace the attention: such a patch runs, and its result is dropped.
    """

    patch_reported = False

    absent = (
        *CachedText.absent,
        *("attn2.to_q.weight", "attn2.to_out.0.weight", "attn2.to_out.0.bias", "norm2.weight", "norm2.bias"),
    )

    def freeze(self, tokens: int) -> None:
        """Take all layers out, in place."""
        for layer in ("to_q", "to_k", "to_v", "to_out"):
            del self._modules[layer]

    def to_q(self, x: Tensor) -> Tensor:
        return x

    def to_k(self, context: Tensor) -> Tensor:
        return context.new_zeros(*context.shape[:2], self.heads * self.dim_head)

    def to_v(self, context: Tensor) -> Tensor:
        return self.to_k(context)

    def to_out(self, x: Tensor) -> Tensor:
        if not self.patch_reported:
            self.patch_reported = True
            LOG.info("A patch replaces cross-attention, which this text-free model does not have: it has no effect.")
        return torch.zeros_like(x)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return torch.zeros_like(x)


def remove_text(unet: nn.Module, form: str, tokens: int) -> None:
    """Make the cross-attention of every transformer block of a core UNet its text-free `form`, in place."""
    blocks: list[Any] = [part for part in unet.modules() if isinstance(part, attention.BasicTransformerBlock)]
    for block in blocks:
        if block.disable_self_attn:
            raise Problem(
                "Text-free UNet: expected blocks whose first attention looks at the image only, found one that looks "
                "at the text; this architecture has no text-free form."
            )
        block.attn2.__class__ = mixed(NoText if form == "constant" else CachedText, type(block.attn2))
        block.attn2.freeze(tokens)
        if form == "constant":
            block.norm2 = nn.Identity()


class TextFree(BaseModel):
    """Mixed into core's model class: text in the conditioning is ignored, everything else in it stays live."""

    indomain_text_reported = False

    def state_dict(self, *args, **kwargs) -> dict:
        """As core's, with an empty tensor for each absent layer: core's LoRA loader logs every name that it misses."""
        found = super().state_dict(*args, **kwargs)
        if not args and not kwargs:
            found.update((name, torch.empty(0)) for name in absent_layers(self))
        return found

    def extra_conds(self, **kwargs) -> dict:
        if kwargs.get("cross_attn") is None:
            # Patches and ControlNets expect a context of the family's width even where the UNet takes none.
            width = self.model_config.unet_config["context_dim"]
            kwargs["cross_attn"] = torch.zeros(1, 1, width, device=kwargs.get("device"))
        elif not self.indomain_text_reported:
            self.indomain_text_reported = True
            LOG.info("The domain model '%s' takes no text: prompts on it are ignored.", self.indomain_domain.name)
        return super().extra_conds(**kwargs)

    def encode_adm(self, **kwargs) -> Tensor | None:
        # Only ControlNets use SDXL's pooled text, and they get the prior's; a conditioning may come without it. Sizes
        # and crops are used.
        pooled = kwargs.get("pooled_output")
        if self.adm_channels in POOLED_TEXT_ADM and (pooled is None or pooled.shape[-1] != POOLED_TEXT_WIDTH):
            kwargs["pooled_output"] = torch.zeros(1, POOLED_TEXT_WIDTH)
        return super().encode_adm(**kwargs)

    def apply_model(self, x: Tensor, t: Tensor, *args, **kwargs) -> Tensor:
        # The UNet has its pooled text folded into the weights, which are zero where it enters; zeros here keep text out
        # even where a LoRA, or a file of another origin, has other weights there.
        y = kwargs.get("y")
        if y is not None and self.adm_channels in POOLED_TEXT_ADM:
            kwargs["y"] = torch.cat([torch.zeros_like(y[:, :POOLED_TEXT_WIDTH]), y[:, POOLED_TEXT_WIDTH:]], dim=1)
        return super().apply_model(x, t, *args, **kwargs)

    def state_dict_for_saving(self, *args, **kwargs) -> dict:
        """As core's, with the frozen tokens under the names this project's files give them."""
        state_dict = super().state_dict_for_saving(*args, **kwargs)
        return {file_key(key): value for key, value in state_dict.items()}


def absent_layers(model: TextFree) -> list[str]:
    """The weights of the layers that text had, by the names that LoRAs have for them."""
    return [
        f"diffusion_model.{name}.{weight}"
        for name, module in model.diffusion_model.named_modules()
        if isinstance(module, attention.BasicTransformerBlock)
        for weight in module.attn2.absent
    ]


class TextFreePatcher(ModelPatcher if TYPE_CHECKING else object):
    """Mixed into core's patcher: a LoRA's weights for layers that read text are left out, with one warning.

    Core is told that those weights were taken, or it would log a line for each.
    """

    def clone(self, *args, **kwargs):
        """As core's, which makes a patcher of another class where weights are no longer to be paged in."""
        return without_text(super().clone(*args, **kwargs))

    def model_state_dict(self, *args, **kwargs) -> dict:
        """As core's, without the names that are there for LoRAs alone."""
        return self._present(super().model_state_dict(*args, **kwargs))

    def model_state_dict_for_saving(self, *args, **kwargs) -> dict:
        """Newer versions ask here."""
        return self._present(super().model_state_dict_for_saving(*args, **kwargs))

    def _present(self, state_dict: Mapping) -> dict:
        absent = absent_layers(self.model)
        return {key: value for key, value in state_dict.items() if key not in absent}

    def add_patches(self, patches: Mapping, *args, **kwargs) -> list:
        own, absent = self._divided(patches)
        return [*super().add_patches(own, *args, **kwargs), *absent]

    def add_hook_patches(self, hook, patches: Mapping, *args, **kwargs) -> list:
        own, absent = self._divided(patches)
        return [*super().add_hook_patches(hook, own, *args, **kwargs), *absent]

    def _divided(self, patches: Mapping) -> tuple[dict, list]:
        layers = absent_layers(self.model)
        absent = [key for key in patches if (key if isinstance(key, str) else key[0]) in layers]
        if absent:
            kinds = sorted({".".join(key.split(".")[-3:-1]) for key in map(str, absent)})
            LOG.warning(
                "The domain model '%s' takes no text: %d of the %d weights of a LoRA are for its text layers (%s) and "
                "are left out.",
                self.model.indomain_domain.name,
                len(absent),
                len(patches),
                ", ".join(kinds),
            )
        return {key: patch for key, patch in patches.items() if key not in absent}, absent


def without_text(patcher: ModelPatcher) -> ModelPatcher:
    """The patcher of a text-free model with `TextFreePatcher` in front of its class."""
    if not isinstance(patcher, TextFreePatcher):
        patcher.__class__ = mixed(TextFreePatcher, type(patcher))
    return patcher


def mixed(mixin: type, core_class: type) -> type:
    """A class of core's with `mixin` in front; the same type every time."""
    name = f"{mixin.__name__}{core_class.__name__}"
    return _MIXED.setdefault((mixin, core_class), type(name, (mixin, core_class), {}))


def module_key(key: str) -> str:
    """The name of a file's tensor inside the ComfyUI model: frozen tokens live in a module of their own."""
    return f"{key}.weight" if key.endswith((".attn2.null_k", ".attn2.null_v")) else key


def file_key(key: str) -> str:
    """Inverse of `module_key`."""
    return key.removesuffix(".weight") if key.endswith((".attn2.null_k.weight", ".attn2.null_v.weight")) else key
