"""The report as one HTML page that needs nothing from outside: how the rows stand, accuracy against speed, the tables,
then every row that ran. Text comes from tables.py, drawings from svg.py, the style from style.css."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.params.tasks import LABELS
from pipeline.report.html import svg
from pipeline.report.html.elements import SIGNS, escaped, paragraphs, row_link, style_of
from pipeline.report.html.overview import overview
from pipeline.report.html.row_section import Details, row_section
from pipeline.report.rows import Facts, counts, published_rows
from pipeline.report.sentences import HOW_TO_READ, LEGEND, attention
from pipeline.report.tables import TITLES, by_task

_NOTHING_RAN = """<div class=empty><h3>Nothing has run yet</h3>
<p>The tables below show the published figures. To fill in ours:</p><ol>
<li><code>make demo</code> trains a small row on generated pictures: minutes, no GPU.</li>
<li><code>dvc repro evaluate@cityscapes_r50</code> makes a published row: pictures, training, evaluation.</li>
<li><code>python -m stages.report</code> makes this page again.</li></ol></div>"""


def page(rows: Mapping[str, Facts], details: Mapping[str, Details], *, notes: Sequence[str], tracking: str) -> str:
    """The whole page. details: of the rows that ran; notes: what else is to be said; tracking: MLflow's address."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    ran = {name: facts for name, facts in rows.items() if facts.status != "not run"}
    panels = _speed_panels(rows)
    tables = "".join(overview(task, of_task) for task, of_task in by_task(rows).items())
    sections = "".join(row_section(name, facts, details[name], tracking) for name, facts in ran.items())
    if sections:
        sections = f'<section id="rows"><h2>Row by row</h2></section>{sections}'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Mask2Former: results</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{style}</style></head>\n<body>'
        f"{_header(rows, speeds=bool(panels), sections=bool(sections))}"
        f"<main>{_summary(rows, ran, notes)}{_speeds(rows, panels)}{tables}{sections}</main></body></html>\n"
    )


def _header(rows: Mapping[str, Facts], *, speeds: bool, sections: bool) -> str:
    links = [("speed", "Speed")] if speeds else []
    links += [(task, TITLES[task].partition(" ")[0]) for task in by_task(rows)]
    links += [("rows", "Row by row")] if sections else []
    listed = "".join(row_link(key, title) for key, title in links)
    return (
        "<header><h1>Mask2Former: results</h1>"
        "<p class=lead>Every row of the published tables beside the trainings of this project, each the median over "
        f'seeds.</p><nav aria-label="On this page">{listed}</nav></header>'
    )


def _summary(rows: Mapping[str, Facts], ran: Mapping[str, Facts], notes: Sequence[str]) -> str:
    published = published_rows(rows)
    text = "" if ran else _NOTHING_RAN
    if published:
        tiles = "".join(
            f'<div class="tile {style_of(kind)}{"" if count else " none"}">'
            f"<dt>{SIGNS[kind]} {kind}</dt><dd>{count}</dd></div>"
            for kind, count in counts(rows).items()
        )
        text += f"<p>Of {len(published)} published rows:</p><dl class=tiles>{tiles}</dl>"
    if own := [row_link(name) for name in ran if name not in published]:
        text += f"<p>Rows that nothing published compares with: {', '.join(own)}.</p>"
    if worries := attention(rows):
        listed = "".join(f"<li>{row_link(name)}: {escaped(what)}</li>" for name, what in worries)
        text += f"<div class=worries><h3>Needs a look</h3><ul>{listed}</ul></div>"
    text += paragraphs([HOW_TO_READ, *notes], "note")
    text += f"<details class=legend><summary>What the figures mean</summary>{paragraphs([LEGEND], 'note')}</details>"
    return f"<section id=summary><h2>How the rows stand</h2>{text}</section>"


def _speeds(rows: Mapping[str, Facts], panels: Sequence[tuple[str, str, str]]) -> str:
    if not panels:
        return ""
    figures = "".join(
        f"<figure><figcaption><b>{escaped(title)}</b> {escaped(note)}</figcaption>{chart}</figure>"
        for title, note, chart in panels
    )
    unmeasured = [name for name, facts in rows.items() if _median(facts) is not None and not facts.speed]
    missing = f"Not drawn, for want of a measured speed (dvc repro benchmark@<row>): {', '.join(unmeasured)}."
    return (
        "<section id=speed><h2>Accuracy against speed</h2>"
        "<p class=note>Inference, one picture at a time. Speeds of different devices are never drawn on one axis.</p>"
        '<p class=key><span><i class="dot hollow"></i>published</span>'
        '<span><i class="dot ours"></i>our median, from the lowest to the highest seed</span></p>'
        f"{paragraphs([missing] if unmeasured else [], 'note')}"
        f'<div class="charts two">{figures}</div></section>\n'
    )


def _speed_panels(rows: Mapping[str, Facts]) -> list[tuple[str, str, str]]:
    """(title, note, chart) for every dataset, figure and device with points of which one is ours.

    Ours stand beside the published points where the devices are the same, and otherwise in a chart of their own.
    """
    groups: dict[tuple[str, str], dict[str, list[svg.Point]]] = {}
    for name, facts in rows.items():
        devices = groups.setdefault((facts.dataset, facts.primary), {})
        for device, point in _points(name.rpartition("_")[2], facts):
            devices.setdefault(device, []).append(point)
    panels = []
    for (dataset, figure), devices in groups.items():
        if all(point.ours is None for points in devices.values() for point in points):
            continue
        label = LABELS[figure]
        for device, points in devices.items():
            apart = len(devices) > 1 and all(point.published is None for point in points)
            note = ": ours only, not comparable with the published device" if apart else ""
            chart = svg.scatter(
                points,
                x_label=f"pictures/s on {device}",
                label=f"{label} against pictures per second of the rows of {dataset} on {device}",
            )
            panels.append((dataset, f"{label} on {device}{note}", chart))
    return panels


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


def _median(facts: Facts) -> float | None:
    return facts.median.get(facts.primary)
