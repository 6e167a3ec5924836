"""The text encoders and the tokenizer of a checkpoint: prompts to encoded text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...guidance.errors import Problem, first_line
from ...guidance.files import FileProblem, ModelFile, check_finite
from ...guidance.files.layouts import TEXT_ENCODER_PREFIXES
from ...guidance.networks.text_encoder import (
    END_TOKEN,
    START_TOKEN,
    TextEncoder,
    empty_prompt_tokens,
    text_encoder_config_from_state_dict,
    text_encoder_from_openclip,
)
from ...guidance.null_text import NullContext
from .families import Family


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded prompts: context [B, T, D], and SDXL's pooled vectors [B, P] or None."""

    context: Tensor
    pooled: Tensor | None = None


class TextEncoders:
    """The text encoders of one checkpoint, read from the file for each use: SDXL's alone take 3 GB in fp32.

    tokenizer: folder with CLIP's vocab.json and merges.txt, "" for none.
    """

    def __init__(self, path: Path, family: Family, tokenizer: str = "") -> None:
        self.path = path
        self.family = family
        self.tokenizer = _load_tokenizer(tokenizer) if tokenizer else None

    def encode_empty(self) -> NullContext:
        """The empty prompt; needs no tokenizer."""
        text = self._encode(lambda encoder, pad: empty_prompt_tokens(encoder.config, pad))
        description = {
            "text_encoder": "+".join(name for name, *_ in self.family.text_encoders),
            "layer": ",".join(str(layer) for _, layer, *_ in self.family.text_encoders),
            "empty": "encoded empty prompt",
        }
        return NullContext(text.context, description, text.pooled)

    def encode(self, prompts: Sequence[str]) -> Text:
        """Prompts -> encoded text; each cut after 75 tokens, weights in brackets are read as words."""
        assert self.tokenizer is not None, "a prior without a tokenizer encodes the empty prompt alone"
        ids = [self.tokenizer(prompt) for prompt in prompts]

        def tokens(encoder: TextEncoder, pad: int) -> Tensor:
            length = encoder.config.max_length
            rows = [[START_TOKEN, *row[: length - 2], END_TOKEN] for row in ids]
            return torch.tensor([row + [pad] * (length - len(row)) for row in rows])

        return self._encode(tokens)

    @torch.no_grad()
    def _encode(self, tokens: Callable[[TextEncoder, int], Tensor]) -> Text:
        """Every encoder of the family on its tokens, one at a time in fp32."""
        contexts, pooled = [], None
        for name, layer, final_norm, pad in self.family.text_encoders:
            encoder = self._load(name)
            # Files that went through diffusers lack ViT-H's last layer, which nothing uses: there -1 is the same layer.
            skipped = name == "clip_h" and encoder.config.layers == 23
            hidden, projected = encoder(tokens(encoder, pad), -1 if skipped else layer, final_norm)
            contexts.append(hidden)
            if self.family.latent_format == "sdxl":
                pooled = projected  # the last encoder's
        return Text(torch.cat(contexts, dim=-1), pooled)

    def _load(self, name: str) -> TextEncoder:
        file = ModelFile(self.path)
        for prefix, kind, is_openclip in TEXT_ENCODER_PREFIXES:
            if kind == name and any(key.startswith(prefix) for key in file.keys):
                weights = file.tensors(prefix)
                return self._build(name, text_encoder_from_openclip(weights) if is_openclip else weights)
        raise FileProblem(
            f"{self.path}: expected a full checkpoint of {self.family.name} with its text encoder {name}, found none; "
            "the empty prompt has to be encoded once, so use a checkpoint that has UNet, VAE and text encoder."
        )

    def _build(self, name: str, weights: Mapping[str, Tensor]) -> TextEncoder:
        check_finite(weights, self.path)
        named = {  # files of 2022 leave out the first part
            key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": tensor
            for key, tensor in weights.items()
        }
        named.pop("text_model.embeddings.position_ids", None)
        named.pop("text_model.logit_scale", None)
        try:
            config = text_encoder_config_from_state_dict(named)
            with torch.device("meta"):
                encoder = TextEncoder(config)
            encoder.load_state_dict({key: tensor.float() for key, tensor in named.items()}, strict=True, assign=True)
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise FileProblem(
                f"{self.path}: its text encoder {name} cannot be read ({first_line(error)}); download the file again."
            ) from error
        return encoder.eval().requires_grad_(False)


def _load_tokenizer(folder: str) -> Callable[[str], list[int]]:
    """CLIP's byte-pair encoder from a folder, as a function from text to ids without start and end."""
    files = [Path(folder) / name for name in ("vocab.json", "merges.txt")]
    for file in files:
        if not file.is_file():
            raise FileProblem(f"{file}: expected CLIP's tokenizer file, found nothing; name the folder that holds it.")
    try:
        from transformers import CLIPTokenizer
    except ImportError as error:
        raise Problem(
            "Expected the package transformers to read a tokenizer, found none; install it, or leave prompts empty."
        ) from error
    tokenizer = CLIPTokenizer(*map(str, files))
    return lambda text: tokenizer.encode(text, add_special_tokens=False)
