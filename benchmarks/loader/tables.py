"""What `python -m benchmarks.loader` measures: contenders in turns, and where the loader's time goes."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import cv2
import numpy as np
import torch

from benchmarks.loader.sizes import GROUP, Size
from pipeline.data.datasets import folder
from pipeline.data.images import resize as resizing
from pipeline.data.images.codecs import decode_image, decode_segments
from pipeline.data.loader import augmentation as transforms
from pipeline.data.loader import train_batches
from pipeline.data.loader.train_batches import TrainingOrder, training_batches
from pipeline.data.shards import reader
from pipeline.data.shards.build import build
from pipeline.params.load import load_params
from pipeline.params.schema import AugmentationConfig, DatasetConfig
from pipeline.storage.results.data import Manifest

PROJECT = Path(__file__).resolve().parents[2]

PROCESSES = 16
"""Loader processes that the last column stands for."""

CLASSES = 254
"""Labels that the pictures may have."""

PLAIN, DECODING = "OpenCV, straightforward", "decoding alone"
"""What the others are compared with."""


@dataclass(frozen=True)
class Files:
    """One picture and its label map, encoded as they are published."""

    image: bytes
    labels: bytes


def enlarged(images: Path, ignore_label: int, size: Size, count: int) -> list[Files]:
    """The first `count` training pictures, cut to the size's aspect and enlarged to it."""
    config = DatasetConfig(
        layout="folder", class_names=tuple(f"class {index}" for index in range(CLASSES)), ignore_label=ignore_label
    )
    files = []
    for record in islice(folder.records(config, [images], "train"), count):
        labelled = record.read()
        assert labelled.segments is not None
        image, labels = decode_image(labelled.image, record.image_file), labelled.segments.astype(np.uint8)
        height = min(image.shape[0], image.shape[1] * size.height // size.width)
        width = min(image.shape[1], image.shape[0] * size.width // size.height)
        to = (size.width, size.height)
        image = cv2.resize(image[:height, :width], to, interpolation=cv2.INTER_CUBIC)
        labels = cv2.resize(labels[:height, :width], to, interpolation=cv2.INTER_NEAREST)
        png = cv2.imencode(".png", labels, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1]  # as most programs write it
        files.append(Files(cv2.imencode(size.suffix, image[..., ::-1])[1].tobytes(), png.tobytes()))
    return files


def write_shard(
    storage: Path, name: str, files: Sequence[Files], suffix: str, pixels: Literal["encoded", "raw"]
) -> Manifest:
    """One shard of all the files."""
    images = storage / "images" / name
    for top in ("images", "annotations"):
        (images / top / "train").mkdir(parents=True)
    for index, file in enumerate(files):
        (images / f"images/train/{index:06d}{suffix}").write_bytes(file.image)
        (images / f"annotations/train/{index:06d}.png").write_bytes(file.labels)
    config = DatasetConfig(
        layout="folder",
        splits={"train": "train"},
        class_names=tuple(f"class {index}" for index in range(CLASSES)),
        shard_mib=2**20,
        pixels=pixels,
    )
    return build(name, config, [images], facts=(), processes=0)


def decode(file: Files) -> tuple[np.ndarray, np.ndarray]:
    """Picture and labels, whole, by cv2.imdecode."""
    return decode_image(file.image, "image"), decode_segments(file.labels, "labels")


def straightforward(
    file: Files, augmentation: AugmentationConfig, draw: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recipe step by step with OpenCV: (3, H, W) uint8 and (H, W) uint8, padded."""
    image, labels = decode(file)
    height, width = labels.shape
    crop = augmentation.crop
    if augmentation.jitter is not None:
        if draw.random() < augmentation.flip:
            image, labels = cv2.flip(image, 1), cv2.flip(labels, 1)
        factor = draw.uniform(*augmentation.jitter)
        short, long = sorted(int(side * factor) for side in crop)
        share = 1.0
    else:
        short, long = draw.choice(augmentation.short_sides), augmentation.long_side_max
        share = augmentation.max_label_share
    size = resizing.resized_size(height, width, short_side=short, long_side_max=long)
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    labels = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)
    for _ in range(11):
        top, left = (draw.randint(0, max(0, side - most)) for side, most in zip(size, crop, strict=True))
        shown = labels[top : top + crop[0], left : left + crop[1]]
        counts = cv2.calcHist([shown], [0], None, [255], [0, 255])
        if share >= 1 or (np.count_nonzero(counts) > 1 and counts.max() < share * counts.sum()):
            break
    image, labels = image[top : top + crop[0], left : left + crop[1]], shown
    if augmentation.jitter is None and draw.random() < augmentation.flip:
        image, labels = cv2.flip(image, 1), cv2.flip(labels, 1)
    if augmentation.photometric:
        image = distort(image, draw)
    images, segments = np.zeros((3, *crop), np.uint8), np.full(crop, 255, np.uint8)
    images[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    segments[: labels.shape[0], : labels.shape[1]] = labels
    return torch.from_numpy(images), torch.from_numpy(segments)


def scaled(pixels: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """uint8 pixels times a factor plus an offset, truncated. (By cv2.LUT it takes as long.)"""
    return np.clip(pixels.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


def distort(image: np.ndarray, draw: random.Random) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each with probability 0.5."""
    brightness, contrast, saturation, hue, contrast_first = (draw.random() < 0.5 for _ in range(5))
    if brightness:
        image = scaled(image, 1, draw.uniform(-32, 32))
    if contrast and contrast_first:
        image = scaled(image, draw.uniform(0.5, 1.5), 0)
    if saturation:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = scaled(np.ascontiguousarray(hsv[..., 1]), draw.uniform(0.5, 1.5), 0)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if hue:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + draw.randint(-18, 17)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if contrast and not contrast_first:
        image = scaled(image, draw.uniform(0.5, 1.5), 0)
    return image


def batches(manifest: Manifest, augmentation: AugmentationConfig) -> Iterator[train_batches.Batch]:
    """Endless batches of GROUP pictures, loaded in this process."""
    order = TrainingOrder(manifest=manifest, augmentation=augmentation, seed=0, global_batch=GROUP)
    return training_batches(order, first_step=0, steps=10**9, image_range=range(GROUP))


def per_second(contenders: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Pictures per second of each contender, which returns how many it made; the median of `rounds` in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            began = time.process_time()
            made = work()
            if turn:  # the first one fills caches
                seconds[name].append((time.process_time() - began) / made)
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}


class Profile:
    """Seconds by part of the loader, and what copying and resizing the crop alone would have taken."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed as this part."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            result = work(*args, **kwargs)
            self.seconds[part] += time.process_time() - began
            return result

        return wrapped

    def resize(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """resize_image, timed; then the crop's pixels are copied and resized without regard to where they begin."""

        def wrapped(image: np.ndarray, size: tuple[int, int], part: transforms.Part, **kwargs: Any) -> np.ndarray:
            began = time.process_time()
            resized: np.ndarray = work(image, size, part, **kwargs)
            self.seconds["reading and resizing"] += time.process_time() - began
            spans = [
                [round(edge * was / now) for edge in kept.indices(now)[:2]]
                for kept, now, was in zip(part, size, image.shape, strict=False)
            ]
            (top, bottom), (left, right) = ((min(a, b - 1), b) for a, b in spans)
            began = time.process_time()
            copied = np.ascontiguousarray(image[top:bottom, left:right])
            copying = time.process_time()
            cv2.resize(copied, resized.shape[1::-1], interpolation=cv2.INTER_LINEAR)
            ended = time.process_time()
            self.seconds["at least: copying"] += copying - began
            self.seconds["at least: resizing"] += ended - copying
            self.seconds["measuring"] += ended - began
            return resized

        return wrapped


def profile(manifest: Manifest, augmentation: AugmentationConfig, images: int) -> dict[str, float]:
    """Milliseconds per picture by part of the loader, `all` among them."""
    found = Profile()
    with contextlib.ExitStack() as stack:
        for owner, name, part in (
            (reader, "decode_image", "decoding"),
            (reader, "decode_segments", "decoding"),
            (transforms, "resize_ids", "labels: resizing, crop rule, numbering"),
            (transforms, "label_counts", "labels: resizing, crop rule, numbering"),
            (train_batches, "close_gaps", "labels: resizing, crop rule, numbering"),
            (transforms.Distortion, "in_place", "distortion"),
            (transforms.Flip, "apply", "flipping"),
            (train_batches, "_put", "into the batch"),
        ):
            stack.enter_context(mock.patch.object(owner, name, found.timed(part, getattr(owner, name))))
        stack.enter_context(mock.patch.object(transforms, "resize_image", found.resize(transforms.resize_image)))
        source = batches(manifest, augmentation)
        for warm in (True, False):
            found.seconds.clear()
            began = time.process_time()
            for _ in islice(source, 2 if warm else images // GROUP):
                pass
            found.seconds["all"] = time.process_time() - began - found.seconds.pop("measuring")
    return {part: 1000 * seconds / (images // GROUP * GROUP) for part, seconds in found.seconds.items()}


def compare(
    name: str, size: Size, files: Sequence[Files], storage: Path, rounds: int, images_per_s_per_gpu: float | None
) -> None:
    """Print the tables of one size."""
    augmentation = load_params(PROJECT / "params.yaml").row(size.row).train.augmentation
    layouts: tuple[Literal["raw", "encoded"], ...] = ("raw", "encoded")
    manifests: dict[str, Manifest] = {
        layout: write_shard(storage, f"{name}-{layout}", files, size.suffix, layout) for layout in layouts
    }
    sources = {layout: batches(manifest, augmentation) for layout, manifest in manifests.items()}
    draw = random.Random(0)

    def load(layout: str) -> int:
        return sum(len(batch.names) for batch in islice(sources[layout], len(files) // GROUP))

    contenders: dict[str, Callable[[], int]] = {
        PLAIN: lambda: sum(1 for file in files if straightforward(file, augmentation, draw)),
        "loader, raw": lambda: load("raw"),
        "loader, encoded": lambda: load("encoded"),
        DECODING: lambda: sum(1 for file in files if decode(file)),
    }
    found = per_second(contenders, rounds)
    crop = " x ".join(map(str, augmentation.crop))
    kib = {layout: manifest.bytes["train"] / 1024 for layout, manifest in manifests.items()}
    print(f"\n{name}: {len(files)} images of {size.width} x {size.height} ({size.suffix}), crop {crop}, {size.row}")
    print(f"KiB per image: {', '.join(f'{layout} {total / len(files):,.0f}' for layout, total in kib.items())}\n")
    fed = "" if images_per_s_per_gpu is None else f" GPUs fed at {images_per_s_per_gpu:g} images/s each |"
    print(f"| one process | images/s | x straightforward | x decoding alone | {PROCESSES} processes, images/s |{fed}")
    print("|---|---|---|---|---|" + ("---|" if fed else ""))
    for contender, rate in found.items():
        ratios = [rate / found[other] for other in (PLAIN, DECODING)]
        last = f" {PROCESSES * rate / images_per_s_per_gpu:,.0f} |" if images_per_s_per_gpu else ""
        print(f"| {contender} | {rate:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {PROCESSES * rate:,.0f} |{last}")
    parts = {layout: profile(manifest, augmentation, 4 * len(files)) for layout, manifest in manifests.items()}
    print("\n| ms per image | raw | encoded |\n|---|---|---|")
    least = {layout: sum(ms for part, ms in found.items() if part.startswith("at")) for layout, found in parts.items()}
    for part in sorted({part for found in parts.values() for part in found} - {"all"}):
        if not part.startswith("at"):
            print(f"| {part} | {parts['raw'].get(part, 0):.2f} | {parts['encoded'].get(part, 0):.2f} |")
    rest = {
        layout: found["all"] - sum(ms for part, ms in found.items() if part != "all" and not part.startswith("at"))
        for layout, found in parts.items()
    }
    print(f"| the rest (drawing, records, albumentations) | {rest['raw']:.2f} | {rest['encoded']:.2f} |")
    print(f"| all | {parts['raw']['all']:.2f} | {parts['encoded']['all']:.2f} |")
    shares = [f"{least[layout]:.2f} ({least[layout] / parts[layout]['all']:.0%})" for layout in ("raw", "encoded")]
    print(f"| unavoidable: copying the crop's pixels, resizing them | {' | '.join(shares)} |")
