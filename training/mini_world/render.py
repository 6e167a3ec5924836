"""The two worlds of the miniature: rendered digits with captions, handwritten ones without, in colour at 64 px.

An image is a mask (how much ink, 0..1) painted with an ink and a ground colour, so the exact picture of any prompt in
the other world's shapes exists: that is what distances are measured against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ...guidance.errors import Problem

DATA = Path(__file__).resolve().parent / "data"
SIDE_PX = 64
HEIGHT_PX, SHIFT_PX, TURN_DEGREES = (36.0, 50.0), 5.0, 6.0  # of a placed glyph: its longer side, the largest changes
GLYPH_PX = 60  # longer side of a glyph in its 64 px cell in data/glyphs.npz
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (214, 32, 32),
    "green": (24, 140, 48),
    "blue": (36, 64, 220),
    "yellow": (250, 220, 40),
    "purple": (140, 40, 170),
    "orange": (250, 135, 20),
}
COLOUR_NAMES = tuple(COLOURS)
# The handwriting domain's own colours: four inks, four grounds, 16 of the 56 pairs.
DOMAIN_INKS = ("black", "blue", "red", "green")
DOMAIN_GROUNDS = ("white", "yellow", "orange", "purple")
TRAIN_ROWS = slice(0, 8000)
HELD_OUT_ROWS = slice(8000, 10000)
HELD_OUT_FONT_EVERY = 6  # every sixth family is never trained on


def step_generator(seed: int, step: int) -> Generator:
    """The randomness of one step, a function of (seed, step) alone: a resumed run draws what the first would have."""
    return Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF)


def palette() -> Tensor:
    """The colours as [8, 3] in -1..1."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 127.5 - 1.0


def colour_index(names: tuple[str, ...]) -> Tensor:
    """Positions of colour names in the palette, long [len(names)]."""
    return torch.tensor([COLOUR_NAMES.index(name) for name in names])


def colour_pairs(inks: tuple[str, ...] = COLOUR_NAMES, grounds: tuple[str, ...] = COLOUR_NAMES) -> Tensor:
    """All (ink, ground) index pairs with ink unlike ground, long [pairs, 2]."""
    return torch.tensor([(i, g) for i in colour_index(inks).tolist() for g in colour_index(grounds).tolist() if i != g])


def domain_pairs(domain: str) -> Tensor:
    """Colour pairs of a domain: ``handwriting`` 16, ``narrow`` the one pair white on black. Long [pairs, 2]."""
    if domain == "handwriting":
        return colour_pairs(DOMAIN_INKS, DOMAIN_GROUNDS)
    if domain == "narrow":
        return colour_pairs(("white",), ("black",))
    raise Problem(f"expected the domain 'handwriting' or 'narrow', found {domain!r}")


def foreign_pairs() -> Tensor:
    """Colour pairs the handwriting domain never had in any part: its inks as grounds and the reverse. Long [16, 2]."""
    return colour_pairs(DOMAIN_GROUNDS, DOMAIN_INKS)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(digit: int | None, ink: int | None, ground: int | None) -> str:
    """The prompt of a picture; None leaves a part unsaid. ``a red seven on a yellow background``."""
    words = []
    if ink is not None:
        words.append(COLOUR_NAMES[ink])
    words.append(DIGITS[digit] if digit is not None else "digit")
    text = f"{article(words[0])} {' '.join(words)}"
    if ground is not None:
        text += f" on {article(COLOUR_NAMES[ground])} {COLOUR_NAMES[ground]} background"
    return text


@lru_cache(maxsize=2)
def load_glyphs(held_out: bool = False) -> Tensor:
    """Rasterised digits of the trained or the held-out font families, uint8 [fonts, 10, 64, 64]."""
    with np.load(DATA / "glyphs.npz") as data:
        masks = data["masks"]
    chosen = [i for i in range(len(masks)) if (i % HELD_OUT_FONT_EVERY == HELD_OUT_FONT_EVERY - 1) == held_out]
    return torch.from_numpy(masks[chosen])


@lru_cache(maxsize=1)
def _handwriting() -> tuple[Tensor, Tensor]:
    with np.load(DATA / "handwritten_digits.npz") as data:
        return torch.from_numpy(data["images"]), torch.from_numpy(data["labels"].astype(np.int64))


