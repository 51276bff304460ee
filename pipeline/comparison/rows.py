"""What results/ says about a row of params.yaml, beside its published figures: the rows of results.json.

Nothing is computed here but medians, ranges, differences and the verdict (pipeline.comparison.verdict). Figures are
fractions in results/ and percent here, with two decimals; speeds, times and memory are as they were measured.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.comparison.published import other_checkpoints
from pipeline.comparison.verdict import Decision, Verdict, median_interval, row_verdict
from pipeline.params.schema import Row, Task, VerdictConfig
from pipeline.params.tasks import FIGURES, MS_FLIP, percent, primary
from pipeline.provenance.run_key import settings_key
from pipeline.storage.results.folder import RESULTS, find_result, made_by, read_result, result_path
from pipeline.storage.results.rows import (
    Baseline,
    BelowReference,
    Benchmark,
    EvaluatedSeed,
    Evaluation,
    Figures,
    PaddedEvaluation,
    PublishedEvaluation,
    Registration,
    Reused,
    Status,
    TrainingResult,
    Which,
)

_Result = TypeVar("_Result")

CHECKPOINTS: Mapping[Which, str] = {"last": "last", "best": "best on validation"}
"""The two checkpoints of a seed, and their names in headings."""

ENDED_BADLY = ("failed", "diverged", "stopped")
"""How a seed ends that has no figures: it is shown in every table, with its reason."""

VERDICTS: tuple[Decision, ...] = ("reproduced", "above", "below", "undecided", "no verdict", "not run")
"""In the order in which they are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFacts:
    """One of a seed's checkpoints."""

    step: int
    figures: Figures
    """Percent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedFacts:
    """A seed: its figures in percent, from its evaluation, and the cost of its training."""

    seed: int
    run_key: str
    status: Status
    reason: str | None
    mlflow_run_id: str | None
    checkpoints: Mapping[Which, CheckpointFacts]
    """Empty: the seed has no figures."""
    step: int | None
    figures: Figures
    """Of the checkpoint that decides, after `step` steps."""
    per_class: Mapping[str, Figures]
    """Metric -> class -> percent, of the same checkpoint."""
    train_s: float | None
    worker_s: float | None
    workers: int | None
    images_per_s: float | None
    peak_memory_mib: float | None
    reused: Reused | None
    device: str | None
    gpu: bool
    gpu_hours: float | None
    below_reference: tuple[BelowReference, ...]
    """Where its curve was clearly below the one it was compared with, in percent."""

    def as_json(self) -> dict[str, Any]:
        """As results.json holds it: figures beside the rest, and an evaluated seed alone has any."""
        facts = asdict(self)
        checkpoints, figures = facts.pop("checkpoints"), facts.pop("figures")
        step, per_class = facts.pop("step"), facts.pop("per_class")
        if checkpoints:
            facts |= {which: {"step": of["step"], **of["figures"]} for which, of in checkpoints.items()}
            facts |= {"step": step, **figures, "per_class": per_class}
        return facts


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedFacts:
    """A published checkpoint's figures under one padding."""

    figures: Figures
    """Percent."""
    difference: Mapping[str, float]
    pad_multiple: int

    def as_json(self) -> dict[str, Any]:
        """As results.json holds it."""
        return {**self.figures, "difference": self.difference, "pad_multiple": self.pad_multiple}


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFacts:
    """The published checkpoint, evaluated here: it should repeat the published figures."""

    evaluated: PaddedFacts
    other_padding: PaddedFacts | None
    agrees: int | None
    per_class: Mapping[str, Figures]

    def as_json(self) -> dict[str, Any]:
        """As results.json holds it."""
        other = self.other_padding.as_json() if self.other_padding else None
        return self.evaluated.as_json() | {"other_padding": other, "agrees": self.agrees, "per_class": self.per_class}


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Where the median over all possible seeds lies, with `coverage` percent confidence."""

    low: float
    high: float
    coverage: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What the seeds' trainings took: medians of a seed, and all of them together."""

    seconds: float
    gpu_hours: float | None
    """None: not all were on GPUs."""
    gpu_hours_all: float | None
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """A GPU's memory in training."""

    gib: float
    pictures: float
    """On the GPU at once."""
    device: str
    source: Literal["benchmark", "trainings"]
    comparable: bool
    """Whether the published figure is of as many pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Inference, one picture at a time."""

    fps: float
    device: str
    comparable: bool
    """Whether that is the published device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known about a row. Figures are percent; they and the seeds' values have the tables' two decimals."""

    dataset: str
    task: Task
    primary: str
    checkpoint_rule: Literal["last", "best", "unknown"]
    decides: Which
    status: Literal["not run", "trained", "out of date", "incomplete", "finished"]
    """trained: not evaluated yet. out of date: the figures belong to an earlier training. incomplete: a seed failed,
    diverged, was stopped or has no result."""
    planned_seeds: int
    verdict: Verdict
    margin: float
    """How far from the published figure a row counts as equal, in points."""
    median: Figures
    """A figure that is None in any evaluated seed has no median and no range."""
    range: Mapping[str, tuple[float, float] | None]
    median_interval: Interval | None
    median_seed: int | None
    published: Mapping[str, Any]
    published_authors: Mapping[str, Any]
    judged_by: Literal["published", "published_authors"]
    """Which of the two `verdict` and `difference` are of."""
    difference: Mapping[str, float]
    """The median less the published figure."""
    baseline: Baseline | None
    published_checkpoint: PublishedFacts | None
    """That which is called as the row."""
    other_checkpoints: Mapping[str, PublishedFacts]
    """The row's others, by name."""
    seeds: tuple[SeedFacts, ...]
    cost: Cost | None = None
    memory: Memory | None = None
    speed: Speed | None = None
    benchmark: Benchmark | None = None
    registered: Registration | None = None
    parameters: int | None = None
    """Of the network; None: nobody has counted them."""
    precision: str = ""
    """Where the row computes otherwise than the published recipe (`precision_of`)."""
    mlflow_run_id: str | None = None
    """The row's own run."""
    mlflow_experiment_id: str | None = None
    """Of the experiment that holds all rows."""

    @property
    def reference(self) -> Mapping[str, Any]:
        """The figures that the row is judged by."""
        return self.published if self.judged_by == "published" else self.published_authors

    def as_json(self) -> dict[str, Any]:
        """The row in results.json."""
        facts = asdict(self)
        facts["verdict"]["margin"] = facts.pop("margin")
        facts["seeds"] = [seed.as_json() for seed in self.seeds]
        if self.baseline:
            facts["baseline"] = {"class": self.baseline.class_name, **self.baseline.figures}
        if self.published_checkpoint:
            facts["published_checkpoint"] = self.published_checkpoint.as_json()
        facts["other_checkpoints"] = {name: each.as_json() for name, each in self.other_checkpoints.items()}
        if self.memory:
            facts["memory"]["from"] = facts["memory"].pop("source")
        if self.benchmark:  # the device and libraries stand for themselves; `training` says why it is missing
            measured = facts["benchmark"]
            skipped = measured.pop("skipped")
            measured |= {name: measured["environment"].pop(name) for name in ("device", "libraries")}
            measured["training"] = measured["training"] or {"skipped": skipped}
        return facts


