"""Scatter plots with Pareto fronts, and curves, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ...guidance.errors import Problem
from .statistics import is_on_front

# Distinguishable also without red and green: Okabe and Ito's, then some of Tol's muted ones.
COLOURS = (
    "#000000",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#882255",
    "#999933",
    "#332288",
    "#44aa99",
)
SHAPES = ("circle", "square", "triangle", "diamond")
OVERSAMPLING = 3  # drawn larger and reduced, which smooths the lines


@dataclass(frozen=True)
class Series:
    """Points (x, y) with optional intervals ((x low, x high), (y low, y high)); its front is joined by a line."""

    label: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[tuple[float, float], tuple[float, float]]] = ()


@dataclass(frozen=True)
class Panel:
    """One plot: x on a logarithmic axis, lower is better; y a share in 0..1, higher is better."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]


@dataclass(frozen=True)
class Curves:
    """One plot of what becomes of a measure: the points of a series are joined from left to right; both axes are linear
    and begin at 0. top: the end of the y axis where values do not reach beyond it; level: a dashed line."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    top: float = 0.0
    level: float | None = None


def draw_panels(
    panels: Sequence[Panel | Curves], columns: int = 2, width_px: int = 640, height_px: int = 480
) -> Image.Image:
    """The panels in rows, with one legend for all of them below. Raises ValueError without a point to draw."""
    panels = [panel for panel in panels if any(series.points for series in panel.series)]
    if not panels:
        raise Problem("expected at least one point to plot, found none; measure some first")
    labels = list(dict.fromkeys(series.label for panel in panels for series in panel.series if series.points))
    style = {
        label: (COLOURS[i % len(COLOURS)], SHAPES[(i + i // len(COLOURS)) % len(SHAPES)])
        for i, label in enumerate(labels)
    }
    columns = min(columns, len(panels))
    rows, line_px = -(-len(panels) // columns), 22
    per_row = max(1, columns * width_px // 310)
    legend_px = line_px * -(-len(labels) // per_row) + 16
    canvas = _Canvas(columns * width_px, rows * height_px + legend_px)
    for index, panel in enumerate(panels):
        draw = _draw_curves if isinstance(panel, Curves) else _draw_panel
        draw(canvas, panel, style, (index % columns) * width_px, index // columns * height_px, width_px, height_px)
    for index, label in enumerate(labels):
        x, y = 24 + index % per_row * 310, rows * height_px + 12 + index // per_row * line_px
        canvas.marker(x, y, *style[label], 5)
        canvas.text(x + 14, y, label, anchor="lm")
    return canvas.finished()


class _Canvas:
    """Pillow's drawing in plain pixels, at several times the size."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.image = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), "white")
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        self.draw.line(
            [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points],
            fill=colour,
            width=max(1, round(width * OVERSAMPLING)),
            joint="curve",
        )

    def text(self, x: float, y: float, words: str, size: int = 13, anchor: str = "la", colour: str = "#222222") -> None:
        try:
            font = ImageFont.load_default(size * OVERSAMPLING)
        except TypeError:  # Pillow before 10.1 has one small bitmap font, without anchors
            font = ImageFont.load_default()
            across = {"l": 0, "m": 0.5, "r": 1}[anchor[0]] * self.draw.textlength(words, font=font)
            self.draw.text((x * OVERSAMPLING - across, y * OVERSAMPLING - 5), words, fill=colour, font=font)
            return
        self.draw.text((x * OVERSAMPLING, y * OVERSAMPLING), words, fill=colour, font=font, anchor=anchor)

    def marker(self, x: float, y: float, colour: str, shape: str, radius: float) -> None:
        x, y, r = x * OVERSAMPLING, y * OVERSAMPLING, radius * OVERSAMPLING
        corners = {
            "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
            "triangle": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
            "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        }
        if shape == "circle":
            self.draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)
        else:
            self.draw.polygon([(x + dx * r, y + dy * r) for dx, dy in corners[shape]], fill=colour)

    def finished(self) -> Image.Image:
        return self.image.resize(self.size, Image.LANCZOS)


