"""The report's charts as inline SVG: plain numbers in, markup out. Colours and line styles are classes of style.css.
Every chart is an image with a title that says what it shows.

A chart is drawn about as wide as a phone shows it, so that its 12-pixel letters stay legible there.
"""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.runs.curve_file import thinned

SEED_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")
"""One per seed, told apart by colour-blind readers too (Okabe and Ito)."""

_WIDTH, _LEFT, _RIGHT = 400.0, 44.0, 16.0
_LETTER = 6.6
"""About how wide a letter is, at 12 px."""


def strip(
    values: Mapping[int, float],
    colours: Mapping[int, str],
    *,
    label: str,
    median: float | None = None,
    published: float | None = None,
    authors: float | None = None,
    margin: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Markup:
    """Each seed's figure on one axis, with what it is compared with above and the interval that decides below.

    values: seed -> percent; colours: of the seeds; margin: how far from the published figure a row counts as equal.
    """
    marks = [(name, value) for name, value in (("published", published), ("authors'", authors)) if value is not None]
    known = [*values.values(), *(value for _, value in marks), *(interval or ())]
    known += [] if published is None else [published - margin, published + margin]
    axis = ticks(min(known), max(known), 4)
    y = 62.0

    def place(value: float) -> float:
        return _scaled(value, axis, 14.0, _WIDTH - 14.0)

    def words(value: float, at: float, text: str) -> str:
        """The text centred at a value, but inside the chart."""
        half = len(text) * _LETTER / 2
        return _label(min(max(place(value), half), _WIDTH - half), at, text, "middle")

    parts = []
    if published is not None and margin:
        x0, x1 = place(published - margin), place(published + margin)
        parts.append(f'<rect class="band" x="{x0:.1f}" y="34" width="{x1 - x0:.1f}" height="{y - 34:.1f}"/>')
    parts.append(_line("axis", 14.0, y, _WIDTH - 14.0, y))
    for tick in axis:
        parts += [_line("axis", place(tick), y, place(tick), y + 5), _label(place(tick), y + 18, f"{tick:g}", "middle")]
    for (name, value), top in zip(marks, (12.0, 27.0), strict=False):
        css_class = "mark" if name == "published" else "mark faint"
        parts += [words(value, top, f"{name} {value:.2f}"), _line(css_class, place(value), top + 4, place(value), y)]
    if median is not None and len(values) > 1:
        parts.append(_line("median", place(median), y - 20, place(median), y))
        parts.append(f'<path class="median" d="M{place(median):.1f} {y - 20:.1f}m-4 -6h8l-4 6z"/>')
    for seed, up in _stacked({seed: place(value) for seed, value in values.items()}).items():
        parts.append(
            f'<circle cx="{place(values[seed]):.1f}" cy="{y - up:.1f}" r="5" fill="{colours[seed]}">'
            f"<title>seed {seed}: {values[seed]:.2f}</title></circle>"
        )
    height = y + 24
    if interval:
        (x0, x1), at = map(place, interval), y + 30
        parts += [_line("interval", x0, at, x1, at), *(_line("interval", x, at - 4, x, at + 4) for x in (x0, x1))]
        parts.append(words(sum(interval) / 2, at + 17, f"expected {interval[0]:.2f} to {interval[1]:.2f}"))
        height += 30
    return _chart("strip", parts, height, label)


def _stacked(places: Mapping[int, float]) -> dict[int, float]:
    """Seed -> height above the axis: dots that would cover each other are stacked."""
    heights: dict[int, float] = {}
    for seed, x in sorted(places.items(), key=lambda item: item[1]):
        up = 0.0
        while any(abs(x - places[other]) < 8 and abs(up - height) < 8 for other, height in heights.items()):
            up += 8
        heights[seed] = up
    return heights


def small_strip(differences: Sequence[float], median: float, *, reach: float, margin: float, label: str) -> Markup:
    """The seeds' differences from the published figure, for a cell of a table; all cells have the axis -reach to
    reach, and what lies outside is drawn at its end."""

    def place(value: float) -> float:
        return 60 + 54 * min(max(value / reach, -1.0), 1.0)

    left, right = place(-margin), place(margin)
    parts = [f'<rect class="band" x="{left:.1f}" y="2" width="{right - left:.1f}" height="16"/>']
    parts += [_line("grid", 6, 10, 114, 10), _line("axis", 60, 1, 60, 19)]
    parts += [f'<circle class="seed" cx="{place(value):.1f}" cy="10" r="3"/>' for value in differences]
    parts.append(_line("median", place(median), 4, place(median), 16))
    return _svg("small", parts, "0 0 120 20", label)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A figure at a speed."""

    speed: float
    value: float
    low: float | None = None
    high: float | None = None
    """The lowest and the highest seed; None: it is one value."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A row in a chart of accuracy against speed; the published and ours, where there are both, joined by a line."""

    name: str
    published: Mark | None = None
    """Hollow."""
    ours: Mark | None = None
    """Filled."""


def scatter(points: Sequence[Point], *, x_label: str, label: str) -> Markup:
    """Figure against speed; every row's marks hold its number, counted from 1, for a list of names beside the chart."""
    height, top, bottom = 330.0, 14.0, 44.0
    marks = [mark for point in points for mark in (point.published, point.ours) if mark]
    values = [y for mark in marks for y in (mark.value, mark.low, mark.high) if y is not None]
    x_axis = ticks(0.0, max(mark.speed for mark in marks) * 1.04, 5)
    y_axis = ticks(min(values), max(values), 5)

    def at(x: float, y: float) -> tuple[float, float]:
        return _scaled(x, x_axis, _LEFT, _WIDTH - _RIGHT), _scaled(y, y_axis, height - bottom, top)

    parts = _axes(x_axis, y_axis, at, "{:g}".format)
    parts.append(_label((_LEFT + _WIDTH - _RIGHT) / 2, height - 6, x_label, "middle"))
    for number, point in enumerate(points, start=1):
        if (ours := point.ours) and ours.low is not None and ours.high is not None:
            parts.append(_line("interval", *at(ours.speed, ours.low), *at(ours.speed, ours.high)))
        if point.published and point.ours:
            ends = (at(mark.speed, mark.value) for mark in (point.published, point.ours))
            parts.append(_line("join", *next(ends), *next(ends)))
        for css_class, drawn in (("hollow", point.published), ("ours", point.ours)):
            if drawn:
                x, y = at(drawn.speed, drawn.value)
                parts.append(f'<circle class="{css_class}" cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
                parts.append(_label(x, y + 4, str(number), "middle", f"number {css_class}"))
    return _chart("scatter", parts, height, label)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(step, value)."""
    colour: str = ""
    """Empty: the published curve's style."""


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    reference: float | None = None,
    logarithmic: bool = False,
    warnings: Sequence[tuple[float, float]] = (),
) -> Markup:
    """Lines over training steps; empty without any.

    reference: a dotted line at the published figure; logarithmic: for losses, whose beginning would flatten the rest;
    warnings: (step, value) of early warnings, ringed.
    """
    if not series:
        return Markup()
    height, top, bottom = 240.0, 12.0, 40.0
    drawn = [(line, thinned(line.points)) for line in series]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points] + ([] if reference is None else [reference])
    x_axis = ticks(min(0, *xs), max(xs), 4)
    logarithmic = logarithmic and min(ys) > 0
    y_axis = log_ticks(min(ys), max(ys)) if logarithmic else ticks(min(ys), max(ys), 5)

    if logarithmic:
        y_place = functools.partial(_scaled, axis=[math.log(tick) for tick in y_axis], start=height - bottom, end=top)
    else:
        y_place = functools.partial(_scaled, axis=y_axis, start=height - bottom, end=top)

    def at(x: float, y: float) -> tuple[float, float]:
        return _scaled(x, x_axis, _LEFT, _WIDTH - _RIGHT), y_place(math.log(y) if logarithmic else y)

    parts = _axes(x_axis, y_axis, at, _thousands)
    parts.append(_label((_LEFT + _WIDTH - _RIGHT) / 2, height - 4, "step", "middle"))
    if reference is not None:
        (x0, y), (x1, _) = at(x_axis[0], reference), at(x_axis[-1], reference)
        parts.append(_line("mark", x0, y, x1, y))
        below = y < top + 14
        parts.append(_label(x0 + 4, y + 14 if below else y - 5, f"published {reference:.2f}", "start"))
    for line, points in sorted(drawn, key=lambda item: bool(item[0].colour)):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        stroke = f'stroke="{line.colour}"' if line.colour else 'class="published"'
        parts.append(f'<polyline points="{path}" {stroke}><title>{html.escape(line.name)}</title></polyline>')
        if line.colour:
            x, y = at(*points[-1])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{line.colour}"/>')
    for warning in warnings:
        x, y = at(min(max(warning[0], x_axis[0]), x_axis[-1]), min(max(warning[1], y_axis[0]), y_axis[-1]))
        parts.append(f'<circle class="warning" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>early warning</title></circle>')
    return _chart("lines", parts, height, label)


