"""What a stage writes for others to read: results/<stage>/<name>.json, as frozen dataclasses.

These files are what DVC tracks: small, and written whole or not at all. Each holds the version of its layout. A file of
another version is refused with the command that makes it again, and so is one with an unknown, missing or wrong value.
No other module spells a path below results/.

A stage that waits for data, terms or GPUs leaves {"version": ..., "waiting": "why"}: to whoever reads, no result.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pipeline.params.parse import parse
from pipeline.params.schema import Task
from pipeline.params.tasks import FIGURES, primary
from pipeline.provenance.environment import Environment
from pipeline.storage.files import read_json, write_json, write_text

RESULTS = Path("results")
"""The folder of all results, in the working directory."""

Label = Literal["instances", "panoptic", "semantic"]
"""A type of labels that pictures have."""

_Result = TypeVar("_Result")

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
class Source:
    """An archive or folder that a dataset is made of, wherever it lies."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedSource(Source):
    """A source as it lies here."""

    path: str
    """Under the storage root; of a folder that is read where it lies, its folder.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedDataset:
    """results/fetch/<dataset>.json."""

    dataset: str
    sources: tuple[FetchedSource, ...]
    """Empty: the pictures are generated."""
    terms: str
    generate: Mapping[str, int]
    """What generated pictures are like; of other datasets empty."""
    waits: str = ""
    """Why no shards are to be made of them now; empty: they may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One Arrow file."""

    path: str
    """Under the storage root."""
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The shards of a split, in the order of its records."""

    records: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSides:
    """Sides of a split's pictures, in pixels: least, median (the lower of two) and greatest."""

    height: tuple[int, int, int]
    width: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtremeSizes:
    """(height, width) of images at the ends of a split, each of one that there is."""

    smallest: tuple[int, int]
    """Of the fewest pixels."""
    largest: tuple[int, int]
    """Of the most pixels."""
    narrowest: tuple[int, int]
    """Whose longer side is the most times its shorter one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedImages:
    """Validation images whose bytes are those of a training image too."""

    count: int = 0
    first: tuple[str, ...] = ()
    """Names of the first three; with the training image's where that is another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedRecord:
    """A record that is in no shard, because it was wrong."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EmptyThings:
    """Annotated things whose mask has no pixel in their picture: no training sees them."""

    count: int
    first: tuple[str, ...]
    """The first of them: annotation file, annotation, picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """A picture of some records with their labels."""

    path: str
    """Under the storage root."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """results/shard/<dataset>.json: what a dataset's shards hold, and where they lie.

    A field that is added later gets a default, and with that value it leaves the digest as it was.
    """

    dataset: str
    digest: str
    """Of all fields but those of `_TRAINS_NOTHING`; a part of run keys."""
    class_names: tuple[str, ...]
    thing_classes: tuple[str, ...]
    """Classes with countable instances."""
    ignore_label: int
    labels: tuple[Label, ...]
    """That every picture has."""
    pixel_layout: Literal["encoded", "raw"]
    """How pictures and segment ids are stored: as files, or decoded."""
    splits: Mapping[str, Split]
    pixels: Mapping[str, tuple[int, ...]]
    """Of every class, crowds included, by split; so are the other counts."""
    ignored_pixels: Mapping[str, int]
    images: Mapping[str, tuple[int, ...]]
    """That hold a class, for every class."""
    instances: Mapping[str, tuple[int, ...]]
    """Things that are no crowd, of every class."""
    things_per_image: Mapping[str, Mapping[int, int]]
    """Number of things that are no crowd -> pictures with as many."""
    image_sizes: Mapping[str, ImageSides]
    bytes: Mapping[str, int]
    skipped: Mapping[str, tuple[SkippedRecord, ...]]
    sources: tuple[Source, ...]
    """Where they lay is left out."""
    samples: Samples
    terms: str
    empty_things: Mapping[str, EmptyThings] = field(default_factory=dict)
    """Of the splits that have some."""
    left_out: tuple[str, ...] = ()
    """Categories of the annotation files that pictures hold and `class_names` leaves out."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The dataset's settings that shape records (pipeline.data.shards.look.record_settings); empty: not known."""
    extreme_sizes: Mapping[str, ExtremeSizes] = field(default_factory=dict)
    """By split; empty: not known."""
    shared_images: SharedImages = SharedImages()

    def split(self, name: str) -> Split:
        """ValueError where the dataset has no such split."""
        if name not in self.splits:
            raise ValueError(f"dataset {self.dataset} has no split {name}; `splits` in params.yaml names them")
        return self.splits[name]

    def class_names_of(self, task: Task) -> tuple[str, ...]:
        """The classes of a row with this task: the dataset's, or its things alone for an instance row."""
        if task != "instance":
            return self.class_names
        return tuple(name for name in self.class_names if name in self.thing_classes)

    def thing_ids_of(self, task: Task) -> list[int]:
        """Which of the classes of a row with this task are things."""
        return [place for place, name in enumerate(self.class_names_of(task)) if name in self.thing_classes]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedWeights:
    """results/weights/<name>.json. None, and an empty URL: there are none, and the backbone starts at random."""

    name: str
    url: str
    """Where they were downloaded from."""
    source_sha256: str | None
    """Of the file that was downloaded."""
    sha256: str | None
    """Of the converted file."""
    path: str | None
    """The converted file, under the storage root."""
    network: str = ""
    """What is kept of a whole network; empty: they are a backbone's."""


