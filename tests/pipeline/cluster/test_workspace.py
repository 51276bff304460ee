"""How code and results travel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from pipeline.cluster import workspace


def tree(folder: Path, lock: Mapping[str, str] | None = None, **files: tuple[str, int]) -> Path:
    """A project's results: train@a=(content, time); the lock says of each what it was made from."""
    for stage, (content, time) in files.items():
        path = folder / "results" / f"{stage.replace('_', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        os.utime(path, (time, time))
    stages = {
        name.replace("_", "@"): {"cmd": text, "outs": [{"path": f"results/{name.replace('_', '/')}.json"}]}
        for name, text in (lock or {}).items()
    }
    folder.mkdir(exist_ok=True)
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    return folder


def shown(folder: Path) -> dict[str, tuple[str, str]]:
    """Stage -> (result, what the lock says of it)."""
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {name: ((folder / entry["outs"][0]["path"]).read_text(), entry["cmd"]) for name, entry in stages.items()}


def test_the_newer_result_stays_with_its_entry_of_the_lock(tmp_path: Path) -> None:
    # a: only there; b: newer there; c: newer here; d: the same; e: only here
    there = tree(
        tmp_path / "there", {"train_a": "a there", "train_b": "b there", "train_c": "c there", "train_d": "d there"},
        train_a=("A", 1), train_b=("B new", 9), train_c=("C old", 1), train_d=("D", 1),
    )  # fmt: skip
    here = tree(
        tmp_path / "here", {"train_b": "b here", "train_c": "c here", "train_d": "d here", "train_e": "e here"},
        train_b=("B old", 2), train_c=("C new", 8), train_d=("D", 7), train_e=("E", 1),
    )  # fmt: skip
    assert workspace.add_newer_results(there, here) == ["train@a", "train@b"]
    assert shown(here) == {
        "train@a": ("A", "a there"),
        "train@b": ("B new", "b there"),
        "train@c": ("C new", "c here"),
        "train@d": ("D", "d here"),
        "train@e": ("E", "e here"),
    }
    assert (here / "results/train/b.json").stat().st_mtime == 9
    assert workspace.add_newer_results(there, here) == []


def test_a_job_takes_only_results_that_the_workspace_lacks(tmp_path: Path) -> None:
    upload = tree(tmp_path / "upload", {"train_a": "a", "train_b": "b"}, train_a=("A", 9), train_b=("B", 9))
    ours = tree(tmp_path / "ours", {"train_a": "ours"}, train_a=("A ours", 1))
    assert workspace.add_missing_results(upload, ours) == ["train@b"]
    assert shown(ours) == {"train@a": ("A ours", "ours"), "train@b": ("B", "b")}


def test_a_result_of_a_stage_that_has_not_ended_travels_without_a_lock(tmp_path: Path) -> None:
    there, here = tree(tmp_path / "there", train_a=("A", 1)), tmp_path / "here"
    here.mkdir()
    assert workspace.add_newer_results(there, here) == ["results/train/a.json"]
    assert (here / "results/train/a.json").read_text() == "A"
    assert not (here / "dvc.lock").exists()


def test_code_is_taken_whole_and_results_and_ignored_files_stay(tmp_path: Path) -> None:
    upload, ours = tmp_path / "upload", tmp_path / "ours"
    for folder, text in ((upload, "new"), (ours, "old")):
        (folder / "m2f").mkdir(parents=True)
        (folder / "m2f" / "model.py").write_text(text)
        (folder / "dvc.yaml").write_text("stages: {}")
        (folder / ".gitignore").write_text("/storage/\n")
    (ours / "m2f" / "gone.py").write_text("")
    for kept in ("results/a.json", "storage/b", "tracking/mlflow.db", "reports/index.html"):
        (ours / kept).parent.mkdir(exist_ok=True)
        (ours / kept).write_text("kept")
    (ours / "dvc.lock").write_text("kept")
    assert workspace.code_changes(upload, ours) == ["m2f/gone.py", "m2f/model.py"]
    workspace.take_code(upload, ours)
    assert (ours / "m2f/model.py").read_text() == "new" and not (ours / "m2f/gone.py").exists()
    assert {path.relative_to(ours).as_posix() for path in ours.rglob("*") if path.is_file()} == {
        "m2f/model.py", "dvc.yaml", "dvc.lock", ".gitignore",
        "results/a.json", "storage/b", "tracking/mlflow.db", "reports/index.html",
    }  # fmt: skip
    assert workspace.code_changes(upload, ours) == []


