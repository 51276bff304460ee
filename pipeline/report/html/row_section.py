"""What the page says about one row that ran: its figure and verdict, charts, seeds, classes, pictures, provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from pipeline.comparison.rows import CHECKPOINTS, ENDED_BADLY, Facts
from pipeline.comparison.tables import (
    evaluated_seeds,
    figure_names,
    figure_text,
    rate,
    seed_cells,
    seed_columns,
    signed,
    span,
)
from pipeline.params.tasks import LABELS
from pipeline.report.html import svg
from pipeline.report.html.classes import ClassTable, class_tables
from pipeline.report.sentences import below_reference, interval_sentence
from pipeline.storage.results.rows import RegisteredVersion, Reused, TrainedSeed
from pipeline.tracking.pages import MlflowPages


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
    weights_sha256: str | None = None
    trainings: Sequence[TrainedSeed] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    """What of the published training can be had -> URL."""


@dataclass(frozen=True, kw_only=True)
class SeedLine:
    """A seed in the table of seeds."""

    seed: int
    cells: Sequence[str]
    key: str
    run: str | None
    """The run's page in MLflow; None: not known."""
    bad: bool
    """Whether it has no figures."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A line of what the numbers came from."""

    term: str
    text: str
    url: str | None = None
    """Where `text` links to."""
    note: str = ""
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """A training in the table of what can be looked up."""

    seed: int
    key: str
    reused: Reused | None
    checkpoints: Sequence[tuple[str, str]]
    """(which, SHA-256)."""
    run_id: str | None
    run: str | None
    """Its page in MLflow."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A row's section, ready for its template."""

    name: str
    verdict: str
    status: str
    """Empty: finished."""
    value: str
    """The median; empty: there is none."""
    headline: str
    """What stands after it."""
    sentences: Sequence[str]
    charts: Sequence[tuple[str, Markup]]
    """(caption, chart)."""
    colours: Mapping[int, str]
    """Of the seeds in the charts."""
    published_curve: bool
    figures: tuple[Sequence[str], Sequence[tuple[str, Sequence[str]]]]
    """Headings, and (figure, cells)."""
    seed_headings: Sequence[str]
    seeds: Sequence[SeedLine]
    warnings: Sequence[str]
    classes: Sequence[ClassTable]
    overlays: Sequence[Sequence[tuple[str, str]]]
    """(alternative text, data URI) of an overlay's panels."""
    overlays_left_out: int
    benchmark: Sequence[tuple[str, str]]
    """(term, what was measured); empty: nothing was."""
    origins: Sequence[Origin]
    runs: Sequence[RunLine]


def row_section(name: str, facts: Facts, details: Details, mlflow: MlflowPages) -> Section:
    """What the row's section shows. mlflow: where its runs are shown."""
    seeds = dict.fromkeys([*(seed.seed for seed in facts.seeds if seed.checkpoints), *details.curves])
    colours = {seed: svg.SEED_COLOURS[i % len(svg.SEED_COLOURS)] for i, seed in enumerate(seeds)}
    value, headline = _headline(facts)
    return Section(
        name=name,
        verdict=facts.verdict.decision,
        status="" if facts.status == "finished" else facts.status,
        value=value,
        headline=headline,
        sentences=[text for text in (facts.verdict.reason, interval_sentence(facts)) if text],
        charts=_charts(name, facts, details, colours),
        colours=colours,
        published_curve=bool(details.published_curve and details.curves),
        figures=_figures(facts),
        seed_headings=seed_columns(facts),
        seeds=_seeds(facts, mlflow),
        warnings=[f"{warning}." for seed in facts.seeds for warning in below_reference(seed, facts)],
        classes=class_tables(facts),
        overlays=_overlays(details),
        overlays_left_out=details.overlays_left_out,
        benchmark=_benchmark(facts),
        origins=_origins(facts, details, mlflow),
        runs=[_run(training, mlflow) for training in details.trainings],
    )


def _headline(facts: Facts) -> tuple[str, str]:
    """(the median, what it is of); without a median, why there is none."""
    first, count = facts.primary, evaluated_seeds(facts)
    if not count:
        return "", "No seed has been evaluated."
    label, median = LABELS[first], facts.median[first]
    checkpoint = "last checkpoint" if facts.decides == "last" else "checkpoint that is best on validation"
    if median is None:
        return "", f"A seed's {checkpoint} has no {label}, because the images hold nothing to count."
    of = f"median of {count} seeds ({span(facts, first)})" if count > 1 else "one seed"
    return f"{median:.2f}", f"{label} of the {checkpoint}, {of}"


def _charts(name: str, facts: Facts, details: Details, colours: Mapping[int, str]) -> list[tuple[str, Markup]]:
    first, published = facts.primary, facts.reference.get(facts.primary)
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
    return [(caption, chart) for caption, chart in drawn if chart]