def _draw_panel(
    canvas: _Canvas, panel: Panel, style: dict[str, tuple[str, str]], left: int, top: int, width: int, height: int
) -> None:
    x0, x1, y0, y1 = left + 70, left + width - 20, top + 40, top + height - 56
    values = [max(x, 1e-3) for series in panel.series for x, _ in series.points]
    values += [max(x, 1e-3) for series in panel.series for ends, _ in series.intervals for x in ends]
    low, high = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(max(x, 1e-3)) - low) / (high - low)
        return x0 + min(max(share, 0.0), 1.0) * (x1 - x0), y1 - min(max(y, 0.0), 1.0) * (y1 - y0)

    for tick in range(0, 11, 2):
        _, y = place(1.0, tick / 10)
        canvas.line([(x0, y), (x1, y)], "#e4e4e4")
        canvas.text(x0 - 8, y, f"{tick * 10} %", 12, "rm")
    for tick in log_ticks(10**low, 10**high):
        x, _ = place(tick, 0.0)
        canvas.line([(x, y0), (x, y1)], "#e4e4e4")
        canvas.text(x, y1 + 8, f"{tick:g}", 12, "ma")
    canvas.line([(x0, y0), (x0, y1), (x1, y1)], "#444444", 1.2)
    canvas.text(x0, top + 6, f"{panel.title}: {panel.y_label}", 15, "la")
    canvas.text((x0 + x1) / 2, y1 + 28, panel.x_label, 13, "ma")
    for series in panel.series:
        colour, shape = style.get(series.label, (COLOURS[0], SHAPES[0]))
        for (x, y), ((x_low, x_high), (y_low, y_high)) in zip(series.points, series.intervals):
            canvas.line([place(x_low, y), place(x_high, y)], colour, 0.7)
            canvas.line([place(x, y_low), place(x, y_high)], colour, 0.7)
        front = is_on_front([x for x, _ in series.points], [y for _, y in series.points])
        joined = sorted(point for point, on in zip(series.points, front) if on)
        if len(joined) > 1:
            canvas.line([place(*point) for point in joined], colour, 1.6)
        for point in series.points:
            canvas.marker(*place(*point), colour, shape, 4)


def _draw_curves(
    canvas: _Canvas, panel: Curves, style: dict[str, tuple[str, str]], left: int, top: int, width: int, height: int
) -> None:
    x0, x1, y0, y1 = left + 70, left + width - 20, top + 40, top + height - 56
    points = [point for series in panel.series for point in series.points]
    ends = [y for series in panel.series for _, y_ends in series.intervals for y in y_ends]
    right, highest = max(x for x, _ in points) or 1.0, max(panel.top, *(y for _, y in points), *ends) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return x0 + x / right * (x1 - x0), y1 - min(max(y / highest, 0.0), 1.0) * (y1 - y0)

    for tick in linear_ticks(highest):
        _, y = place(0.0, tick)
        canvas.line([(x0, y), (x1, y)], "#e4e4e4")
        canvas.text(x0 - 8, y, f"{tick:g}", 12, "rm")
    for tick in linear_ticks(right):
        x, _ = place(tick, 0.0)
        canvas.line([(x, y0), (x, y1)], "#e4e4e4")
        canvas.text(x, y1 + 8, f"{tick:g}", 12, "ma")
    if panel.level is not None:
        _, y = place(0.0, panel.level)
        for start in range(round(x0), round(x1), 12):
            canvas.line([(start, y), (min(start + 6, x1), y)], "#444444")
    canvas.line([(x0, y0), (x0, y1), (x1, y1)], "#444444", 1.2)
    canvas.text(x0, top + 6, f"{panel.title}: {panel.y_label}", 15, "la")
    canvas.text((x0 + x1) / 2, y1 + 28, panel.x_label, 13, "ma")
    for series in panel.series:
        colour, shape = style.get(series.label, (COLOURS[0], SHAPES[0]))
        for (x, _), (_, (low, high)) in zip(series.points, series.intervals):
            canvas.line([place(x, low), place(x, high)], colour, 0.7)
        joined = sorted(series.points)
        if len(joined) > 1:
            canvas.line([place(*point) for point in joined], colour, 1.6)
        for point in joined:
            canvas.marker(*place(*point), colour, shape, 4)


def linear_ticks(high: float, most: int = 6) -> list[float]:
    """0 and round numbers up to high, above 0; at most so many steps."""
    size = 10.0 ** math.floor(math.log10(high / most))
    step = next(factor * size for factor in (1, 2, 5, 10, 20) if factor * size * most >= high)
    return [round(index * step, 10) for index in range(math.floor(high / step * (1 + 1e-9)) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high, both above 0: 1, 2 and 5 times powers of ten, more where that is few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(i / 10 for i in range(10, 100))):
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks
