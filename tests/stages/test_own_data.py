"""docs/own-data.md shows datasets and rows that are in params.yaml, and one example to be added to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.params.load import parse_params

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def params() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "params.yaml").read_text())


@pytest.fixture
def examples() -> dict[str, dict[str, Any]]:
    """Entries by section."""
    found: dict[str, dict[str, Any]] = {}
    for block in re.findall(r"```yaml\n(.*?)```", (PROJECT / "docs/own-data.md").read_text(), re.DOTALL):
        for section, entries in yaml.safe_load(block).items():
            found.setdefault(section, {}).update(entries)
    return found


ADDED = {"coast", "shapes_to_coast", "coast_from_shapes"}
"""What a reader adds."""


def test_the_worked_examples_are_what_params_yaml_holds(params: dict[str, Any], examples: dict[str, Any]) -> None:
    shown = {(section, name): entry for section, entries in examples.items() for name, entry in entries.items()}
    held = {place: entry for place, entry in shown.items() if place[1] not in ADDED}
    assert {name for _, name in held} == {"camvid", "camvid_tiny", "nuclei", "nuclei_tiny"}
    for (section, name), entry in held.items():
        assert params[section][name] == entry, name


def test_the_example_of_fine_tuning_can_be_added_to_params_yaml(
    params: dict[str, Any], examples: dict[str, Any]
) -> None:
    more = {
        section: {name: entry for name, entry in entries.items() if name in ADDED}
        for section, entries in examples.items()
    }
    assert {name for entries in more.values() for name in entries} == ADDED
    random = {**more["rows"]["coast_from_shapes"], "weights": "none"}
    more["rows"]["coast_from_random"] = random
    parsed = parse_params({section: {**params[section], **more.get(section, {})} for section in params})
    tuned = parsed.row("coast_from_shapes")
    assert tuned.model.num_classes == 8 and parsed.weights[tuned.weights].row == "shapes_tiny"
    others = {"name", "weights"}
    assert {
        name for name in tuned.__slots__ if getattr(tuned, name) != getattr(parsed.row("coast_from_random"), name)
    } == others