def row_facts(row: Row, results: Path, settings: VerdictConfig) -> Facts:
    """What `results` say about a row.

    ValueError when a result file is torn, of another version's layout, or of another task than the row.
    """
    evaluated = of_row(Evaluation, row, results)
    trained = of_row(TrainingResult, row, results)
    benchmark = of_row(Benchmark, row, results)
    checked = of_row(PublishedEvaluation, row, results)
    registered = of_row(Registration, row, results)
    first = primary(row.task)
    decides: Which = evaluated.decides if evaluated else "best" if row.checkpoint_rule == "best" else "last"
    seeds = _seeds(evaluated, trained, row.task, decides)
    done = [seed for seed in seeds if seed.checkpoints]
    figures = _by_figure(done, row.task)
    median = {name: None if values is None else statistics.median(values) for name, values in figures.items()}
    values = figures.get(first) or []
    status = _status(row, seeds, evaluated, trained)
    failed = sum(seed.status in ENDED_BADLY for seed in seeds)
    verdict = row_verdict(row, [seed.figures.get(first) for seed in done], failed, settings)
    facts = Facts(
        dataset=row.dataset,
        task=row.task,
        primary=first,
        checkpoint_rule=evaluated.checkpoint_rule if evaluated else row.checkpoint_rule,
        decides=decides,
        status=status,
        planned_seeds=len({seed.seed for seed in seeds} | set(row.seeds)),
        verdict=verdict if status != "not run" else replace(verdict, decision="not run"),
        margin=settings.margin_points,
        median=median,
        range={name: None if known is None else (min(known), max(known)) for name, known in figures.items()},
        median_interval=_median_interval(values, settings.coverage),
        median_seed=_nearest(done, first, statistics.median(values)) if values else None,
        published=dict(row.published),
        published_authors=dict(row.published_authors),
        judged_by=row.figures,
        difference=_difference(median, row.reference),
        baseline=_baseline(evaluated, row.task),
        published_checkpoint=_published_checkpoint(checked, row.task) if checked else None,
        other_checkpoints={
            name: _published_checkpoint(each, row.task) for name, each in other_checkpoints(row, results).items()
        },
        seeds=tuple(seeds),
    )
    rounded: Facts = _rounded(facts)
    return replace(
        rounded,
        cost=_cost(seeds),
        memory=_memory(row, seeds, benchmark),
        speed=_speed(row, benchmark),
        benchmark=benchmark,
        registered=registered,
        parameters=benchmark.parameters if benchmark else evaluated.parameters if evaluated else None,
        precision=precision_of(row),
        mlflow_run_id=evaluated.mlflow_run_id if evaluated else None,
        mlflow_experiment_id=evaluated.mlflow_experiment_id if evaluated else None,
    )


