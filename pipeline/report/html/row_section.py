"""What the page says about one row that ran: its figure and verdict, charts, seeds, classes, pictures, provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.params.tasks import LABELS
from pipeline.report.html import svg
from pipeline.report.html.classes import class_tables
from pipeline.report.html.elements import cells, chip, definitions, escaped, items, paragraphs, small, table
from pipeline.report.rows import CHECKPOINTS, ENDED_BADLY, Facts
from pipeline.report.sentences import below_reference, interval_sentence
from pipeline.report.tables import evaluated_seeds, figure_names, percent, rate, seed_cells, seed_columns, signed, span
from pipeline.storage.results import RegisteredVersion, TrainedSeed


@dataclass(frozen=True, kw_only=True)
class Details:
    """What only the page shows of a row."""

    curves: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Seed -> points of its curve."""
    published_curve: Sequence[Mapping[str, Any]] = ()
    overlays: Sequence[Sequence[str]] = ()
    """Data URIs of an overlay's panels."""
    overlays_left_out: int = 0
    data_digest: str | None = None
    weights: str = ""
    trainings: Sequence[TrainedSeed] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    """What of the published training can be had -> URL."""


def row_section(name: str, facts: Facts, details: Details, tracking: str) -> str:
    """The row's section; tracking: MLflow's address."""
    status = "" if facts.status == "finished" else small(facts.status)
    warnings = [f"{warning}." for seed in facts.seeds for warning in below_reference(seed, facts)]
    warned = f"<ul class=warnings>{items(warnings)}</ul>" if warnings else ""
    return (
        f'<section class="row" id="{escaped(name)}"><h3>{escaped(name)} {chip(facts)}{status}</h3>{_headline(facts)}'
        f"{paragraphs([facts.verdict.reason, interval_sentence(facts)])}"
        f"{_charts(name, facts, details)}{_figures(facts)}{_seeds(facts)}{warned}{class_tables(facts)}"
        f"{_overlays(details)}{_benchmark(facts)}{_provenance(facts, details, tracking)}</section>\n"
    )


def _headline(facts: Facts) -> str:
    first, count = facts.primary, evaluated_seeds(facts)
    if not count:
        return "<p>No seed has been evaluated.</p>"
    label, median = LABELS[first], facts.median[first]
    checkpoint = "last checkpoint" if facts.decides == "last" else "checkpoint that is best on validation"
    if median is None:
        return f"<p>A seed's {checkpoint} has no {label}, because the pictures hold nothing to count.</p>"
    of = f"median of {count} seeds ({span(facts, first)})" if count > 1 else "one seed"
    return f"<p class=headline><b>{median:.2f}</b> {label} of the {checkpoint}, {of}</p>"


def _charts(name: str, facts: Facts, details: Details) -> str:
    seeds = dict.fromkeys([*(seed.seed for seed in facts.seeds if seed.checkpoints), *details.curves])
    colours = {seed: svg.SEED_COLOURS[i % len(svg.SEED_COLOURS)] for i, seed in enumerate(seeds)}
    first, published = facts.primary, facts.published.get(facts.primary)
    validation = f"Validation {LABELS[first]} during training, percent"
    warnings = [(point.step, point.value) for seed in facts.seeds for point in seed.below_reference]
    drawn = [
        _spread(name, facts, colours),
        (
            validation,
            svg.line_chart(
                _series(details, colours, f"val_{first}", 100.0),
                label=f"{validation}, of {name}",
                reference=published,
                warnings=warnings,
            ),
        ),
        (
            "Training loss",
            svg.line_chart(_series(details, colours, "loss"), label=f"Training loss of {name}", logarithmic=True),
        ),
    ]
    figures = "".join(
        f"<figure><figcaption>{escaped(title)}</figcaption>{chart}</figure>" for title, chart in drawn if chart
    )
    if not figures:
        return ""
    key = "".join(f'<span><i class=dot style="background:{c}"></i>seed {seed}</span>' for seed, c in colours.items())
    if details.published_curve and details.curves:
        key += "<span><i class=dash></i>published training</span>"
    return f'<div class="charts">{figures}</div><p class="key">{key}</p>'