# What rows give


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


_TRAINS_NOTHING = ("digest", "samples", "terms", "empty_things", "settings", "extreme_sizes", "shared_images")
"""Fields of a manifest that its digest leaves out: shards with equal bytes and counts are trained on alike."""


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 of everything in a manifest but the fields that train nothing.

    A field that holds its default is left out: a new one changes no digest until it is used.
    """
    rest = {key: value for key, value in plain(manifest).items() if key not in _TRAINS_NOTHING}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Dataclasses and what is in them as JSON values, without the fields that hold their defaults."""
    if dataclasses.is_dataclass(value):
        held = ((entry, getattr(value, entry.name)) for entry in dataclasses.fields(value))
        return {entry.name: plain(each) for entry, each in held if each != _default(entry)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value


def _default(entry: dataclasses.Field[Any]) -> Any:
    """MISSING: it has none."""
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def _wrong_manifest(manifest: Manifest) -> str:
    counts = ("pixels", "images", "instances")
    if not manifest.splits:
        return "has no splits"
    for name in ("ignored_pixels", "things_per_image", "image_sizes", "bytes", "skipped", *counts):
        if {*getattr(manifest, name)} != {*manifest.splits}:
            return f"has other splits in {name} than in splits"
    for name in counts:
        for split, values in getattr(manifest, name).items():
            if len(values) != len(manifest.class_names):
                return f"has {name} of split {split} for {len(values)} classes, but {len(manifest.class_names)} classes"
    if manifest_digest(manifest) != manifest.digest:
        return "was altered: its digest is another"
    return ""


def _wrong_weights(weights: ConvertedWeights) -> str:
    given = {name: bool(getattr(weights, name)) for name in ("url", "source_sha256", "sha256", "path")}
    return "" if len({*given.values()}) == 1 else f"has {' and '.join(n for n, there in given.items() if there)} alone"


def _wrong_training(trained: TrainingResult) -> str:
    return _twice([seed.seed for seed in trained.seeds])


def _twice(seeds: Sequence[int]) -> str:
    twice = [str(seed) for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]
    return f"has the seeds {' and '.join(twice)} more than once" if twice else ""


def _wrong_evaluation(evaluated: Evaluation) -> str:
    first = primary(evaluated.task)
    if evaluated.primary != first:
        return f"has the primary figure {evaluated.primary!r}, but that of the task {evaluated.task} is {first!r}"
    if twice := _twice([seed.seed for seed in evaluated.seeds]):
        return twice
    seeds = [seed.checkpoints for seed in evaluated.seeds if seed.checkpoints]
    return _lacking([each for seed in seeds for each in (seed.last, seed.best)], evaluated.task)


def _wrong_published(checked: PublishedEvaluation) -> str:
    padded = [each for each in (checked.evaluated, checked.other_padding) if each]
    return _lacking([each.checkpoint for each in padded], checked.task)


def _lacking(checkpoints: Sequence[EvaluatedCheckpoint], task: Task) -> str:
    for checkpoint in checkpoints:
        for name in FIGURES[task]:
            if name not in checkpoint.figures:
                return f"has no {name!r} of the checkpoint of step {checkpoint.step}"
    return ""


class _File(NamedTuple):
    """Where a kind of result lies, and how its file is read."""

    stage: str
    version: int
    """Rises whenever the fields or their meaning change."""
    wrong: Callable[[Any], str] = lambda result: ""
    """What is wrong with a result although each value may be, after the name of its file; empty: nothing."""
    of: Literal["row", "dataset", "name"] = "row"
    """The field that holds what its file is called after."""


_FILES: Mapping[type, _File] = {
    Ready: _File("ready", 2),
    FetchedDataset: _File("fetch", 1, of="dataset"),
    Manifest: _File("shard", 2, _wrong_manifest, of="dataset"),
    ConvertedWeights: _File("weights", 1, _wrong_weights, of="name"),
    TrainingResult: _File("train", 2, _wrong_training),
    Evaluation: _File("evaluate", 1, _wrong_evaluation),
    PublishedEvaluation: _File("published", 1, _wrong_published, of="name"),
    Benchmark: _File("benchmark", 3),
    Registration: _File("register", 1),
}


PLOTS: Mapping[str, tuple[str, ...]] = {
    "classes": ("class", "split", "pixels", "images", "instances"),
    "curves": ("training", "figure", "step", "value"),
    "confusion": ("actual", "predicted", "share"),
}
"""What `dvc plots` draws, results/plots/<plot>/<name>.csv, with the columns of each file."""
_PLOTS_OF: Mapping[type, tuple[str, ...]] = {Manifest: ("classes",), Evaluation: ("curves", "confusion")}


def result_path(result_type: type, name: str, *, results: Path = RESULTS) -> Path:
    """The file of a stage's result for a row, dataset or entry of weights."""
    return results / _FILES[result_type].stage / f"{name}.json"


def made_by(result_type: type, name: str) -> str:
    """The command that makes a result again."""
    return f"dvc repro -f {_FILES[result_type].stage}@{name}"


def read_result(result_type: type[_Result], name: str, *, results: Path = RESULTS) -> _Result:
    """A stage's result. ValueError, with the command that makes it, where it is missing or waited for, torn, of another
    version of its layout, holds a key or value that it should not, or contradicts itself."""
    path = result_path(result_type, name, results=results)
    content = read_json(path, made_by=made_by(result_type, name))
    if why := _waits(content):
        raise ValueError(f"{path} waits for {why}; when that is here: dvc repro {_FILES[result_type].stage}@{name}")
    return _checked(result_type, name, content, path)


def find_result(result_type: type[_Result], name: str, *, results: Path = RESULTS) -> _Result | None:
    """`read_result`, or None where the stage has not run, or waits."""
    path = result_path(result_type, name, results=results)
    if not path.exists():
        return None
    content = read_json(path, made_by=made_by(result_type, name))
    return None if _waits(content) else _checked(result_type, name, content, path)


def sound_result(result_type: type[_Result], name: str, *, results: Path = RESULTS) -> _Result | None:
    """`find_result`, or None where the file is torn or of another version: for whoever asks what there is to go on."""
    try:
        return find_result(result_type, name, results=results)
    except ValueError:
        return None


def _checked(result_type: type[_Result], name: str, content: Any, path: Path) -> _Result:
    """A result of what its file holds."""
    command, file = made_by(result_type, name), _FILES[result_type]
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object; make it again with: {command}")
    version = content.pop("version", None)
    if type(version) is not int or version != file.version:
        found = "no version of its layout" if version is None else f"version {reprlib.repr(version)} of its layout"
        raise ValueError(f"{path} has {found}, but version {file.version} is needed; make it again with: {command}")
    try:
        result = parse(result_type, content, str(path), in_file=True)
    except ValueError as error:
        raise ValueError(f"{error}; make it again with: {command}") from None
    if (of := getattr(result, file.of)) != name:
        raise ValueError(f"{path} is of {file.of} {of!r}, not of {name}; make it again with: {command}")
    if wrong := file.wrong(result):
        raise ValueError(f"{path} {wrong}; make it again with: {command}")
    return result


def waiting(result_type: type, name: str, *, results: Path = RESULTS) -> str:
    """What a stage waits for; empty: it has run, or was never begun."""
    return waiting_in(result_path(result_type, name, results=results))


def waiting_in(path: Path) -> str:
    """`waiting`, of a file below results/."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    return _waits(content)


def _is_torn(path: Path) -> bool:
    """Whether a file is no JSON, as a copy that was cut short."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return False
    except (ValueError, RecursionError):
        return True
    return False


def _waits(content: Any) -> str:
    why = content.get("waiting") if isinstance(content, dict) else None
    return why if isinstance(why, str) else ""


def write_waiting(result_type: type, name: str, why: str, *, results: Path = RESULTS) -> None:
    """Say in a result's file what its stage waits for. A file that holds anything else is left as it is, unless it is
    torn."""
    path = result_path(result_type, name, results=results)
    if not path.exists() or waiting(result_type, name, results=results) or _is_torn(path):
        write_json(path, {"version": _FILES[result_type].version, "waiting": why})
    if result_type is Evaluation and not (results / "metrics" / f"{name}.json").exists():
        write_metrics(name, {}, results=results)
    for plot in _PLOTS_OF.get(result_type, ()):
        if not plot_path(plot, name, results=results).exists():
            write_plot(plot, name, (), results=results)


def write_result(result: Any, name: str, *, results: Path = RESULTS) -> Path:
    """Write a stage's result, whole or not at all; its path."""
    path = result_path(type(result), name, results=results)
    write_json(path, {"version": _FILES[type(result)].version, **dataclasses.asdict(result)})
    return path


def write_metrics(row: str, metrics: Mapping[str, Mapping[str, float]], *, results: Path = RESULTS) -> None:
    """Write what `dvc metrics` and `dvc exp show` show of a row: results/metrics/<row>.json."""
    write_json(results / "metrics" / f"{row}.json", metrics)


def plot_path(plot: str, name: str, *, results: Path = RESULTS) -> Path:
    """The table of a row or dataset that `dvc plots` draws; `plot` is one of PLOTS."""
    return results / "plots" / plot / f"{name}.csv"


def write_plot(plot: str, name: str, lines: Iterable[Sequence[object]], *, results: Path = RESULTS) -> None:
    """Write such a table. Without lines there is nothing to draw yet."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([PLOTS[plot], *lines])
    write_text(plot_path(plot, name, results=results), text.getvalue())


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """results/package.json, in a project without the code: the package that makes its results."""

    name: str
    version: str | None
    sha256: str
    """Of all its files (pipeline.provenance.package)."""


PACKAGE = RESULTS / "package.json"
"""The file of a project that says which package makes its results: what the code is in a clone to DVC."""


def write_package(package: Package, *, path: Path = PACKAGE) -> None:
    """Write results/package.json, whole or not at all."""
    write_json(path, dataclasses.asdict(package))


def names_of(result_type: type, *, results: Path = RESULTS) -> Iterator[str]:
    """The rows, datasets or weights that have such a result, sorted."""
    names = (path.stem for path in sorted((results / _FILES[result_type].stage).glob("*.json")))
    return (name for name in names if not waiting(result_type, name, results=results))


def every_result(results: Path = RESULTS) -> Iterator[Any]:
    """All results as JSON, whatever their kind and version: what a file of an earlier version names is kept too."""
    return (content for _, content in result_files(results))


def result_files(results: Path = RESULTS) -> Iterator[tuple[Path, Any]]:
    """`every_result`, each with its file."""
    stages = {file.stage for file in _FILES.values()}
    for path in sorted(results.glob("*/*.json")):
        if path.parent.name in stages and not waiting_in(path):
            yield path, read_json(path, made_by=f"dvc repro -f {path.parent.name}@{path.stem}")
