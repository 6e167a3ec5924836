"""The prompts that a guidance is matched at: given ones, lines of a file, random words of the prior's vocabulary."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...guidance.errors import Problem
from ...guidance.files import FileProblem
from ...guidance.plain_json import decode
from ..engine.randomness import sample_generator
from ..engine.settings import ConfigProblem
from ..engine.small_files import read_small
from ..mini_world import MINI_WORLD
from ..mini_world.tokens import TOKEN_IDS
from ..prior.prior import ImageSize, Prior
from ..prior.text_encoders import Text
from .config import BakeConfig

LONGEST = 12  # words of a random prompt
AT_ONCE = 32  # prompts that are encoded together
MOST_VOCABULARY = 2**23  # bytes; CLIP's has one million
_WORD = re.compile(r"[a-z]{3,}</w>")


def prompts_of(config: BakeConfig, latent_format: str, warn: Callable[[str], object] = lambda text: None) -> list[str]:
    """Every prompt of a run but the empty one, each once; latent_format: the prior's, whose words are drawn from.

    warn: told where there is no vocabulary to draw from. Raises FileProblem for files that cannot be read,
    ConfigProblem for one without prompts.
    """
    found = [*config.prompt_list]
    if config.prompt_file:
        lines = [line.strip() for line in _text(config.prompt_file).splitlines()]
        if not any(lines):
            raise ConfigProblem(
                f"prompt_file: expected prompts, one a line, found none in {config.prompt_file}; name another file."
            )
        found += lines
    if config.random_prompts:
        words = vocabulary(latent_format, config.tokenizer)
        if not words:
            warn(
                "random_prompts: expected a vocabulary to draw words from, found none, so that no prompt is drawn; set "
                "tokenizer to a folder with CLIP's vocab.json and merges.txt, or name prompts in prompt_list."
            )
        found += [random_prompt(words, config.seed, number) for number in range(config.random_prompts if words else 0)]
    return list(dict.fromkeys(filter(None, found)))


def _text(path: str) -> str:
    try:
        return decode(read_small(path, "a text file of prompts"))
    except FileProblem:
        raise
    except Problem as problem:
        raise FileProblem(f"{path}: cannot be read as a text file of prompts: {problem}.") from None


def vocabulary(latent_format: str, tokenizer: str) -> list[str]:
    """The words of a prior: the mini world's own, or what ends a word in CLIP's tokenizer in a folder; none without.

    Raises FileProblem for a folder without a vocabulary.
    """
    if latent_format == MINI_WORLD:
        return sorted(TOKEN_IDS)
    if not tokenizer:
        return []
    path = Path(tokenizer) / "vocab.json"
    data = read_small(path, "CLIP's vocabulary", MOST_VOCABULARY)
    try:
        names = json.loads(data)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, dict):
        raise FileProblem(f"{path}: expected CLIP's vocabulary, words with numbers in JSON, found other text.")
    return [name.removesuffix("</w>") for name in names if _WORD.fullmatch(name)]


def random_prompt(words: Sequence[str], seed: int, number: int) -> str:
    """A few of the words, drawn from (seed, number) alone."""
    generator = sample_generator(seed, 0, number, "prompt")
    length = int(torch.randint(3, LONGEST + 1, (), generator=generator))
    return " ".join(words[int(place)] for place in torch.randint(len(words), (length,), generator=generator))


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """Encoded prompts, the empty one first: context [P, T, D], and SDXL's pooled vectors [P, V] or None."""

    prior: Prior
    context: Tensor
    pooled: Tensor | None

    @classmethod
    def of(cls, prior: Prior, prompts: Sequence[str]) -> EncodedTexts:
        """The empty prompt and these. Raises ValueError for prompts that the prior cannot encode."""
        every = ["", *prompts]
        parts = [prior.encode_text(every[start : start + AT_ONCE]) for start in range(0, len(every), AT_ONCE)]
        # Attention to repeated tokens is attention to the tokens, so prompts of several lengths fit in one tensor.
        tokens = math.lcm(*(part.context.shape[1] for part in parts))
        context = torch.cat([part.context.repeat(1, tokens // part.context.shape[1], 1) for part in parts])
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(prior, context, torch.cat(pooled) if pooled else None)

    def __len__(self) -> int:
        """How many prompts there are, without the empty one."""
        return len(self.context) - 1

    def pair(
        self, sizes: Sequence[ImageSize], places: Tensor, device: torch.device | str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`conditioning` at the empty prompt and at each image's own; one object where all of these are empty."""
        empty = self.conditioning(sizes, torch.zeros_like(places), device)
        return empty, self.conditioning(sizes, places, device) if bool(places.any()) else empty

    def conditioning(self, sizes: Sequence[ImageSize], places: Tensor, device: torch.device | str) -> dict[str, Tensor]:
        """What the prior's UNet takes for images of these sizes, each at the prompt of its place [B] (0: the empty)."""
        text = Text(self.context[places], None if self.pooled is None else self.pooled[places])
        return self.prior.conditioning(sizes, text, device)
