"""A copy of the project with rows of a few steps, for clusters that have no GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.helpers.project_copy import Copy
from tests.helpers.shared import PROJECT

ROWS = {"brief": 20, "faults": 60, "other": 30}
"""The rows and their steps."""
CHECKPOINT_INTERVAL = 10


def write_project(folder: Path) -> None:
    """Make the copy in a new folder."""
    folder.mkdir(parents=True)
    copy = Copy(folder)
    row = copy.params["rows"]["shapes_tiny"]
    copy.params["datasets"] = {"shapes": copy.params["datasets"]["shapes"]}
    copy.params["datasets"]["shapes"]["generate"] |= {"train": 12, "val": 4}
    row["seeds"] = [0]
    copy.keep_rows("shapes_tiny")
    for name, steps in ROWS.items():
        train = {"steps": steps, "val_interval": steps, "checkpoint_interval": CHECKPOINT_INTERVAL, "log_every": 1}
        copy.params["rows"][name] = {**row, "train": {**row["train"], **train}}
    copy.write_params()
    for name in (".gitignore", "requirements.lock"):
        shutil.copy(PROJECT / name, folder / name)
    shutil.copytree(PROJECT / "deploy", folder / "deploy")