def copy_of(folder: Path, **files: str) -> Path:
    """A copy of a project with these files beside its dvc.yaml."""
    for name, text in {"dvc.yaml": "stages: {}", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    """Files and links of a folder and the folders in it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def test_links_programs_and_files_that_become_folders_arrive_as_they_are(tmp_path: Path) -> None:
    upload = copy_of(tmp_path / "upload", **{"run": "sh", "text": "t", "m2f/a.py": "a", "part/b.py": "b", "whole": "w"})
    links = {"link": "m2f/a.py", "folder": "m2f", "nowhere": "missing"}
    for name, to in links.items():
        (upload / name).symlink_to(to)
    (upload / "run").chmod(0o755)
    ours = copy_of(
        tmp_path / "ours",
        **{"run": "sh", "text": "t", "m2f/a.py": "a", "part": "b", "whole/c/d.py": "", "link": "a", "old/e.py": ""},
    )
    (ours / "folder").symlink_to("old")
    (ours / "text").chmod(0o755)
    changed = ["folder", "link", "nowhere", "old/e.py", "part", "part/b.py", "run", "text", "whole", "whole/c/d.py"]
    assert workspace.code_changes(upload, ours) == changed
    workspace.take_code(upload, ours)
    assert workspace.code_changes(upload, ours) == []
    assert names(ours) == names(upload) and not (ours / "old").exists()
    assert {name: os.readlink(ours / name) for name in links} == links
    assert [(ours / name).read_text() for name in ("part/b.py", "whole")] == ["b", "w"]
    assert [os.access(ours / name, os.X_OK) for name in ("run", "text")] == [True, False]


def test_a_gitignore_counts_in_its_folder_and_below_as_git_reads_it(tmp_path: Path) -> None:
    upload = copy_of(
        tmp_path / "upload",
        **{
            ".gitignore": "*.db\n/data/\n/out/*\n!/out/kept/\n",
            "docs/.gitignore": "/draft.md\n!shown.db\n",
        },
    )
    taken = {"docs/shown.db", "docs/more/shown.db", "docs/more/draft.md", "docs/data/x", "out/kept/x", "draft.md"}
    ignored = {"a.db", "shown.db", "docs/a.db", "docs/draft.md", "data/x", "data/shown.db", "out/x", "out/kept/a.db"}
    copy_of(upload, **dict.fromkeys(taken | ignored, "theirs"))
    before = names(upload)
    ours = copy_of(tmp_path / "ours", **dict.fromkeys(ignored, "ours"))
    workspace.take_code(upload, ours)
    assert names(ours) == before
    assert {name for name in before if (ours / name).read_text() == "theirs"} == taken
    assert {name for name in before if (ours / name).read_text() == "ours"} == ignored


def test_a_line_less_in_the_uploads_gitignore_removes_nothing(tmp_path: Path) -> None:
    ours = copy_of(tmp_path / "ours", **{".gitignore": "/weights/\n", "weights/a": "ours"})
    upload = copy_of(tmp_path / "upload", **{".gitignore": "", "weights/b": "theirs"})
    workspace.take_code(upload, ours)
    assert names(ours) == {"dvc.yaml", ".gitignore", "weights/a", "weights/b"}


def test_what_stays_and_is_in_the_way_of_code_is_said(tmp_path: Path) -> None:
    upload = copy_of(tmp_path / "upload", **{".gitignore": "*.db\n", "notes": "now a file"})
    ours = copy_of(tmp_path / "ours", **{"notes/a.db": "ours"})
    with pytest.raises(ValueError, match=r"could not be taken from .*upload to .*ours: .*Is a directory: .*notes"):
        workspace.take_code(upload, ours)
    assert (ours / "notes/a.db").read_text() == "ours"


def test_a_folder_without_the_project_is_no_upload(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no project \(no dvc.yaml\); bring it with: ray rsync-up"):
        workspace.take_code(tmp_path, tmp_path / "ours")


def test_a_workspace_without_git_is_one_that_dvc_works_in_and_a_clone_stays_one(tmp_path: Path) -> None:
    for name in ("copy", "clone"):
        (tmp_path / name / ".dvc").mkdir(parents=True)
        (tmp_path / name / ".dvc/config").write_text("[core]\n    analytics = false\n")
        (tmp_path / name / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "clone/.git").mkdir()
    for name in ("copy", "clone"):
        workspace.without_git(tmp_path / name)
    assert not (tmp_path / "clone/.dvc/config.local").exists()
    assert "no_scm = true" in (tmp_path / "copy/.dvc/config.local").read_text()
    subprocess.run([sys.executable, "-m", "dvc", "status"], cwd=tmp_path / "copy", check=True)
