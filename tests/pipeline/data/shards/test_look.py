"""What a manifest says of a dataset before anything is trained on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.shards.look import current_manifest, look, other_settings, record_settings
from pipeline.params.schema import DatasetConfig, Params
from pipeline.storage.results.data import FetchedDataset, FetchedSource, Manifest, SharedImages
from pipeline.storage.results.folder import write_result
from tests.helpers.manifests import made_up_manifest

CONFIG = DatasetConfig(layout="folder", class_names=("sky", "road", "car"), thing_classes=("car",))
LOOK_AT = "look at the labels, ignore_label (255), label_offset (0) and class_names"


def of_pixels(train: tuple[int, ...], val: tuple[int, ...] = (9, 9, 9), *, ignored: int = 0, **fields: Any) -> Manifest:
    """Of a folder of label maps with these pixels of every class, without objects."""
    made = made_up_manifest(
        labels=("semantic",),
        pixels={"train": train, "val": val},
        instances={"train": (0, 0, 0), "val": (0, 0, 0)},
        ignored_pixels={"train": ignored, "val": ignored},
    )
    return dataclasses.replace(made, **fields)


def of_objects(train: int, val: int, labels: tuple[str, ...] = ("instances",), **fields: Any) -> Manifest:
    """Of annotated cars, this many in each split."""
    values: dict[str, Any] = {
        "labels": labels,
        "pixels": {"train": (0, 0, 0), "val": (0, 0, 0)},
        "instances": {"train": (0, 0, train), "val": (0, 0, val)},
    }
    return made_up_manifest(**{**values, **fields})


def test_a_dataset_with_pixels_of_every_class_is_nothing_to_speak_of() -> None:
    assert look(made_up_manifest(), CONFIG) == ([], [])


def test_every_class_without_a_training_pixel_is_named_with_the_share_of_ignored_pixels() -> None:
    # 60 of 60 + 40 pixels are ignored
    errors, (warning,) = look(of_pixels((40, 0, 0), ignored=60), CONFIG)
    assert warning == (
        "dataset mine: 2 of 3 classes have no training pixel: road, car; 60.0% of the training pixels are ignored; "
        + LOOK_AT
    )
    assert errors == [
        "the training images of dataset mine have pixels of one class alone, sky; 60.0% of their pixels are ignored; "
        f"{LOOK_AT}; or, if that is meant, set on_empty: allow in the dataset"
    ]


def test_ignored_labels_are_listed_as_a_user_writes_them() -> None:
    for labels, said in (((0, 254), "0, 254"), ((), "none"), (7, "7")):
        (error,), _ = look(of_pixels((40, 0, 0)), dataclasses.replace(CONFIG, ignore_label=labels))
        assert f"ignore_label ({said}), label_offset (0)" in error


def test_settings_that_a_layout_does_not_have_are_not_named() -> None:
    for layout in ("ade20k", "cityscapes", "coco", "vistas"):
        (error,), _ = look(of_pixels((40, 0, 0)), dataclasses.replace(CONFIG, layout=layout))
        assert "; look at the annotations, class_names and thing_classes; or" in error


def test_two_classes_with_pixels_are_enough_and_the_third_is_warned_of() -> None:
    errors, (warning,) = look(of_pixels((40, 40, 0), ignored=20), CONFIG)
    assert errors == [] and "1 of 3 classes have no training pixel: car; 20.0% of" in warning


def test_labels_in_colours_are_looked_for_in_the_palette() -> None:
    colours = dataclasses.replace(CONFIG, palette={"sky": ((0, 0, 200),)})
    _, (warning,) = look(of_pixels((40, 40, 0)), colours)
    assert warning.endswith("; look at the labels, palette and class_names")


@pytest.mark.parametrize(("ignored", "said"), [(119, 0), (120, 1)])
def test_half_of_the_pixels_ignored_is_worth_a_warning_though_no_class_is_missing(ignored: int, said: int) -> None:
    _, warnings = look(of_pixels((40, 40, 40), ignored=ignored), CONFIG)
    assert len(warnings) == said
    assert warnings == [f"dataset mine: 50.0% of the training pixels are ignored; {LOOK_AT}"] * said


def test_a_validation_split_without_a_labelled_pixel_is_an_error() -> None:
    (error,), _ = look(of_pixels((40, 40, 40), (0, 0, 0), ignored=9), CONFIG)
    assert error.startswith(
        "the validation images of dataset mine have no pixel of a class; 100.0% of their pixels are ignored; look at"
    )
    assert look(of_pixels((40, 40, 40), (5, 0, 0)), CONFIG).errors == []  # one class can be measured


def test_what_is_allowed_to_be_empty_is_a_warning() -> None:
    allowed = dataclasses.replace(CONFIG, on_empty="allow")
    errors, warnings = look(of_pixels((40, 0, 0), (0, 0, 0)), allowed)
    assert errors == []
    assert [warning.partition(" of dataset")[0] for warning in warnings[1:]] == [
        "the training images",
        "the validation images",
    ]


def test_a_split_without_an_object_is_an_error_where_only_objects_are_annotated() -> None:
    coco = dataclasses.replace(CONFIG, layout="coco")
    for train, val, where in ((0, 3, "training"), (3, 0, "validation")):
        (error,), _ = look(of_objects(train, val), coco)
        assert error.startswith(
            f"the {where} images of dataset mine have no object of a thing class (crowds do not count); look at the "
            "annotations, class_names and thing_classes; or"
        )
    enough = look(of_objects(3, 3, class_names=("dog", "road", "car")), coco)
    assert enough == (
        [],
        [
            "dataset mine: 2 of 3 classes have no training object: dog, road; look at the annotations, class_names and "
            "thing_classes"
        ],
    )


def test_panoptic_labels_need_an_object_to_learn_from_and_anything_to_be_measured_on() -> None:
    both = ("instances", "panoptic", "semantic")
    pixels = {"train": (40, 40, 0), "val": (40, 0, 0)}
    (error,), _ = look(of_objects(0, 0, both, pixels=pixels), CONFIG)  # sky in validation can be measured
    assert error.startswith("the training images of dataset mine have no object")
    one_class = {"train": (0, 0, 40), "val": (0, 0, 40)}  # things against nothing
    assert look(of_objects(3, 3, both, pixels=one_class), CONFIG).errors == []
    (error,), _ = look(of_objects(3, 0, both, pixels=one_class), CONFIG)  # crowds alone
    assert error.startswith("the validation images of dataset mine have no pixel of a class")


def test_a_dataset_of_validation_images_alone_is_not_asked_for_training_ones() -> None:
    manifest = of_pixels((0, 0, 0))
    only_val = dataclasses.replace(manifest, splits={"val": manifest.splits["val"]})
    assert look(only_val, CONFIG) == ([], [])


def test_images_of_both_splits_are_counted_and_the_first_are_named() -> None:
    shared = SharedImages(count=4, first=("p1", "p2", "p3"))
    _, (warning,) = look(made_up_manifest(shared_images=shared), CONFIG)
    assert warning.startswith(
        "dataset mine: 4 of 1 validation images are training images too, byte for byte (p1, p2, p3, ...); figures on"
    )


# Settings


def test_shards_of_other_settings_are_told_by_what_differs() -> None:
    manifest = made_up_manifest(settings=record_settings(CONFIG))
    assert other_settings(manifest, CONFIG) == []
    other = dataclasses.replace(CONFIG, class_names=("sky", "road"), ignore_label=1, terms="others", on_error="skip")
    assert other_settings(manifest, other) == [
        "class_names (now [sky, road], then [sky, road, car])",
        "ignore_label (now 1, then 255)",
    ]
    assert other_settings(manifest, dataclasses.replace(CONFIG, splits={"val": "validation"})) == [
        "splits (now {val: validation}, then {train: training, val: validation})"
    ]


def test_an_older_manifest_is_compared_by_what_it_knows() -> None:
    manifest = made_up_manifest()
    assert other_settings(manifest, dataclasses.replace(CONFIG, ignore_label=1)) == []
    assert other_settings(manifest, dataclasses.replace(CONFIG, pixels="raw")) == ["pixels (now raw, then encoded)"]
    things = dataclasses.replace(CONFIG, thing_classes=())
    assert other_settings(manifest, things) == ["thing_classes (now [], then [car])"]


def test_a_setting_of_a_later_version_at_its_off_value_is_no_other_setting() -> None:
    manifest = made_up_manifest(settings={**record_settings(CONFIG), "later": "on"})
    assert other_settings(manifest, CONFIG) == ["later (now its default, then on)"]


def test_long_settings_are_cut() -> None:
    names = tuple(f"class number {number}" for number in range(150))
    manifest = made_up_manifest(settings=record_settings(CONFIG))
    (said,) = other_settings(manifest, dataclasses.replace(CONFIG, class_names=names))
    assert len(said) < 150 and said.endswith("..., then [sky, road, car])")


def test_the_manifest_of_a_stage_is_refused_where_params_yaml_says_other_settings(tmp_path: Path) -> None:
    write_result(made_up_manifest(settings=record_settings(CONFIG)), "mine", results=tmp_path)
    assert current_manifest(Params(datasets={"mine": CONFIG}, rows={}), "mine", results=tmp_path).dataset == "mine"
    changed = dataclasses.replace(CONFIG, label_offset=-1)
    with pytest.raises(ValueError, match="were made with other settings") as refused:
        current_manifest(Params(datasets={"mine": changed}, rows={}), "mine", results=tmp_path)
    assert str(refused.value) == (
        "the shards of dataset mine were made with other settings than params.yaml has: label_offset (now -1, then 0); "
        "make them again with: dvc repro -f shard@mine"
    )


def test_the_manifest_of_a_stage_is_refused_where_other_sources_were_fetched_since(tmp_path: Path) -> None:
    manifest, params = made_up_manifest(), Params(datasets={"mine": CONFIG}, rows={})
    write_result(manifest, "mine", results=tmp_path)
    (source,) = manifest.sources
    fetched = FetchedSource(name=source.name, bytes=source.bytes, sha256=source.sha256, path="archives/0b/mine.zip")
    for sha256, refused in ((source.sha256, False), ("5c" * 32, True)):
        sources = (dataclasses.replace(fetched, sha256=sha256),)
        write_result(FetchedDataset(dataset="mine", sources=sources, terms="", generate={}), "mine", results=tmp_path)
        if refused:
            with pytest.raises(ValueError, match=r"now {mine.zip: 5c5c5c5c5c5c5c5c}, then {mine.zip: 0b0b"):
                current_manifest(params, "mine", results=tmp_path)
        else:
            assert current_manifest(params, "mine", results=tmp_path) == manifest
