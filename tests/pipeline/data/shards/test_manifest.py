from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.data.shards import writer
from pipeline.data.shards.manifest import class_lines, counted, manifest_digest
from pipeline.storage.files import sha256
from pipeline.storage.results.data import EmptyThings, ExtremeSizes, ImageSides, Manifest, Samples, SharedImages, Source
from tests.helpers.images import encoded, image, labels, put, write_folder
from tests.helpers.manifests import made_up_manifest
from tests.helpers.shard_folders import build, facts_of


def test_the_manifest_counts_pixels_pictures_and_bytes(tmp_path: Path, storage: Path) -> None:
    manifest = build(write_folder(tmp_path / "d"), thing_classes=("car",))
    # one picture, 12 x 16: column 0 ignored (12); car 4 x 4 = 16; sky 6 x 15 - 8 = 82; road the same
    assert manifest.pixels == {"train": (3 * 82, 3 * 82, 3 * 16), "val": (2 * 82, 2 * 82, 2 * 16)}
    assert manifest.ignored_pixels == {"train": 36, "val": 24}
    assert manifest.images == {"train": (3, 3, 3), "val": (2, 2, 2)}
    assert manifest.image_sizes["val"] == ImageSides(height=(12, 12, 12), width=(16, 16, 16))
    assert manifest.things_per_image == {"train": {0: 3}, "val": {0: 2}}
    assert (manifest.pixel_layout, manifest.skipped) == ("encoded", {"train": (), "val": ()})
    assert manifest.bytes["train"] == sum(shard.bytes for shard in manifest.splits["train"].shards)
    assert manifest.class_names == ("sky", "road", "car")
    assert (manifest.thing_classes, manifest.ignore_label) == (("car",), 255)
    assert manifest.labels == ("semantic",)  # ids are classes: cars that touch are one region, and nobody counts it
    assert manifest.instances == {"train": (0, 0, 0), "val": (0, 0, 0)}
    (source,) = facts_of(tmp_path / "d")
    assert manifest.sources == (Source(name=source.name, bytes=source.bytes, sha256=source.sha256),)
    for split, count in (("train", 3), ("val", 2)):
        assert manifest.splits[split].records == count
        for shard in manifest.splits[split].shards:
            path = storage / shard.path
            assert (path.stat().st_size, sha256(path)) == (shard.bytes, shard.sha256)
    assert manifest.digest == manifest_digest(manifest)
    assert manifest.digest != manifest_digest(dataclasses.replace(manifest, class_names=("a", "b", "c")))
    # neither how samples are painted nor how the terms are worded changes what is trained on
    others = Samples(path="elsewhere.png", bytes=1, sha256="5a")
    assert manifest.digest == manifest_digest(dataclasses.replace(manifest, samples=others, terms="others"))


def test_a_manifest_notes_what_trains_nothing_without_another_digest(tmp_path: Path, storage: Path) -> None:
    manifest = build(write_folder(tmp_path / "d"), thing_classes=("car",))
    # the images p0 and p1 of both splits are the same files, and all are of 12 x 16
    assert manifest.shared_images == SharedImages(count=2, first=("p0", "p1"))
    assert manifest.extreme_sizes["val"] == ExtremeSizes(smallest=(12, 16), largest=(12, 16), narrowest=(12, 16))
    assert manifest.settings["class_names"] == ["sky", "road", "car"] and "on_error" not in manifest.settings
    unknown = dataclasses.replace(manifest, settings={}, extreme_sizes={}, shared_images=SharedImages())
    assert manifest_digest(unknown) == manifest.digest


def test_images_of_two_splits_are_the_same_by_their_bytes_whatever_they_are_called(
    tmp_path: Path, storage: Path
) -> None:
    folder = write_folder(tmp_path / "d", train=5, val=0)
    for name, other in (("p1", "p1"), ("q", "p4"), ("r", "p0"), ("s", "p2")):
        for top, suffix in (("images", ".jpg"), ("annotations", ".png")):
            data = (folder / top / f"training/{other}{suffix}").read_bytes()
            put(folder / top / f"validation/{name}{suffix}", data)
    put(folder / "images/validation/new.jpg", encoded(image(seed=9), ".jpg"))
    put(folder / "annotations/validation/new.png", encoded(labels()))
    shared = build(folder).shared_images
    assert shared == SharedImages(count=4, first=("p1", "q = p4 in training", "r = p0 in training"))


def test_a_manifests_digest_is_that_of_its_values_as_json() -> None:
    # SHA-256 of json.dumps(..., sort_keys=True) of the same values without digest, samples and terms
    manifest = made_up_manifest(things_per_image={"train": {2: 1, 10: 4}, "val": {0: 1}})
    assert manifest_digest(manifest) == "b5f92972505b3c3c468f71528828ef3f515d28b48671bc0cebf5ab0e6d5770e9"


def test_a_new_field_changes_a_manifests_digest_only_where_it_is_used() -> None:
    manifest = made_up_manifest()
    newer = dataclasses.make_dataclass("Newer", [("depth", tuple[int, ...], ())], bases=(Manifest,), frozen=True)
    fields = {entry.name: getattr(manifest, entry.name) for entry in dataclasses.fields(manifest)}
    assert manifest_digest(newer(**fields)) == manifest_digest(manifest)
    assert manifest_digest(newer(**fields, depth=(3,))) != manifest_digest(manifest)


def test_every_class_and_split_has_its_counts(tmp_path: Path, storage: Path) -> None:
    manifest = build(write_folder(tmp_path / "d"), class_names=("sky", "road, wet", "car"))
    assert list(class_lines(manifest)) == [
        ("sky", "train", 246, 3, 0),
        ("road, wet", "train", 246, 3, 0),
        ("car", "train", 48, 3, 0),
        ("sky", "val", 164, 2, 0),
        ("road, wet", "val", 164, 2, 0),
        ("car", "val", 32, 2, 0),
    ]


def test_sizes_and_things_of_several_shards_are_one_histogram() -> None:
    facts = writer.ShardFacts(
        records=3,
        bytes=10,
        sha256="5a",
        pixels=(1, 2, 3),
        images=(1, 0),
        instances=(4, 0),
        things_per_image={0: 1, 10: 2},
        things=21,
        targets=20,
        empty=EmptyThings(count=1, first=("a.json: annotation 1, image a",)),
        left_out=(),
        sizes=((5, 9, 3),),
        labels=None,
        skipped=(),
        image_digests={"a": "01", "b": "02", "c": "03"},
    )
    other = dataclasses.replace(facts, things_per_image={2: 1, 10: 1}, sizes=((8, 4, 1), (6, 9, 1)))
    counts = counted([facts, other])
    # heights 5 5 5 6 8, widths 4 9 9 9 9
    assert counts.image_sizes == ImageSides(height=(5, 5, 8), width=(4, 9, 9))
    # 5 x 9, 8 x 4 and 6 x 9: 45, 32 and 54 pixels, one side 1.8, 2 and 1.5 times the other
    assert counts.extreme_sizes == ExtremeSizes(smallest=(8, 4), largest=(6, 9), narrowest=(8, 4))
    assert list(counts.things_per_image.items()) == [(0, 1), (2, 1), (10, 3)]
    assert (counts.pixels, counts.ignored_pixels) == ((2, 4), 6)
    assert (counts.instances, counts.bytes) == ((8, 0), 20)
    assert counts.empty_things == EmptyThings(count=2, first=("a.json: annotation 1, image a",) * 2)
