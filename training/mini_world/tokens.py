"""Words of the mini world's captions as CLIP token ids, and the compact rows their embeddings are kept in."""

from __future__ import annotations

import torch
from torch import Tensor

from ...guidance.networks.text_encoder import END_TOKEN, START_TOKEN

LENGTH = 77
# Every caption word is one token of CLIP's vocabulary; ids as core ComfyUI's SD1 tokenizer gives them.
TOKEN_IDS = {
    "a": 320,
    "an": 550,
    "background": 5994,
    "black": 1449,
    "blue": 1746,
    "digit": 27472,
    "eight": 7910,
    "five": 3127,
    "four": 2721,
    "green": 1901,
    "nine": 7330,
    "on": 525,
    "one": 637,
    "orange": 4287,
    "purple": 5496,
    "red": 736,
    "seven": 5757,
    "six": 4093,
    "three": 2097,
    "two": 1237,
    "white": 1579,
    "yellow": 4481,
    "zero": 5848,
}
# Row i of the stored embedding belongs to the i-th id; one more row at the end serves every other token.
ROW_IDS = (*TOKEN_IDS.values(), START_TOKEN, END_TOKEN)
ROWS = len(ROW_IDS) + 1
END_ROW = ROW_IDS.index(END_TOKEN)
UNKNOWN_ROW = ROWS - 1


def tokenize(text: str) -> Tensor:
    """CLIP token ids [77] of a caption: start, one id a word, end, and end as padding, as Stable Diffusion 1.x pads.

    A word outside the captions' vocabulary becomes id 0, which the mini world reads as unknown.
    """
    words = text.lower().replace(",", " ").split()[: LENGTH - 2]
    ids = [START_TOKEN, *(TOKEN_IDS.get(word, 0) for word in words)]
    return torch.tensor(ids + [END_TOKEN] * (LENGTH - len(ids)))


def to_rows(tokens: Tensor) -> Tensor:
    """CLIP token ids -> rows of the compact embedding, any shape."""
    table = torch.full((END_TOKEN + 1,), UNKNOWN_ROW, dtype=torch.long)
    table[list(ROW_IDS)] = torch.arange(len(ROW_IDS))
    return table[tokens]


def expand_embedding(
    compact: Tensor, token_ids: list[int] | tuple[int, ...], vocab_size: int = END_TOKEN + 1
) -> Tensor:
    """Stored rows [R + 1, W] -> the full embedding [vocab_size, W]; ids without a row get the last one."""
    full = compact[-1].expand(vocab_size, -1).clone()
    full[list(token_ids)] = compact[:-1]
    return full
