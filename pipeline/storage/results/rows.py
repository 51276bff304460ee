"""What is known of a row: whether it is ready, its trainings, evaluations, costs and registered models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.params.schema import Task
from pipeline.params.tasks import FIGURES, primary
from pipeline.provenance.environment import Environment

Status = Literal["finished", "diverged", "stopped", "failed"]
"""How a training ended. stopped: by the early warning, where the user wants that."""

Which = Literal["last", "best"]
"""One of a training's two checkpoints; the best is that on validation."""

Figures = Mapping[str, float | None]
"""By name (pipeline.params.tasks), as fractions; None: there was nothing to count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """results/ready/<row>.json: whether the row's other stages are to work."""

    row: str
    run: bool
    needs: tuple[str, ...]
    """What is missing here (pipeline.cost.needs). `run` may be true all the same: for a stage that was asked for by
    name and does without it."""
    settings: str
    """SHA-256 of all settings of the row, its recipe's and preset's included, but `registry`: with others its stages
    run again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerGroupSpan:
    """The workers that went on with a training from one of its steps."""

    from_step: int
    train_s: float
    """What the training had taken before."""
    time_ms: int
    """When they began."""
    workers: int
    nodes: int
    """Ray nodes that they were on."""
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BelowReference:
    """A validation clearly below its reference (pipeline.training.early_warning); both figures are fractions."""

    step: int
    value: float
    reference: Literal["published", "other seeds"]
    expected: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reused:
    """An earlier training that stands for one that has another run key (pipeline.runs.reuse)."""

    run_key: str
    """Of the earlier training."""
    instead_of: str
    reason: str
    differences: tuple[str, ...]
    """In words."""
    reused_s: int
    note: str
    """The file that says so, under the storage root."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedCheckpoint:
    """A checkpoint that a training has left."""

    step: int
    path: str
    """In the run folder."""
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BestCheckpoint(TrainedCheckpoint):
    """The checkpoint that was best on validation."""

    figure: str
    """Which figure it is best at."""
    value: float
    """A fraction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedCheckpoints:
    """The two checkpoints that a training leaves; they may be the same file."""

    last: TrainedCheckpoint
    best: BestCheckpoint

    def __getitem__(self, which: Which) -> TrainedCheckpoint:
        return self.last if which == "last" else self.best


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedSeed:
    """One training of a row. What only a finished one has is None, or empty, of another."""

    seed: int
    run_key: str
    status: Status
    reason: str | None
    """One sentence; None: it finished."""
    run_dir: str
    """Under the storage root."""
    steps: int
    """Of the whole training."""
    checkpoints: TrainedCheckpoints | None
    metrics: Figures
    """Of the last validation."""
    below_reference: tuple[BelowReference, ...]
    peak_memory_mib: float | None
    """Most that a worker's GPU held; None also without GPUs."""
    train_s: float | None
    worker_s: float | None
    """The same times the workers."""
    workers: int | None
    """That made the most of its steps; None: it never got a place."""
    worker_groups: tuple[WorkerGroupSpan, ...]
    images_per_s: float | None
    mlflow_run_id: str | None
    environment: Environment | None
    """None: no worker got as far."""
    reused: Reused | None = None
    """Why a run with another key stands here; None: it has the row's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """results/train/<row>.json."""

    row: str
    dataset: str
    settings: str
    """pipeline.provenance.run_key.settings_key of the row that was trained."""
    seeds: tuple[TrainedSeed, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedCheckpoint:
    """A checkpoint's figures on the validation pictures."""

    key: str
    """Of the evaluation (pipeline.evaluation.evaluate_checkpoint); its folder in the run folder has this name."""
    step: int
    figures: Figures
    per_class: Mapping[str, Figures]
    """Metric (iou, pq, ap) -> class -> fraction; None: the pictures hold nothing of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedCheckpoints:
    """The two checkpoints of a finished seed."""

    last: EvaluatedCheckpoint
    best: EvaluatedCheckpoint

    def __getitem__(self, which: Which) -> EvaluatedCheckpoint:
        return self.last if which == "last" else self.best


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedSeed:
    """One training of a row, evaluated if it finished."""

    seed: int
    run_key: str
    status: Status
    reason: str | None
    mlflow_run_id: str | None
    checkpoints: EvaluatedCheckpoints | None = None
    """None: it did not finish."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """What predicting one class everywhere scores."""

    class_name: str
    figures: Figures


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """results/evaluate/<row>.json."""

    row: str
    dataset: str
    task: Task
    primary: str
    """The figure that is compared first."""
    checkpoint_rule: Literal["last", "best", "unknown"]
    decides: Which
    """The checkpoint whose figures are the row's."""
    seeds: tuple[EvaluatedSeed, ...]
    median: Figures
    """Of the finished seeds; None as soon as one seed lacks a figure."""
    baseline: Baseline | None
    """None: the task's figures cannot be worked out from counts of pixels, or there are no training pictures."""
    overlays: tuple[str, ...]
    """Under the storage root."""
    parameters: int | None = None
    """Of the network; None: an earlier version did not count them."""
    mlflow_run_id: str | None = None
    """The row's own run; None: no server answered."""
    mlflow_experiment_id: str | None = None
    """Of the experiment that holds all rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedEvaluation:
    """A published checkpoint on pictures that are padded to a multiple of pixels."""

    pad_multiple: int
    """1: not padded."""
    checkpoint: EvaluatedCheckpoint
    difference: Mapping[str, float]
    """Our figures less the published ones, in percent points, where there are both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedEvaluation:
    """results/published/<checkpoint>.json."""

    row: str
    dataset: str
    task: Task
    primary: str
    url: str
    sha256: str
    """Of the file as published."""
    published: Mapping[str, Any]
    """The published figures of it in percent, and what else is printed beside them."""
    evaluated: PaddedEvaluation
    """Padded as the row says."""
    other_padding: PaddedEvaluation | None
    """Padded, of a row that is tested unpadded."""
    agrees: int | None
    """The padding of the two that is nearer to the published figure; None: there is nothing to choose."""
    mlflow_run_id: str | None
    step_s: float | None
    """Median time of a training step by the published log; None: there is no log, or it gives no times."""
    curve: str | None
    """The published training's curve, under the storage root; None: there is no log."""
    checkpoint: str = ""
    """Its entry of `checkpoints`; empty: the row's name."""

    @property
    def name(self) -> str:
        """Its entry of `checkpoints`."""
        return self.checkpoint or self.row


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Durations in seconds: the median and the 10th and 90th of 100."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """Floating-point operations of one forward pass."""

    image_size: tuple[int, int]
    """(height, width) as the network is shown it."""
    forward: int
    counted: str
    """What is counted and how, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceCost:
    """How long pictures take, one at a time, by a network whose gradients take no memory."""

    fps: float
    images: int
    sizes: tuple[tuple[int, int, int], ...]
    """(height, width, how many), the commonest first."""
    memory_mib: float | None
    """Most that tensors took; None: not measured on a GPU."""
    reserved_mib: float | None
    seconds: Spread
    protocol: str
    differs: str
    """How it differs from the measurement of the published speeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCost:
    """How long a training step takes on one device, or on one of several together."""

    step_s: float
    seconds: Spread
    steps: int
    workers: int
    """Devices, whose sums are in the time."""
    groups: int
    """Of each worker."""
    images: int
    """Of each worker."""
    crop: tuple[int, int]
    memory_mib: float | None
    reserved_mib: float | None
    precision: str
    protocol: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """results/benchmark/<row>.json."""

    key: str
    """Of the measurement (pipeline.cost.benchmark.benchmark_key): where it is the same, nothing is measured again."""
    row: str
    dataset: str
    task: Task
    device_type: Literal["cuda", "cpu"]
    threads: int | None
    """None: on a GPU."""
    other_load: float
    """Processes that wanted a core in the minute before."""
    environment: Environment
    parameters: int
    parameters_trained: int
    flops: Operations
    inference: InferenceCost
    training: TrainingCost | None
    skipped: str | None = None
    """Why there is no `training`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """A version of a row's model; somebody may have made it by hand, which leaves all but its number unknown."""

    version: int
    seed: int | None
    run_key: str | None
    figure: str | None
    """Which figure `value` is."""
    value: float | None
    """A fraction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BestVersion(RegisteredVersion):
    """The version that has the alias best."""

    kept: str | None = None
    """Why it kept the alias although it cannot be compared with the row's best; None: it is the row's best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Aliases:
    """Which versions of a row's model have which alias."""

    best: BestVersion
    median: RegisteredVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class Registration:
    """results/register/<row>.json."""

    row: str
    model: str
    aliases: Aliases
    tracking_uri: str
    """Without a password."""