def bar(value: float, reach: float, *, label: str) -> Markup:
    """A bar from the middle of a table's cell, -reach to reach."""
    width = 50 * min(abs(value) / reach, 1.0) if reach else 0.0
    x, css_class = (50.0, "more") if value >= 0 else (50.0 - width, "less")
    parts = [
        f'<rect class="{css_class}" x="{x:.1f}" y="1" width="{width:.1f}" height="8"/>',
        _line("axis", 50, 0, 50, 10),
    ]
    return _svg("bar", parts, "0 0 100 10", label)


def span_bar(low: float, high: float, at: float, *, label: str) -> Markup:
    """A bar from low to high of 0 to 100, for a table's cell, with a mark at `at`."""
    parts = [
        '<rect class="track" x="0" y="4" width="100" height="2"/>',
        f'<rect class="more" x="{low:.1f}" y="2" width="{max(high - low, 0.6):.1f}" height="6"/>',
        f'<rect class="at" x="{at - 0.4:.1f}" y="0" width="0.8" height="10"/>',
    ]
    return _svg("bar", parts, "0 0 100 10", label)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that enclose low to high, about `count` steps of 1, 2 or 5 times a power of ten."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose low to high; both above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    begin = max(i for i, step in enumerate(steps) if step <= low * (1 + 1e-9))
    end = min(i for i, step in enumerate(steps) if step >= high * (1 - 1e-9))
    return steps[begin : max(end, begin + 1) + 1]