def precision_of(row: Row) -> str:
    """How a row computes: in training, and in tests if that is another way; empty: both as in the published recipe."""
    training = row.train.precision + ("" if row.train.tf32 == "convolutions" else f", TF32 {row.train.tf32}")
    tests = "" if row.test.precision == row.train.precision else f"; tests {row.test.precision}"
    return "" if (training, tests) == ("float32", "") else training + tests


def counts(rows: Mapping[str, Facts]) -> dict[str, int]:
    """How many of the rows that others have published figures of have each verdict, in the order of VERDICTS."""
    decisions = [facts.verdict.decision for facts in published_rows(rows).values()]
    return {decision: decisions.count(decision) for decision in VERDICTS}


def published_rows(rows: Mapping[str, Facts]) -> dict[str, Facts]:
    """The rows of published tables; the others are a user's own."""
    return {name: facts for name, facts in rows.items() if facts.published or facts.published_authors}


def short_device(device: str, *, gpu: bool = True) -> str:
    """A device as tables name it: "NVIDIA A100-SXM4-80GB" -> "A100"; any processor -> "CPU"."""
    if not gpu:
        return "CPU"
    model = re.sub(r"^(NVIDIA |Tesla |GeForce |AMD |Instinct )+", "", device)
    part = re.search(r" MIG \S+", model)  # a part of a GPU is another device
    return re.split(r"-| \d+GB| PCIe| MIG", model)[0] + (part[0] if part else "")


def is_of_other_settings(row: Row, trained: TrainingResult) -> bool:
    """Whether trainings are of other settings than the row has now."""
    return trained.settings != settings_key(row)


def current_training(row: Row, *, results: Path = RESULTS) -> TrainingResult:
    """The row's trainings. ValueError where there are none, or they are of other settings than the row has now."""
    trained = read_result(TrainingResult, row.name, results=results)
    if is_of_other_settings(row, trained):
        raise ValueError(
            f"{result_path(TrainingResult, row.name, results=results)} is of other settings than row {row.name} has "
            f"in params.yaml; train the row with: dvc repro train@{row.name}"
        )
    return trained


