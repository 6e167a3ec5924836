"""The plot puts points where they belong, joins fronts, and refuses nothing to draw."""

from __future__ import annotations

import pytest
from indomain_guidance.training.claims import plot
from PIL import ImageColor


def colour_at(image, x, y):
    return image.getpixel((round(x), round(y)))


def place(panel_width, panel_height, low, high, x, y):
    """Where a value lies, from the axes' own rule: logarithmic to the right, 0..1 upwards."""
    import math

    a, b = math.log10(low) - 0.08, math.log10(high) + 0.08
    return 70 + (math.log10(x) - a) / (b - a) * (panel_width - 90), panel_height - 56 - y * (panel_height - 96)


def test_points_fronts_and_intervals_are_where_they_belong():
    series = plot.Series(
        "ours",
        [(10.0, 0.2), (100.0, 0.8), (90.0, 0.1)],
        [((8.0, 12.0), (0.1, 0.3))] + [((90.0, 100.0), (0.5, 0.9))] * 2,
    )
    image = plot.draw_panels([plot.Panel("Title", "x", "y", [series], front=True)], width=600, height=400)
    black = ImageColor.getrgb(plot.COLOURS[0])
    for point in series.points:
        assert colour_at(image, *place(600, 400, 8, 100, *point)) == black
    # The two points of the front are joined, the dominated one is not.
    ends = [place(600, 400, 8, 100, *point) for point in series.points[:2]]
    middle = [sum(values) / 2 for values in zip(*ends)]
    assert max(colour_at(image, *middle)) < 120
    assert max(colour_at(image, *place(600, 400, 8, 100, 11.5, 0.2))) < 200
    assert colour_at(image, 300, 60) == (255, 255, 255)


def test_panels_stand_side_by_side_with_one_legend():
    series = [plot.Series("a", [(1.0, 0.5)]), plot.Series("b", [(2.0, 0.5)])]
    panels = [plot.Panel(name, "x", "y", series, front=True) for name in "pqr"]
    image = plot.draw_panels(panels, width=400, height=300)
    assert image.width == 800 and image.height > 600
    found = {colour for _, colour in image.getcolors(1 << 20)}
    assert {ImageColor.getrgb(colour) for colour in plot.COLOURS[:2]} <= found
    assert ImageColor.getrgb(plot.COLOURS[2]) not in found


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least one point"):
        plot.draw_panels([plot.Panel("t", "x", "y", [plot.Series("a", [])])])


def test_ticks_are_round_and_never_too_few():
    assert plot.log_ticks(8, 120) == [10, 20, 50, 100]
    assert plot.log_ticks(150, 450) == [150, 200, 300, 400]
    assert len(plot.log_ticks(202, 258)) >= 3


def test_curves_join_their_points_from_left_to_right_on_linear_axes():
    series = plot.Series("ours", [(100.0, 0.5), (0.0, 0.0), (50.0, 1.0)], [((100, 100), (0.4, 0.6))] * 3)
    panel = plot.Panel("Title", "steps", "share", [series], top=1.0, level=0.9)
    image = plot.draw_panels([panel], width=600, height=400)
    black = ImageColor.getrgb(plot.COLOURS[0])

    def place(x, y):
        return 70 + x / 100 * (600 - 90), 400 - 56 - y * (400 - 96)

    for point in series.points:
        assert colour_at(image, *place(*point)) == black
    assert max(colour_at(image, *place(25, 0.5))) < 170 and max(colour_at(image, *place(75, 0.75))) < 170
    assert max(colour_at(image, *place(50, 0.25))) > 200  # 0 and 100 are not joined
    assert min(max(colour_at(image, 70 + dx, place(0, 0.9)[1])) for dx in range(300, 320)) < 150  # the dashed level


def test_linear_ticks_are_round():
    assert plot.linear_ticks(1.0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert plot.linear_ticks(200) == [0, 50, 100, 150, 200] and plot.linear_ticks(37.0)[-1] <= 37.0