def wrong_training(trained: TrainingResult) -> str:
    """What is wrong with trainings although each value may be, after their file's name; empty: nothing."""
    return _twice([seed.seed for seed in trained.seeds])


def _twice(seeds: Sequence[int]) -> str:
    twice = [str(seed) for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]
    return f"has the seeds {' and '.join(twice)} more than once" if twice else ""


def wrong_evaluation(evaluated: Evaluation) -> str:
    """The same of an evaluation."""
    first = primary(evaluated.task)
    if evaluated.primary != first:
        return f"has the primary figure {evaluated.primary!r}, but that of the task {evaluated.task} is {first!r}"
    if twice := _twice([seed.seed for seed in evaluated.seeds]):
        return twice
    seeds = [seed.checkpoints for seed in evaluated.seeds if seed.checkpoints]
    return _lacking([each for seed in seeds for each in (seed.last, seed.best)], evaluated.task)


def wrong_published(checked: PublishedEvaluation) -> str:
    """The same of a published network's evaluation."""
    padded = [each for each in (checked.evaluated, checked.other_padding) if each]
    return _lacking([each.checkpoint for each in padded], checked.task)


def _lacking(checkpoints: Sequence[EvaluatedCheckpoint], task: Task) -> str:
    for checkpoint in checkpoints:
        for name in FIGURES[task]:
            if name not in checkpoint.figures:
                return f"has no {name!r} of the checkpoint of step {checkpoint.step}"
    return ""
