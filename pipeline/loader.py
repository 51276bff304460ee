"""Batches and validation pictures from memory-mapped shards.

Which picture stands at position p of a run's endless order, and how it is augmented, are functions of (seed, p) alone:
mix(seed, 1, epoch, index) sorts an epoch, mix(seed, 2, p) seeds the augmentation and mix(seed, 3, p) is handed to the
network and the losses. So workers, loader processes and restarts do not change what is seen.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m2f.draws import mix
from pipeline.files import read_json, sha256, write_json
from pipeline.pictures import IGNORE, decode_image, decode_segments
from pipeline.progress import Progress
from pipeline.storage import storage_root, stored
from pipeline.transforms import label_counts, resize_image, resized_size, seed_transform, training_transform

if TYPE_CHECKING:
    from pipeline.params import AugmentationConfig, TestConfig

_Item = TypeVar("_Item")

PREFETCH = 3
"""Batches that every loader process keeps ready."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B augmented training pictures of H x W, the crop."""

    images: Tensor
    """(B, 3, H, W) uint8 RGB; what lies right of and below a picture is arbitrary."""
    sizes: Tensor
    """(B, 2) int64, (height, width) of every picture inside the crop."""
    segments: Tensor
    """(B, H, W) index into `labels[b]`; nothing and padding are 255 (uint8) or, with over 255 segments, -1 (int32)."""
    labels: tuple[Tensor, ...]
    """B times (T,) int64: class of every segment that is in the crop, by rising id; T may be 0."""
    positions: tuple[int, ...]
    """Place of every picture in the run's order."""
    seeds: tuple[int, ...]
    """mix(seed, 3, position): what the network and the losses draw from."""
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Picture:
    """One validation picture, resized for the network, with its truth at the original size."""

    image: Tensor
    """(3, H, W) uint8 RGB, resized, not padded."""
    original_size: tuple[int, int]
    """(height, width) of the labels."""
    label_map: Tensor
    """(h, w) uint8 class ids, 255: nothing."""
    segments: Tensor
    """(h, w) index into `labels`; uint8 with 255, or int32 with -1, for nothing."""
    labels: Tensor
    """(T,) int64 class of every segment in the picture, by rising id."""
    name: str


def training_batches(
    manifest: Mapping[str, Any],
    augmentation: AugmentationConfig,
    *,
    seed: int,
    first_step: int,
    steps: int,
    global_batch: int,
    picture_range: range,
    processes: int = 0,
) -> Iterator[Batch]:
    """One Batch for each of `steps` steps from `first_step` on.

    Step k holds the positions k * global_batch + i; this worker's are those with i in `picture_range`. The order never
    ends: epoch after epoch, each in an order of its own. processes: 0 decodes in this process, else that many
    others do, with the same batches. ValueError names a shard that is missing or altered, or the record that failed.
    """
    source = _Training(_Split.of(manifest, "train"), augmentation, seed, global_batch, picture_range)
    yield from _load(source, range(first_step, first_step + steps), processes)


