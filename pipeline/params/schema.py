"""params.yaml, parsed once into frozen dataclasses. Unknown keys are errors that name the nearest known one."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from m2f.config import ModelConfig, OptimizerConfig, ScheduleConfig

_T = typing.TypeVar("_T")

Task = Literal["semantic", "panoptic", "instance"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """Where pictures come from and what their labels mean."""

    layout: Literal["folder", "cityscapes", "coco", "shapes"]
    """How images and labels are found; `folder` is ADE20K's: images/<split>, annotations/<split>."""
    sources: tuple[str, ...] = ()
    """Archives (.zip), a folder, or http(s) URLs of archives; relative paths start at params.yaml. A URL that does not
    end with the archive's name is followed by it: https://host/file?id=3#pictures.zip."""
    bytes: tuple[int, ...] = ()
    """Length of each source where published, in the same order; 0: not known. Empty: none is."""
    sha256: tuple[str, ...] = ()
    """Digest of each source where known, in the same order; checked before anything is read."""
    mirrors: tuple[str, ...] = ()
    """Looked into before a URL in `sources` is asked, in this order: folders (relative paths start at params.yaml) that
    hold an archive under its name, or the dataset unpacked; http(s) URLs to which the archive's name is added."""
    login: Literal["", "cityscapes"] = ""
    """Site whose login form comes before the URLs in `sources` (pipeline.storage.download); credentials come from the
    environment or netrc."""
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "training", "val": "validation"})
    """Our split names and the folders that hold them."""
    class_names: tuple[str, ...] = ()
    ignore_label: int = 255
    """Label of pixels that belong to no class, after `label_offset`."""
    label_offset: int = 0
    """Added to every stored label id; -1 for ADE20K, whose 0 (becoming 255) is "unlabelled"."""
    thing_classes: tuple[str, ...] = ()
    """Classes with countable instances, for panoptic labels."""
    terms: str = ""
    """Licence and terms of use, shown before a download."""
    accept_terms: bool = False
    """Must be true before a dataset that carries terms is downloaded."""
    shard_mib: int = 64
    """Approximate size of one Arrow file; a shard is what one process makes at a time."""
    pixels: Literal["encoded", "raw"] = "encoded"
    """How shards hold pictures. encoded: as published; raw: decoded, many times the bytes, but a crop is read without
    the rest of its picture."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens at a record that does not decode or whose labels are wrong. skip: it is left out and listed in the
    manifest; more than a twentieth of a split stops all the same."""
    generate: Mapping[str, int] = field(default_factory=dict)
    """`shapes` only: pictures per split (`train`, `val`), `height`, `width`, `seed`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """Published weights a backbone starts from."""

    url: str = ""
    """Where they are published; empty: none, and the backbone starts at random."""
    layout: Literal["torchvision", "swin"] = "torchvision"
    """Whose names the file uses; swin: the original's or mmsegmentation's."""
    sha256_prefix: str = ""
    """First digits of the file's SHA-256, as published in its name."""
    terms: str = ""
    """Licence of the weights, and terms of the pictures they were trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """The recipe's training pictures: resize, crop, flip, photometric distortion."""

    crop: tuple[int, int]
    """(height, width) of the crop; smaller pictures are padded right and bottom."""
    short_sides: tuple[int, ...] = ()
    """One is drawn uniformly; the picture's short side is scaled to it. Empty: `jitter` scales instead."""
    long_side_max: int = 0
    """Scaling to a short side stops where the long side would exceed this."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter: the picture is scaled to fit, keeping its aspect, into `crop` times a factor drawn uniformly
    from this range (COCO rows: 0.1 to 2)."""
    max_label_share: float = 0.75
    """A crop is drawn again, at most 10 times, while its commonest label holds this share or more; 1: never."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. A step is `groups` groups of `group_size` pictures, however many workers there are."""

    steps: int
    augmentation: AugmentationConfig
    groups: int = 8
    """The recipe's GPUs: class losses are normalised per group, gradients averaged over groups."""
    group_size: int = 2
    """Pictures per group."""
    pictures: Literal["all", "with_things"] = "all"
    """with_things: only those with an annotated thing and both sides of at least 32 px (the COCO rows)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    val_interval: int = 5000
    """Steps between validations (and at the end)."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints (and at every validation)."""
    log_every: int = 50
    """Steps between points of the tracked curves."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: autocast of the network; losses and matching stay float32."""
    tf32: Literal["off", "convolutions", "all"] = "convolutions"
    """Which float32 products a GPU may take in TF32 (10 bits of mantissa instead of 23); convolutions: cuDNN's only, as
    PyTorch does unless told otherwise, and so the published trainings."""

    @property
    def global_batch(self) -> int:
        """Pictures per step."""
        return self.groups * self.group_size


