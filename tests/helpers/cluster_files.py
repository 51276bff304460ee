"""The project's cluster files, filled in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.cluster.config import PLACEHOLDER
from tests.helpers.shared import PROJECT


def filled(name: str, tmp_path: Path, **changes: Any) -> Path:
    """The project's file with something in every place that is to be filled in; changes: key__key=value."""
    text = (PROJECT / name).read_text()
    if name in ("cluster.onprem.yaml", "cluster.gcp.yaml"):
        text = PLACEHOLDER.sub(lambda found: re.sub(r"\W+", "-", found.group()), text)
    config = yaml.safe_load(text)
    if name == "cluster.onprem.yaml":
        config["auth"]["ssh_private_key"] = "~/.ssh/m2f"
    for path, value in changes.items():
        *keys, last = path.split("__")
        inner = config
        for key in keys:
            inner = inner[key]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    (tmp_path / name).write_text(yaml.safe_dump(config))
    return tmp_path / name
