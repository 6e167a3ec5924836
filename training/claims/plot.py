"""Plots of points with intervals, joined along their front or from left to right, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ...guidance.errors import Problem
from ..engine.lettering import default_font
from .statistics import is_on_front

# Distinguishable also without red and green: Okabe and Ito's, then some of Tol's muted ones.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
COLOURS += ("#56b4e9", "#7f7f7f", "#882255", "#999933", "#332288", "#44aa99")
# Corners of a marker of radius 1; none: a circle.
SHAPES = (
    (),
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
    ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
)
OVERSAMPLING = 3  # drawn larger and reduced, which smooths the lines
LEGEND_PX, LINE_PX = 310, 22
GRID, AXIS, INK = "#e4e4e4", "#444444", "#222222"
LEAST = 1e-3  # on a logarithmic axis
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points (x, y) with optional intervals ((x low, x high), (y low, y high))."""

    label: str
    points: Sequence[Point]
    intervals: Sequence[tuple[Point, Point]] = ()


@dataclass(frozen=True)
class Panel:
    """One plot.

    front: x is logarithmic and lower is better, y is a share in 0..1 and higher is better, and the points of a series
    that no other dominates are joined. Else both axes are linear from 0 and a series is joined from left to right. top:
    the end of the y axis where values do not reach beyond it; level: a dashed line.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    front: bool = False
    top: float = 0.0
    level: float | None = None


class _Canvas:
    """Pillow's drawing in plain pixels, at several times the size."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.image = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), "white")
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[Point], colour: str, width: float = 1.0) -> None:
        places = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points]
        self.pen.line(places, fill=colour, width=max(1, round(width * OVERSAMPLING)), joint="curve")

    def text(self, x: float, y: float, words: str, size: int = 13, across: float = 0.0, down: float = 0.0) -> None:
        """across, down: which part of the words, 0 (left, top) to 1 (right, bottom), stands at (x, y)."""
        font = default_font(size * OVERSAMPLING)
        left, top, right, bottom = self.pen.textbbox((0, 0), words, font=font)
        place = (x * OVERSAMPLING - left - across * (right - left), y * OVERSAMPLING - top - down * (bottom - top))
        self.pen.text(place, words, fill=INK, font=font)

    def marker(self, x: float, y: float, style: tuple[str, int], radius: float) -> None:
        x, y, r = x * OVERSAMPLING, y * OVERSAMPLING, radius * OVERSAMPLING
        colour, corners = style[0], SHAPES[style[1]]
        if corners:
            self.pen.polygon([(x + dx * r, y + dy * r) for dx, dy in corners], fill=colour)
        else:
            self.pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)


