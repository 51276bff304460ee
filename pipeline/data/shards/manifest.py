"""What the shards of a dataset hold together: counts, digests, and the manifest that says it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from pipeline.data.images.codecs import nothing_for
from pipeline.data.shards.look import record_settings
from pipeline.data.shards.writer import (
    NAMED,
    ImageLabels,
    ShardFacts,
    ShardJob,
    same_labels,
)
from pipeline.storage.results.data import (
    EmptyThings,
    ExtremeSizes,
    FetchedSource,
    ImageSides,
    Manifest,
    Samples,
    Shard,
    SharedImages,
    SkippedRecord,
    Source,
    Split,
    manifest_digest,
    plain,
)

if TYPE_CHECKING:
    from pipeline.data.shards.writer import ShardFacts
    from pipeline.params.schema import DatasetConfig


class Counts(NamedTuple):
    """What the shards of a split hold together: the fields of this name of a manifest, for one split."""

    pixels: tuple[int, ...]
    ignored_pixels: int
    images: tuple[int, ...]
    instances: tuple[int, ...]
    things_per_image: dict[int, int]
    image_sizes: ImageSides
    extreme_sizes: ExtremeSizes
    bytes: int
    skipped: tuple[SkippedRecord, ...]
    empty_things: EmptyThings


def counted(shards: Sequence[ShardFacts]) -> Counts:
    """The counts of a split's shards, which are in their order."""
    *pixels, ignored = _summed([shard.pixels for shard in shards])
    things: Counter[int] = Counter()
    heights: Counter[int] = Counter()
    widths: Counter[int] = Counter()
    for shard in shards:
        things.update(shard.things_per_image)
        for height, width, images in shard.sizes:
            heights[height] += images
            widths[width] += images
    return Counts(
        pixels=tuple(pixels),
        ignored_pixels=ignored,
        images=_summed([shard.images for shard in shards]),
        instances=_summed([shard.instances for shard in shards]),
        things_per_image={count: things[count] for count in sorted(things)},
        image_sizes=ImageSides(height=_spread(heights), width=_spread(widths)),
        extreme_sizes=_extremes(size for shard in shards for size in shard.sizes),
        bytes=sum(shard.bytes for shard in shards),
        skipped=tuple(record for shard in shards for record in shard.skipped),
        empty_things=EmptyThings(
            count=sum(shard.empty.count for shard in shards),
            first=tuple(name for shard in shards for name in shard.empty.first)[:NAMED],
        ),
    )


def check_things(dataset: str, split: str, shards: Sequence[ShardFacts], on_empty: Literal["stop", "allow"]) -> None:
    """ValueError where a split has annotated things and none of them can be a target, unless that is allowed; a warning
    where more than MAX_EMPTY of them have no pixel."""
    things, empty = sum(shard.things for shard in shards), counted(shards).empty_things
    named = "; ".join(empty.first)
    if things and not any(shard.targets for shard in shards) and on_empty == "stop":
        raise ValueError(
            f"none of the {things:,} annotated objects of split {split} of {dataset} can be a target: {empty.count:,} "
            f"have no pixel, {things - empty.count:,} are crowds (`iscrowd`); correct the annotations"
            f"{f', such as {named}' if named else ''}, or set on_empty: allow in the dataset if that is meant"
        )
    if empty.count > MAX_EMPTY * things:
        print(
            f"{dataset} {split}: {empty.count:,} of {things:,} annotated objects have no pixel, and no training sees "
            f"them: {named}",
            file=sys.stderr,
        )


