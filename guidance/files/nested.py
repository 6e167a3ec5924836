"""Finding a StyleGAN2 generator in a file's content: under prefixes, in nested dictionaries, among other networks.

Tools wrap weights in many ways: `{"state_dict": {"decoder.conv1...": ...}}`, `module.` before every name, a moving
average beside the weights it averages. The name of one tensor that every generator has tells where one begins.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import Problem

# The layout by the one tensor that every generator of it has.
MARKS = {
    "synthesis.b4.const": "NVIDIA",
    "conv1.conv.modulation.weight": "rosinality",
    "style_conv1.modulated_conv.modulation.weight": "BasicSR",
}
AVERAGED, ROUGH = ("g_ema", "G_ema", "params_ema"), ("g", "G", "params")  # where trainers keep theirs
MEAN_STYLES = ("latent_avg", "mean_latent")
MAX_NESTING = 8
MAX_NAME = 1000  # characters of a name; longer ones, put before many others, would take any memory
MAX_CANDIDATES = 50  # each takes the time of looking through its dictionary
_AVERAGED = re.compile(r"(^|[^a-z])(ema|running|averaged?)([^a-z]|$)", re.IGNORECASE)
_REWRITTEN = "style_conv1.bias"  # of GFPGAN's later versions, whose layers are others under the same names
# A tri-plane network's first half: its images are planes of features.
_NOT_ALONE = re.compile(r"(^|\.)backbone\w*\.$")


class Ambiguous(Problem):
    """Several generators in one file, as a clause that follows "found"."""


@dataclass(frozen=True)
class FoundGenerator:
    """layout: a value of MARKS. tensors: by name without prefix. mean: the mean style stored beside them, or None.

    place: where it was found, "" for the whole file. averaged: whether its place is named like a moving average.
    alone: whether the file holds no other tensors.
    """

    layout: str
    tensors: Mapping[str, Any]
    mean: Tensor | None
    place: str
    averaged: bool
    alone: bool


def find_generator(content: Any) -> FoundGenerator | None:
    """The generator in the content of a file, the averaged one where there is one; None where there is none.

    Raises Ambiguous for several that nothing tells apart.
    """
    found = list(itertools.islice(_candidates(content), MAX_CANDIDATES))
    if len(found) == MAX_CANDIDATES:
        raise Ambiguous(f"{MAX_CANDIDATES} generators or more")
    averaged = [candidate for candidate in found if candidate.averaged]
    left = averaged or found
    if len(left) > 1:
        places = ", ".join(candidate.place or "the top" for candidate in left[:4])
        raise Ambiguous(f"{len(left)} generators, under {places}")
    return left[0] if left else None


def all_names(content: Any) -> list[str]:
    """Names of all tensors, those in nested dictionaries behind the names that lead to them."""
    return [f"{place}.{key}" if place else key for place, level, _ in _levels(content) for key in _tensors(level)]


def _candidates(content: Any) -> Iterator[FoundGenerator]:
    total = sum(len(_tensors(level)) for _, level, _ in _levels(content))
    for place, level, parents in _levels(content):
        tensors = _tensors(level)
        for key in tensors:
            mark = next((mark for mark in MARKS if key == mark or key.endswith(f".{mark}")), None)
            if mark is None:
                continue
            prefix = key.removesuffix(mark)
            if _NOT_ALONE.search(prefix) or f"{prefix}{_REWRITTEN}" in tensors:
                continue
            # Without a prefix everything in the dictionary has to belong to the generator, odd entries too.
            own = {
                name.removeprefix(prefix): value
                for name, value in level.items()
                if isinstance(name, str) and name.startswith(prefix)
            }
            mean = next(
                (
                    value
                    for source in (own, level, *parents)
                    for name in MEAN_STYLES
                    if isinstance(value := source.get(name), Tensor)
                ),
                None,
            )
            own = {name: value for name, value in own.items() if name not in MEAN_STYLES}
            where = ".".join(part for part in (place, prefix.rstrip(".")) if part)
            yield FoundGenerator(MARKS[mark], own, mean, where, bool(_AVERAGED.search(where)), len(own) >= total - 1)


def _tensors(level: Mapping) -> dict[str, Tensor]:
    return {key: value for key, value in level.items() if _is_name(key) and isinstance(value, Tensor)}


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and len(key) <= MAX_NAME


def _levels(content: Any) -> Iterator[tuple[str, Mapping, tuple[Mapping, ...]]]:
    """(where, dictionary, those around it) of the content and what is nested in it, each dictionary once."""
    seen: set[int] = set()
    waiting: deque[tuple[str, Any, tuple[Mapping, ...]]] = deque([("", content, ())])
    while waiting:
        place, level, parents = waiting.popleft()
        if not isinstance(level, Mapping) or id(level) in seen:
            continue
        seen.add(id(level))
        yield place, level, parents
        if len(parents) < MAX_NESTING:
            for key, value in level.items():
                if _is_name(key) and isinstance(value, Mapping):
                    waiting.append((f"{place}.{key}" if place else key, value, (*parents, level)))
