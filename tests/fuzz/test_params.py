"""params.yaml with changed entries and bytes: the settings that it holds, or one sentence."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import event, given
from hypothesis import strategies as st

from tests.fuzz import runs
from tests.fuzz.changes import ODD, changed_bytes, changed_tree, inputs
from tests.fuzz.child import Child, Sentence

AUGMENTATION = {"crop": [32, 64], "short_sides": [32, 48], "long_side_max": 96}

TREE: dict[str, Any] = {
    "datasets": {
        "streets": {
            "layout": "folder",
            "sources": ["streets.zip", "https://example.org/more.zip"],
            "bytes": [12, 0],
            "sha256": ["aa", "bb"],
            "class_names": ["sky", "road"],
            "ignore_label": 9,
            "label_offset": -1,
            "exif": "ignore",
            "value_range": [0.0, 4095.0],
            "on_error": "skip",
        },
        "cells": {
            "layout": "coco",
            "splits": {"train": "a", "val": "b"},
            "annotation_files": {"instances": "{folder}/coco.json"},
            "class_names": ["cell"],
            "thing_classes": ["cell"],
            "max_pixels": 1000,
        },
    },
    "sites": {"zoo": {"url": "https://example.org/{name}.pth"}},
    "weights": {"none": {}, "r50": {"site": "zoo", "name": "r50", "sha256_prefix": "0676ba61"}},
    "presets": {
        "small": {
            "model": {"backbone": {"name": "r50"}, "loss": {"points": 64}},
            "test": {"short_side": 32, "long_side_max": 64},
        }
    },
    "rows": {
        "streets_small": {
            "dataset": "streets",
            "preset": "small",
            "weights": "r50",
            "train": {"steps": 10, "augmentation": AUGMENTATION, "optimizer": {"lr": 0.001}},
            "seeds": [0, 1],
            "published": {"miou": 40.5},
        },
        "cells_small": {
            "dataset": "cells",
            "preset": "small",
            "weights": "none",
            "task": "instance",
            "train": {"steps": 10, "augmentation": {"crop": [32, 32], "jitter": [0.1, 2.0]}},
        },
    },
    "checkpoints": {},
}

ODD_SETTINGS = (
    *ODD,
    *("yes", "1e-4", "off", "road", "streets", "none", "folder", "r50", "x.y", "my set", 2024, {1: 2}, {None: 3}),
)


SHORTHAND = {"preset", "site", "name", "stamp"}
"""Entries that stand for others."""


@st.composite
def changed_params(draw: st.DrawFn) -> bytes:
    """The file with changed entries or, now and then, changed bytes."""
    if draw(st.integers(0, 4)):
        tree = draw(changed_tree(TREE, ODD_SETTINGS))
        return yaml.safe_dump(tree, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return draw(changed_bytes(yaml.safe_dump(TREE).encode()))


def ends_well(child: Child, data: bytes) -> bool:
    """Whether a params.yaml is read. AssertionError unless it ends in its settings, or in a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "params.yaml"
        file.write_bytes(data)
        found = child.run(runs.params, file)
    event("a sentence" if isinstance(found, Sentence) else "settings")
    if isinstance(found, Sentence):
        runs.check_sentence(found, ["params.yaml"])
        return False
    tree = yaml.safe_load(data)
    for section in ("datasets", "weights", "rows"):
        assert getattr(found, section).keys() == (tree.get(section) or {}).keys()
        for name, entry in (tree.get(section) or {}).items():
            preset = tree["presets"].get(entry.get("preset"), {}) if section == "rows" else {}
            holds(getattr(found, section)[name], {key: value for key, value in preset.items() if key not in entry})
            holds(getattr(found, section)[name], {key: entry[key] for key in entry.keys() - SHORTHAND})
    return True


def holds(settings: Any, entries: Mapping[str, Any]) -> None:
    """AssertionError unless dataclasses have the entries' values."""
    for key, value in entries.items():
        found = getattr(settings, key)
        if dataclasses.is_dataclass(found):
            holds(found, value)
        elif key not in ("class_names", "thing_classes") or not isinstance(value, str):  # the name of a list
            assert plain(found) == (float(value) if isinstance(found, float) else plain(value)), key


def plain(value: Any) -> Any:
    """Tuples as lists, and keys as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, tuple | list) else value


@inputs(1)
@given(tree=st.just(TREE))
def test_the_file_that_is_changed_is_right(child: Child, tree: dict[str, Any]) -> None:
    assert ends_well(child, yaml.safe_dump(tree).encode())


@inputs(300)
@given(data=changed_params())
def test_a_changed_params_yaml_gives_its_settings_or_a_sentence(child: Child, data: bytes) -> None:
    ends_well(child, data)


@pytest.mark.full
@inputs(900)
@given(data=changed_params())
def test_many_changes_of_params_yaml_give_its_settings_or_a_sentence(child: Child, data: bytes) -> None:
    ends_well(child, data)
