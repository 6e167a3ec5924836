"""The claims' logic on made-up points whose verdicts are known."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.training.claims.deciding import Verdict, decide
from indomain_guidance.training.claims.keeping import Row
from indomain_guidance.training.claims.sgf import claims
from indomain_guidance.training.claims.sgf.sweep import PLANS, Point
from indomain_guidance.training.claims.sgf.tasks import COLOURS, DARK, DOMAIN, LONG, SEVEN, TASKS

REPLICATES = 100
FIRST, SECOND = COLOURS[0].name, COLOURS[1].name


def row(
    recipe: str,
    step: int,
    accuracy: float,
    diversity: float,
    distance: float = 10.0,
    seed: int = 0,
    task: str = FIRST,
    changed: float = 1.0,
    gflops: float = 1.0,
    spread: float = 0.01,
) -> Row:
    """A point whose replicates spread evenly by +-spread, as a share of its numbers."""
    steps = torch.linspace(-1, 1, REPLICATES, dtype=torch.float64)
    numbers = {"accuracy": accuracy, "diversity": diversity, "distance": distance, "recall": 0.5, "correspondence": 0.9}
    draws = {name: value * (1 + spread * steps) for name, value in numbers.items()}
    numbers |= {"changed": changed, "moved": changed / 10, "gflops": gflops}
    return Row(Point(task, recipe, step, seed), numbers, draws)


def verdict(rows: list[Row], name: str, missing: tuple[Point, ...] = (), coarse: bool = False) -> Verdict:
    points = (*(row.point for row in rows), *missing)
    (claim,) = (claim for claim in claims.claims(rows, points) if claim.name == name)
    return decide(claim, rows, points, coarse)


def test_a_asks_for_the_end_of_training_in_both_numbers():
    rows = [row("sds", 100, 0.95, 0.9), row("sds", 200, 0.99, 0.5)]
    reaches, loses = (verdict(rows, f"colours/a/{part}") for part in ("reaches_the_prompt", "loses_diversity"))
    assert reaches.outcome == "confirmed" and reaches.value == 0.99
    assert loses.outcome == "confirmed" and loses.value == 0.5
    rows = [row("sds", 100, 0.3, 0.9), row("sds", 200, 0.5, 0.95)]
    assert verdict(rows, "colours/a/reaches_the_prompt").outcome == "refuted"
    assert verdict(rows, "colours/a/loses_diversity").outcome == "refuted"
    assert verdict([row("csd", 100, 1, 1)], "colours/a/loses_diversity").outcome == "undecided"


def test_a_is_silent_on_diversity_where_hardly_any_sample_obeys():
    """The diversity of no samples is 0, which is not a loss of diversity."""
    rows = [row("sds", 200, 0.05, 0.0)]
    found = verdict(rows, "colours/a/loses_diversity")
    assert found.outcome == "undecided" and "at the end of 1 of 1 runs" in found.details["reason"]
    assert verdict(rows, "colours/a/reaches_the_prompt").outcome == "refuted"


def test_b_takes_the_best_accurate_stop_and_counts_runs_that_never_get_there_as_zero():
    good = [row("sds_directional", 100, 0.5, 1.0), row("sds_directional", 200, 0.95, 0.9)]
    found = verdict(good, "colours/b/directional")
    assert found.outcome == "confirmed" and found.value == pytest.approx(0.9)
    assert found.details["runs that reach 90 %"] == "1 of 1"
    assert verdict(good, "colours/b/reconstruction").outcome == "undecided"
    never = [row("sds_directional", step, 0.5, 1.0, task=SECOND) for step in (100, 200)]
    found = verdict([*good, *never], "colours/b/directional")
    assert found.outcome == "refuted" and found.value == pytest.approx(0.45)  # the mean over two tasks
    # Another strength may do better; the best counts.
    other = [row("sds_directional_weak", 200, 0.95, 0.95, task=task) for task in (FIRST, SECOND)]
    found = verdict([*good, *never, *other], "colours/b/directional")
    assert found.outcome == "confirmed" and found.details["setting"] == "SDS + directional 0.2"


def test_the_colour_that_keeps_the_ground_is_also_decided_by_itself():
    rows = [row("sds", 200, 0.2, 0.9), row("sds", 200, 0.99, 0.5, task=COLOURS[2].name)]
    assert verdict(rows, "colours/a/reaches_the_prompt").value == pytest.approx(0.595)
    alone = verdict(rows, "ink_alone/a/reaches_the_prompt")
    assert alone.outcome == "confirmed" and alone.value == 0.99
    assert verdict(rows[:1], "ink_alone/a/reaches_the_prompt").outcome == "undecided"


def test_a_setting_asked_only_the_easy_task_is_not_the_best():
    both = [row("sds_directional", 200, 0.95, 0.7, task=task) for task in (FIRST, SECOND)]
    easy = [row("sds_directional_noisy", 200, 0.95, 0.99)]
    assert verdict([*both, *easy], "colours/b/directional").value == pytest.approx(0.7)
    assert verdict(easy, "colours/b/directional").value == pytest.approx(0.99)
    rows = [*sgf(10.0), *sgf(10.0, task=SECOND)]
    rows += [row("csd", 200, 0.95, 0.9, 9.0, task=task) for task in (FIRST, SECOND)]
    found = verdict([*rows, row("bridge", 200, 0.95, 0.9, 1.0)], "colours/e/equal_compute")
    assert found.value == pytest.approx(0.9) and found.details["setting"] == "CSD"


def test_the_interval_holds_the_training_seeds():
    rows = [row("sds_directional", 200, 0.95, diversity, seed=seed) for seed, diversity in enumerate((0.7, 0.9, 0.95))]
    found = verdict(rows, "colours/b/directional")
    assert found.value == pytest.approx(0.85) and found.low < 0.8 and found.high > 0.9
    assert found.outcome == "undecided" and "3 seeds" in found.details["runs"]
    alone = verdict(rows[2:], "colours/b/directional")
    assert alone.outcome == "confirmed" and alone.high - alone.low < 0.03


def test_tasks_weigh_alike_whatever_their_number_of_seeds():
    rows = [row("sds_directional", 200, 0.95, 0.6, seed=seed) for seed in range(3)]
    rows.append(row("sds_directional", 200, 0.95, 1.0, task=SECOND))
    assert verdict(rows, "colours/b/directional").value == pytest.approx(0.8)


def test_c_compares_what_changed_at_the_first_accurate_stop():
    every = [row("sds", 100, 0.95, 0.9, changed=0.8), row("sds", 200, 0.99, 0.5, changed=0.9)]
    some = [row("sds_layers_3", 100, 0.5, 1, changed=0.2), row("sds_layers_3", 200, 0.95, 1, changed=0.4)]
    found = verdict([*every, *some], "colours/c/parameters_changed")
    assert found.outcome == "confirmed" and found.value == pytest.approx(0.5) and found.claim.unit == "ratio"
    assert verdict([*every, *some], "colours/c/distance_moved").value == pytest.approx(0.5)
    # The constant that no layer holds is no selection.
    hardly = [row("sds_layers_3", step, 0.95, 1, changed=0.79) for step in (100, 200)]
    assert verdict([*every, *hardly], "colours/c/parameters_changed").outcome == "refuted"
    never = [row("sds_layers_3", step, 0.5, 1, changed=0.2) for step in (100, 200)]
    assert verdict([*every, *never], "colours/c/parameters_changed").outcome == "refuted"
    poor = [row("sds", step, 0.5, 0.9) for step in (100, 200)]
    found = verdict([*poor, *some], "colours/c/parameters_changed")
    assert found.outcome == "undecided" and "no run of SDS" in found.details["reason"]


def test_d_compares_the_share_in_the_domain_at_the_end():
    rows = [row("sds", 200, 0.1, 0.5, task=DOMAIN.name), row("domain", 200, 0.7, 0.5, task=DOMAIN.name)]
    found = verdict(rows, "domain/d/domain_model")
    assert found.outcome == "confirmed" and found.value == pytest.approx(0.6)
    assert verdict(rows, "domain/d/fine-tuned_model").outcome == "undecided"
    few = [rows[0], row("domain", 200, 0.13, 0.5, task=DOMAIN.name)]
    assert verdict(few, "domain/d/domain_model").outcome == "refuted"


def sgf(distance: float, gflops: float = 2.0, task: str = FIRST) -> list[Row]:
    names = ("sds", "sds_directional", "sds_reconstruction")
    return [row(name, 200, 0.95, 0.9, distance + index, gflops=gflops, task=task) for index, name in enumerate(names)]


def test_e_compares_distances_within_the_operations_of_sgfs_full_run():
    ours = [row("csd", 100, 0.95, 0.9, 8.0, gflops=3.0), row("csd", 200, 0.95, 0.9, 2.0, gflops=3.0)]
    found = verdict([*sgf(10.0), *ours], "colours/e/equal_compute")
    # 200 steps of 2 GFLOPs are SGF's; of ours only the first 100 steps of 3 fit into that.
    assert found.outcome == "confirmed" and found.value == pytest.approx(0.8)
    assert (found.details["setting"], found.details["settings compared"]) == ("CSD", 1)
    assert verdict([*sgf(5.0), *ours], "colours/e/equal_compute").outcome == "refuted"
    poor = [row("csd", step, 0.5, 0.9, 2.0) for step in (100, 200)]
    found = verdict([*sgf(5.0), *poor], "colours/e/equal_compute")
    assert found.outcome == "refuted" and found.words == "only SGF reaches it in every run" and found.value is None
    none = [row(name, 200, 0.5, 0.9) for name in ("sds", "sds_directional", "sds_reconstruction")]
    found = verdict([*none, *poor], "colours/e/equal_compute")
    assert found.outcome == "undecided" and "neither side" in found.details["reason"]
    found = verdict([*none, *ours[:1], row("csd", 200, 0.99, 0.9)], "colours/e/equal_compute")
    assert found.words == "only the method here reaches it in every run"


def test_missing_points_and_coarse_sweeps_make_it_so_far():
    rows = [row("sds", 100, 0.95, 0.9), row("sds", 200, 0.99, 0.5)]
    later = (Point(SECOND, "sds", 100), Point(SECOND, "sds", 200))
    found = verdict(rows, "colours/a/loses_diversity", missing=later)
    assert found.outcome == "confirmed so far" and (found.measured, found.planned) == (2, 4)
    assert verdict(rows, "colours/a/loses_diversity", coarse=True).outcome == "confirmed so far"
    # Whether the task can decide anything is a point too.
    for frame in ("exact", "prior"):
        found = verdict(rows, "colours/a/loses_diversity", missing=(Point(FIRST, frame),))
        assert found.outcome == "confirmed so far"
    # A run whose last stop is missing is not yet at its end.
    half = verdict(rows[:1], "colours/a/loses_diversity", missing=(rows[1].point,))
    assert half.outcome == "undecided"


def test_tasks_whose_exact_answers_the_judge_refuses_are_left_out():
    exact = Row(Point(FIRST, "exact"), {"accuracy": 0.6}, {})
    rows = [row("sds", 200, 0.99, 0.5), row("sds", 200, 0.2, 0.5, task=SECOND)]
    found = verdict([*rows, exact], "colours/a/reaches_the_prompt")
    assert found.value == pytest.approx(0.2) and "60%" in found.details[f"left out: {FIRST}"]


def test_a_prompt_that_the_prior_does_not_know_decides_nothing():
    rows = [row("sds", 200, 0.99, 0.5, task=LONG.name)]
    assert verdict(rows, "long_prompt/a/loses_diversity").outcome == "confirmed"
    prior = Row(Point(LONG.name, "prior"), {"accuracy": 0.4}, {})
    found = verdict([*rows, prior], "long_prompt/a/loses_diversity")
    assert found.outcome == "undecided" and "prior's own pictures 40% obey" in found.details["reason"]
    # "a digit" says nothing of the domain, so the prior's pictures of it are no test of the prior.
    rows = [row("sds", 200, 0.1, 0.5, task=DOMAIN.name), row("domain", 200, 0.7, 0.5, task=DOMAIN.name)]
    prior = Row(Point(DOMAIN.name, "prior"), {"accuracy": 0.1}, {})
    assert verdict([*rows, prior], "domain/d/domain_model").outcome == "confirmed"


def test_shape_and_colours_are_decided_apart():
    rows = [row("sds", 200, 0.99, 0.5), row("sds", 200, 0.99, 0.95, task=SEVEN.name)]
    assert verdict(rows, "colours/a/loses_diversity").outcome == "confirmed"
    assert verdict(rows, "shape/a/loses_diversity").outcome == "refuted"


def test_every_claim_is_there_without_points():
    found = claims.claims([], PLANS["full"].points)
    assert {decide(claim, [], PLANS["full"].points).outcome for claim in found} == {"undecided"}
    assert {claim.letter for claim in found} == set("abcde") and len({claim.name for claim in found}) == 32 == len(
        found
    )
    named = {task for tasks in claims.GROUPS.values() for task in tasks}
    assert named == set(TASKS) - {DARK.name}
