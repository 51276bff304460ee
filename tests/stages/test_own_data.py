"""docs/own-data.md shows the datasets and the rows that are in params.yaml."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parents[2]


def test_the_worked_examples_are_what_params_yaml_holds() -> None:
    text = (PROJECT / "docs/own-data.md").read_text()
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    examples = set()
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        for section, entries in yaml.safe_load(block).items():
            for name, entry in entries.items():
                assert params[section][name] == entry, name
                examples.add(name)
    assert examples == {"camvid", "camvid_tiny", "nuclei", "nuclei_tiny"}