def of_row(result_type: type[_Result], row: Row, results: Path) -> _Result | None:
    """The row's result of a type, or None where the stage has not run.

    ValueError with the command that makes it again when it cannot be read, or is of another task than the row.
    """
    result = find_result(result_type, row.name, results=results)
    task = getattr(result, "task", row.task)
    if task != row.task:
        raise ValueError(
            f"{result_path(result_type, row.name, results=results)} is of the task {task}, but row {row.name} is "
            f"{row.task} now; make it again with: {made_by(result_type, row.name)}"
        )
    return result


def _names(task: str) -> tuple[str, ...]:
    """Figures a checkpoint may have."""
    return (*FIGURES[task], MS_FLIP)


def _percent(figures: Figures, task: str) -> dict[str, float | None]:
    return {name: percent(figures[name]) for name in _names(task) if name in figures}


def _per_class(metrics: Mapping[str, Figures]) -> dict[str, dict[str, float | None]]:
    return {metric: {name: percent(value) for name, value in values.items()} for metric, values in metrics.items()}


def _by_figure(seeds: Sequence[SeedFacts], task: str) -> dict[str, list[float] | None]:
    """The seeds' values of every figure that one of them has; None where another has none."""
    return {
        name: _all_known([seed.figures.get(name) for seed in seeds])
        for name in _names(task)
        if any(name in seed.figures for seed in seeds)
    }


def _difference(median: Mapping[str, float | None], published: Mapping[str, Any]) -> dict[str, float]:
    """By how much the medians exceed the published figures, where both are known."""
    known = {name: value for name, value in median.items() if value is not None and name in published}
    return {name: value - published[name] for name, value in known.items()}


def _median_interval(values: Sequence[float], coverage: float) -> Interval | None:
    found = median_interval(values, coverage) if values else None
    return Interval(low=found[0], high=found[1], coverage=100 * found[2]) if found else None


