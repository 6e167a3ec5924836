"""Right answers are right: recoloured latent by latent, the source's own shapes, held-out handwriting."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.training.claims.sgf import tasks
from indomain_guidance.training.mini_world import assets, render, tokens
from indomain_guidance.training.mini_world.classifier import judge


def white_on_black(rows: slice = slice(8000, 8060)) -> render.Pictures:
    pair = render.colour_pairs(("white",), ("black",))
    return render.handwritten(rows, pair, torch.Generator().manual_seed(0))


def test_the_colours_are_foreign_to_every_handwriting_and_the_fourth_to_the_source():
    known = {tuple(pair) for name in ("handwriting", "narrow") for pair in render.domain_pairs(name).tolist()}
    pairs = [tuple(dict(task.named)[head] for head in ("ink", "ground")) for task in (*tasks.COLOURS[:3], tasks.LONG)]
    assert len(set(pairs)) == 4 and not set(pairs) & known
    fourth = dict(tasks.COLOURS[3].named)
    assert (fourth["ink"], fourth["ground"]) != tuple(render.domain_pairs("narrow")[0].tolist())


def test_prompts_are_the_priors_words_and_the_long_one_fits():
    for task in (*tasks.TASKS.values(), tasks.Task("source", "colour", tasks.SOURCE_PROMPT, "")):
        words = task.prompt.replace(",", " ").split()
        assert set(words) <= set(tokens.TOKEN_IDS) or task is tasks.LONG
        assert len(words) < tokens.LENGTH - 2
    assert len(tasks.LONG.prompt.replace(",", " ").split()) > 2 * len(tasks.COLOURS[0].prompt.split())
    assert tasks.COLOURS[0].prompt == "a yellow digit on a blue background" and tasks.SEVEN.prompt == "a seven"


@pytest.mark.parametrize("task", [*tasks.COLOURS, tasks.LONG], ids=lambda task: task.name)
def test_a_colour_tasks_answers_are_the_same_ink_in_the_asked_colours(task):
    source = white_on_black()
    found, paired = task.answers(source.images, source.digit)
    wanted = torch.tensor([[dict(task.named)["ink"], dict(task.named)["ground"]]])
    masks = render.handwriting_masks(render.load_handwriting(slice(8000, 8060))[0])
    assert paired and torch.allclose(found, render.paint(masks, wanted.expand(60, 2)), atol=1e-5)
    named = judge(assets.load_classifier(), found)[1]
    right = torch.stack(list(task.obeys(named).values())).all(0)
    assert right.float().mean() > 0.95  # else nobody could reach what the claims ask for
    assert (named["digit"] == source.digit).float().mean() > 0.9
    assert task.kept == ("digit",)


def test_the_source_itself_obeys_no_colour_task():
    source = white_on_black()
    named = judge(assets.load_classifier(), source.images)[1]
    for task in (*tasks.COLOURS, tasks.LONG):
        assert torch.stack(list(task.obeys(named).values())).all(0).float().mean() < 0.05


def test_a_shapes_answers_are_the_sources_own_and_keep_its_colours():
    source = white_on_black(slice(8000, 8300))
    found, paired = tasks.SEVEN.answers(source.images, source.digit)
    assert not paired and torch.equal(found, source.images[source.digit == 7])
    assert tasks.SEVEN.kept == ("ink", "ground")
    assert tasks.SEVEN.obeys({"digit": torch.tensor([7, 1])})["digit"].tolist() == [True, False]


def test_the_domain_is_held_out_handwriting_in_its_colours():
    found, paired = tasks.DOMAIN.answers(torch.zeros(3, 3, 64, 64), torch.zeros(3, dtype=torch.long))
    assert not paired and len(found) == 2000
    named = judge(assets.load_classifier(), found[:300])[1]
    assert torch.stack(list(tasks.DOMAIN.obeys(named).values())).all(0).float().mean() > 0.9
    asked = {"ink": torch.tensor([1, 0]), "ground": torch.tensor([0, 1]), "world": torch.tensor([1, 1])}
    parts = tasks.DOMAIN.obeys(asked)  # white on black is not of the domain, black on white is
    assert parts["ink"].tolist() == parts["ground"].tolist() == [False, True]
