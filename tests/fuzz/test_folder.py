"""The folder layout, as a folder and as archives, whole and changed: right targets or one sentence."""

from __future__ import annotations

import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.fuzz import runs
from tests.fuzz.changes import changed_bytes, changed_png, inputs, png
from tests.fuzz.child import Child, Sentence
from tests.fuzz.oracle import UnknownPngError, png_values
from tests.helpers.images import encoded, image, put

NOTHING = 255

IMAGE = {(5, 7): encoded(image(5, 7), ".png"), (7, 5): encoded(image(7, 5), ".jpg"), (1, 1): encoded(image(1, 1))}
"""Image files by height and width."""


class Dataset(NamedTuple):
    """A data set of one picture in training and one in validation."""

    settings: Mapping[str, Any]
    images: tuple[bytes, bytes]
    labels: tuple[bytes, bytes]
    packing: str
    """folder, or the suffix of an archive."""
    name: str
    """Of both pictures, without suffix."""
    right: tuple[np.ndarray, np.ndarray] | None
    """Class ids; None: something is changed."""


def class_ids(stored: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Class ids of stored labels, one by one. ValueError: an id is none."""
    if palette := settings.get("palette"):
        of = {colour: name for name, colours in palette.items() for colour in colours}
        names = [of[tuple(colour)] for colour in stored.reshape(-1, 3).tolist()]
        ids = [NOTHING if name == "ignore" else settings["class_names"].index(name) for name in names]
        return np.array(ids).reshape(stored.shape[:2])
    found = []
    for value in stored[..., 0].ravel().tolist():
        label = (
            (value + settings["label_offset"]) % 256
            if settings["label_offset"] < 0
            else value + settings["label_offset"]
        )
        if label in np.atleast_1d(settings["ignore_label"]):
            found.append(NOTHING)
        elif 0 <= label < len(settings["class_names"]):
            found.append(label)
        else:
            raise ValueError(f"{value} becomes {label}")
    return np.array(found).reshape(stored.shape[:2])


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    """Labels of all depths, ids that are shifted or ignored, names of all spellings, all archives."""
    classes = draw(st.integers(3, 5))
    settings = {
        "layout": "folder",
        "class_names": tuple("abcde"[:classes]),
        "label_offset": draw(st.sampled_from((0, 0, -1, 1))),
        "ignore_label": draw(st.sampled_from((255, 255, 9, classes, (255, 9)))),
        "label_suffix": draw(st.sampled_from(("", "_L"))),
    }
    size = draw(st.sampled_from(sorted(IMAGE)[1:]))
    labels, right = [], []
    for _ in range(2):
        bits = draw(st.sampled_from((2, 4, 8, 8, 16)))
        palette = draw(st.booleans()) and bits < 16
        values = range(min(2**bits, 256))
        known = [value for value in values if _is_known(value, settings)]
        wrong = draw(st.sampled_from((False,) * 9 + (True,)))
        drawn = st.sampled_from(values if wrong else known)
        ids = np.array(draw(st.lists(drawn, min_size=size[0] * size[1], max_size=size[0] * size[1]))).reshape(size)
        ids[0, :2] = [value for value in values if 0 <= value + settings["label_offset"] < 3][:2]  # two classes
        labels.append(png(ids, bits, palette=palette))
        right.append(ids)
    if draw(st.sampled_from((False, False, True))):
        colours = np.array([(40 * value % 256, 255 - value, 7) for value in range(classes + 1)])
        names = (*settings["class_names"], "ignore")
        palette = {name: (tuple(colour),) for name, colour in zip(names, colours.tolist(), strict=True)}
        settings |= {"label_offset": 0, "ignore_label": 255, "palette": palette}
        right = [colours[ids % (classes + 1)] for ids in right]
        labels = [png(each, 8) for each in right]
    return Dataset(
        settings,
        (IMAGE[size], IMAGE[size]),
        (labels[0], labels[1]),
        draw(st.sampled_from(("folder", "zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"))),
        draw(st.sampled_from(("a", "Straße", "e\u0301", "é", "below/a", "a b.c", "ラ"))),
        (right[0], right[1]),
    )


def _is_known(value: int, settings: Mapping[str, Any]) -> bool:
    try:
        class_ids(np.array([[[value]]]), settings)
    except ValueError:
        return False
    return value + settings["label_offset"] < 256


@st.composite
def changed_datasets(draw: st.DrawFn) -> Dataset:
    """With a label or an image that is changed."""
    dataset = draw(datasets())
    images, labels = list(dataset.images), list(dataset.labels)
    place = draw(st.integers(0, 1))
    if draw(st.integers(0, 3)):
        labels[place] = draw(changed_png(labels[place]) | changed_bytes(labels[place]))
    else:
        images[place] = draw(changed_bytes(images[place]) | st.sampled_from(list(IMAGE.values())))
    return dataset._replace(images=tuple(images), labels=tuple(labels), packing="folder", right=None)


def written(dataset: Dataset, folder: Path) -> Path:
    """The data set as files or as an archive."""
    place = folder / "mine"
    for split, picture, label in zip(("training", "validation"), dataset.images, dataset.labels, strict=True):
        suffix = ".jpg" if picture.startswith(b"\xff\xd8") else ".png"
        put(place / f"images/{split}/{dataset.name}{suffix}", picture)
        put(place / f"annotations/{split}/{dataset.name}{dataset.settings['label_suffix']}.png", label)
    if dataset.packing == "folder":
        return place
    archive = folder / f"mine.{dataset.packing}"
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    if dataset.packing == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in files:
                packed.write(path, f"top\\{path.relative_to(place)}".replace("/", "\\"))  # as on Windows
    else:
        compression = dataset.packing.removeprefix("tar").removeprefix(".").replace("tgz", "gz")
        with tarfile.open(archive, f"w:{compression}") as tar:
            tar.add(place, "./top")
    return archive


def ends_well(child: Child, dataset: Dataset) -> None:
    """AssertionError unless a data set ends in the right class ids, or in a sentence where something is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder, storage = Path(name), Path(name) / "storage"
        found = child.run(runs.shard, [written(dataset, folder)], storage, dataset.settings)
        runs.check_storage(storage, refused=isinstance(found, Sentence))
    event("a sentence" if isinstance(found, Sentence) else "targets")
    if isinstance(found, Sentence):
        runs.check_sentence(found, ["mine"])
        assert dataset.right is None or any(_is_wrong(stored, dataset.settings) for stored in dataset.right), found
        return
    for split, label in zip(("train", "val"), dataset.labels, strict=True):
        (row,) = found[split]
        assert row["name"] == unicodedata.normalize("NFC", dataset.name)
        try:
            stored = png_values(label)
        except UnknownPngError:
            continue
        assert stored.shape[:2] == (row["height"], row["width"])
        np.testing.assert_array_equal(png_values(row["segments"])[..., 0], class_ids(stored, dataset.settings))


def _is_wrong(stored: np.ndarray, settings: Mapping[str, Any]) -> bool:
    return not all(_is_known(value, settings) for value in np.unique(stored).tolist())


@inputs(30)
@given(dataset=datasets())
def test_labels_of_every_depth_in_every_archive_become_the_classes_that_the_settings_say(
    child: Child, dataset: Dataset
) -> None:
    ends_well(child, dataset)


@inputs(50)
@given(dataset=changed_datasets())
def test_changed_labels_and_images_give_right_targets_or_a_sentence(child: Child, dataset: Dataset) -> None:
    ends_well(child, dataset)


@pytest.mark.full
@inputs(200)
@given(dataset=datasets())
def test_many_labels_of_every_depth_in_every_archive_become_the_classes_that_the_settings_say(
    child: Child, dataset: Dataset
) -> None:
    ends_well(child, dataset)


@pytest.mark.full
@inputs(400)
@given(dataset=changed_datasets())
def test_many_changed_labels_and_images_give_right_targets_or_a_sentence(child: Child, dataset: Dataset) -> None:
    ends_well(child, dataset)
