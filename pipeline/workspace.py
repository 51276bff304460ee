"""Two copies of the project, the user's and the cluster's: code goes one way, results both, and none is lost.

An entry of dvc.lock says from what a result was made, so it travels with that result's file and never alone.
"""

from __future__ import annotations

import filecmp
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.files import whole_file, write_text
from pipeline.results import RESULTS

LOCK = "dvc.lock"
_OURS = [
    "/results",
    "/reports",
    f"/{LOCK}",
    "/.dvc/tmp",
    "/.dvc/cache",
    "/.git",
    "/tracking",
    "/lost+found",
    "__pycache__",
]
"""What no upload replaces or removes in a workspace; what .gitignore names is not either."""


def code_changes(upload: Path, workspace: Path) -> list[str]:
    """Files that `take_code` would change, add or remove, relative to the workspace."""
    changes = (line.split(maxsplit=1)[1] for line in _rsync(upload, workspace, "--dry-run"))
    return [path for path in changes if not path.endswith("/")]


def take_code(upload: Path, workspace: Path) -> None:
    """Make the workspace's code and settings those of the upload; results and what .gitignore names stay."""
    workspace.mkdir(parents=True, exist_ok=True)
    _rsync(upload, workspace)


def _rsync(source: Path, target: Path, *options: str) -> list[str]:
    """The changes, one per line: rsync's code for it, a space, the path."""
    if not (source / "dvc.yaml").is_file():
        raise ValueError(f"{source} holds no project (no dvc.yaml); bring it with: ray rsync-up cluster.yaml")
    command = ["rsync", "--recursive", "--links", "--checksum", "--delete"]
    command += ["--itemize-changes", "--filter=:- .gitignore", *(f"--exclude={path}" for path in _OURS), *options]
    answer = subprocess.run([*command, f"{source}/", f"{target}/"], capture_output=True, text=True)
    if answer.returncode != 0:
        raise ValueError(f"the project could not be taken from {source} to {target}: {answer.stderr.strip()}")
    return answer.stdout.splitlines()


def add_missing_results(source: Path, target: Path) -> list[str]:
    """Bring over the results that the target lacks; the stages they belong to."""
    return _merge(source, target, lambda theirs, ours: not ours.exists())


def add_newer_results(source: Path, target: Path) -> list[str]:
    """Bring over the results that the target lacks or has in an older version; the stages they belong to.

    A file's time says how old it is, so the source must have kept it (rsync -a does).
    """

    def newer(theirs: Path, ours: Path) -> bool:
        return not ours.exists() or theirs.stat().st_mtime > ours.stat().st_mtime

    return _merge(source, target, newer)


def _merge(source: Path, target: Path, wanted: Callable[[Path, Path], bool]) -> list[str]:
    theirs, ours = _lock(source), _lock(target)
    in_lock = set()
    taken = []
    for stage, entry in theirs["stages"].items():
        outs = [Path(out["path"]) for out in entry.get("outs", []) if out["path"].startswith(f"{RESULTS}/")]
        in_lock.update(outs)
        if not outs or not all((source / out).is_file() for out in outs):
            continue
        changed = [out for out in outs if not _same(source / out, target / out)]
        if any(not wanted(source / out, target / out) for out in changed):
            continue  # the target's is newer, and so is what its lock says of it
        for out in changed:
            _copy(source / out, target / out)
        if changed:
            taken.append(stage)
        if changed or stage not in ours["stages"]:
            ours["stages"][stage] = entry
    # of a stage that has not ended well, or of the report, which always runs
    for file in sorted([*(source / RESULTS).rglob("*"), *(source / "reports").rglob("*")]):
        out = file.relative_to(source)
        if file.is_file() and out not in in_lock and not _same(file, target / out) and wanted(file, target / out):
            _copy(file, target / out)
            taken.append(out.as_posix())
    if ours["stages"] != _lock(target)["stages"]:
        write_text(target / LOCK, yaml.safe_dump({"schema": "2.0", "stages": ours["stages"]}, sort_keys=False))
    return taken


def _lock(folder: Path) -> dict[str, Any]:
    path = folder / LOCK
    try:
        content: Mapping[str, Any] | None = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML ({error}); a stage may be writing it: try again") from None
    return {"stages": dict((content or {}).get("stages") or {})}


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as partial:
        shutil.copyfile(source, partial)
    shutil.copystat(source, target)