def _summed(counts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(np.sum(counts, axis=0).tolist())


def _spread(counts: Counter[int]) -> tuple[int, int, int]:
    """Least, median (the lower of two) and greatest value."""
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    return values[0], values[int(np.searchsorted(below, (below[-1] + 1) // 2))], values[-1]


def _extremes(counted_sizes: Iterable[tuple[int, int, int]]) -> ExtremeSizes:
    sizes = sorted((height, width) for height, width, _ in counted_sizes)
    return ExtremeSizes(
        smallest=min(sizes, key=lambda size: size[0] * size[1]),
        largest=max(sizes, key=lambda size: size[0] * size[1]),
        narrowest=max(sizes, key=lambda size: max(size) / min(size)),
    )


def shared_images(train: Sequence[ShardFacts], val: Sequence[ShardFacts]) -> SharedImages:
    """Which images of the second split are in the first too, by the digests of their files."""
    trained = {digest: name for shard in train for name, digest in shard.image_digests.items()}
    shared = [(n, trained[d]) for shard in val for n, d in shard.image_digests.items() if d in trained]
    first = (name if name == other else f"{name} = {other} in training" for name, other in shared[:_NAMED])
    return SharedImages(count=len(shared), first=tuple(first))


def class_lines(manifest: Manifest) -> Iterator[tuple[object, ...]]:
    """Class, split, and its pixels, pictures and instances there, for every class and split."""
    for split in manifest.splits:
        columns = (manifest.pixels[split], manifest.images[split], manifest.instances[split])
        yield from ((name, split, *counts) for name, *counts in zip(manifest.class_names, *columns, strict=True))


MAX_EMPTY = 0.02
"""Share of a split's things that may be without a pixel before a warning; few are slips of annotators."""

_NAMED = 3
"""Images that are named of those that are in two splits."""

MAX_SKIPPED = 0.05
"""Share of a split's records that `on_error: skip` leaves out at most; more are no slips but a wrong setting."""


def content_digest(splits: Mapping[str, Split]) -> str:
    """SHA-256 of what the shards are: a digest of their names, lengths and digests."""
    return hashlib.sha256(json.dumps(plain(splits), sort_keys=True).encode()).hexdigest()


def splits_of(config: DatasetConfig, jobs: Sequence[ShardJob], shards: MadeShards) -> dict[str, Split]:
    """The splits with their shards, which are called by their names alone."""
    listed: dict[str, list[Shard]] = {split: [] for split in config.splits}
    for job in jobs:
        facts = shards.facts[job.name]
        listed[job.split].append(
            Shard(path=f"{job.name}.arrow", records=facts.records, bytes=facts.bytes, sha256=facts.sha256)
        )
    return {
        split: Split(records=sum(shard.records for shard in entries), shards=tuple(entries))
        for split, entries in listed.items()
    }


def make_manifest(
    dataset: str,
    config: DatasetConfig,
    jobs: Sequence[ShardJob],
    shards: MadeShards,
    facts: Sequence[FetchedSource],
    splits: Mapping[str, Split],
    samples: Samples,
    *,
    folder: str,
) -> Manifest:
    """The manifest of shards and samples that lie in `folder`, under the storage root."""

    def placed(split: Split) -> Split:
        shards = (dataclasses.replace(shard, path=f"{folder}/{shard.path}") for shard in split.shards)
        return dataclasses.replace(split, shards=tuple(shards))

    facts_of = {split: [shards.facts[job.name] for job in jobs if job.split == split] for split in splits}
    counts = {split: counted(facts_of[split]) for split in splits}
    manifest = Manifest(
        dataset=dataset,
        digest="",
        class_names=config.class_names,
        thing_classes=config.thing_classes,
        ignore_label=nothing_for(len(config.class_names)),
        labels=shards.labels.label_types if shards.labels else (),
        pixel_layout=config.pixels,
        splits={name: placed(split) for name, split in splits.items()},
        pixels={split: count.pixels for split, count in counts.items()},
        ignored_pixels={split: count.ignored_pixels for split, count in counts.items()},
        images={split: count.images for split, count in counts.items()},
        instances={split: count.instances for split, count in counts.items()},
        things_per_image={split: count.things_per_image for split, count in counts.items()},
        image_sizes={split: count.image_sizes for split, count in counts.items()},
        bytes={split: count.bytes for split, count in counts.items()},
        skipped={split: count.skipped for split, count in counts.items()},
        sources=tuple(Source(name=source.name, bytes=source.bytes, sha256=source.sha256) for source in facts),
        samples=dataclasses.replace(samples, path=f"{folder}/{samples.path}"),
        terms=config.terms,
        empty_things={split: count.empty_things for split, count in counts.items() if count.empty_things.count},
        left_out=tuple(sorted({name for made in shards.facts.values() for name in made.left_out})),
        settings=record_settings(config),
        extreme_sizes={split: count.extreme_sizes for split, count in counts.items()},
        shared_images=shared_images(facts_of.get("train", ()), facts_of.get("val", ())),
    )
    return dataclasses.replace(manifest, digest=manifest_digest(manifest))


class MadeShards:
    """The facts of finished shards. What only several shards together can get wrong is found when one is added."""

    def __init__(self, dataset: str, records: Mapping[str, int]) -> None:
        self.dataset, self.records = dataset, records
        self.facts: dict[str, ShardFacts] = {}
        self.skipped = dict.fromkeys(records, 0)
        self.labels: ImageLabels | None = None

    def add(self, job: ShardJob, facts: ShardFacts) -> None:
        """ValueError when its pictures have other kinds of labels than the rest, or too many records are skipped."""
        self.facts[job.name] = facts
        if facts.labels is not None:
            self.labels = same_labels(self.labels, facts.labels)
        for record in facts.skipped:
            print(f"{self.dataset}: skipped {record.file}: {record.reason}", file=sys.stderr)
        self.skipped[job.split] += len(facts.skipped)
        if self.skipped[job.split] > MAX_SKIPPED * self.records[job.split]:
            raise ValueError(
                f"{self.skipped[job.split]} of the {self.records[job.split]:,} records of split {job.split} are wrong, "
                f"of which `on_error: skip` leaves out at most {MAX_SKIPPED:.0%}: {facts.skipped[0].reason}"
            )