@dataclass(frozen=True, kw_only=True, slots=True)
class MsFlipConfig:
    """Multi-scale and flip: semantic scores averaged over views of several sizes, each also mirrored."""

    short_sides: tuple[int, ...]
    long_side_max: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TestConfig:
    """How validation pictures are shown to the network, keeping their aspect, and what is made of its answer."""

    short_side: int
    long_side_max: int
    pad_multiple: int = 32
    """Pictures are padded right and bottom to a multiple of this; 1: not at all (the 640 x 640 rows)."""
    ms_flip: MsFlipConfig | None = None
    """The second column of the semantic tables; None: left out."""
    score_threshold: float = 0.8
    """Panoptic: class probability below which a query is left out."""
    overlap_threshold: float = 0.8
    """Panoptic: share of its own mask that a query must win."""
    max_instances: int = 100
    """Instances kept of a picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyWarningConfig:
    """When a training counts as clearly behind the published curve or its sister seeds; shapes no weights."""

    points: float = 5.0
    """Percent points of the row's first figure by which a validation must be behind."""
    after: float = 0.25
    """Share of the steps before which nothing is judged."""
    stop: bool = False
    """Whether a training that is behind at two validations in a row is stopped; switched off, it goes on again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a results table."""

    name: str
    dataset: str
    model: ModelConfig
    train: TrainConfig
    test: TestConfig
    weights: str = "none"
    """Entry of `weights` the backbone starts from; none: random."""
    task: Task = "semantic"
    """What is trained and reported (pipeline.params.tasks)."""
    checkpoint_rule: Literal["last", "best", "unknown"] = "unknown"
    """Which checkpoint the published figure is of; unknown: both are shown, and the last is compared."""
    seeds: tuple[int, ...] = (0,)
    max_gpu_hours: float = 8.0
    """A seed whose estimate exceeds this does not start."""
    early_warning: EarlyWarningConfig = field(default_factory=EarlyWarningConfig)
    published: Mapping[str, Any] = field(default_factory=dict)
    """The published figures, metrics in percent; empty: none."""
    published_trainings: int = 1
    """How many trainings the published figures are the median of; 1: they are a single training's."""
    published_authors: Mapping[str, Any] = field(default_factory=dict)
    """The original authors' figures, shown beside and not judged against."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedConfig:
    """A row's published checkpoint: the fastest check that network, conversion, test sizes and metric are right."""

    dataset: str
    """The row's dataset (DVC cannot look it up)."""
    url: str
    """The .pth; the last part of its name is the beginning of its SHA-256, as mmsegmentation publishes them."""
    log_url: str = ""
    """The training log, JSON lines; empty: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictConfig:
    """By what rule a row's seeds are judged against its published figure (docs/verdicts.md): fixed before they run."""

    margin_points: float = 1.0
    """Percent points by which the recipe here may truly differ from the published one and still count as the same."""
    coverage: float = 0.9
    """Of the interval in which the seeds let the published figure be expected; "reproduced", "above" and "below" are
    each wrong at most (1 - coverage) / 2 of the time."""
    assumed_spread_points: float = 1.0
    """Standard deviation between seeds, in percent points, taken where they show none (fewer than three seeds, or equal
    figures)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """All of params.yaml."""

    datasets: Mapping[str, DatasetConfig]
    rows: Mapping[str, Row]
    weights: Mapping[str, WeightsConfig] = field(default_factory=dict)
    checkpoints: Mapping[str, PublishedConfig] = field(default_factory=dict)
    """By row."""
    verdict: VerdictConfig = field(default_factory=VerdictConfig)

    def row(self, name: str) -> Row:
        """The row called `name`; ValueError with the nearest name otherwise."""
        return pick(self.rows, name, "row", "params.yaml")

    def dataset(self, name: str) -> DatasetConfig:
        """The dataset called `name`; ValueError with the nearest name otherwise."""
        return pick(self.datasets, name, "dataset", "params.yaml")


def pick(table: Mapping[str, _T], name: str, kind: str, where: str) -> _T:
    """`table[name]`, or a ValueError that lists the nearest known names."""
    if name not in table:
        raise ValueError(f"{where}: no {kind} is called {name!r}; {_nearest(name, table)}")
    return table[name]


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml. ValueError says which key is wrong and what is known."""
    import yaml

    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; run from the project's folder or give --params") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return parse_params(tree, str(path))


