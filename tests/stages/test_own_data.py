"""docs/own-data.md shows the dataset and the row that are in params.yaml."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parents[2]


def test_the_worked_example_is_what_params_yaml_holds() -> None:
    text = (PROJECT / "docs/own-data.md").read_text()
    params = (PROJECT / "params.yaml").read_text()
    tiny = params[params.index("rows:") : params.index("  camvid_tiny:")]  # defines the anchor that the example uses
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        shown = yaml.safe_load(block.replace("rows:\n", tiny))
        for section, entries in shown.items():
            assert (
                yaml.safe_load(params)[section]["camvid" if section == "datasets" else "camvid_tiny"]
                == (entries["camvid" if section == "datasets" else "camvid_tiny"])
            )