def validation_pictures(
    manifest: Mapping[str, Any], test: TestConfig, *, worker: int = 0, workers: int = 1, processes: int = 0
) -> Iterator[Picture]:
    """Every `workers`-th validation picture from `worker` on, in the shards' order."""
    split = _Split.of(manifest, "val")
    yield from _load(_Validation(split, test), range(worker, split.records, workers), processes)


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order of `count` records in an epoch: sorted by a hash of (seed, epoch, index)."""
    return sorted(range(count), key=lambda index: mix(seed, 1, epoch, index))


_epoch_order = lru_cache(maxsize=2)(epoch_order)  # a step may straddle two epochs


def verify_shards(manifest: Mapping[str, Any], split: str) -> None:
    """Check the digest of a split's shards, once per host: a note under the storage root says what was checked.

    A file of the note's size and modification time is not read again. ValueError names a missing or altered shard.
    """
    made_by = _made_by(manifest)
    note = storage_root() / "verified" / socket.gethostname() / f"{manifest['digest'][:16]}-{split}.json"
    try:
        known = read_json(note, made_by=made_by) if note.exists() else {}
    except ValueError:
        known = {}
    seen: dict[str, list[Any]] = {}
    shards = manifest["splits"][split]["shards"]
    progress = Progress(
        f"verifying shards of {manifest['dataset']}", sum(s["bytes"] for s in shards), unit="MiB", scale=2.0**-20
    )
    for shard in shards:
        path = stored(shard["path"], made_by=made_by)
        status = path.stat()
        seen[shard["path"]] = [status.st_size, status.st_mtime_ns, shard["sha256"]]
        if known.get(shard["path"]) != seen[shard["path"]]:
            digest = sha256(path)
            if digest != shard["sha256"]:
                raise ValueError(
                    f"shard {path} is truncated or altered: its sha256 is {digest}, the manifest "
                    f"says {shard['sha256']} ({status.st_size:,} of {shard['bytes']:,} bytes); "
                    f"make it again with: {made_by}"
                )
        progress.add(shard["bytes"])
    if seen != known:
        with contextlib.suppress(OSError):  # a storage root that cannot be written: checked again next time
            write_json(note, seen)


def _made_by(manifest: Mapping[str, Any]) -> str:
    return f"python -m stages.shard {manifest['dataset']}"


@dataclass(frozen=True)
class _Entry:
    """One record as stored, decoded."""

    name: str
    image: np.ndarray
    segments: np.ndarray
    classes: np.ndarray
    """(S,) class of every segment id."""


@dataclass
class _Split:
    """Random access to a split's records. Memory maps are opened by the process that reads them."""

    paths: tuple[str, ...]
    starts: tuple[int, ...]
    """Index of every shard's first record."""
    records: int
    num_classes: int
    made_by: str
    readers: dict[tuple[int, int], pa.RecordBatchFileReader] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Mapping[str, Any], split: str) -> _Split:
        """A verified split of a manifest."""
        if split not in manifest["splits"]:
            raise ValueError(f"dataset {manifest['dataset']} has no split {split}; `splits` in params.yaml names them")
        verify_shards(manifest, split)
        shards = manifest["splits"][split]["shards"]
        starts = itertools.accumulate((shard["records"] for shard in shards[:-1]), initial=0)
        return cls(
            paths=tuple(shard["path"] for shard in shards),
            starts=tuple(starts),
            records=manifest["splits"][split]["records"],
            num_classes=len(manifest["class_names"]),
            made_by=_made_by(manifest),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "readers": {}}

    def __getitem__(self, index: int) -> _Entry:
        shard = bisect.bisect_right(self.starts, index) - 1
        key = (os.getpid(), shard)
        if key not in self.readers:
            path = stored(self.paths[shard], made_by=self.made_by)
            try:
                self.readers[key] = pa.ipc.open_file(pa.memory_map(str(path)))
            except pa.ArrowInvalid as error:
                raise ValueError(
                    f"shard {path} is not readable ({error}); make it again with: {self.made_by}"
                ) from None
        batch = self.readers[key].get_batch(index - self.starts[shard])
        name = batch.column("name")[0].as_py()
        classes = batch.column("segment_classes")[0].as_py()
        return _Entry(
            name=name,
            image=decode_image(batch.column("image")[0].as_buffer(), f"{self.paths[shard]}: {name}"),
            segments=decode_segments(batch.column("segments")[0].as_buffer(), f"{self.paths[shard]}: {name}"),
            classes=np.arange(self.num_classes) if classes is None else np.array(classes, np.int64),
        )


