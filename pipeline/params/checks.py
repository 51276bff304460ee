"""What no field can check alone: settings of params.yaml that must fit one another."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from urllib.parse import urlsplit

from m2f.config import PixelDecoderConfig
from pipeline.params.parse import pick
from pipeline.params.schema import ANNOTATION_FILES, DatasetConfig, Params, Row, VerdictConfig, WeightsConfig
from pipeline.params.sentences import shown
from pipeline.params.tasks import LABELS

MOST_PIXELS = 2**30
"""Of an image that OpenCV decodes."""

LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1_000_000
"""Of a loss or a class. Sums of others could leave float32."""

_PUBLISHED_COSTS = ("inf_fps", "train_mem_gib", "train_mem_gb_as_printed")
_PUBLISHED_TEXTS = ("device", "protocol")
"""What `published` may hold beside figures."""


def check_dataset(data: DatasetConfig, at: str) -> None:
    for key, unit in (("bytes", "lengths"), ("sha256", "digests")):
        count = len(getattr(data, key))
        if count not in (0, len(data.sources)):
            raise ValueError(f"{at}.{key} lists {count} {unit} for {len(data.sources)} sources; give one each, or none")
    if any(size < 0 for size in data.bytes):
        raise ValueError(f"{at}.bytes is {list(data.bytes)}; a length is above 0, or 0 where it is not known")
    if data.value_range is not None and not 0 < data.value_range[1] - data.value_range[0] < math.inf:
        raise ValueError(f"{at}.value_range is {list(data.value_range)}; it must be two numbers that rise")
    if data.shard_mib < 1:
        raise ValueError(f"{at}.shard_mib is {data.shard_mib}; it must be at least 1")
    if not data.splits:
        raise ValueError(f"{at}.splits is empty; name the folders, such as train: training, or take it out")
    for name, folder in data.splits.items():
        if any(part in ("", ".", "..") for part in folder.split("/")):
            raise ValueError(f"{at}.splits.{name} is {shown(folder)}; give the folder without / at its ends, . and ..")
        # the name is a part of shards' names
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise ValueError(
                f"{at}.splits has a split called {shown(name)}; begin with a letter, and go on with letters a-z, "
                "digits, _ and -; its folder may have any name"
            )
    if not 0 < data.max_pixels <= MOST_PIXELS:
        raise ValueError(f"{at}.max_pixels is {data.max_pixels}; it must be 1 to {MOST_PIXELS} (OpenCV's limit)")
    for key in ("sources", "mirrors"):
        for index, place in enumerate(getattr(data, key)):
            if not place.strip():
                raise ValueError(f"{at}.{key}[{index}] is empty; name an archive, a folder or a URL, or take it out")
            try:
                host = urlsplit(place).netloc if "://" in place else ""
            except ValueError as error:
                raise ValueError(f"{at}.{key}[{index}] is {shown(place)}, which is no URL ({error})") from None
            if "@" in host:  # not quoted: this message may be logged
                raise ValueError(
                    f"{at}.{key}[{index}] holds a user name or password, and params.yaml is for everybody to read; "
                    "take it out (docs/data.md says where credentials belong)"
                )
    for key in ("class_names", "thing_classes"):
        twice = [name for name, count in Counter(getattr(data, key)).items() if count > 1]
        if twice:
            raise ValueError(f"{at}.{key} has {shown(twice[0])} more than once; name every class once")
    for name in data.thing_classes:
        if name not in data.class_names:
            raise ValueError(f"{at}.thing_classes has {shown(name)}, which is not among class_names")
    if data.annotation_files and data.layout != "coco":
        raise ValueError(f"{at}.annotation_files is for the layout coco; the layout here is {data.layout}")
    for key, path in data.annotation_files.items():
        pick(ANNOTATION_FILES, key, "annotation file", f"{at}.annotation_files")
        if not path:
            raise ValueError(f"{at}.annotation_files.{key} is empty; name a file in a source, or take it out")
        if marks := re.findall(r"\{.*?\}|[{}]", re.sub(r"\{(folder|split)\}", "", path)):
            raise ValueError(
                f"{at}.annotation_files.{key} has {min(marks)}; {{folder}} and {{split}} are what it may have"
            )


def check_labels(data: DatasetConfig, at: str) -> None:
    """Of label maps: where they lie, and what their ids or colours mean."""
    of_maps = data.layout in ("folder", "voc")
    for key, off in (("label_suffix", ""), ("palette", {}), ("label_offset", 0), ("ignore_label", 255)):
        if getattr(data, key) != off and not of_maps:
            raise ValueError(
                f"{at}.{key} is for the layouts folder and voc; take it out, layout {data.layout} has none"
            )
    if "/" in data.label_suffix or data.label_suffix.lower().endswith((".png", ".tif", ".tiff", ".bmp", ".webp")):
        raise ValueError(f"{at}.label_suffix is {shown(data.label_suffix)}; give it without folder and without .png")
    if data.palette:
        _check_palette(data, at)
    elif of_maps and len(data.class_names) > 255 and 255 in data.ignore_labels:
        raise ValueError(
            f"{at}.ignore_label is 255, which is the class {shown(data.class_names[255])}; of more than 255 classes, "
            "set it to a label that is no class, such as 65535, or to [] if there is none"
        )


def _check_palette(data: DatasetConfig, at: str) -> None:
    if missing := [name for name in data.class_names if not data.palette.get(name)]:
        raise ValueError(f"{at}.palette has no colour for {shown(missing[0])}; every class of class_names needs one")
    if unknown := data.palette.keys() - {*data.class_names, "ignore"}:
        raise ValueError(
            f"{at}.palette names {shown(min(unknown))}, which is not among class_names; colours of no class go to "
            "`ignore`"
        )
    if data.label_offset or data.ignore_labels != (255,):
        raise ValueError(
            f"{at} has a palette, so its labels have no ids; take out label_offset and ignore_label, and give colours "
            "of no class to the palette's entry `ignore`"
        )
    of: dict[tuple[int, int, int], str] = {}
    for name, colours in data.palette.items():
        for colour in colours:
            if any(not 0 <= value <= 255 for value in colour):
                raise ValueError(f"{at}.palette.{name} holds {list(colour)}; red, green and blue are 0 to 255")
            if of.setdefault(colour, name) != name:
                raise ValueError(f"{at}.palette gives {list(colour)} to both {shown(of[colour])} and {shown(name)}")


def check_published(row: Row, at: str) -> None:
    """ValueError where a published figure has an unknown name, or is no number."""
    known = dict.fromkeys((*LABELS, *_PUBLISHED_COSTS, *_PUBLISHED_TEXTS))
    for key in ("published", "published_authors"):
        for name, value in getattr(row, key).items():
            pick(known, name, "published figure", f"{at}.{key}")
            if name in _PUBLISHED_TEXTS:
                if not isinstance(value, str):
                    raise ValueError(f"{at}.{key}.{name} is {shown(value)}; expected text")
            elif type(value) not in (int, float) or not 0 <= value <= (100 if name in LABELS else sys.float_info.max):
                expected = "a number of percent, 0 to 100" if name in LABELS else "a number, 0 or more"
                raise ValueError(
                    f"{at}.{key}.{name} is {shown(value)}; expected {expected}; leave out what is not known"
                )


def check_verdict(verdict: VerdictConfig, at: str) -> None:
    for key in ("margin_points", "assumed_spread_points"):
        if not 0 < getattr(verdict, key) < 100:
            raise ValueError(f"{at}.{key} is {getattr(verdict, key)}; it must be above 0 and below 100 percent points")
    if not 0.5 <= verdict.coverage < 1:
        raise ValueError(f"{at}.coverage is {verdict.coverage}; it must be at least 0.5 and below 1")


def check_limits(row: Row, at: str) -> None:
    """ValueError where a number cannot be what it stands for: a side below 1, a share above 1."""
    model, test, augmentation = row.model, row.test, row.train.augmentation
    pixel, query, views = model.pixel_decoder, model.query_decoder, test.ms_flip
    if model.num_classes < 1:
        names = "thing_classes" if row.task == "instance" else "class_names"
        raise ValueError(f"{at} has no class to train on; the task {row.task} needs `{names}` in dataset {row.dataset}")
    counts: dict[str, int | tuple[int, ...]] = {
        **{f"model.pixel_decoder.{key}": getattr(pixel, key) for key in ("channels", "heads", "points", "feedforward")},
        **{f"model.query_decoder.{key}": getattr(query, key) for key in ("queries", "heads", "feedforward")},
        **{f"test.{key}": getattr(test, key) for key in ("short_side", "long_side_max", "max_instances")},
        "train.augmentation.short_sides": augmentation.short_sides,
    }
    if views is not None:
        counts |= {"test.ms_flip.short_sides": views.short_sides, "test.ms_flip.long_side_max": views.long_side_max}
        if not views.short_sides:
            raise ValueError(f"{at}.test.ms_flip.short_sides is empty; list at least one, or leave ms_flip out")
    for key, value in counts.items():
        if min(value if isinstance(value, tuple) else (value,), default=1) < 1:
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{at}.{key} is {shown}; it must be at least 1")
    if pixel.name == "fapn":
        own = PixelDecoderConfig(name="fapn")
        for key in ("layers", "heads", "points", "feedforward"):
            if (value := getattr(pixel, key)) != getattr(own, key):
                raise ValueError(
                    f"{at}.model.pixel_decoder.{key} is {value}, but the pixel decoder fapn has no {key}; leave it out"
                )
    for part, layers in (("pixel_decoder", pixel.layers), ("query_decoder", query.layers)):
        if layers < 0:
            raise ValueError(f"{at}.model.{part}.layers is {layers}; it must be 0 or more")
    for part, heads in (("pixel_decoder", pixel.heads), ("query_decoder", query.heads)):
        if pixel.channels % heads:
            raise ValueError(
                f"{at}.model.{part}.heads is {heads}; model.pixel_decoder.channels ({pixel.channels}) must be a "
                "multiple of it"
            )
    for key, share in (
        ("test.score_threshold", test.score_threshold),
        ("test.overlap_threshold", test.overlap_threshold),
        ("train.augmentation.flip", augmentation.flip),
        ("train.augmentation.max_label_share", augmentation.max_label_share),
    ):
        if not 0 <= share <= 1:
            raise ValueError(f"{at}.{key} is {share}; it must be between 0 and 1")


def check_window(window: Mapping[str, int], at: str) -> None:
    """ValueError where there can be no such windows."""
    if window.keys() != {"size", "overlap"}:
        raise ValueError(f"{at} has the keys {', '.join(window) or 'none'}; give size and overlap")
    size, overlap = window["size"], window["overlap"]
    if size < 32:
        raise ValueError(f"{at} has windows of {size} pixels; they must have 32 or more")
    if not 0 <= overlap <= size // 2:
        raise ValueError(f"{at} has windows of {size} pixels that overlap by {overlap}; give 0 to {size // 2}")


def check_url(url: str, at: str) -> None:
    """ValueError unless a file can be downloaded from such an address."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s", url)
    except ValueError:  # such as a torn IPv6 address
        right = False
    if not right:
        raise ValueError(f"{at} is {shown(url)}; it must be an address that begins with https:// or http://")