def _spread(name: str, facts: Facts, colours: Mapping[int, str]) -> tuple[str, str]:
    """(caption, chart) of the seeds on one axis with what they are compared with."""
    first, verdict = facts.primary, facts.verdict
    label, published = LABELS[first], facts.published.get(first)
    values = {seed.seed: value for seed in facts.seeds if (value := seed.figures.get(first)) is not None}
    if not values:
        return "", ""
    caption = f"{label} of the seeds, percent."
    if published is not None:
        caption += f" Shaded: within {facts.margin:g} of the published."
    if verdict.interval:
        caption += f" The bar: {verdict.interval_kind}."
    chart = svg.strip(
        values,
        colours,
        label=f"{label} of each seed of {name}",
        median=facts.median[first],
        published=published,
        authors=facts.published_authors.get(first),
        margin=facts.margin,
        interval=verdict.interval,
    )
    return caption, chart


def _series(details: Details, colours: Mapping[int, str], key: str, scale: float = 1.0) -> list[svg.Series]:
    """The seeds' lines of one value, after the published one; none where no seed has it."""

    def points(curve: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
        return [(point["step"], scale * point[key]) for point in curve if point.get(key) is not None]

    ours = [
        svg.Series(name=f"seed {seed}", colour=colours[seed], points=points(curve))
        for seed, curve in details.curves.items()
        if points(curve)
    ]
    published = points(details.published_curve) if ours else []
    return [svg.Series(name="published", points=published), *ours] if published else ours


def _figures(facts: Facts) -> str:
    """Every figure of the row."""
    names = [name for name in figure_names(facts) if name in facts.median]
    if not names:
        return ""
    columns = {
        "median": [percent(facts.median[name]) for name in names],
        "range": [span(facts, name) for name in names],
        "published": [percent(facts.published.get(name)) for name in names],
        "difference": [signed(facts.difference.get(name)) for name in names],
        "authors'": [percent(facts.published_authors.get(name)) for name in names],
    }
    if baseline := facts.baseline:
        columns[f"{baseline.class_name} everywhere"] = [percent(baseline.figures.get(name)) for name in names]
    columns = {heading: texts for heading, texts in columns.items() if set(texts) != {"-"}}
    lines = [
        f'<tr><th scope="row">{LABELS[name]}</th>{cells(texts)}</tr>'
        for name, *texts in zip(names, *columns.values(), strict=True)
    ]
    return table(["Figure", *columns], lines, "figures")


def _seeds(facts: Facts) -> str:
    lines = []
    for seed in facts.seeds:
        number, first, *others, key = seed_cells(seed, facts)
        bad = " class=bad" if seed.status in ENDED_BADLY else ""
        lines.append(
            f'<tr{bad}><th scope="row">{number}</th><td>{escaped(first)}</td>{cells(others)}'
            f"<td><code>{escaped(key)}</code></td></tr>"
        )
    return table(seed_columns(facts), lines, "seeds")


def _overlays(details: Details) -> str:
    if not details.overlays:
        return ""
    pictures = ""
    for number, panels in enumerate(details.overlays, start=1):
        names = (": picture", ": prediction", ": truth") if len(panels) == 3 else ("",)
        images = "".join(
            f'<img alt="validation picture {number}{name}" src="{panel}">'
            for name, panel in zip(names, panels, strict=True)
        )
        pictures += f'<div class="panels of-{len(panels)}">{images}</div>'
    more = f" {details.overlays_left_out} more are in the run folder." if details.overlays_left_out else ""
    caption = f"Validation pictures: the picture, the prediction over it, the truth over it.{more}"
    return f'<figure class="overlays"><figcaption>{caption}</figcaption>{pictures}</figure>'


def _benchmark(facts: Facts) -> str:
    measured = facts.benchmark
    if not measured:
        return ""
    flops, inference, training = measured.flops, measured.inference, measured.training
    size = " x ".join(map(str, flops.image_size))
    if training is None:
        step = f"not measured: {measured.skipped}"
    else:
        step = f"{training.step_s:.3f} s for {training.images} pictures"
        step += "" if training.memory_mib is None else f", {training.memory_mib / 1024:.2f} GiB"
    lines = {
        "device": measured.environment.device,
        "parameters": f"{measured.parameters / 1e6:,.1f} million",
        "one picture": f"{flops.forward / 1e9:,.0f} GFLOPs at {size} ({flops.counted})",
        "inference": f"{rate(inference.fps)}/s over {inference.images} pictures: {inference.protocol}",
        "training step": step,
    }
    return f"<h4>Cost and speed, measured</h4>{definitions((term, escaped(said)) for term, said in lines.items())}"


def _provenance(facts: Facts, details: Details, tracking: str) -> str:
    """Run keys, digests, commits, versions: what a number came from."""
    lines = [("data", f"{escaped(facts.dataset)}, manifest {escaped(details.data_digest or '-')}")]
    lines.append(("initial weights", escaped(details.weights)))
    lines += [(name, f'<a href="{escaped(url)}">{escaped(url)}</a>') for name, url in details.links.items()]
    if registered := facts.registered:
        lines += [
            (
                f"registered, {alias}",
                f"models:/{escaped(registered.model)}@{alias}: version {version.version}, "
                f"{_of_seed(version, LABELS[facts.primary])}",
            )
            for alias, version in (("best", registered.aliases.best), ("median", registered.aliases.median))
        ]
    if any(training.mlflow_run_id for training in details.trainings):
        lines.append(("MLflow", escaped(tracking)))
    environments: dict[str, list[str]] = {}
    for training in details.trainings:
        environments.setdefault(_environment(training), []).append(str(training.seed))
    lines += [
        (f"seed{'' if len(seeds) == 1 else 's'} {', '.join(seeds)}", escaped(environment))
        for environment, seeds in environments.items()
    ]
    keys = [_keys(training) for training in details.trainings]
    headings = ["Seed", "run key", "checkpoints, SHA-256", "MLflow run"]
    return (
        f"<details class=provenance><summary>Where these numbers came from</summary>{definitions(lines)}"
        f"{table(headings, keys, 'keys') if keys else ''}</details>"
    )


def _of_seed(version: RegisteredVersion, label: str) -> str:
    """The seed of a registered version; one that was registered by hand does not say."""
    if version.seed is None or version.value is None:
        return "not said of which seed"
    return f"seed {version.seed}, {label} {100 * version.value:.2f}"


def _keys(training: TrainedSeed) -> str:
    """A seed's line in the table of what can be looked up."""
    checkpoints = "-"
    if training.checkpoints:
        checkpoints = "<br>".join(
            f"{called}, step {training.checkpoints[which].step:,}: "
            f"<code>{escaped(training.checkpoints[which].sha256)}</code>"
            for which, called in CHECKPOINTS.items()
        )
    note = ""
    if accepted := training.reused:
        instead, why = escaped(accepted.instead_of), escaped(accepted.reason)
        note = f"<br>accepted instead of <code>{instead}</code>: {why} ({escaped('; '.join(accepted.differences))})"
    return (
        f'<tr><th scope="row">{training.seed}</th><td><code>{escaped(training.run_key)}</code>{note}</td>'
        f"<td>{checkpoints}</td><td><code>{escaped(training.mlflow_run_id or '-')}</code></td></tr>"
    )


def _environment(training: TrainedSeed) -> str:
    """What a training ran with; equal ones are told once."""
    workers = f"{training.workers or '-'} worker{'' if training.workers == 1 else 's'}"
    environment = training.environment
    if environment is None:
        return f"device unknown, {workers}"
    changed = " with changes" if environment.git_changed else ""
    facts = [
        f"commit {environment.git_commit or 'unknown (no checkout)'}{changed}",
        f"{environment.device}, {workers}",
        f"python {environment.python} on {environment.platform}",
        f"TF32 {environment.tf32 or 'none'}",
        ", ".join(f"{name} {version}" for name, version in environment.libraries.items()),
    ]
    return "; ".join(fact for fact in facts if fact)
