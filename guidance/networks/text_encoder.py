"""CLIP text encoders (ViT-L of Stable Diffusion 1.x, OpenCLIP ViT-H and ViT-bigG) under Hugging Face parameter names.

The text transformer of "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020),
section 2.4. It encodes the empty prompt and serves the mini world, and takes token ids, not words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import Problem
from .configuration import Configuration, one_of, whole_number

START_TOKEN = 49406
END_TOKEN = 49407
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass(frozen=True)
class TextEncoderConfig(Configuration):
    """The architecture of one CLIP text encoder.

    `projection_dim` None leaves the pooled vector unprojected; `end_token` is where the pooled vector is taken.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocab_size: int = 49408
    max_length: int = 77
    activation: str = "quick_gelu"
    projection_dim: int | None = None
    end_token: int = END_TOKEN

    _NAME = "Text encoder"
    _RULES = {"activation": one_of(ACTIVATIONS), "end_token": whole_number(0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise self._problem(f"width {self.width} cannot be split into {self.heads} heads")


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(part, "b t (h d) -> b h t d", h=self.heads) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(out, "b h t d -> b t (h d)"))


class _Layer(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = _SelfAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width)
        layers = {"fc1": nn.Linear(config.width, config.mlp_width), "fc2": nn.Linear(config.mlp_width, config.width)}
        self.mlp = nn.ModuleDict(layers)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class _Embeddings(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class TextEncoder(nn.Module):
    """CLIP's causal text transformer (arXiv 2103.00020, section 2.4).

    `forward(tokens, layer, final_norm)`: tokens [B, T] (T at most max_length) -> hidden [B, T, W] after `layer`
    (-1: the last, Stable Diffusion 1.x; -2: the last but one, 2.x and SDXL), through the final LayerNorm when
    `final_norm` (SDXL: False), and pooled [B, W] (or [B, projection_dim]): the last layer at the first end token.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = nn.ModuleDict({"embeddings": _Embeddings(config)})
        layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.text_model["encoder"] = nn.ModuleDict({"layers": layers})
        self.text_model["final_layer_norm"] = nn.LayerNorm(config.width)
        self.text_projection = (
            None if config.projection_dim is None else nn.Linear(config.width, config.projection_dim, bias=False)
        )

    def forward(self, tokens: Tensor, layer: int = -1, final_norm: bool = True) -> tuple[Tensor, Tensor]:
        config = self.config
        if tokens.ndim != 2 or tokens.shape[1] > config.max_length:
            raise Problem(f"Text encoder: expected tokens [B, T <= {config.max_length}], got {list(tokens.shape)}.")
        if not -config.layers <= layer < config.layers:
            raise Problem(f"Text encoder: layer {layer} does not exist, there are {config.layers}.")
        norm = self.text_model["final_layer_norm"]
        x = self.text_model["embeddings"](tokens)
        hidden = x
        for index, block in enumerate(cast(nn.ModuleDict, self.text_model["encoder"])["layers"].children()):
            x = block(x)
            if index == layer % config.layers:
                hidden = x
        last = norm(x)
        if final_norm:
            hidden = last if hidden is x else norm(hidden)
        ends = (tokens == config.end_token).int().argmax(dim=1)
        pooled = last[torch.arange(tokens.shape[0], device=tokens.device), ends]
        return hidden, pooled if self.text_projection is None else self.text_projection(pooled)


def empty_prompt_tokens(config: TextEncoderConfig, pad: int | None = None) -> Tensor:
    """Token ids [1, max_length] of the empty prompt: start, end, padding.

    `pad` defaults to the end token for CLIP (quick_gelu: Stable Diffusion 1.x, SDXL's first encoder) and to 0 for
    OpenCLIP (gelu: 2.x, SDXL's second), as their tokenizers do.
    """
    if pad is None:
        pad = END_TOKEN if config.activation == "quick_gelu" else 0
    tokens = torch.full((1, config.max_length), pad, dtype=torch.long)
    tokens[0, 0], tokens[0, 1] = START_TOKEN, END_TOKEN
    return tokens


def text_encoder_config_from_state_dict(
    state_dict: Mapping[str, Tensor], heads: int | None = None, activation: str | None = None
) -> TextEncoderConfig:
    """Read the architecture from Hugging Face parameter names and shapes (`text_model.encoder.layers.0...`).

    Heads and activation leave no trace in the weights; by default heads have 64 channels, as in every published CLIP,
    and width 768 (ViT-L) means quick_gelu, any other gelu. Raises Problem when the keys are not such an encoder's.
    """

    def shape(key: str) -> torch.Size:
        if key not in state_dict:
            raise Problem(f"This is not a CLIP text encoder in Hugging Face layout: the tensor {key} is missing.")
        return state_dict[key].shape

    vocab_size, width = shape("text_model.embeddings.token_embedding.weight")
    prefix = "text_model.encoder.layers."
    layers = 1 + max((int(key.split(".")[3]) for key in state_dict if key.startswith(prefix)), default=-1)
    projection = state_dict.get("text_projection.weight")
    return TextEncoderConfig(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads or max(1, width // 64),
        mlp_width=shape(f"{prefix}0.mlp.fc1.weight")[0],
        max_length=shape("text_model.embeddings.position_embedding.weight")[0],
        activation=activation or ("quick_gelu" if width == 768 else "gelu"),
        projection_dim=None if projection is None else projection.shape[0],
    )


_OPENCLIP_NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight",
}
_OPENCLIP_LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def text_encoder_from_openclip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an OpenCLIP text tower (Stable Diffusion 2.x, SDXL's second encoder) to Hugging Face parameter names.

    Input keys start at `transformer.resblocks.0...`; the fused attention projection [3W, W] is split, the text
    projection (stored transposed) turned, and `logit_scale` and the constant `attn_mask` dropped.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if key in _OPENCLIP_NAMES:
            converted[_OPENCLIP_NAMES[key]] = tensor
        elif key == "text_projection":
            converted["text_projection.weight"] = tensor.t().contiguous()
        elif key.startswith("transformer.resblocks."):
            _, _, layer, rest = key.split(".", 3)
            target = f"text_model.encoder.layers.{layer}"
            name, _, kind = rest.rpartition(".")
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, chunk in zip("qkv", tensor.chunk(3)):
                    converted[f"{target}.self_attn.{part}_proj.{kind}"] = chunk
            elif name in _OPENCLIP_LAYER_NAMES:
                converted[f"{target}.{_OPENCLIP_LAYER_NAMES[name]}.{kind}"] = tensor
            else:
                raise Problem(f"This is not an OpenCLIP text encoder: the tensor {key} is unknown.")
        elif key not in ("logit_scale", "attn_mask"):
            raise Problem(f"This is not an OpenCLIP text encoder: the tensor {key} is unknown.")
    return converted
