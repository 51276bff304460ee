"""The report as one HTML page without outside resources: tables, curves as SVG, pictures inline, provenance."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.tasks import LABELS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")
"""One per seed, told apart by colour-blind readers too (Okabe and Ito)."""

CURVE_POINTS = 240
"""A longer curve is drawn as the means of this many pieces."""

_METRICS = {"iou": "IoU", "pq": "PQ", "ap": "AP"}
"""How a metric of classes is headed."""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 240, 46, 20, 14, 30


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page says about one row."""

    name: str
    facts: Mapping[str, Any]
    """The row's entry in results.json."""
    line: Mapping[str, str]
    """Its cells in the table."""
    seed_columns: Sequence[str]
    """Headings of its seeds."""
    seeds: Sequence[Sequence[str]]
    """Cells of its seeds."""
    curves: Mapping[int, Sequence[Mapping[str, Any]]]
    """Seed -> points of its curve."""
    overlays: Sequence[Path]
    """PNG files: picture, prediction, truth."""
    data_digest: str | None
    weights: str
    trainings: Sequence[Mapping[str, Any]]
    """Entries of results/train/<row>.json."""

    def colour(self, seed: int) -> str:
        """The seed's colour, the same in every figure of the row."""
        seeds = [*(entry["seed"] for entry in self.facts["seeds"]), *self.curves]
        return COLOURS[seeds.index(seed) % len(COLOURS)]

    @property
    def primary(self) -> str:
        """The figure that is compared first."""
        return str(self.facts["primary"])

    @property
    def label(self) -> str:
        """How it is called."""
        return LABELS[self.primary]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of one task."""

    title: str
    columns: Sequence[tuple[str, str]]
    """Key of `Section.line` and heading, the row's name first."""
    notes: Sequence[str]
    """What its columns mean."""
    published: Sequence[str]
    """A sentence for every published checkpoint that was evaluated."""
    sections: Sequence[Section]


def page(tables: Sequence[Table], *, notes: Sequence[str]) -> str:
    """The whole page: the tables, then every row that ran."""
    sections = [section for table in tables for section in table.sections]
    rows = "".join(_section(section) for section in sections if section.facts["status"] != "not run")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Mask2Former: results</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f"<body><h1>Mask2Former: results</h1>{_paragraphs(notes)}\n{''.join(map(_table, tables))}{rows}</body></html>\n"
    )


def _paragraphs(notes: Sequence[str]) -> str:
    return "".join(f"<p>{_text(note)}</p>" for note in notes if note)


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for _, title in table.columns)
    keys = [key for key, _ in table.columns]
    body = "".join(_table_line(section, keys) for section in table.sections)
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in table.published)
    notes = _paragraphs(table.notes) + (f"<ul>{items}</ul>" if items else "")
    return (
        f'<h2>{_text(table.title)}</h2><div class="wide"><table class="rows"><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><div class="notes">{notes}</div>\n'
    )


def _table_line(section: Section, keys: Sequence[str]) -> str:
    status = section.facts["status"]
    if status == "not run":
        name, mark = f"{_text(section.name)} <small>not run</small>", ' class="idle"'
    else:
        name, mark = f'<a href="#{_text(section.name)}">{_text(section.name)}</a>', ""
        if status != "finished":
            name += f" <small>{_text(status)}</small>"
    cells = "".join(
        f"<td{' class=main' if key == section.primary else ''}>{_text(section.line[key])}</td>" for key in keys[1:]
    )
    return f"<tr{mark}><th>{name}</th>{cells}</tr>"


def _section(section: Section) -> str:
    status = section.facts["status"]
    note = "" if status == "finished" else f" <small>{_text(status)}</small>"
    head = "".join(f"<th>{_text(title)}</th>" for title in section.seed_columns)
    lines = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>" for cells in section.seeds)
    return (
        f'<section id="{_text(section.name)}"><h2>{_text(section.name)}{note}</h2>{_sentence(section)}{_strip(section)}'
        f'<div class="wide"><table class="seeds"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
        f"{_curves(section)}{_overlays(section)}{_classes(section)}{_provenance(section)}</section>\n"
    )