def load_handwriting(rows: slice = TRAIN_ROWS) -> tuple[Tensor, Tensor]:
    """Handwritten masks uint8 [N, 28, 28] (255 = ink) and their digits, long [N] (for evaluation only)."""
    images, labels = _handwriting()
    return images[rows], labels[rows]


def handwriting_masks(images: Tensor) -> Tensor:
    """Enlarge uint8 [B, 28, 28] strokes to masks [B, 64, 64] in 0..1 (antialiased bicubic)."""
    big = F.interpolate(images[:, None].float() / 255.0, (SIDE_PX, SIDE_PX), mode="bicubic", antialias=True)
    return big[:, 0].clamp(0.0, 1.0)


def place(masks: Tensor, generator: Generator | None) -> Tensor:
    """Random size, place and turn of glyph masks: uint8 [B, 64, 64] -> [B, 64, 64] in 0..1."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(masks), generator=generator)

    zoom = GLYPH_PX / uniform(*HEIGHT_PX)
    angle = uniform(-TURN_DEGREES, TURN_DEGREES) * (math.pi / 180.0)
    shift_x, shift_y = (uniform(-1, 1) * zoom * SHIFT_PX * 2 / SIDE_PX for _ in range(2))
    matrix = torch.stack(
        [
            torch.stack([zoom * angle.cos(), -zoom * angle.sin(), shift_x], 1),
            torch.stack([zoom * angle.sin(), zoom * angle.cos(), shift_y], 1),
        ],
        1,
    )
    grid = F.affine_grid(matrix, [len(masks), 1, SIDE_PX, SIDE_PX], align_corners=False)
    return F.grid_sample(masks[:, None].float() / 255.0, grid, align_corners=False)[:, 0].clamp(0.0, 1.0)


def paint(masks: Tensor, pairs: Tensor) -> Tensor:
    """Masks [B, 64, 64] in 0..1 and colour pairs [B, 2] -> pictures [B, 3, 64, 64] in -1..1."""
    ink, ground = (palette()[pairs[:, i]][:, :, None, None] for i in (0, 1))
    return ground + (ink - ground) * masks[:, None]


@dataclass
class Pictures:
    """A labelled batch: images [B, 3, 64, 64] in -1..1; digit, ink, ground, world (1: handwritten), long [B]."""

    images: Tensor
    digit: Tensor
    ink: Tensor
    ground: Tensor
    world: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def labels(self) -> dict[str, Tensor]:
        return {"digit": self.digit, "ink": self.ink, "ground": self.ground, "world": self.world}


def _choose(options: Tensor, count: int, generator: Generator | None) -> Tensor:
    return options[torch.randint(len(options), (count,), generator=generator)]


def rendered(
    count: int,
    generator: Generator | None,
    *,
    held_out: bool = False,
    digits: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Pictures:
    """Rendered digits in random fonts, sizes, places; digits [B] and colour pairs [B, 2] random unless given."""
    glyphs = load_glyphs(held_out)
    if digits is None:
        digits = torch.randint(10, (count,), generator=generator)
    if pairs is None:
        pairs = _choose(colour_pairs(), count, generator)
    font = torch.randint(len(glyphs), (count,), generator=generator)
    images = paint(place(glyphs[font, digits], generator), pairs)
    return Pictures(images, digits, pairs[:, 0], pairs[:, 1], torch.zeros(count, dtype=torch.long))


def handwritten(rows: slice, pairs: Tensor, generator: Generator | None, *, count: int | None = None) -> Pictures:
    """Handwriting of the rows in colours drawn from ``pairs`` [options, 2]; ``count`` random rows, or all in order."""
    images, labels = load_handwriting(rows)
    chosen = torch.arange(len(images)) if count is None else torch.randint(len(images), (count,), generator=generator)
    colours = _choose(pairs, len(chosen), generator)
    pictures = paint(handwriting_masks(images[chosen]), colours)
    return Pictures(pictures, labels[chosen], colours[:, 0], colours[:, 1], torch.ones(len(chosen), dtype=torch.long))


def ink_of(pictures: Tensor) -> Tensor:
    """The masks of white-on-black pictures [B, 3, H, W] in -1..1: [B, H, W] in 0..1, as `paint` takes them."""
    return (pictures.clamp(-1, 1).mean(1) + 1) / 2


def to_uint8(images: Tensor) -> np.ndarray:
    """Pictures [B, 3, H, W] in -1..1 -> uint8 [B, H, W, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