def _scaled(value: float, axis: Sequence[float], start: float, end: float) -> float:
    return start + (value - axis[0]) / (axis[-1] - axis[0]) * (end - start)


def _axes(
    x_axis: Sequence[float],
    y_axis: Sequence[float],
    at: Callable[[float, float], tuple[float, float]],
    x_text: Callable[[float], str],
) -> list[str]:
    """Grid lines with their values left, values of x below."""
    parts = []
    for tick in y_axis:
        (x0, y), (x1, _) = at(x_axis[0], tick), at(x_axis[-1], tick)
        parts.append(_line("grid", x0, y, x1, y) + _label(x0 - 6, y + 4, f"{tick:g}", "end"))
    for tick in x_axis:
        x, y = at(tick, y_axis[0])
        parts.append(_label(x, y + 16, x_text(tick), "middle"))
    return parts


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _line(css_class: str, x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line class="{css_class}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _label(x: float, y: float, text: str, anchor: str, css_class: str = "") -> str:
    style = f' class="{css_class}"' if css_class else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _chart(css_class: str, parts: Sequence[str], height: float, label: str) -> Markup:
    return _svg(f"chart {css_class}", parts, f"0 0 {_WIDTH:g} {height:g}", label)


def _svg(css_class: str, parts: Sequence[str], view: str, label: str) -> Markup:
    stretched = ' preserveAspectRatio="none"' if css_class == "bar" else ""
    title = f"<title>{html.escape(label)}</title>"
    return Markup(f'<svg class="{css_class}" viewBox="{view}" role="img"{stretched}>{title}{"".join(parts)}</svg>')