def _sentence(section: Section) -> str:
    """The result in words."""
    facts, first = section.facts, section.primary
    count = sum("step" in seed for seed in facts["seeds"])
    if not count:
        return "<p>No seed has been evaluated.</p>"
    median, limits = facts["median"][first], facts["range"][first]
    checkpoint = "last checkpoint" if facts["decides"] == "last" else "checkpoint that is best on validation"
    if median is None:
        return f"<p>A seed's {checkpoint} has no {section.label}, because the pictures hold nothing to count.</p>"
    text = f"{section.label} <b>{median:.2f}</b> of the {checkpoint}, "
    text += f"median of {count} seeds ({limits[0]:.2f} to {limits[1]:.2f})" if count > 1 else "one seed"
    for figure, difference in facts["difference"].items():
        ours = "" if figure == first else f"{LABELS[figure]} {facts['median'][figure]:.2f}, "
        text += f"; {ours}published {facts['published'][figure]:.2f}, difference {difference:+.2f}"
    if first not in facts["difference"] and first in facts["published_authors"]:
        text += f"; the authors' {section.label} {facts['published_authors'][first]:.2f}"
    if facts["baseline"] and facts["baseline"].get(first) is not None:
        text += f"; predicting {_text(facts['baseline']['class'])} everywhere gives {facts['baseline'][first]:.2f}"
    return f"<p>{text}.</p>"


def _strip(section: Section) -> str:
    """Seeds, their median and the published figures on one axis of the primary figure."""
    facts, first = section.facts, section.primary
    values = [(seed["seed"], seed[first]) for seed in facts["seeds"] if seed.get(first) is not None]
    if not values:
        return ""
    marks = [("published", facts["published"].get(first)), ("authors", facts["published_authors"].get(first))]
    known = [value for _, value in values] + [value for _, value in marks if value is not None]
    ticks = _ticks(min(known), max(known))
    left, right = 22.0, 458.0

    def place(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)

    parts = [f'<line class="axis" x1="{left}" x2="{right}" y1="44" y2="44"/>']
    for tick in ticks:
        parts.append(f'<line class="axis" x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="44" y2="49"/>')
        parts.append(f'<text x="{place(tick):.1f}" y="63" text-anchor="middle">{tick:g}</text>')
    taken: list[float] = []
    for label, value in marks:
        if value is None:
            continue
        x = place(value)
        y = 12 + 14 * sum(abs(x - other) < 130 for other in taken)
        taken.append(x)
        anchor = "start" if x < 60 else "end" if x > 420 else "middle"
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 4}" y2="44"/>')
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{label} {value:.2f}</text>')
    if facts["median"][first] is not None:
        median = place(facts["median"][first])
        parts.append(f'<line class="median" x1="{median:.1f}" x2="{median:.1f}" y1="30" y2="44"/>')
    for seed, value in values:
        title = f"<title>seed {seed}: {value:.2f}</title>"
        parts.append(f'<circle cx="{place(value):.1f}" cy="44" r="5" fill="{section.colour(seed)}">{title}</circle>')
    label = f"{section.label} of each seed of {_text(section.name)}"
    return f'<svg class="strip" viewBox="0 0 480 70" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _curves(section: Section) -> str:
    published = section.facts["published"].get(section.primary)
    charts = (
        ("Training loss", "loss", 1.0, None),
        (f"Validation {section.label} during training, percent", f"val_{section.primary}", 100.0, published),
    )
    figures = ""
    for title, key, scale, reference in charts:
        series = {
            seed: [(p["step"], scale * p[key]) for p in points if p.get(key) is not None]
            for seed, points in section.curves.items()
        }
        series = {seed: points for seed, points in series.items() if points}
        if series:
            chart = line_chart(series, [section.colour(seed) for seed in series], reference=reference)
            figures += f"<figure><figcaption>{title}</figcaption>{chart}</figure>"
    if not figures:
        return ""
    legend = "".join(
        f'<span><i style="background:{section.colour(seed)}"></i>seed {seed}</span>' for seed in section.curves
    )
    return f'<div class="charts">{figures}</div><p class="legend">{legend}</p>'