def draw_panels(panels: Sequence[Panel], columns: int = 2, width: int = 640, height: int = 480) -> Image.Image:
    """The panels in rows, each of width x height pixels, with one legend below. Raises ValueError without a point."""
    panels = [panel for panel in panels if any(series.points for series in panel.series)]
    if not panels:
        raise Problem("expected at least one point to plot, found none; measure some first")
    labels = list(dict.fromkeys(series.label for panel in panels for series in panel.series if series.points))
    styles = {
        label: (COLOURS[i % len(COLOURS)], (i + i // len(COLOURS)) % len(SHAPES)) for i, label in enumerate(labels)
    }
    columns = min(columns, len(panels))
    rows, per_row = -(-len(panels) // columns), max(1, columns * width // LEGEND_PX)
    canvas = _Canvas(columns * width, rows * height + LINE_PX * -(-len(labels) // per_row) + 16)
    for index, panel in enumerate(panels):
        left, top = index % columns * width, index // columns * height
        _draw_panel(canvas, panel, styles, (left + 70, top + 40, left + width - 20, top + height - 56))
    for index, label in enumerate(labels):
        x, y = 24 + index % per_row * LEGEND_PX, rows * height + 12 + index // per_row * LINE_PX
        canvas.marker(x, y, styles[label], 5)
        canvas.text(x + 14, y, label, down=0.5)
    return canvas.image.resize(canvas.size, Image.Resampling.LANCZOS)


def _draw_panel(
    canvas: _Canvas, panel: Panel, styles: dict[str, tuple[str, int]], box: tuple[float, float, float, float]
) -> None:
    """box: of the axes, (left, top, right, bottom)."""
    x0, y0, x1, y1 = box
    x_share, x_ticks = _axis([p[0] for s in panel.series for p in s.points], panel, 0)
    y_share, y_ticks = _axis([p[1] for s in panel.series for p in s.points], panel, 1)

    def place(x: float, y: float) -> Point:
        return x0 + min(max(x_share(x), 0.0), 1.0) * (x1 - x0), y1 - min(max(y_share(y), 0.0), 1.0) * (y1 - y0)

    for tick in y_ticks:
        y = place(x_ticks[0], tick)[1]
        canvas.line([(x0, y), (x1, y)], GRID)
        canvas.text(x0 - 8, y, f"{tick:.0%}" if panel.front else f"{tick:g}", 12, across=1, down=0.5)
    for tick in x_ticks:
        x = place(tick, 0.0)[0]
        canvas.line([(x, y0), (x, y1)], GRID)
        canvas.text(x, y1 + 8, f"{tick:g}", 12, across=0.5)
    if panel.level is not None:
        y = place(x_ticks[0], panel.level)[1]
        for start in range(round(x0), round(x1), 12):
            canvas.line([(start, y), (min(start + 6, x1), y)], AXIS)
    canvas.line([(x0, y0), (x0, y1), (x1, y1)], AXIS, 1.2)
    canvas.text(x0, y0 - 34, f"{panel.title}: {panel.y_label}", 15)
    canvas.text((x0 + x1) / 2, y1 + 28, panel.x_label, 13, across=0.5)
    for series in panel.series:
        style = styles.get(series.label, (COLOURS[0], 0))
        for (x, y), ((x_low, x_high), (y_low, y_high)) in zip(series.points, series.intervals):
            canvas.line([place(x_low, y), place(x_high, y)], style[0], 0.7)
            canvas.line([place(x, y_low), place(x, y_high)], style[0], 0.7)
        on_front = is_on_front(series.points) if panel.front else [True] * len(series.points)
        joined = sorted(point for point, on in zip(series.points, on_front) if on)
        if len(joined) > 1:
            canvas.line([place(*point) for point in joined], style[0], 1.6)
        for point in series.points:
            canvas.marker(*place(*point), style, 4)


def _axis(values: Sequence[float], panel: Panel, axis: int) -> tuple[Callable[[float], float], list[float]]:
    """(where a value lies along an axis, 0..1; its ticks). axis: 0 for x, 1 for y."""
    values = [*values, *(end for series in panel.series for ends in series.intervals for end in ends[axis])]
    if not panel.front:
        highest = max(*values, panel.top * axis, 0.0) or 1.0
        return lambda value: value / highest, linear_ticks(highest)
    if axis == 1:
        return lambda value: value, linear_ticks(1.0)
    low = math.log10(max(min(values), LEAST)) - 0.08
    high = math.log10(max(*values, LEAST)) + 0.08
    return lambda value: (math.log10(max(value, LEAST)) - low) / (high - low), log_ticks(10**low, 10**high)


def linear_ticks(high: float, most: int = 6) -> list[float]:
    """0 and round numbers up to high, above 0; at most so many steps."""
    size = 10.0 ** math.floor(math.log10(high / most))
    step = next(factor * size for factor in (1, 2, 5, 10, 20) if factor * size * most >= high)
    return [round(index * step, 10) for index in range(math.floor(high / step * (1 + 1e-9)) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high, both above 0: 1, 2 and 5 times powers of ten, more where that is few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(i / 10 for i in range(10, 100))):
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks
