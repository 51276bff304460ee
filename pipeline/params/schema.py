"""The settings of params.yaml as frozen dataclasses: their fields, defaults and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from m2f.config import BATCH_NORM_BACKBONES, OFF, Kernels, ModelConfig, OptimizerConfig, ScheduleConfig
from pipeline.params.parse import pick

Task = Literal["semantic", "panoptic", "instance"]

ANNOTATION_FILES: Mapping[str, str] = {
    "instances": "annotations/instances_{folder}.json",
    "panoptic": "annotations/panoptic_{folder}.json",
    "panoptic_maps": "annotations/panoptic_{folder}",
}
"""COCO's files of annotations, in a source or its top folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """Where pictures come from and what their labels mean."""

    layout: Literal["folder", "voc", "cityscapes", "ade20k", "coco", "vistas", "shapes"]
    """How images and labels are found. folder: as ADE20K, images/<split> and annotations/<split>; voc: as Pascal VOC,
    JPEGImages, SegmentationClass and ImageSets/Segmentation/<split>.txt; ade20k: with objects; others: as published."""
    sources: tuple[str, ...] = ()
    """Archives (zip, or tar, which may be compressed), a folder, or http(s) URLs of archives; relative paths start at
    params.yaml. A URL that does not end with the archive's name is followed by it:
    https://host/file?id=3#pictures.zip."""
    bytes: tuple[int, ...] = ()
    """Length of each source where published, in the same order; 0: not known. Empty: none is."""
    sha256: tuple[str, ...] = ()
    """Digest of each source where known, in the same order; checked before anything is read."""
    mirrors: tuple[str, ...] = ()
    """Looked into before a URL in `sources` is asked, in this order: folders (relative paths start at params.yaml) that
    hold an archive under its name, or the dataset unpacked; http(s) URLs to which the archive's name is added."""
    login: Literal["", "cityscapes"] = ""
    """Site whose login form comes before the URLs in `sources` (pipeline.data.download); credentials come from the
    environment or netrc."""
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "training", "val": "validation"})
    """Our split names and the folders that hold them."""
    annotation_files: Mapping[str, str] = field(default_factory=dict, metadata={OFF: {}})
    """`coco` only: where `instances`, `panoptic` and `panoptic_maps` (a folder of PNGs) are if not where COCO has them
    (ANNOTATION_FILES). {folder} and {split} stand for a split's folder and name."""
    class_names: tuple[str, ...] = ()
    ignore_label: int | tuple[int, ...] = 255
    """Label, or labels, of pixels that belong to no class, after `label_offset`."""
    label_offset: int = 0
    """Added to every stored label id. Below 0, 256 is added too, or 65536 where there are more than 255 classes: with
    -1, ADE20K's 0 for "unlabelled" becomes 255."""
    label_suffix: str = field(default="", metadata={OFF: ""})
    """What label files' names have after their pictures': _mask for a_mask.png of a.jpg. Files without it are left
    alone."""
    palette: Mapping[str, tuple[tuple[int, int, int], ...]] = field(default_factory=dict, metadata={OFF: {}})
    """Red, green and blue of every class, where label files hold colours: one colour or a list of them, 0 to 255. The
    entry `ignore` lists those of no class."""
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
    exif: Literal["apply", "ignore"] = field(default="apply", metadata={OFF: "apply"})
    """Whether pictures are turned as their EXIF orientation (in TIFF a tag) says. ignore: labels were drawn on the
    pixels as they are stored."""
    value_range: tuple[float, float] | None = field(default=None, metadata={OFF: None})
    """Values that become 0 and 255, for pictures of more than 8 bits or of floats; those of 8 bits stay as they are.
    None: 16-bit values lose their lower byte; if all are below 4096, or of another type, they are an error."""
    max_pixels: int = 180_000_000
    """Larger pictures and labels are refused before they are decoded. Sharding takes 40 bytes for every pixel."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens at a record that does not decode or whose labels are wrong. skip: it is left out and listed in the
    manifest; more than a twentieth of a split stops all the same."""
    on_empty: Literal["stop", "allow"] = "stop"
    """What happens where a split holds nothing to learn from or to measure: pixels of fewer than two classes, or no
    object. allow: a warning; a row still trains only if its validation has something to measure."""
    generate: Mapping[str, int] = field(default_factory=dict)
    """`shapes` only: pictures per split (`train`, `val`), `height`, `width`, `seed`. `class_names` decide what is
    drawn: a street or a coast."""

    def annotation_path(self, name: str, split: str) -> str:
        """Where the annotation file `name` of a split is in a source, in COCO's layout."""
        path = {**ANNOTATION_FILES, **self.annotation_files}[name]
        return path.replace("{folder}", self.splits[split]).replace("{split}", split)

    @property
    def ignore_labels(self) -> tuple[int, ...]:
        """`ignore_label` as a list."""
        return (self.ignore_label,) if isinstance(self.ignore_label, int) else self.ignore_label


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """Weights that a backbone or, with layout mask2former, the whole network starts from. Without a source: random."""

    url: str = ""
    """Where they are published."""
    path: str = ""
    """mask2former: a file or folder here instead."""
    row: str = ""
    """mask2former: a row trained here instead; its checkpoint that decides, of `seed`."""
    seed: int | None = None
    """Of `row`; None: 0."""
    layout: Literal["torchvision", "swin", "mask2former"] = "torchvision"
    """Whose names the file uses; swin: the original's or mmsegmentation's; mask2former: a whole network by whomever
    (m2f.weights.load_any)."""
    partial: bool = False
    """mask2former: whether entries outside the class head may be missing; they begin anew."""
    classes: Literal["same", "anew", "match"] = "same"
    """mask2former: what becomes of the class head. same: it is taken over, and must fit; anew: it begins anew; match:
    classes of the same name are taken over."""
    class_names: tuple[str, ...] = ()
    """match: the file's classes, in order; of a row, its own."""
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
    rules: Literal["openmmlab", "detectron2"] = field(default="openmmlab", metadata={OFF: "openmmlab"})
    """Whose rules apply where the two differ. detectron2, the authors': one draw for both offsets of a jittered crop,
    hues moved by up to 18 both ways, small pictures padded with grey 128 before they are normalised; of what a crop
    cuts off, panoptic segments stay targets without a pixel, and instances too unless `jitter` is set: then a picture
    may have none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Images of rare classes are shown more often (LVIS, arXiv 1908.03195)."""

    repeat_threshold: float
    """Share of the training images, above 0 and at most 1. A class in a smaller share f of them is rare: its images
    are shown sqrt(repeat_threshold / f) times as often, those of several rare classes as often as the rarest's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. A step is `groups` groups of `group_size` pictures, however many workers there are."""

    steps: int
    augmentation: AugmentationConfig
    groups: int = 8
    """The recipe's GPUs: class losses are normalised per group, gradients averaged over groups."""
    group_size: int = 2
    """Pictures per group."""
    images: Literal["all", "with_things"] = "all"
    """with_things: only those with an annotated thing and both sides of at least 32 px (the COCO rows)."""
    sampling: SamplingConfig | None = field(default=None, metadata={OFF: None})
    """How often images are shown; None: all equally often (all published rows)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    val_interval: int = 5000
    """Steps between validations (and at the end)."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints (and at every validation)."""
    log_every: int = 50
    """Steps between points of the tracked curves."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """bf16, fp16: autocast of the network; losses and matching stay float32. With fp16 the loss is scaled."""
    tf32: Literal["off", "convolutions", "all"] = "convolutions"
    """Which float32 products a GPU may take in TF32 (10 bits of mantissa instead of 23); convolutions: cuDNN's only, as
    PyTorch does unless told otherwise, and so the published trainings."""
    kernels: Kernels = field(default="auto", metadata={OFF: "auto"})
    """How some operations of network and losses are made; they differ in rounding and speed."""
    deterministic: bool = field(default=False, metadata={OFF: False})
    """Whether a GPU's training gives the same bits again, as a CPU's always does; it is slower."""
    freeze: tuple[Literal["backbone", "pixel_decoder"], ...] = field(default=(), metadata={OFF: ()})
    """Parts of the network that do not learn; their batch norm uses its running statistics."""

    @property
    def global_batch(self) -> int:
        """Pictures per step."""
        return self.groups * self.group_size

    @property
    def kernels_of_predictions(self) -> Kernels:
        """Of who predicts with the trained network, maybe on another machine: compiled ones where they can be had."""
        return "plain" if self.kernels == "plain" else "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class MsFlipConfig:
    """Multi-scale and flip: semantic scores averaged over views of several sizes, each also mirrored."""

    short_sides: tuple[int, ...]
    long_side_max: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TestConfig:
    """How validation pictures are shown to the network, keeping their aspect, and what is made of its predictions."""

    short_side: int
    long_side_max: int
    pad_multiple: int = 32
    """Pictures are padded right and bottom to a multiple of this; 1: not at all (the 640 x 640 rows)."""
    ms_flip: MsFlipConfig | None = None
    """The second column of the semantic tables; None: left out."""
    window: Mapping[str, int] | None = field(default=None, metadata={OFF: None})
    """Larger pictures are shown in overlapping square windows, each like a picture, instead of scaled down to one
    input: `size`, a window's side in pixels of the picture as it is, and `overlap`, the pixels, at most half of them,
    that neighbours share at least. None: every picture whole."""  # no dataclass of its own: it would change run keys
    score_threshold: float = 0.8
    """Panoptic: class probability below which a query is left out."""
    overlap_threshold: float = 0.8
    """Panoptic: share of its own mask that a query must win."""
    max_instances: int = 100
    """Instances kept of a picture."""
    precision: Literal["float32", "bf16", "fp16"] = field(default="float32", metadata={OFF: "float32"})
    """bf16, fp16: autocast of the network; what is made of its predictions stays float32."""
    ap_rule: Literal["coco", "cityscapes"] = field(default="coco", metadata={OFF: "coco"})
    """Whose AP the instances have: pycocotools', or Cityscapes' own (m2f.metrics.cityscapes), for labels that are
    segments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyWarningConfig:
    """When a training counts as clearly below the published curve or the row's other seeds; shapes no weights."""

    points: float = 5.0
    """Percent points of the row's first figure by which a validation must be below its reference."""
    after: float = 0.25
    """Share of the steps before which nothing is judged."""
    stop: bool = False
    """Whether a training that is below its reference at two validations in a row is stopped; switched off, it goes on
    again."""


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
    max_served_pixels: int = 50_000_000
    """Pixels of the largest image that the row's registered model takes; a larger one is refused before it is decoded.
    At most 178,956,970."""
    registry: bool = True
    """Whether register@<row> puts the row's best and median checkpoint into MLflow's model registry."""
    early_warning: EarlyWarningConfig = field(default_factory=EarlyWarningConfig)
    published: Mapping[str, Any] = field(default_factory=dict)
    """The published figures, metrics in percent; empty: none."""
    published_trainings: int = 1
    """How many trainings the published figures are the median of; 1: they are a single training's."""
    published_authors: Mapping[str, Any] = field(default_factory=dict)
    """The original authors' figures."""
    figures: Literal["published", "published_authors"] = field(default="published", metadata={OFF: "published"})
    """Which of the two the row is judged by: those of its own recipe. The other is shown beside."""

    @property
    def reference(self) -> Mapping[str, Any]:
        """The figures that the row is judged by."""
        return self.published if self.figures == "published" else self.published_authors


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedConfig:
    """A row's published checkpoint: the fastest check that network, conversion, test sizes and metric are right."""

    row: str = ""
    """The row whose network it is, with whose name the entry's begins; empty: the entry is called as the row."""
    dataset: str
    """The row's dataset (DVC cannot look it up)."""
    url: str
    """The file. Of mmsegmentation's, the last part of the name is the beginning of its SHA-256."""
    layout: Literal["reference", "detectron2", "huggingface"] = "reference"
    """Whose names it uses: mmsegmentation's and mmdetection's, the authors', or Hugging Face's."""
    figures: Literal["published", "published_authors"] = "published"
    """The row's figures that it should repeat."""
    log_url: str = ""
    """The training log, JSON lines; empty: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictConfig:
    """By what rule a row's seeds are judged against its published figure (docs/rows.md): fixed before they run."""

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
    """By name: the row's for the one whose training is compared with, others with something after it."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings that several rows share, by the name a row's `preset` gives; the row's own come first."""
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What another recipe than the presets' changes, by the name a row's `recipe` gives; it comes before the preset,
    and the row's own before both."""
    sites: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What weights or checkpoints of one publisher share, by the name an entry's `site` gives."""
    verdict: VerdictConfig = field(default_factory=VerdictConfig)

    def row(self, name: str) -> Row:
        """The row called `name`; ValueError with the nearest name otherwise."""
        return pick(self.rows, name, "row", "params.yaml")

    def dataset(self, name: str) -> DatasetConfig:
        """The dataset called `name`; ValueError with the nearest name otherwise."""
        return pick(self.datasets, name, "dataset", "params.yaml")


def needs_synchronised_norm(row: Row) -> bool:
    """Whether the row's batch norm takes its statistics over the whole step."""
    backbone = row.model.backbone
    return backbone.name in BATCH_NORM_BACKBONES and backbone.batch_statistics
