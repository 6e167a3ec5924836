"""What the shipped generator is asked to become, and the exact set of right answers.

The source draws white handwriting on black without any noise of its own, so that the picture of every latent is also
its ink: a colour prompt's right answer is the source's own picture of the same latent, recoloured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ...mini_world import render
from ...mini_world.classifier import HEADS

SOURCE_PROMPT = "a white digit on a black background"
SOURCE = {"ink": render.COLOUR_NAMES.index("white"), "ground": render.COLOUR_NAMES.index("black")}
WORLD = 1  # what the judge calls handwritten


@dataclass(frozen=True)
class Task:
    """A prompt and what it names.

    kind: "colour" (recolour every digit), "shape" (every latent becomes one digit) or "domain" (a domain that no prompt
    describes, shown by images alone). named: the judge's heads that the prompt decides, and their classes. t_max: the
    largest timestep asked about; shapes are made at more noise than colours.
    """

    name: str
    kind: str
    prompt: str
    title: str
    named: tuple[tuple[str, int], ...] = ()
    t_max: int = 500

    @property
    def kept(self) -> tuple[str, ...]:
        """The heads that correspondence is about: what the prompt leaves open and the source has."""
        return {"colour": ("digit",), "shape": ("ink", "ground"), "domain": ("digit",)}[self.kind]

    def obeys(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whether each sample has what the prompt, or the domain, asks for: bool [N] for each part."""
        if self.kind == "domain":
            inks, grounds = (render.colour_index(some) for some in (render.DOMAIN_INKS, render.DOMAIN_GROUNDS))
            return {
                "ink": torch.isin(named["ink"], inks),
                "ground": torch.isin(named["ground"], grounds),
                "world": named["world"] == WORLD,
            }
        return {head: named[head] == wanted for head, wanted in self.named}

    def answers(self, pictures: Tensor, digits: Tensor) -> tuple[Tensor, bool]:
        """(The exact answers [M, 3, 64, 64], whether answer i belongs to latent i), given the source's pictures
        [N, 3, 64, 64] and the digits [N] that the judge sees in them.

        The answers to a shape are the source's own pictures of that digit, those to a domain its held-out images.
        """
        if self.kind == "shape":
            (wanted,) = (value for head, value in self.named if head == "digit")
            return pictures[digits == wanted], False
        if self.kind == "domain":
            pairs = render.domain_pairs("handwriting")
            return render.handwritten(render.HELD_OUT_ROWS, pairs, Generator().manual_seed(0)).images, False
        pair = torch.tensor([[dict(self.named)["ink"], dict(self.named)["ground"]]]).expand(len(pictures), 2)
        return render.paint(render.ink_of(pictures), pair), True


def colour_task(ink: str, ground: str, name: str = "", prompt: str = "") -> Task:
    index = {"ink": render.COLOUR_NAMES.index(ink), "ground": render.COLOUR_NAMES.index(ground)}
    return Task(
        name or f"{ink}_on_{ground}",
        "colour",
        prompt or render.caption(None, index["ink"], index["ground"]),
        f"{ink} on {ground}" if not prompt else f"a long prompt, {ink} on {ground}",
        tuple(index.items()),
    )


def shape_task(digit: int) -> Task:
    word = render.DIGITS[digit]
    return Task(word, "shape", render.caption(digit, None, None), f"every latent a {word}", (("digit", digit),), 900)


# No handwriting of the mini world has the first three pairs; the fourth asks for dark ink on a light ground, which the
# source never drew.
COLOURS = (
    colour_task("yellow", "blue"),
    colour_task("orange", "green"),
    colour_task("purple", "black"),
    colour_task("black", "yellow"),
)
INK = COLOURS[2]  # only the ink has to change
DARK = COLOURS[3]
# Longer than any caption the prior was trained on, with words that it does not know.
LONG = colour_task(
    "yellow",
    "red",
    "long",
    "a yellow digit on a red background, drawn by hand with one even colour, and nothing else in the picture",
)
SEVEN = shape_task(7)
# The 16 colour pairs of the coloured handwriting, of which "a digit" says nothing.
DOMAIN = Task("handwriting", "domain", "a digit", "coloured handwriting", t_max=900)
TASKS = {task.name: task for task in (*COLOURS, LONG, SEVEN, DOMAIN)}

assert all(head in HEADS for task in TASKS.values() for head, _ in task.named)