def check_weights(weights: WeightsConfig, at: str) -> None:
    sources = [key for key in ("url", "path", "row") if getattr(weights, key)]
    if len(sources) > 1:
        raise ValueError(f"{at} names a {' and a '.join(sources)}; give one source")
    if weights.layout != "mask2former":
        default = WeightsConfig()
        for key in ("path", "row", "seed", "partial", "classes", "class_names"):
            if getattr(weights, key) != getattr(default, key):
                raise ValueError(f"{at}.{key} is for whole networks; write layout: mask2former, or take it out")
    elif not sources:
        raise ValueError(f"{at} has layout mask2former and no source; give a url, a path or a row")
    if weights.url:
        check_url(weights.url, f"{at}.url")
    if weights.seed is not None and not weights.row:
        raise ValueError(f"{at}.seed is a row's; take it out, or give the row instead of the {sources[0]}")
    if weights.class_names and weights.classes != "match":
        raise ValueError(f"{at}.class_names is for classes: match, and classes is {weights.classes}; take one out")
    twice = [name for name, count in Counter(weights.class_names).items() if count > 1]
    if twice:
        raise ValueError(f"{at}.class_names has {shown(twice[0])} more than once; name every class once")
    if weights.sha256_prefix and not weights.url:
        raise ValueError(f"{at}.sha256_prefix is for a url; take it out")
    if weights.classes == "match" and not weights.class_names and not weights.row:
        raise ValueError(f"{at}.classes is match, which needs the file's class_names; list them, or name a list")


