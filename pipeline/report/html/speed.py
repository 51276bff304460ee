"""Accuracy against speed: a chart for every dataset, figure and device, with a list of its numbered rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from markupsafe import Markup

from pipeline.comparison.rows import Facts
from pipeline.comparison.tables import figure_text, rate
from pipeline.params.tasks import LABELS
from pipeline.report.html import svg


@dataclass(frozen=True, kw_only=True)
class SpeedChart:
    """A chart and what stands beside it."""

    dataset: str
    what: str
    """The figure and the device."""
    chart: Markup
    rows: Sequence[tuple[str, str]]
    """(name, its values in words), in the order of the chart's numbers."""


def speed_charts(rows: Mapping[str, Facts]) -> list[SpeedChart]:
    """One for every dataset, figure and device with points of which one is ours.

    Ours stand beside the published points where the devices are the same, and otherwise in a chart of their own.
    """
    groups: dict[tuple[str, str], dict[str, Facts]] = {}
    for name, facts in rows.items():
        groups.setdefault((facts.dataset, facts.primary), {})[name] = facts
    charts = []
    for (dataset, figure), of_group in groups.items():
        devices: dict[str, list[svg.Point]] = {}
        for name, facts in zip(_short_names(of_group), of_group.values(), strict=True):
            for device, point in _points(name, facts):
                devices.setdefault(device, []).append(point)
        if all(point.ours is None for points in devices.values() for point in points):
            continue
        label = LABELS[figure]
        for device, points in devices.items():
            apart = len(devices) > 1 and all(point.published is None for point in points)
            chart = svg.scatter(
                points,
                x_label=f"images/s on {device}",
                label=f"{label} against images per second of the rows of {dataset} on {device}",
            )
            what = f"{label} on {device}" + (": ours only, not comparable with the published device" if apart else "")
            told = [(point.name, _in_words(point)) for point in points]
            charts.append(SpeedChart(dataset=dataset, what=what, chart=chart, rows=told))
    return charts


def without_speed(rows: Mapping[str, Facts]) -> list[str]:
    """Evaluated rows that no chart shows, because their speed was not measured."""
    return [name for name, facts in rows.items() if _median(facts) is not None and not facts.speed]


def _short_names(names: Iterable[str]) -> list[str]:
    """Without the words that all begin with; at least the last word of each stays."""
    words = [name.split("_") for name in names]
    columns = zip(*(name[:-1] for name in words), strict=False)
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    return ["_".join(name[shared:]) for name in words]


def _points(name: str, facts: Facts) -> list[tuple[str, svg.Point]]:
    """A row's points by device: the published and ours in one where they were measured on the same device."""
    first, published, speed = facts.primary, facts.published, facts.speed
    ours, limits = None, facts.range.get(first)
    if (median := _median(facts)) is not None and speed and limits:
        ours = svg.Mark(speed=speed.fps, value=median, low=limits[0], high=limits[1])
    theirs = None
    if published.get("inf_fps") and published.get(first) is not None:
        theirs = svg.Mark(speed=published["inf_fps"], value=published[first])
    if ours and theirs and speed and speed.comparable:
        return [(speed.device, svg.Point(name=name, published=theirs, ours=ours))]
    points = []
    if theirs:
        points.append((published.get("device", "an unknown device"), svg.Point(name=name, published=theirs)))
    if ours and speed:
        points.append((speed.device, svg.Point(name=name, ours=ours)))
    return points


def _in_words(point: svg.Point) -> str:
    marks = (("published", point.published), ("ours", point.ours))
    return ", ".join(f"{whose} {figure_text(mark.value)} at {rate(mark.speed)}/s" for whose, mark in marks if mark)


def _median(facts: Facts) -> float | None:
    return facts.median.get(facts.primary)
