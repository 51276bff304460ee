"""dvc.yaml of a project without the code: this repository's, whose dependencies on code become one on the package."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from pipeline.provenance.sources import PACKAGES
from pipeline.storage.results.folder import PACKAGE

_HEAD = f"""\
# Written by `m2f init`, from the package's own pipeline. One stage per noun and entry of params.yaml:
# `dvc repro evaluate@shapes_tiny` makes one row and what it needs. Results are small files under results/; the large
# files that they name lie under storage/. {PACKAGE} holds the version of the package and a digest of its
# code: stages run again after an update, and find finished work by digest or key.

stages:
  package:
    cmd: python -m stages.package
    always_changed: true
    outs:
      - {PACKAGE}: {{cache: false, persist: true}}

"""

_ON_CODE = re.compile(rf"^( +)- ({'|'.join(PACKAGES)})(/\S+)?$")

_OWN_FILE = 'checkpoints.yaml: ["checkpoints.${key}"]'
"""Of the repository: where published checkpoints stand. A project's params.yaml has their section itself."""


def project_stages(repository: str) -> str:
    """The text of a project's dvc.yaml, from the text of the repository's."""
    lines, placed = [], False
    stages = repository.partition("\nstages:\n")[2].replace(_OWN_FILE, "checkpoints.${key}")
    for line in stages.strip("\n").splitlines():
        if on_code := _ON_CODE.match(line):
            if not placed:
                lines.append(f"{on_code[1]}- {PACKAGE}")
            placed = True
        else:
            lines.append(line)
            placed = placed and line.startswith("        - ")  # until the list ends
    return _HEAD + "\n".join(lines) + "\n"


def shown_folders(text: str) -> list[str]:
    """The folders that a dvc.yaml names for `dvc metrics` and `dvc plots`: they must be there before a row has run."""
    import yaml

    tree = yaml.safe_load(text)
    named = [*tree.get("metrics", ()), *(path for entry in tree.get("plots", ()) for path in entry)]
    return [path for path in named if not PurePosixPath(path).suffix]
