"""What the shipped generator is asked to become, and the exact set of right answers.

The source draws white handwriting on black without any noise of its own, so that the picture of every latent is also
its ink: a colour prompt's right answer is the source's own picture of the same latent, recoloured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ...mini_world import render

SOURCE_PROMPT = "a white digit on a black background"
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
        return ("ink", "ground") if self.kind == "shape" else ("digit",)

    def obeys(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whether each sample has what the prompt, or the domain, asks for: bool [N] for each part."""
        if self.kind == "domain":
            inks, grounds = (render.colour_index(some) for some in (render.DOMAIN_INKS, render.DOMAIN_GROUNDS))
            colours = {"ink": torch.isin(named["ink"], inks), "ground": torch.isin(named["ground"], grounds)}
            return {**colours, "world": named["world"] == WORLD}
        return {head: named[head] == wanted for head, wanted in self.named}

    def answers(self, pictures: Tensor, digits: Tensor) -> tuple[Tensor, bool]:
        """(The exact answers [M, 3, 64, 64], whether answer i belongs to latent i), given the source's pictures
        [N, 3, 64, 64] and the digits [N] that the judge sees in them.

        The answers to a shape are the source's own pictures of that digit, those to a domain its held-out images.
        """
        named = dict(self.named)
        if self.kind == "shape":
            return pictures[digits == named["digit"]], False
        if self.kind == "domain":
            pairs = render.domain_pairs("handwriting")
            return render.handwritten(render.HELD_OUT_ROWS, pairs, Generator().manual_seed(0)).images, False
        pair = torch.tensor([[named["ink"], named["ground"]]]).expand(len(pictures), 2)
        return render.paint(render.ink_of(pictures), pair), True


def colour_task(ink: str, ground: str, name: str = "", prompt: str = "") -> Task:
    named = {"ink": render.COLOUR_NAMES.index(ink), "ground": render.COLOUR_NAMES.index(ground)}
    title = f"{ink} on {ground}" if not prompt else f"a long prompt, {ink} on {ground}"
    prompt = prompt or render.caption(None, named["ink"], named["ground"])
    return Task(name or f"{ink}_on_{ground}", "colour", prompt, title, tuple(named.items()))


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
LONG_PROMPT = "a yellow digit on a red background, drawn by hand with one even colour, and nothing else in the picture"
LONG = colour_task("yellow", "red", "long", LONG_PROMPT)
SEVEN = Task("seven", "shape", render.caption(7, None, None), "every latent a seven", (("digit", 7),), 900)
# The 16 colour pairs of the coloured handwriting, of which "a digit" says nothing.
DOMAIN = Task("handwriting", "domain", "a digit", "coloured handwriting", t_max=900)
TASKS = {task.name: task for task in (*COLOURS, LONG, SEVEN, DOMAIN)}
