"""Two copies of the project, the user's and the cluster's: code goes one way, results both, and none is lost.

An entry of dvc.lock says from what a result was made, so it travels with that result's file and never alone.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pathspec import GitIgnoreSpec

from pipeline.storage.files import whole_file, write_text
from pipeline.storage.results.folder import RESULTS, waiting_in

LOCK = "dvc.lock"
_OURS = GitIgnoreSpec.from_lines(
    [
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
)
"""What no upload replaces or removes in a workspace; what .gitignore names is not either."""


def without_git(workspace: Path) -> None:
    """Tell DVC in its local settings that a copy of the project has no Git, as `make install` does."""
    if not (workspace / ".git").exists():
        command = [sys.executable, "-m", "dvc", "config", "--local", "core.no_scm", "true"]
        subprocess.run(command, cwd=workspace, check=True)


def code_changes(upload: Path, workspace: Path) -> list[str]:
    """Files that `take_code` would change, add or remove, relative to the workspace."""
    return sorted(set().union(*_changes(upload, workspace)))


def take_code(upload: Path, workspace: Path) -> None:
    """Make the workspace's code and settings those of the upload; results and what .gitignore names stay."""
    workspace.mkdir(parents=True, exist_ok=True)
    taken, gone = _changes(upload, workspace)
    try:
        for name in gone:
            _remove(workspace / name, below=workspace)
        for name in taken:
            _take(upload / name, workspace / name)
    except OSError as error:
        raise ValueError(f"the project could not be taken from {upload} to {workspace}: {error}") from error


def _changes(upload: Path, workspace: Path) -> tuple[set[str], set[str]]:
    """Files and links that the workspace lacks or has otherwise, and those that it has too many.

    Only what neither copy's .gitignore files name is too many: a line less in the upload's removes nothing.
    """
    if not (upload / "dvc.yaml").is_file():
        raise ValueError(f"{upload} holds no project (no dvc.yaml); bring it with: ray rsync-up cluster.yaml")
    theirs = _code(upload, ignored_by=[upload])
    ours = _code(workspace, ignored_by=[upload, workspace])
    return {name for name in theirs if not _same_code(upload / name, workspace / name)}, ours - theirs


def _code(project: Path, *, ignored_by: Sequence[Path]) -> set[str]:
    """Files and links of a copy of the project, relative to it, without what is in `_OURS` and what the .gitignore
    files of any of these copies name."""
    found: set[str] = set()

    def walk(folder: str, outer: Sequence[list[tuple[str, GitIgnoreSpec]]]) -> None:
        # of each copy, its .gitignore files from this folder outwards
        rules = [[(folder, _gitignore(copy / folder)), *more] for copy, more in zip(ignored_by, outer, strict=True)]
        for entry in os.scandir(project / folder):
            is_folder = entry.is_dir(follow_symlinks=False)
            path = f"{folder}{entry.name}/" if is_folder else f"{folder}{entry.name}"
            if _OURS.match_file(path) or any(_ignored(path, files) for files in rules):
                continue
            if is_folder:
                walk(path, rules)
            elif entry.is_symlink() or entry.is_file():
                found.add(path)

    walk("", [[] for _ in ignored_by])
    return found


def _gitignore(folder: Path) -> GitIgnoreSpec:
    file = folder / ".gitignore"
    return GitIgnoreSpec.from_lines(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [])


def _ignored(path: str, rules: Sequence[tuple[str, GitIgnoreSpec]]) -> bool:
    """Whether git ignores a path, a folder's ends with /: the innermost .gitignore that names it decides."""
    named = (spec.check_file(path.removeprefix(folder)).include for folder, spec in rules)
    return next((ignored for ignored in named if ignored is not None), False)


def _same_code(one: Path, other: Path) -> bool:
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and one.readlink() == other.readlink()
    return _same(one, other) and _is_program(one) == _is_program(other)


def _is_program(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IXUSR)


def _remove(path: Path, *, below: Path) -> None:
    """Delete a file or link, and the folders up to `below` that it leaves empty."""
    path.unlink()
    for folder in path.relative_to(below).parents[:-1]:
        try:
            (below / folder).rmdir()
        except OSError:  # something is left in it
            return


def _take(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all and as executable as it is, or make the same link."""
    if source.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(source.readlink())
        return
    with whole_file(target) as partial:
        shutil.copyfile(source, partial)
    if _is_program(source):
        target.chmod(target.stat().st_mode | 0o111)


def add_missing_results(source: Path, target: Path) -> list[str]:
    """Bring over the results that the target lacks or waits for; the stages they belong to."""
    return _merge(source, target, lambda theirs, ours: _lacks(ours))


def add_newer_results(source: Path, target: Path) -> list[str]:
    """Bring over the results that the target lacks or has in an older version; the stages they belong to.

    A file's time says how old it is, so the source must have kept it (rsync -a does).
    """

    def newer(theirs: Path, ours: Path) -> bool:
        return _lacks(ours) or theirs.stat().st_mtime > ours.stat().st_mtime

    return _merge(source, target, newer)


def _lacks(ours: Path) -> bool:
    """Whether there is no result, or only what its stage waits for."""
    return not ours.exists() or bool(waiting_in(ours))


def _merge(source: Path, target: Path, wanted: Callable[[Path, Path], bool]) -> list[str]:
    theirs, ours = _lock(source), _lock(target)
    in_lock = set()
    taken = []
    for stage, entry in theirs["stages"].items():
        outs = [Path(out["path"]) for out in entry.get("outs", []) if out["path"].startswith(f"{RESULTS}/")]
        in_lock.update(outs)
        if not outs or not all((source / out).is_file() for out in outs):
            continue
        if any(waiting_in(source / out) for out in outs):
            continue  # the target finds out for itself what it lacks
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
