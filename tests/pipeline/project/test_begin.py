from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.project.begin import begin
from tests.helpers.images import write_folder
from tests.helpers.shared import PROJECT


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_project_has_what_dvc_and_the_stages_read(tmp_path: Path) -> None:
    begun = begin(tmp_path / "new")
    assert begun.row == "shapes_tiny" and not begun.to_name
    assert files_in(tmp_path / "new") == set(begun.files)
    templates = {f".dvc/plots/{path.name}" for path in (PROJECT / ".dvc/plots").iterdir()}
    expected = {"params.yaml", "dvc.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", *templates}
    assert expected <= set(begun.files)


def test_changes_to_a_clones_own_settings_are_left_out_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(PROJECT / ".dvc/plots", clone / ".dvc/plots")
    for name in (".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml"):
        shutil.copy(PROJECT / name, clone / name)
    text = (clone / "params.yaml").read_text()
    (clone / "params.yaml").write_text(text.replace("steps: 1000,", "steps: 7,"))
    monkeypatch.setattr("pipeline.project.begin._COPIES", clone)
    monkeypatch.setattr("pipeline.provenance.environment.PROJECT", clone)
    assert not begin(tmp_path / "no checkout").changes_left_out
    assert "steps: 7," in (tmp_path / "no checkout/params.yaml").read_text()

    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (clone / "params.yaml").write_text(text)
    for words in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "shipped"]):
        subprocess.run([*git, *words], cwd=clone, check=True)
    assert not begin(tmp_path / "as shipped").changes_left_out
    (clone / "params.yaml").write_text(text.replace("steps: 1000,", "steps: 7,"))
    assert begin(tmp_path / "changed").changes_left_out
    made = {name: (tmp_path / name / "params.yaml").read_text() for name in ("as shipped", "changed")}
    assert made["as shipped"] == made["changed"] and "steps: 1000," in made["changed"]


def no_scm(folder: Path, *value: str) -> str:
    """DVC's setting that there is no Git, in any file of the folder; with a value, as DVC says after setting it."""
    command = [sys.executable, "-m", "dvc", "config", "core.no_scm"]
    if value:
        subprocess.run([*command, *value], cwd=folder, check=True)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()


def test_dvc_is_told_where_there_is_no_git_and_unlearns_it_by_the_command_that_it_advises(tmp_path: Path) -> None:
    begin(tmp_path / "plain")
    assert no_scm(tmp_path / "plain") == "true"
    assert no_scm(tmp_path / "plain", "false") == "false"  # after a `git init`
    (tmp_path / "clone/.git").mkdir(parents=True)
    for folder in ("clone", "clone/below/it"):
        begin(tmp_path / folder)
        assert "no_scm" not in (tmp_path / folder / ".dvc/config").read_text()


@pytest.mark.parametrize("name", ["params.yaml", ".gitignore", ".dvc/config"])
def test_where_a_file_exists_nothing_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"{name} exists, and nothing was written; name another folder"):
        begin(tmp_path)
    assert files_in(tmp_path) == {name} and (tmp_path / name).read_text() == "mine"


def test_what_cannot_be_written_whole_is_not_written_at_all(tmp_path: Path) -> None:
    (tmp_path / ".dvc").write_text("a file where a folder is to be")
    with pytest.raises(OSError):  # noqa: PT011  # whichever the system raises
        begin(tmp_path)
    assert files_in(tmp_path) == {".dvc"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        begin(tmp_path / "file")


def test_what_a_killed_call_has_left_is_not_in_the_way_of_the_next(tmp_path: Path) -> None:
    begun = begin(tmp_path)
    (tmp_path / "params.yaml").unlink()  # the last
    (tmp_path / "dvc.yaml").unlink()
    begin(tmp_path)
    assert files_in(tmp_path) == set(begun.files)
    (tmp_path / "params.yaml").unlink()
    (tmp_path / "dvc.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"dvc.yaml exists, and nothing was written"):
        begin(tmp_path)


def test_of_two_projects_begun_at_once_in_a_folder_one_is_refused_and_the_other_is_whole(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_folder(tmp_path / name)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    calls = [
        subprocess.Popen(
            [sys.executable, "-m", "stages.init", "new", "--own", name],
            cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    said = [call.communicate()[1] for call in calls]
    assert sorted(call.returncode for call in calls) == [0, 1]
    assert sum("exists, and nothing was written" in text for text in said) == 1
    winner = "one" if calls[0].returncode == 0 else "two"
    assert list(yaml.safe_load((tmp_path / "new/params.yaml").read_text())["rows"]) == ["shapes_tiny", f"{winner}_tiny"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be written \(.*\); name a folder where this user may write"):
        begin(Path("/sys/new"))  # where nobody may


def test_own_images_are_named_as_they_lie(tmp_path: Path) -> None:
    write_folder(tmp_path / "here/data/mine")
    for folder, path in (("here", "data/mine"), ("there", str(tmp_path / "here/data/mine"))):
        begun = begin(tmp_path / folder, own=tmp_path / "here/data/../data/mine")
        assert begun.row == "mine_tiny" and begun.to_name
        params = yaml.safe_load((tmp_path / folder / "params.yaml").read_text())
        assert params["datasets"]["mine"]["sources"] == [path]
        assert list(params["rows"]) == ["shapes_tiny", "mine_tiny"]


def test_images_that_hold_the_project_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(ValueError, match="holds the project's folder; put the images into a folder of their own"):
        begin(tmp_path / "new", own=tmp_path)
    assert not (tmp_path / "new").exists()
