from __future__ import annotations

import yaml

from pipeline.params.load import load_params, parse_params
from pipeline.project.settings import NOTHING_OWN, Entries, project_settings
from pipeline.provenance.run_key import settings_key
from tests.helpers.shared import PROJECT

REPOSITORY = (PROJECT / "params.yaml").read_text()


def test_the_embedded_row_is_the_repositorys() -> None:
    made = parse_params(yaml.safe_load(project_settings(REPOSITORY, NOTHING_OWN)))
    whole = load_params(PROJECT / "params.yaml")
    assert list(made.rows) == ["shapes_tiny"] and list(made.datasets) == ["shapes"] and not made.checkpoints
    assert made.rows["shapes_tiny"] == whole.rows["shapes_tiny"]
    assert settings_key(made.rows["shapes_tiny"]) == settings_key(whole.rows["shapes_tiny"])
    assert made.datasets["shapes"] == whole.datasets["shapes"]
    assert made.weights["torchvision_r50"] == whole.weights["torchvision_r50"]
    assert made.verdict == whole.verdict


def test_the_examples_are_entries_once_they_are_no_comments() -> None:
    lines = project_settings(REPOSITORY, NOTHING_OWN).splitlines()
    first = lines.index("  # mine:")
    row = lines.index("  # mine_tiny:")
    for start, end in ((first, lines.index("", first)), (row, lines.index("", row))):
        lines[start:end] = [line.replace("  # ", "  ", 1) for line in lines[start:end]]
    made = parse_params(yaml.safe_load("\n".join(lines)))
    assert made.rows["mine_tiny"].dataset == "mine" and made.rows["mine_tiny"].model.num_classes == 2


def test_own_entries_follow_the_embedded_ones() -> None:
    text = project_settings(
        "verdict:\n  margin_points: 1.0\n\n"
        "datasets:\n  shapes:\n    layout: shapes\n\n  # of another\n  other: {}\n"
        "sites:\n  torchvision: {a: 1}\n  # of another\n  other: {}\n"
        "weights:\n  none: {}\n  torchvision_r50: {}\n"
        "presets:\n  none: {}\n  tiny:\n    model:\n      a: 1 # why\n\n  # of another\n  other: {}\n"
        "rows:\n  shapes_tiny:\n    seeds: [0,\n            1]\n\n  other: {}\n",
        Entries(dataset="mine:\n  layout: coco\n", row="mine_tiny:\n  dataset: mine\n"),
    )
    assert "of another" not in text and "      a: 1 # why\n" in text
    assert yaml.safe_load(text) == {
        "verdict": {"margin_points": 1.0},
        "datasets": {"shapes": {"layout": "shapes"}, "mine": {"layout": "coco"}},
        "sites": {"torchvision": {"a": 1}},
        "weights": {"none": {}, "torchvision_r50": {}},
        "presets": {"none": {}, "tiny": {"model": {"a": 1}}},
        "rows": {"shapes_tiny": {"seeds": [0, 1]}, "mine_tiny": {"dataset": "mine"}},
        "checkpoints": {},
    }
