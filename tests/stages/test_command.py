"""The command `m2f`, as a user calls it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.storage.results.folder import write_result, write_waiting
from pipeline.storage.results.rows import Aliases, BestVersion, RegisteredVersion, Registration, TrainingResult
from stages.__main__ import COMMANDS
from tests.helpers.costs import seed
from tests.helpers.made_up import training
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S

M2F = "import sys; from stages.__main__ import main; sys.argv[0] = '/usr/bin/m2f'; main()"
"""What the script of that name does."""


def m2f(*words: str, folder: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT), "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-c", M2F, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_every_script_of_stages_is_a_subcommand() -> None:
    scripts = {path.stem for path in (PROJECT / "stages").glob("*.py")} - {"__init__", "__main__"}
    assert {name: command.module.__name__ for name, command in COMMANDS.items()} == {
        name: f"stages.{name}" for name in scripts
    }


@pytest.mark.parametrize("words", [["--help"], []])
def test_its_help_lists_all_subcommands_in_order_one_a_line(words: list[str]) -> None:
    shown = m2f(*words)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: m2f ")
    lines = shown.stdout.splitlines()
    first = lines.index("  COMMAND") + 1
    listed = lines[first : first + len(COMMANDS)]
    assert [line.split(maxsplit=1) for line in listed] == [[name, each.does] for name, each in COMMANDS.items()]


def test_a_subcommand_is_its_stage() -> None:
    shown = m2f("train", "--help")
    assert shown.stdout.startswith("usage: m2f train [-h]") and "entry of `rows` in params.yaml" in shown.stdout
    wrong = m2f("train")
    assert wrong.returncode == 2 and wrong.stderr.endswith(
        "m2f train: error: the following arguments are required: row\n"
    )
    wrong = m2f("browse", "shapes", "--count", "0")
    assert wrong.returncode == 2 and wrong.stderr.endswith("m2f browse: error: --count must be 1 or more\n")


def test_an_unknown_subcommand_is_told_which_there_are() -> None:
    wrong = m2f("trian")
    assert wrong.returncode == 2
    assert "m2f: error: argument COMMAND: invalid choice: 'trian' (choose from " in wrong.stderr


def test_the_version_is_printed() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert m2f("--version").stdout == f"{project['name']} {project['version']}\n"


@pytest.mark.parametrize("words", [["check", "shapes_tiny"], ["report"], ["train", "shapes_tiny"], ["plan"]])
def test_without_a_project_one_sentence_says_how_to_begin_one(tmp_path: Path, words: list[str]) -> None:
    refused = m2f(*words, folder=tmp_path)
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr == (
        "error: params.yaml does not exist; run from the project's folder, give --params, or begin a project with: "
        "m2f init\n"
    )
    assert not any(tmp_path.iterdir())


def test_init_says_what_comes_next(tmp_path: Path) -> None:
    said = m2f("init", "my project", folder=tmp_path)
    assert said.returncode == 0, said.stderr
    wrote, empty, begins, *steps = said.stdout.splitlines()
    assert wrote.startswith("wrote params.yaml, dvc.yaml, .gitignore, ") and wrote.endswith("/my project")
    assert (empty, begins) == ("", "Next:")
    commands = [line.strip().partition("   ")[0] for line in steps]
    assert commands[0] == "cd 'my project'"
    assert "dvc calls `python`" in steps[1]  # the PATH of this test has another
    assert [command.partition("  ")[0] for command in commands[2:]] == [
        "m2f check shapes_tiny",
        "dvc repro evaluate@shapes_tiny",
        "m2f report",
        "m2f predict shapes_tiny IMAGES --out predictions",
    ]
    again = m2f("init", "my project", folder=tmp_path)
    assert again.returncode == 1 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    unset = m2f("init", "", folder=tmp_path)  # of a script's variable
    assert (unset.returncode, unset.stderr) == (1, "error: FOLDER is empty; name a folder, or leave it out\n")


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_m2f; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(
        ["bash", "-c", code], cwd=script.parent, capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    return done.stdout.split()


def test_bash_completes_subcommands_options_choices_and_paths(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(m2f("--print-completion", "bash").stdout)
    assert completed(script, "m2f", "pre") == ["preflight", "predict"]
    assert completed(script, "m2f", "export", "row", "--fo") == ["--format", "--force"]
    assert completed(script, "m2f", "storage", "") == ["list", "verify", "prune", "copy"]
    (tmp_path / "images").mkdir()
    assert completed(script, "m2f", "predict", "row", "im") == ["images"]
    assert m2f("--print-completion", "zsh").stdout.startswith("#compdef m2f\n")


def test_bash_completes_the_names_in_params(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(m2f("--print-completion", "bash").stdout)
    assert completed(script, "m2f", "train", "") == []  # there is no params.yaml
    (tmp_path / "params.yaml").write_text(
        "datasets: {streets: {}}\nrows:\n  street_a: {}\n  other: {}\nweights: {r50: {}}"
    )
    assert completed(script, "m2f", "train", "st") == ["street_a"]
    assert completed(script, "m2f", "predict", "model.pt", "images", "--row", "") == ["street_a", "other"]
    assert completed(script, "m2f", "shard", "") == ["streets"]
    assert completed(script, "m2f", "weights", "") == ["r50"]


def test_a_source_is_completed_to_files_trained_rows_and_registered_models(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(m2f("--print-completion", "bash").stdout)
    (tmp_path / "model.pt").touch()
    assert completed(script, "m2f", "export", "mo") == ["model.pt"]
    version = RegisteredVersion(version=1, seed=0, run_key=None, figure=None, value=None)
    aliases = Aliases(best=BestVersion(**dataclasses.asdict(version)), median=version)
    registered = Registration(row="mine_tiny", model="mine-tiny", aliases=aliases, tracking_uri="sqlite:///mlflow.db")
    write_result(registered, "mine_tiny", results=tmp_path / "results")
    write_result(training("mine_tiny", [seed(0, steps=10)]), "mine_tiny", results=tmp_path / "results")
    write_waiting(TrainingResult, "street_a", "images", results=tmp_path / "results")
    for command in ("export", "predict"):
        assert completed(script, "m2f", command, "m") == ["model.pt", "mine_tiny", "models:/mine-tiny@best"]
    assert m2f("--names", "sources", folder=tmp_path).stdout == "mine_tiny\nmodels:/mine-tiny@best\n"


def test_names_are_printed_or_missing_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("rows:\n  street_a: {}\n  other: {}\n")
    assert m2f("--names", "rows", folder=tmp_path).stdout == "street_a\nother\n"
    missing = m2f("--names", "weights", folder=tmp_path)
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "params.yaml has no names under weights" in missing.stderr
    (tmp_path / "checkpoints.yaml").write_text("checkpoints: {street_a_authors: {}}\n")
    assert m2f("--names", "checkpoints", folder=tmp_path).stdout == "street_a_authors\n"
    (tmp_path / "params.yaml").write_text("rows: [street_a\nweights: r50\n")  # whose letters are no names
    for section in ("rows", "weights"):
        torn = m2f("--names", section, folder=tmp_path)
        assert (torn.returncode, torn.stdout, torn.stderr.count("\n")) == (1, "", 1)
    (tmp_path / "params.yaml").unlink()
    nowhere = m2f("--names", "rows", folder=tmp_path)
    assert nowhere.stderr == "error: params.yaml does not exist; run from the project's folder\n"
