"""Measures against cases whose answers are known."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.training.claims.sgf import measures, tasks
from indomain_guidance.training.claims.statistics import interval
from indomain_guidance.training.claims.study import Sampling
from indomain_guidance.training.mini_world import assets, render
from indomain_guidance.training.mini_world.classifier import judge
from indomain_guidance.training.mini_world.distances import share_inside, within_class_diversity

SAMPLES, REPLICATES = 80, 60
SAMPLING = Sampling(SAMPLES, replicates=REPLICATES)
TASK = tasks.COLOURS[0]


@pytest.fixture(scope="module")
def judge_model():
    return assets.load_classifier()


@pytest.fixture(scope="module")
def source():
    """White handwriting on black, in the place of a generator's pictures."""
    pair = render.colour_pairs(("white",), ("black",))
    return render.handwritten(slice(8000, 8300), pair, torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def answers(judge_model, source):
    return measures.answers_of(TASK, judge_model, source, SAMPLES, source)


def examine(judge_model, answers, pictures):
    return measures.examine(TASK, answers, (judge_model, judge_model), pictures, SAMPLING)


def test_spread_is_the_metric_with_the_size_of_the_class_corrected():
    generator = torch.Generator().manual_seed(0)
    features, classes = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    ones = torch.ones(1, 60, dtype=torch.float64)
    found = float(measures.spread(features, classes, ones)[0])
    assert found == pytest.approx(within_class_diversity(features, classes) * (20 / 19) ** 0.5, rel=1e-9)
    # A count of two is the sample twice, a count of zero a sample that is not there.
    counts = torch.randint(0, 3, (1, 60), generator=generator).double()
    repeated = torch.repeat_interleave(torch.arange(60), counts[0].long())
    expected = measures.spread(features[repeated], classes[repeated], torch.ones(1, len(repeated)).double())
    assert float(measures.spread(features, classes, counts)[0]) == pytest.approx(float(expected[0]), rel=1e-9)
    assert float(measures.spread(features, torch.arange(60), ones)[0]) == 0.0  # no class has two


def test_the_exact_answers_are_perfect(judge_model, source, answers):
    exact = TASK.answers(source, torch.zeros(len(source)))[0][:SAMPLES]
    measured, numbers = examine(judge_model, answers, exact)
    assert numbers["diversity"] == pytest.approx(1.0, rel=0.06) and numbers["accuracy"] > 0.95
    assert numbers["recall"] == 1.0 and numbers["precision"] == 1.0 and numbers["correspondence"] > 0.9
    assert numbers["distance"] < 3.0  # a part of the target set itself
    low, high = interval(measured["diversity"].draws)
    assert low <= numbers["diversity"] <= high and high - low < 0.1  # paired with the answers, latent by latent
    assert numbers["ink_right"] > 0.95 and numbers["ground_right"] > 0.95


def test_the_source_has_everything_but_the_colours(judge_model, source, answers):
    _, numbers = examine(judge_model, answers, source[:SAMPLES])
    assert numbers["correspondence"] == 1.0 and numbers["accuracy"] == 0.0
    assert numbers["diversity"] == 0.0  # of what obeys, which is nothing
    assert numbers["distance"] > 50


def test_one_picture_of_each_digit_is_accurate_and_has_no_diversity(judge_model, source, answers):
    exact = TASK.answers(source, torch.zeros(len(source)))[0][:SAMPLES]
    first = {}
    for index, digit in enumerate(answers.source["digit"][:SAMPLES].tolist()):
        first.setdefault(digit, index)
    collapsed = exact[[first[digit] for digit in answers.source["digit"][:SAMPLES].tolist()]]
    _, numbers = examine(judge_model, answers, collapsed)
    assert numbers["accuracy"] > 0.9 and numbers["correspondence"] > 0.9
    assert numbers["diversity"] < 0.05 and numbers["recall"] < 0.5
    # Half the latents collapsed: about half the diversity is left.
    half = torch.where((torch.arange(SAMPLES) % 2 == 0)[:, None, None, None], exact, collapsed)
    assert 0.4 < examine(judge_model, answers, half)[1]["diversity"] < 0.9


def test_recall_is_the_metrics(judge_model, source, answers):
    pictures = TASK.answers(source, torch.zeros(len(source)))[0][SAMPLES : 2 * SAMPLES]
    features = judge(judge_model, pictures)[0]
    found = examine(judge_model, answers, pictures)[0]["recall"]
    assert found.value == pytest.approx(share_inside(answers.features, features))
    assert 0.3 < found.value < 1.0 and float(found.draws.mean()) == pytest.approx(found.value, abs=0.05)


def test_answers_that_belong_to_no_latent_are_resampled_by_themselves(judge_model, source):
    answers = measures.answers_of(tasks.SEVEN, judge_model, source, SAMPLES, source)
    assert not answers.paired
    measured, numbers = measures.examine(tasks.SEVEN, answers, (judge_model, judge_model), source[:SAMPLES], SAMPLING)
    assert numbers["accuracy"] < 0.3 and numbers["correspondence"] == 1.0
    assert measured["recall"].draws.shape == (REPLICATES,)


def test_what_changed_is_counted():
    source = {"a": torch.tensor([1.0, 2.0, 2.0]), "b": torch.zeros(1)}
    adapted = {"a": torch.tensor([1.0, 2.0, 5.0]), "b": torch.zeros(1)}
    found = measures.changes(source, adapted)
    assert found == {"changed": 0.25, "moved": pytest.approx(1.0)}
