"""The loss curve: what it shows, of how many steps, and that it ends no run."""

from __future__ import annotations

import pytest
from indomain_guidance.training.engine.events import Saved, Step, Validated
from indomain_guidance.training.engine.loss_curve import LossCurve, draw_losses, thinned
from PIL import Image


def at(number, loss, steps=100):
    return Step(number, steps, loss, 1e-4, 1.0, 0.1)


def colours(image):
    return {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}


def test_the_loss_curve_is_drawn_and_forgets_what_a_killed_run_repeats(tmp_path):
    history = [at(number, 1.0) for number in range(1, 31)] + [Validated(20, 0.9, {}), Validated(30, 0.8, {})]
    curve = LossCurve(tmp_path / "loss.png", history, start=20)
    assert max(curve.train) == 20 and curve.held_out == {20: 0.9}
    curve(at(21, float("nan")))
    curve(at(22, 0.7))
    assert 21 not in curve.train and not (tmp_path / "loss.png").exists()
    curve(Saved(22, "c"))
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (960, 480)
        assert {(31, 95, 191), (224, 124, 24)} <= colours(image)
    LossCurve(tmp_path / "empty.png").draw()
    assert not (tmp_path / "empty.png").exists()


def test_a_curve_that_cannot_be_written_ends_no_run(tmp_path):
    """As on Windows while a viewer has the picture open: it is drawn again with the next event."""
    curve = LossCurve(tmp_path / "loss.png", [at(1, 1.0), at(2, 0.9)], start=2)
    (tmp_path / "loss.png").mkdir()
    curve(Saved(2, "c"))
    (tmp_path / "loss.png").rmdir()
    assert not list(tmp_path.iterdir())
    curve(Saved(2, "c"))
    assert (tmp_path / "loss.png").is_file()


def blue_heights(image):
    """Mean row of the means' pixels in each column that has any."""
    pixels = image.load()
    found = {}
    for x in range(image.width):
        rows = [y for y in range(image.height) if pixels[x, y] == (31, 95, 191)]
        if rows:
            found[x] = sum(rows) / len(rows)
    return found


def test_the_curve_falls_as_the_loss_falls():
    heights = blue_heights(draw_losses({step: 2.0 - step / 400 for step in range(1, 401)}, {}))
    columns = sorted(heights)
    assert columns[-1] - columns[0] > 800
    assert all(heights[a] <= heights[b] + 1 for a, b in zip(columns, columns[1:]))  # rows count downwards
    assert heights[columns[-1]] - heights[columns[0]] > 300


@pytest.mark.parametrize(
    "train, held_out",
    [
        ({5: 0.25}, {}),
        ({}, {0: 0.3}),
        ({1: 0.5, 2: 0.5}, {0: 0.5}),
        ({1: 0.0, 2: 0.0}, {}),
        ({1: -1.0, 2: 1e6}, {3: 1e-9}),
        ({}, {0: 1.0}),
    ],
)
def test_degenerate_curves_can_be_drawn(train, held_out):
    assert draw_losses(train, held_out).size == draw_losses(train, held_out, "mismatch").size == (960, 480)


def test_other_numbers_than_losses_have_a_scale_of_their_own(tmp_path):
    """A share of 0 to 1 does not flatten losses of hundredths."""
    losses, shares = {step: 0.02 - step / 40_000 for step in range(1, 401)}, {0: 1.0, 200: 0.5, 400: 0.25}
    beside, alone = (blue_heights(draw_losses(losses, dots, "mismatch")) for dots in (shares, {}))
    assert max(beside.values()) - min(beside.values()) == max(alone.values()) - min(alone.values()) > 300
    curve = LossCurve(tmp_path / "loss.png", [Validated(1, 0.5, {}, "mismatch")], start=1)
    assert curve.what == "mismatch"
    curve(Validated(2, 0.4, {}))
    assert curve.what == "loss"


def test_thinning_keeps_the_last_step_and_the_mean():
    values = {step: float(step) for step in range(1, 5001)}
    fewer = thinned(values, 1000)
    assert len(fewer) == 1000 and max(fewer) == 5000 and fewer[5000] == 4998.0
    assert thinned({3: 1.0}) == {3: 1.0} and thinned({}) == {}
