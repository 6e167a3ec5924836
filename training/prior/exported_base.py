"""A prior that exists only in memory (MODEL, CLIP and VAE of a graph), as plain tensors and as one file.

A training process that another program starts reads the file; in the same process the tensors are used as they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...guidance.errors import Problem
from ...guidance.files import FileProblem, ModelFile
from ...guidance.files.recognise import recognise_names
from ...guidance.files.tensors import write_safetensors
from ...guidance.networks.unet import UNetConfig
from ...guidance.null_text import NullContext
from ...guidance.plain_json import parse_json

if TYPE_CHECKING:
    from .base import Prior, Text

FORMAT = "indomain_exported_base"
UNET, AUTOENCODER, TEXT = "unet.", "autoencoder.", "text."


@dataclass(frozen=True, eq=False)
class ExportedBase:
    """The parts of a prior, as `Base.from_parts` takes them.

    unet, autoencoder: weights under LDM keys without prefix. prediction_type: "epsilon" or "v_prediction".
    latent_format: the latent space's name in domain files; diffusion latent = autoencoder mean * latent_scale.
    null_context: the empty prompt. prompts: prompt -> (context [1, T, D], pooled vector [1, P] or None), the prompts
    that the run will need, already encoded. name: what to call the prior in messages.
    """

    unet: Mapping[str, Tensor]
    config: UNetConfig
    prediction_type: str
    zero_snr: bool
    latent_format: str
    latent_scale: float
    autoencoder: Mapping[str, Tensor]
    null_context: NullContext
    prompts: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    name: str = "prior"

    def open(self) -> Prior:
        """The base to train from."""
        from .base import Prior

        return Prior.from_parts(
            self.unet,
            self.config,
            latent_format=self.latent_format,
            latent_scale=self.latent_scale,
            prediction_type=self.prediction_type,
            zero_snr=self.zero_snr,
            null_context=self.null_context,
            autoencoder=self.autoencoder,
            text=self._encode,
            name=self.name,
        )

    def _encode(self, prompts: Sequence[str]) -> Text:
        from .base import Text

        known = {"": (self.null_context.tensor, self.null_context.pooled), **self.prompts}
        missing = [prompt for prompt in prompts if prompt not in known]
        if missing:
            raise Problem(
                f"{self.name}: expected one of the prompts that were encoded before training "
                f"({', '.join(self.prompts)}), found {missing[0]!r}; name it in sample_prompts."
            )
        contexts, pooled = zip(*(known[prompt] for prompt in prompts))
        # Attention to repeated tokens is attention to the tokens, so prompts of several lengths fit in one batch.
        tokens = math.lcm(*(context.shape[1] for context in contexts))
        contexts = [context.repeat(1, tokens // context.shape[1], 1) for context in contexts]
        return Text(torch.cat(contexts), None if pooled[0] is None else torch.cat(pooled))

    def write(self, path: str | os.PathLike) -> Path:
        """Write everything as one .safetensors file. Raises FileProblem when the disk does not take it."""
        tensors = {f"{UNET}{key}": tensor for key, tensor in self.unet.items()}
        tensors |= {f"{AUTOENCODER}{key}": tensor for key, tensor in self.autoencoder.items()}
        prompts = list(self.prompts)
        null = (self.null_context.tensor, self.null_context.pooled)
        for index, (context, pooled) in enumerate([null, *(self.prompts[prompt] for prompt in prompts)]):
            tensors[f"{TEXT}{index}.context"] = context
            if pooled is not None:
                tensors[f"{TEXT}{index}.pooled"] = pooled
        metadata = {
            "format": FORMAT,
            "config": self.config.to_json(),
            "prediction_type": self.prediction_type,
            "zero_snr": json.dumps(self.zero_snr),
            "latent_format": self.latent_format,
            "latent_scale": repr(self.latent_scale),
            "null_description": json.dumps(dict(self.null_context.description)),
            "prompts": json.dumps(prompts),
            "name": self.name,
        }
        return write_safetensors(path, tensors, metadata)

    @classmethod
    def read(cls, path: str | os.PathLike) -> ExportedBase:
        """Inverse of `write`, exact. Raises FileProblem for any other file."""
        file = ModelFile(path)
        metadata = file.metadata
        if metadata.get("format") != FORMAT:
            found = recognise_names(file.keys, metadata).what
            raise FileProblem(f"{path}: expected an exported prior, found {found}; export it again.")
        tensors = file.tensors()
        try:
            prompts = parse_json(metadata["prompts"])
            texts = [
                (tensors[f"{TEXT}{index}.context"], tensors.get(f"{TEXT}{index}.pooled"))
                for index in range(len(prompts) + 1)
            ]
            return cls(
                unet={key.removeprefix(UNET): t for key, t in tensors.items() if key.startswith(UNET)},
                config=UNetConfig.from_json(metadata["config"]),
                prediction_type=metadata["prediction_type"],
                zero_snr=parse_json(metadata["zero_snr"]),
                latent_format=metadata["latent_format"],
                latent_scale=float(metadata["latent_scale"]),
                autoencoder={k.removeprefix(AUTOENCODER): t for k, t in tensors.items() if k.startswith(AUTOENCODER)},
                null_context=NullContext(texts[0][0], parse_json(metadata["null_description"]), texts[0][1]),
                prompts=dict(zip(prompts, texts[1:])),
                name=metadata["name"],
            )
        except (KeyError, ValueError, TypeError, AttributeError) as problem:
            what = f"{path}: expected an exported prior, found one with parts missing ({problem})."
            raise FileProblem(what) from problem