def check_origin(params: Params, name: str, at: str) -> None:
    """ValueError where weights are those of a row that does not exist, or of one that starts from them."""
    passed = [name]
    while row := params.weights[passed[-1]].row:
        passed.append(pick(params.rows, row, "row", at).weights)
        if passed[-1] in passed[:-1]:
            raise ValueError(f"{at}.row is {row}, which itself starts from these weights; name another row")


def check_row(row: Row, at: str) -> None:
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
        ("model.loss.class_weight", loss.class_weight, 0 <= loss.class_weight <= MOST_WEIGHT, f"0 to {MOST_WEIGHT:,}"),
        ("model.loss.mask_weight", loss.mask_weight, 0 <= loss.mask_weight <= MOST_WEIGHT, f"0 to {MOST_WEIGHT:,}"),
        ("model.loss.dice_weight", loss.dice_weight, 0 <= loss.dice_weight <= MOST_WEIGHT, f"0 to {MOST_WEIGHT:,}"),
        (
            "model.loss.no_object_weight",
            loss.no_object_weight,
            LEAST_WEIGHT <= loss.no_object_weight <= MOST_WEIGHT,
            f"{LEAST_WEIGHT:f} to {MOST_WEIGHT:,}",
        ),
    ):
        if not right:
            raise ValueError(f"{at}.{key} is {value}; it must be {need}")
    _check_balance(row, at)
    milestones = train.schedule.milestones
    if list(milestones) != sorted(set(milestones)) or (train.schedule.name == "multistep") != bool(milestones):
        raise ValueError(
            f"{at}.train.schedule.milestones is {list(milestones)}; "
            "they must rise, and only the schedule multistep has them"
        )
    for key in ("steps", "groups", "group_size", "val_interval", "checkpoint_interval", "log_every"):
        if getattr(train, key) < 1:
            raise ValueError(f"{at}.train.{key} is {getattr(train, key)}; it must be at least 1")
    if row.max_gpu_hours <= 0:
        raise ValueError(f"{at}.max_gpu_hours is {row.max_gpu_hours:g}; it must be above 0")
    if not 1 <= row.max_served_pixels <= 178_956_970:
        raise ValueError(f"{at}.max_served_pixels is {row.max_served_pixels}; it must be from 1 to 178956970")
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
    if (window := row.test.window) is not None:
        check_window(window, f"{at}.test.window")
        if row.test.ms_flip is not None:
            raise ValueError(f"{at}.test has both window and ms_flip, which shows every image whole; take one out")
    if row.test.ms_flip is not None and row.task != "semantic":
        raise ValueError(f"{at}.test.ms_flip averages semantic scores, but the row's task is {row.task}")


def _check_balance(row: Row, at: str) -> None:
    """Of what weighs rare classes more: class weights and the sampling of images."""
    weights, sampling = row.model.loss.class_weights, row.train.sampling
    if weights and len(weights) != row.model.num_classes:
        raise ValueError(
            f"{at}.model.loss.class_weights lists {len(weights)} weights for {row.model.num_classes} classes; give one "
            "for each class, or class names with their weights"
        )
    if wrong := [weight for weight in weights if not LEAST_WEIGHT <= weight <= MOST_WEIGHT]:
        raise ValueError(
            f"{at}.model.loss.class_weights has {wrong[0]}; every weight must be {LEAST_WEIGHT:f} to {MOST_WEIGHT:,}"
        )
    if sampling is not None and not 0 < sampling.repeat_threshold <= 1:
        raise ValueError(
            f"{at}.train.sampling.repeat_threshold is {sampling.repeat_threshold}; it is a share of the training "
            "images, above 0 and at most 1"
        )