def _compact(segments: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segments numbered from 0 without gaps, (h, w) uint8 or int32, and the (T,) int64 class of each that is there."""
    present = np.flatnonzero(label_counts(segments))
    if segments.dtype == np.uint8:
        lookup = np.full(256, IGNORE, np.uint8)
        lookup[present] = np.arange(len(present))
        return lookup[segments], classes[present]
    if len(present) <= IGNORE:
        narrow = np.full(len(classes) + 1, IGNORE, np.uint8)  # the last one is read through index -1
        narrow[present] = np.arange(len(present))
        return narrow[segments], classes[present]
    wide = np.full(len(classes) + 1, -1, np.int32)
    wide[present] = np.arange(len(present))
    return wide[segments], classes[present]


class _Training(Dataset[Batch]):
    """Batches by step."""

    def __init__(
        self, split: _Split, augmentation: AugmentationConfig, seed: int, global_batch: int, picture_range: range
    ) -> None:
        self.split, self.augmentation = split, augmentation
        self.seed, self.global_batch, self.picture_range = seed, global_batch, picture_range
        self.transform = training_transform(augmentation)

    def __getitem__(self, step: int) -> Batch:
        positions = [step * self.global_batch + picture for picture in self.picture_range]
        height, width = self.augmentation.crop
        images = torch.zeros(len(positions), 3, height, width, dtype=torch.uint8)
        sizes, maps, labels, names = [], [], [], []
        for place, position in enumerate(positions):
            entry = self._entry(position)
            seed_transform(self.transform, mix(self.seed, 2, position) % 2**32)
            drawn = self.transform(image=entry.image, mask=entry.segments)
            segments, classes = _compact(drawn["mask"], entry.classes)
            sizes.append(segments.shape)
            images[place, :, : segments.shape[0], : segments.shape[1]] = torch.from_numpy(drawn["image"]).permute(
                2, 0, 1
            )
            maps.append(segments)
            labels.append(torch.from_numpy(classes))
            names.append(entry.name)
        return Batch(
            images=images,
            sizes=torch.tensor(sizes),
            segments=_stack(maps, (height, width)),
            labels=tuple(labels),
            positions=tuple(positions),
            seeds=tuple(mix(self.seed, 3, position) for position in positions),
            names=tuple(names),
        )

    def _entry(self, position: int) -> _Entry:
        epoch, place = divmod(position, self.split.records)
        index = _epoch_order(self.seed, epoch, self.split.records)[place]
        return self.split[index]


def _stack(maps: Sequence[np.ndarray], crop: tuple[int, int]) -> Tensor:
    """Segment maps padded to the crop, (B, H, W): uint8 with 255, or int32 with -1 as soon as one needs it."""
    wide = any(segments.dtype != np.uint8 for segments in maps)
    stacked = np.full((len(maps), *crop), -1 if wide else IGNORE, np.int32 if wide else np.uint8)
    for place, segments in enumerate(maps):
        part = stacked[place, : segments.shape[0], : segments.shape[1]]
        part[:] = segments
        if wide and segments.dtype == np.uint8:
            part[segments == IGNORE] = -1
    return torch.from_numpy(stacked)


class _Validation(Dataset[Picture]):
    """Validation pictures by index."""

    def __init__(self, split: _Split, test: TestConfig) -> None:
        self.split, self.test = split, test

    def __getitem__(self, index: int) -> Picture:
        entry = self.split[index]
        height, width = entry.segments.shape
        size = resized_size(height, width, short_side=self.test.short_side, long_side_max=self.test.long_side_max)
        segments, labels = _compact(entry.segments, entry.classes)
        kinds = np.full(max(256, len(labels) + 1), IGNORE, np.uint8)  # 255 and -1 both find IGNORE
        kinds[: len(labels)] = labels
        return Picture(
            image=torch.from_numpy(resize_image(entry.image, size)).permute(2, 0, 1).contiguous(),
            original_size=(height, width),
            label_map=torch.from_numpy(kinds[segments]),
            segments=torch.from_numpy(segments),
            labels=torch.from_numpy(labels),
            name=entry.name,
        )


@dataclass(frozen=True)
class _Failed:
    """What went wrong in a loader process: exceptions sent by torch would bring the other process's traceback."""

    message: str


class _Guarded(Dataset[Any]):
    """A dataset that gives its errors back."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return _Failed(str(error))


def _load(dataset: Dataset[_Item], indices: Iterable[int], processes: int) -> Iterator[_Item]:
    """dataset[index] for every index, in order."""
    if not processes:
        for index in indices:
            yield dataset[index]
        return
    import cv2

    cv2.setNumThreads(1)  # a forked process would wait forever for the threads that OpenCV has started in this one
    loader: DataLoader[Any] = DataLoader(
        _Guarded(dataset),
        batch_size=None,
        sampler=indices,
        num_workers=processes,
        prefetch_factor=PREFETCH,
        collate_fn=_as_it_is,
        worker_init_fn=_one_thread,
    )
    for item in loader:
        if isinstance(item, _Failed):
            raise ValueError(item.message)
        yield item


def _as_it_is(item: _Item) -> _Item:
    return item


def _one_thread(_: int) -> None:
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
