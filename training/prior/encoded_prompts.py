"""Prompts that were encoded before training, in place of a text encoder: a prior that ComfyUI connects brings them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...guidance.errors import Problem
from .text_encoders import Text


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """Looks prompts up instead of encoding them: a prior's `text_encoder`.

    prompts: prompt -> (context [1, T, D], pooled vector [1, P] or None), the empty prompt among them. name: what to
    call the prior in messages. Calling it with N prompts gives their Text, [N, T, D] and [N, P]; it raises Problem for
    a prompt that was not encoded.
    """

    prompts: Mapping[str, tuple[Tensor, Tensor | None]]
    name: str = "prior"

    def __call__(self, prompts: Sequence[str]) -> Text:
        missing = [prompt for prompt in prompts if prompt not in self.prompts]
        if missing:
            raise Problem(
                f"{self.name}: expected one of the prompts that were encoded before training "
                f"({', '.join(filter(None, self.prompts))}), found {missing[0]!r}; name it in sample_prompts."
            )
        found = [self.prompts[prompt] for prompt in prompts]
        # Attention to repeated tokens is attention to the tokens, so prompts of several lengths fit in one batch.
        tokens = math.lcm(*(context.shape[1] for context, _ in found))
        context = torch.cat([context.repeat(1, tokens // context.shape[1], 1) for context, _ in found])
        pooled = [vector for _, vector in found if vector is not None]
        return Text(context, torch.cat(pooled) if pooled else None)