def _all_known(values: Sequence[float | None]) -> list[float] | None:
    """The values; None as soon as one is."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _nearest(seeds: Sequence[SeedFacts], figure: str, median: float) -> int:
    """The seed whose figure, which all have, is nearest to the median; of equals, the first."""
    return min(seeds, key=lambda seed: abs((seed.figures[figure] or 0.0) - median)).seed


def _baseline(evaluated: Evaluation | None, task: str) -> Baseline | None:
    found = evaluated.baseline if evaluated else None
    return replace(found, figures=_percent(found.figures, task)) if found else None


def _published_checkpoint(checked: PublishedEvaluation, task: str) -> PublishedFacts:
    return PublishedFacts(
        evaluated=_padded(checked.evaluated, task),
        other_padding=_padded(checked.other_padding, task) if checked.other_padding else None,
        agrees=checked.agrees,
        per_class=_per_class(checked.evaluated.checkpoint.per_class),
    )


def _padded(evaluated: PaddedEvaluation, task: str) -> PaddedFacts:
    return PaddedFacts(
        figures=_percent(evaluated.checkpoint.figures, task),
        difference=evaluated.difference,
        pad_multiple=evaluated.pad_multiple,
    )


def _seeds(evaluated: Evaluation | None, trained: TrainingResult | None, task: str, decides: Which) -> list[SeedFacts]:
    """Every seed of the evaluation or, without one, of the training."""
    trainings = {entry.run_key: entry for entry in trained.seeds} if trained else {}
    seeds = []
    for entry in (evaluated.seeds if evaluated else ()) or (trained.seeds if trained else ()):
        checkpoints = entry.checkpoints if isinstance(entry, EvaluatedSeed) else None
        training = trainings.get(entry.run_key)
        environment = training.environment if training else None
        gpu = environment is not None and environment.cuda is not None
        worker_s = training.worker_s if training else None
        shown: dict[Which, CheckpointFacts] = {}
        if checkpoints:
            shown = {
                which: CheckpointFacts(step=checkpoints[which].step, figures=_percent(checkpoints[which].figures, task))
                for which in CHECKPOINTS
            }
        seeds.append(
            SeedFacts(
                seed=entry.seed,
                run_key=entry.run_key,
                status=entry.status,
                reason=entry.reason,
                mlflow_run_id=entry.mlflow_run_id,
                checkpoints=shown,
                step=shown[decides].step if shown else None,
                figures=shown[decides].figures if shown else {},
                per_class=_per_class(checkpoints[decides].per_class) if checkpoints else {},
                train_s=training.train_s if training else None,
                worker_s=worker_s,
                workers=training.workers if training else None,
                images_per_s=training.images_per_s if training else None,
                peak_memory_mib=training.peak_memory_mib if training else None,
                reused=training.reused if training else None,
                device=environment.device if environment else None,
                gpu=gpu,
                gpu_hours=worker_s / 3600 if gpu and worker_s is not None else None,
                below_reference=tuple(
                    replace(point, value=percent(point.value), expected=percent(point.expected))
                    for point in (training.below_reference if training else ())
                ),
            )
        )
    return seeds


def _status(
    row: Row, seeds: Sequence[SeedFacts], evaluated: Evaluation | None, trained: TrainingResult | None
) -> Literal["not run", "trained", "out of date", "incomplete", "finished"]:
    if not evaluated:
        return "trained" if trained else "not run"
    if trained and (
        is_of_other_settings(row, trained)
        or [seed.run_key for seed in trained.seeds] != [seed.run_key for seed in seeds]
    ):
        return "out of date"
    if any(not seed.checkpoints for seed in seeds) or {seed.seed for seed in seeds} != set(row.seeds):
        return "incomplete"
    return "finished"


def _cost(seeds: Sequence[SeedFacts]) -> Cost | None:
    """None: no seed's time is known."""
    timed = [(seed, seed.train_s) for seed in seeds if seed.train_s is not None]
    if not timed:
        return None
    hours = [seed.gpu_hours for seed, _ in timed if seed.gpu_hours is not None]
    on_gpus = len(hours) == len(timed)
    return Cost(
        seconds=statistics.median(train_s for _, train_s in timed),
        gpu_hours=statistics.median(hours) if on_gpus else None,
        gpu_hours_all=sum(hours) if on_gpus else None,
        device=", ".join(dict.fromkeys(short_device(seed.device or "?", gpu=seed.gpu) for seed, _ in timed)),
    )


def _memory(row: Row, seeds: Sequence[SeedFacts], benchmark: Benchmark | None) -> Memory | None:
    """Of benchmark@row, or else the most that a training took.

    Published figures are of one group of pictures a GPU: with another number they say nothing.
    """
    training = benchmark.training if benchmark else None
    source: Literal["benchmark", "trainings"]
    if benchmark and training and training.memory_mib is not None:
        mib, pictures, source = training.memory_mib, float(training.images), "benchmark"
        device = benchmark.environment.device
    else:
        known = [(seed.peak_memory_mib, seed) for seed in seeds if seed.peak_memory_mib is not None]
        if not known:
            return None
        mib, most = max(known, key=lambda each: each[0])
        device, source = most.device or "?", "trainings"
        pictures = row.train.global_batch / (most.workers or 1)
    return Memory(
        gib=mib / 1024,
        pictures=pictures,
        device=short_device(device),
        source=source,
        comparable=pictures == row.train.group_size,
    )


def _speed(row: Row, benchmark: Benchmark | None) -> Speed | None:
    """On the benchmark's device."""
    if not benchmark:
        return None
    device = short_device(benchmark.environment.device, gpu=benchmark.device_type == "cuda")
    return Speed(fps=benchmark.inference.fps, device=device, comparable=device == row.published.get("device"))


def _rounded(value: Any) -> Any:
    """Every float with the tables' two decimals."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _rounded(getattr(value, each.name)) for each in fields(value)})
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_rounded(entry) for entry in value)
    return round(value, 2) + 0.0 if isinstance(value, float) else value  # -0.0 + 0.0 is 0.0