def _spread(name: str, facts: Facts, colours: Mapping[int, str]) -> tuple[str, Markup]:
    """(caption, chart) of the seeds on one axis with what they are compared with."""
    first, verdict = facts.primary, facts.verdict
    label, published = LABELS[first], facts.reference.get(first)
    values = {seed.seed: value for seed in facts.seeds if (value := seed.figures.get(first)) is not None}
    if not values:
        return "", Markup()
    caption = f"{label} of the seeds, percent."
    if published is not None:
        caption += f" Shaded: within {facts.margin:g} of the published."
    if verdict.interval:
        caption += f" The bar: {verdict.interval_name}."
    chart = svg.strip(
        values,
        colours,
        label=f"{label} of each seed of {name}",
        median=facts.median[first],
        published=published,
        authors=facts.published_authors.get(first) if facts.judged_by == "published" else None,
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


def _figures(facts: Facts) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Every figure of the row, under headings; no lines where there is none."""
    names = [name for name in figure_names(facts) if name in facts.median]
    columns = {
        "median": [figure_text(facts.median[name]) for name in names],
        "range": [span(facts, name) for name in names],
        "published": [figure_text(facts.published.get(name)) for name in names],
        "difference": [signed(facts.difference.get(name)) for name in names],
        "authors'": [figure_text(facts.published_authors.get(name)) for name in names],
    }
    if baseline := facts.baseline:
        columns[f"{baseline.class_name} everywhere"] = [figure_text(baseline.figures.get(name)) for name in names]
    columns = {heading: texts for heading, texts in columns.items() if not set(texts) <= {"-"}}
    lines = [(LABELS[name], list(texts)) for name, *texts in zip(names, *columns.values(), strict=True)]
    return ["Figure", *columns], lines


def _seeds(facts: Facts, mlflow: MlflowPages) -> list[SeedLine]:
    lines = []
    for seed in facts.seeds:
        _, *cells, key = seed_cells(seed, facts)
        bad, run = seed.status in ENDED_BADLY, mlflow.run(seed.mlflow_run_id)
        lines.append(SeedLine(seed=seed.seed, cells=cells, key=key, run=run, bad=bad))
    return lines


def _overlays(details: Details) -> list[list[tuple[str, str]]]:
    shown = []
    for number, panels in enumerate(details.overlays, start=1):
        names = (": image", ": prediction", ": truth") if len(panels) == 3 else ("",)
        shown.append([(f"validation image {number}{name}", uri) for name, uri in zip(names, panels, strict=True)])
    return shown


def _benchmark(facts: Facts) -> list[tuple[str, str]]:
    measured = facts.benchmark
    if not measured:
        return []
    flops, inference, training = measured.flops, measured.inference, measured.training
    size = " x ".join(map(str, flops.image_size))
    if training is None:
        step = f"not measured: {measured.skipped}"
    else:
        step = f"{training.step_s:.3f} s for {training.images} images"
        step += f" on each of {training.workers} workers" if training.workers > 1 else ""
        step += "" if training.memory_mib is None else f", {training.memory_mib / 1024:.2f} GiB"
    return [
        ("device", measured.environment.device),
        ("parameters", f"{measured.parameters / 1e6:,.1f} million"),
        ("one image", f"{flops.forward / 1e9:,.0f} GFLOPs at {size} ({flops.counted})"),
        (
            "inference",
            f"{rate(inference.fps)}/s over {inference.images} images: {inference.protocol}; {inference.differs}",
        ),
        ("training step", step),
    ]


def _origins(facts: Facts, details: Details, mlflow: MlflowPages) -> list[Origin]:
    """Digests, commits, versions: what a number came from."""
    lines = [Origin(term="data", text=f"{facts.dataset}, manifest", digest=details.data_digest or "-")]
    sha256 = details.weights_sha256
    lines.append(
        Origin(term="initial weights", text=details.weights + (", SHA-256" if sha256 else ""), digest=sha256 or "")
    )
    lines += [Origin(term=name, text=url, url=url) for name, url in details.links.items()]
    if facts.mlflow_run_id:
        lines.append(Origin(term="row in MLflow", text=facts.mlflow_run_id, url=mlflow.run(facts.mlflow_run_id)))
    if registered := facts.registered:
        pages = MlflowPages(registered.tracking_uri)
        lines += [
            Origin(
                term=f"registered, {alias}",
                text=f"models:/{registered.model}@{alias}: version {version.version}",
                url=pages.version(registered.model, version.version),
                note=_of_seed(version, LABELS[facts.primary]),
            )
            for alias, version in (("best", registered.aliases.best), ("median", registered.aliases.median))
        ]
    environments: dict[str, list[str]] = {}
    for training in details.trainings:
        environments.setdefault(_environment(training), []).append(str(training.seed))
    lines += [
        Origin(term=f"seed{'' if len(seeds) == 1 else 's'} {', '.join(seeds)}", text=environment)
        for environment, seeds in environments.items()
    ]
    return lines


def _of_seed(version: RegisteredVersion, label: str) -> str:
    """The seed of a registered version; one that was registered by hand does not say."""
    if version.seed is None or version.value is None:
        return "not said of which seed"
    return f"seed {version.seed}, {label} {100 * version.value:.2f}"


def _run(training: TrainedSeed, mlflow: MlflowPages) -> RunLine:
    made = training.checkpoints
    return RunLine(
        seed=training.seed,
        key=training.run_key,
        reused=training.reused,
        checkpoints=[
            (f"{called}, step {made[which].step:,}", made[which].sha256) for which, called in CHECKPOINTS.items()
        ]
        if made
        else [],
        run_id=training.mlflow_run_id,
        run=mlflow.run(training.mlflow_run_id),
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
        f"{environment.kernels} kernels" if environment.kernels else "",
        "deterministic" if environment.deterministic else "",
        ", ".join(f"{name} {version}" for name, version in environment.libraries.items()),
    ]
    return "; ".join(fact for fact in facts if fact)