def line_chart(
    series: Mapping[int, Sequence[tuple[float, float]]], colours: Sequence[str], *, reference: float | None = None
) -> str:
    """An SVG of one line per seed, (step, value) points; `reference`: a dashed line for the published figure."""
    series = {seed: thinned(points) for seed, points in series.items()}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points] + ([] if reference is None else [reference])
    x_ticks, y_ticks = _ticks(min(0, *xs), max(xs)), _ticks(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        (x0, y), (x1, _) = at(x_ticks[0], tick), at(x_ticks[-1], tick)
        parts.append(f'<line class="grid" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x0 - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, y = at(tick, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{_thousands(tick)}</text>')
    if reference is not None:
        (x0, y), (x1, _) = at(x_ticks[0], reference), at(x_ticks[-1], reference)
        parts.append(f'<line class="reference" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x1:.1f}" y="{y - 5:.1f}" text-anchor="end">published {reference:g}</text>')
    for (seed, points), colour in zip(series.items(), colours, strict=True):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        last_x, last_y = at(*points[-1])
        parts.append(
            f'<polyline points="{path}" stroke="{colour}"><title>seed {seed}</title></polyline>'
            f'<circle cx="{last_x:.1f}" cy="{last_y:.1f}" r="2.5" fill="{colour}"/>'
        )
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def thinned(points: Sequence[tuple[float, float]], limit: int = CURVE_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: means of consecutive pieces, as equal as can be; the last point stays as it is."""
    if len(points) <= limit:
        return list(points)
    *rest, last = points
    bounds = [round(i * len(rest) / (limit - 1)) for i in range(limit)]
    pieces = [rest[a:b] for a, b in pairwise(bounds)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in pieces] + [last]


def _overlays(section: Section) -> str:
    if not section.overlays:
        return ""
    pictures = "".join(
        f'<img loading="lazy" alt="validation picture {number}: picture, prediction, truth" src="{_data_uri(path)}">'
        for number, path in enumerate(section.overlays, start=1)
    )
    caption = "Validation pictures: the picture, the prediction over it, the truth over it."
    return f'<figure class="overlays"><figcaption>{caption}</figcaption><div>{pictures}</div></figure>'


def _data_uri(path: Path) -> str:
    """The picture inline: as it is when small, else as a JPEG of at most 1,280 pixels across."""
    data, kind = path.read_bytes(), "png"
    if len(data) > 150_000:
        import io

        from PIL import Image

        buffer = io.BytesIO()
        with Image.open(path) as picture:
            small = picture.convert("RGB")
        small.thumbnail((1280, 1280))
        small.save(buffer, "JPEG", quality=82)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _classes(section: Section) -> str:
    """Every class and seed, by metric."""
    seeds = [seed for seed in section.facts["seeds"] if "per_class" in seed]
    head = "".join(f"<th>seed {seed['seed']}</th>" for seed in seeds)
    text = ""
    for metric in seeds[0]["per_class"] if seeds else ():
        lines = ""
        for name in seeds[0]["per_class"][metric]:
            values = [seed["per_class"][metric].get(name) for seed in seeds]
            cells = "".join(f"<td>{'absent' if value is None else f'{value:.2f}'}</td>" for value in values)
            lines += f"<tr><th>{_text(name)}</th>{cells}</tr>"
        text += (
            f"<details><summary>{_text(_METRICS.get(metric, metric))} of every class</summary>"
            f'<div class="wide"><table class="classes"><thead><tr><th>class</th>{head}</tr></thead>'
            f"<tbody>{lines}</tbody></table></div></details>"
        )
    return text


def _provenance(section: Section) -> str:
    """Run keys, digests, commits, versions: what a number came from."""
    lines = [("data", section.facts["dataset"]), ("data manifest", section.data_digest or "-")]
    lines.append(("initial weights", section.weights))
    for training in section.trainings:
        environment = training.get("environment") or {}
        libraries = environment.get("libraries") or {}
        checkpoints = training.get("checkpoints") or {}
        commit = environment.get("git_commit") or "no checkout"
        commit += " with changes" if environment.get("git_changed") else ""
        lines += [
            (f"seed {training['seed']}: run key", training["run_key"]),
            ("run folder", training.get("run_dir") or "-"),
            *(
                (f"{kind} checkpoint", f"step {checkpoint['step']}, sha256 {checkpoint['sha256']}")
                for kind, checkpoint in checkpoints.items()
            ),
            ("commit", commit),
            ("device", f"{environment.get('device') or '-'}, {training.get('workers') or '-'} workers"),
            ("python", f"{environment.get('python') or '-'}, {environment.get('platform') or '-'}"),
            ("libraries", ", ".join(f"{name} {version}" for name, version in libraries.items()) or "-"),
            ("TF32", environment.get("tf32") or "no GPU"),
        ]
        if training.get("mlflow_run_id"):
            lines.append(("MLflow run", training["mlflow_run_id"]))
    cells = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in lines)
    return f"<details><summary>Where these numbers came from</summary><dl>{cells}</dl></details>"


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that enclose low to high, about `count` steps of 1, 2 or 5 times a power of ten."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _text(value: object) -> str:
    return html.escape(str(value))


_STYLE = """
:root { --ink: #1a1c1f; --soft: #63686f; --line: #d9dce0; --paper: #fff; --accent: #0b5cad; color-scheme: light dark }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9ba1a8; --line: #3a3f45; --paper: #17191c; --accent: #7db7f0 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.7rem; margin: .5rem 0 1rem; line-height: 1.2 }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem }
section h2 { margin-top: 0 }
p { max-width: 46rem; margin: .4rem 0 }
small { color: var(--soft); font-size: .8em; font-weight: normal }
a { color: var(--accent) }
section { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--line) }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
.rows { width: 100% } .rows th, .rows td { padding-left: .6rem }
.rows th:first-child { position: sticky; left: 0; padding-left: 0; background: var(--paper) }
.notes p, .notes li { font-size: .9rem; color: var(--soft); max-width: 60rem }
.notes ul { padding-left: 1.2rem; margin: .4rem 0 }
th, td { padding: .35rem 0 .35rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; white-space: normal }
tbody th { font-weight: 500 }
.seeds td { text-align: left }
.seeds th { text-align: left }
.seeds td:nth-child(2) { white-space: normal; max-width: 20rem }
.seeds td:last-child { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .85em }
.main { font-weight: 700 }
.idle th, .idle td { color: var(--soft) }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums }
svg.strip { width: 100%; max-width: 38rem; height: auto; display: block; margin-top: 1rem }
.axis, .median { stroke: var(--ink) } .median { stroke-width: 2 } .grid { stroke: var(--line) }
.mark, .reference { stroke: var(--soft); stroke-dasharray: 4 3 }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
figure { margin: 0 } figcaption { color: var(--soft); font-size: .9rem; margin: .5rem 0 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem 2rem }
.chart { width: 100%; height: auto }
.legend span { margin-right: 1.2rem; color: var(--soft); font-size: .9rem }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin-right: .4rem;
  vertical-align: -1px }
.overlays div { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .75rem }
.overlays img { width: 100%; height: auto; border-radius: 3px }
details { margin-top: 1rem } summary { cursor: pointer; color: var(--accent) }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; font-size: .85rem }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 40rem) {
  .rows tbody th { white-space: normal; min-width: 10rem } .rows small { display: block }
  .seeds th:nth-child(n + 2) { min-width: 5.5rem }
  dl { grid-template-columns: 1fr }
  dt { margin-top: .4rem }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --accent: #000 }
  body { max-width: none; padding: 0; font-size: 11px }
  details::details-content { content-visibility: visible; display: block }
  .charts figure, table, img, svg { break-inside: avoid }
  .overlays div { grid-template-columns: 1fr 1fr }
  table, dl { font-size: 10px }
  .wide { overflow: visible }
  th, td { white-space: normal }
}
"""
