"""The project as a user has it: a copy in which DVC and the stages run for real."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.cluster.workspace import without_git
from pipeline.params.load import read_settings
from pipeline.storage.results.folder import write_metrics, write_plot
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S

SECTIONS = {
    "ready": "rows",
    "fetch": "datasets",
    "shard": "datasets",
    "weights": "weights",
    "train": "rows",
    "evaluate": "rows",
    "published": "checkpoints",
    "benchmark": "rows",
    "register": "rows",
}
"""Every stage of dvc.yaml with the section of params.yaml whose entries it is made for."""


class Copy:
    """A copy of what DVC looks at, without Git; results can be made up that DVC holds to be up to date."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("m2f", "pipeline", "stages", ".dvc"):
            left_out = shutil.ignore_patterns("__pycache__", "tmp", "cache", "config.local")
            shutil.copytree(PROJECT / name, folder / name, ignore=left_out)
        for name in ("dvc.yaml", ".dvcignore", "params.yaml", "checkpoints.yaml"):
            shutil.copy(PROJECT / name, folder / name)
        without_git(folder)
        self.params: dict[str, Any] = read_settings(folder / "params.yaml")

    def keep_rows(self, *rows: str) -> None:
        """Leave these rows alone in params.yaml, with the published checkpoints and initial weights that are theirs."""
        weights = {self.params["rows"][row]["weights"] for row in rows}
        self.params["checkpoints"] = {
            name: entry for name, entry in self.params["checkpoints"].items() if entry["row"] in rows
        }
        for section, names in (("rows", rows), ("weights", weights)):
            self.params[section] = {name: entry for name, entry in self.params[section].items() if name in names}

    def write_params(self) -> None:
        params = dict(self.params)
        for name, tree in (("checkpoints", {"checkpoints": params.pop("checkpoints")}), ("params", params)):
            (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))

    def make_everything_up_to_date(self) -> None:
        self.write_params()
        for stage, section in SECTIONS.items():
            for name in self.params[section]:
                path = self.folder / "results" / stage / f"{name}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f'"{stage} {name}"')
                if stage == "evaluate":
                    write_metrics(name, {}, results=self.folder / "results")
                    write_plot("curves", name, (), results=self.folder / "results")
                    write_plot("confusion", name, (), results=self.folder / "results")
                if stage == "shard":
                    write_plot("classes", name, (), results=self.folder / "results")
        (self.folder / "reports").mkdir()
        self.dvc("commit", "--force")

    def python(self, *arguments: str, **settings: str) -> str:
        """What `python <arguments>` prints in the copy, as a user with the environment activated calls it."""
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        environment = {"PATH": path, "HOME": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", **settings}
        # into files, not pipes: DVC's queue workers keep what they inherit open, and sometimes do not end
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            answer = subprocess.run(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                timeout=LIMIT_S,
            )
            output.seek(0)
            errors.seek(0)
            said = output.read()
            assert answer.returncode == 0, said + errors.read()
        return said

    def dvc(self, *arguments: str, **settings: str) -> str:
        """What `dvc <arguments>` prints in the copy."""
        return self.python("-m", "dvc", *arguments, **settings)

    def stale(self) -> set[str]:
        """Stages that `dvc repro` would run; those that always run are left out."""
        status: Mapping[str, Any] = json.loads(self.dvc("status", "--json"))
        return {stage for stage in status if stage.partition("@")[0] not in ("ready", "fetch", "weights", "report")}