def parse_params(tree: Any, where: str = "params.yaml") -> Params:
    """Params from a parsed YAML tree."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where}: expected the sections {_names(Params)}, found {type(tree).__name__}")
    rows = {
        str(name): {"name": str(name), **row} if isinstance(row, Mapping) else row
        for name, row in (tree.get("rows") or {}).items()
    }
    params = parse(Params, {**tree, "rows": rows}, where, in_file=True)
    for name, data in params.datasets.items():
        _check_dataset(data, f"{where}: datasets.{name}")
    for name, row in params.rows.items():
        at = f"{where}: rows.{name}"
        data = pick(params.datasets, row.dataset, "dataset", at)
        if row.weights != "none":
            pick(params.weights, row.weights, "weights entry", at)
        kind, names = ("thing classes", data.thing_classes) if row.task == "instance" else ("classes", data.class_names)
        if len(names) != row.model.num_classes:
            raise ValueError(
                f"{at}.model.num_classes is {row.model.num_classes}, "
                f"but dataset {row.dataset} names {len(names)} {kind}"
            )
        _check_row(row, at)
    _check_verdict(params.verdict, f"{where}: verdict")
    for name, checkpoint in params.checkpoints.items():
        dataset = pick(params.rows, name, "row", f"{where}: checkpoints").dataset
        if checkpoint.dataset != dataset:
            raise ValueError(
                f"{where}: checkpoints.{name}.dataset is {checkpoint.dataset!r}, but row {name} is on {dataset!r}"
            )
    return params


def _check_dataset(data: DatasetConfig, at: str) -> None:
    for key, unit in (("bytes", "lengths"), ("sha256", "digests")):
        count = len(getattr(data, key))
        if count not in (0, len(data.sources)):
            raise ValueError(f"{at}.{key} lists {count} {unit} for {len(data.sources)} sources; give one each, or none")
    if any(size < 0 for size in data.bytes):
        raise ValueError(f"{at}.bytes is {list(data.bytes)}; a length is above 0, or 0 where it is not known")
    for key in ("sources", "mirrors"):
        for index, place in enumerate(getattr(data, key)):
            if "://" in place and "@" in urlsplit(place).netloc:  # not quoted: this message may be logged
                raise ValueError(
                    f"{at}.{key}[{index}] holds a user name or password, and params.yaml is for everybody to read; "
                    "take it out (docs/data.md says where credentials belong)"
                )


def _check_verdict(verdict: VerdictConfig, at: str) -> None:
    for key in ("margin_points", "assumed_spread_points"):
        if not 0 < getattr(verdict, key) < 100:
            raise ValueError(f"{at}.{key} is {getattr(verdict, key)}; it must be above 0 and below 100 percent points")
    if not 0.5 <= verdict.coverage < 1:
        raise ValueError(f"{at}.coverage is {verdict.coverage}; it must be at least 0.5 and below 1")


def _check_row(row: Row, at: str) -> None:
    train, augmentation, crop = row.train, row.train.augmentation, row.train.augmentation.crop
    if any(side <= 0 or side % 32 for side in crop):
        raise ValueError(f"{at}.train.augmentation.crop is {list(crop)}; both sides must be multiples of 32")
    if bool(augmentation.short_sides) == (augmentation.jitter is not None):
        raise ValueError(f"{at}.train.augmentation must have either short_sides or jitter")
    if augmentation.short_sides and augmentation.long_side_max < max(augmentation.short_sides):
        raise ValueError(
            f"{at}.train.augmentation.long_side_max is {augmentation.long_side_max}; "
            f"it must be at least the largest of short_sides, {max(augmentation.short_sides)}"
        )
    if augmentation.jitter is not None and not 0 < augmentation.jitter[0] <= augmentation.jitter[1]:
        raise ValueError(f"{at}.train.augmentation.jitter is {list(augmentation.jitter)}; it must rise from above 0")
    optimizer, loss = train.optimizer, row.model.loss
    for key, value, right, need in (
        ("train.optimizer.lr", optimizer.lr, optimizer.lr > 0, "above 0"),
        ("train.optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0, "0 or more"),
        ("train.optimizer.backbone_lr_factor", (factor := optimizer.backbone_lr_factor), factor >= 0, "0 or more"),
        ("train.optimizer.betas", list(optimizer.betas), all(0 <= b < 1 for b in optimizer.betas), "0 to below 1"),
        ("train.optimizer.eps", optimizer.eps, optimizer.eps > 0, "above 0"),
        ("train.optimizer.clip_norm", optimizer.clip_norm, optimizer.clip_norm > 0, "above 0"),
        ("model.loss.points", loss.points, loss.points >= 1, "at least 1"),
        ("model.loss.oversample", loss.oversample, loss.oversample >= 1, "at least 1"),
        ("model.loss.importance", loss.importance, 0 <= loss.importance <= 1, "between 0 and 1"),
        ("model.loss.class_weight", loss.class_weight, loss.class_weight >= 0, "0 or more"),
        ("model.loss.mask_weight", loss.mask_weight, loss.mask_weight >= 0, "0 or more"),
        ("model.loss.dice_weight", loss.dice_weight, loss.dice_weight >= 0, "0 or more"),
        ("model.loss.no_object_weight", loss.no_object_weight, loss.no_object_weight > 0, "above 0"),
    ):
        if not right:
            raise ValueError(f"{at}.{key} is {value}; it must be {need}")
    milestones = train.schedule.milestones
    if list(milestones) != sorted(set(milestones)) or (train.schedule.name == "multistep") != bool(milestones):
        raise ValueError(
            f"{at}.train.schedule.milestones is {list(milestones)}; "
            "they must rise, and only the schedule multistep has them"
        )
    for key in ("steps", "groups", "group_size", "val_interval", "checkpoint_interval", "log_every"):
        if getattr(train, key) < 1:
            raise ValueError(f"{at}.train.{key} is {getattr(train, key)}; it must be at least 1")
    if row.published_trainings < 1:
        raise ValueError(f"{at}.published_trainings is {row.published_trainings}; it must be at least 1")
    if row.early_warning.points <= 0:
        raise ValueError(f"{at}.early_warning.points is {row.early_warning.points}; it must be above 0")
    if not 0 <= row.early_warning.after <= 1:
        raise ValueError(f"{at}.early_warning.after is {row.early_warning.after}; it must be between 0 and 1")
    if not row.seeds or len(set(row.seeds)) != len(row.seeds):
        raise ValueError(f"{at}.seeds is {list(row.seeds)}; it must list at least one seed, none twice")
    if row.test.pad_multiple != 1 and (row.test.pad_multiple < 1 or row.test.pad_multiple % 32):
        raise ValueError(f"{at}.test.pad_multiple is {row.test.pad_multiple}; it must be 1 or a multiple of 32")
    if row.test.ms_flip is not None and row.task != "semantic":
        raise ValueError(f"{at}.test.ms_flip averages semantic scores, but the row's task is {row.task}")


def parse(kind: type[_T], value: Any, where: str, *, in_file: bool = False) -> _T:
    """One of this project's frozen dataclasses from parsed JSON or YAML; ValueError says which key is wrong.

    `where`: what messages call the value; `in_file`: that is a file, and its keys are named after a colon.
    """
    parsed: _T = _build_dataclass(kind, value, where, ": " if in_file else ".")
    return parsed


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`: a dataclass, a container of known types, or a scalar."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where, ".")
    if origin is Literal:
        if isinstance(value, bool):
            known = ", ".join(f'"{argument}"' for argument in arguments)
            raise ValueError(f"{where} is {value!r}; write one of {known} (YAML reads a bare off as false)")
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}; {_nearest(str(value), map(str, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _build(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {value!r}; expected a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"{where} has {len(value)} entries; expected {len(arguments)}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}; expected a mapping")
        return {_key(arguments[0], k, where): _build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        hint = "; YAML reads 1e-4 as text, write 1.0e-4" if kind is float and isinstance(value, str) else ""
        raise ValueError(f"{where} is {value!r}; expected {kind.__name__}{hint}")
    return value


def _key(kind: Any, key: Any, where: str) -> Any:
    """A mapping's key: text, or a whole number, which JSON holds as text."""
    if kind is not int:
        return str(key)
    with contextlib.suppress(TypeError, ValueError):
        if str(int(key)) == str(key):
            return int(key)
    raise ValueError(f"{where} has the key {key!r}; expected int")


def _build_dataclass(kind: Any, value: Any, where: str, separator: str) -> Any:
    """`separator`: between `where` and a key, in messages."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}; expected the keys {_names(kind)}")
    kinds = _kinds(kind)
    for key in value:
        if key not in kinds:
            raise ValueError(f"{where}: unknown key {key!r}; {_nearest(str(key), kinds)}")
    for entry in dataclasses.fields(kind):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in value:
            raise ValueError(f"{where}: {entry.name!r} is missing")
    return kind(**{key: _build(kinds[key], entry, f"{where}{separator}{key}") for key, entry in value.items()})


@cache
def _kinds(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass and their types; class variables are none."""
    hints = typing.get_type_hints(kind)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(kind)}


def _names(kind: Any) -> str:
    return ", ".join(entry.name for entry in dataclasses.fields(kind))


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known))}" if known else "none are defined"
