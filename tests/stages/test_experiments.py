"""`dvc exp` as its users know it, in a clone of the project."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.project_copy import Copy
from tests.helpers.shared import PROJECT


def clone(folder: Path) -> Copy:
    """The project with one row of two steps, committed."""
    copy = Copy(folder)
    copy.keep_rows("shapes_tiny")
    copy.params["datasets"] = {"shapes": copy.params["datasets"]["shapes"]}
    copy.params["datasets"]["shapes"]["generate"] |= {"train": 8, "val": 2, "height": 64, "width": 64}
    row = copy.params["rows"]["shapes_tiny"]
    row["train"] |= {"steps": 2, "val_interval": 2, "checkpoint_interval": 2, "log_every": 1}
    row["train"]["augmentation"] |= {"crop": [64, 64], "short_sides": [64], "long_side_max": 64}
    row["test"] = {"short_side": 64, "long_side_max": 64}
    row["seeds"] = [0]
    copy.write_params()
    (folder / ".dvc/config.local").unlink()
    shutil.copy(PROJECT / ".gitignore", folder)
    for plot in ("metrics", "plots/classes", "plots/confusion", "plots/curves"):
        (folder / "results" / plot).mkdir(parents=True)
        shutil.copy(PROJECT / "results" / plot / ".gitkeep", folder / "results" / plot)
    git(copy, "init", "--quiet")
    git(copy, "config", "user.name", "somebody")
    git(copy, "config", "user.email", "somebody@example.org")
    git(copy, "add", "--all")
    git(copy, "commit", "--quiet", "--message", "a row of two steps")
    return copy


def git(copy: Copy, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=copy.folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_dvc_has_nothing_to_say_against_a_clone_in_which_nothing_has_run(tmp_path: Path) -> None:
    copy = clone(tmp_path)
    for command in ("metrics show", "metrics diff", "exp show --only-changed --no-pager", "plots show"):
        answer = subprocess.run(
            [sys.executable, "-m", "dvc", *command.split()], cwd=tmp_path, capture_output=True, text=True
        )
        assert answer.returncode == 0 and answer.stderr == "", command
    assert git(copy, "status", "--short") == ""


@pytest.mark.slow
def test_dvc_is_told_that_a_copy_has_no_git_and_a_clone_is_left_alone(tmp_path: Path) -> None:
    copy = clone(tmp_path)
    shutil.copy(PROJECT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    local = tmp_path / ".dvc/config.local"
    make = ["make", "-o", ".venv/.installed", "install"]  # all is installed
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    assert not local.exists()
    shutil.rmtree(tmp_path / ".git")
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    assert local.read_text().split() == ["[core]", "no_scm", "=", "true"]
    assert "evaluate@shapes_tiny" in copy.dvc("stage", "list", "--name-only")


@pytest.fixture
def no_worker_stays(tmp_path: Path) -> Iterator[None]:
    """DVC tells the workers of its queue to end, which one of two does not always hear."""
    yield
    for file in (tmp_path / ".dvc/tmp/exps/celery").glob("*.json"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads(file.read_text())["pid"], signal.SIGTERM)


@pytest.mark.long
@pytest.mark.usefixtures("no_worker_stays")
def test_experiments_in_temporary_folders_use_what_the_project_has(tmp_path: Path) -> None:
    copy = clone(tmp_path)
    run = ("exp", "run", "evaluate@shapes_tiny")
    said = copy.dvc(*run, "--temp", "-n", "one", *_lr(1e-3), M2F_WORKERS="0")
    assert "Running stage 'shard@shapes'" in said
    (key,) = [path.name for path in (tmp_path / "storage/runs").iterdir()]
    results = ("fetch", "ready", "shard", "train", "evaluate")
    assert not any((tmp_path / "results" / stage).exists() for stage in results)  # they are the experiment's

    # one seed more, and another rate; at once
    copy.dvc(*run, "--queue", "-n", "two", *_lr(1e-3), "-S", "rows.shapes_tiny.seeds=[0,1]")
    copy.dvc(*run, "--queue", "-n", "three", *_lr(2e-3))
    copy.dvc("exp", "run", "--run-all", "--jobs", "2", M2F_WORKERS="0")
    assert f"shapes_tiny: seed 0 (1 of 2), run {key}: finished\n" in copy.dvc("queue", "logs", "two")
    assert "checking shards that are here already" in copy.dvc("queue", "logs", "three")
    keys = {path.name for path in (tmp_path / "storage/runs").iterdir()}
    assert len(keys) == 3 and key in keys

    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        runs = database.execute("select name, status, lifecycle_stage, artifact_uri from runs").fetchall()
        tagged = database.execute("select value from tags where key = 'm2f.run_key'").fetchall()
        assert "/exps/" not in "\n".join(database.iterdump())
    assert {key for (key,) in tagged} == keys
    names = ["seed 0 of shapes_tiny", "seed 0 of shapes_tiny", "seed 1 of shapes_tiny"]
    names += ["shapes_tiny", "shapes_tiny"]  # a row has a run for each of its settings
    assert sorted(name for name, *_ in runs) == names
    assert {(status, stage) for _, status, stage, _ in runs} == {("FINISHED", "active")}
    assert all(uri.startswith(f"{(tmp_path / 'storage/mlflow').as_uri()}/") for *_, uri in runs)

    table = [*csv.DictReader(copy.dvc("exp", "show", "--csv").splitlines())]
    figures = {line["Experiment"]: line["mIoU.median"] for line in table if line["Experiment"]}
    assert {"one", "two", "three"} <= figures.keys() and all(figures[name] for name in ("one", "two", "three"))
    copy.dvc("exp", "apply", "two")
    evaluated = json.loads((tmp_path / "results/evaluate/shapes_tiny.json").read_text())
    first, _ = evaluated["seeds"]
    assert first["run_key"] == key
    shown = json.loads(copy.dvc("metrics", "show", "--json"))
    (metrics,) = shown[""]["data"].values()
    median = metrics["data"]["mIoU"]["median"]
    assert median == pytest.approx(100 * evaluated["median"]["miou"])
    assert metrics["data"]["mIoU"]["lowest"] <= median <= metrics["data"]["mIoU"]["highest"]
    assert "mIoU.median" in copy.dvc("metrics", "diff", "three", "two")
    git(copy, "add", "--all")
    git(copy, "commit", "--quiet", "--message", "experiment two")
    assert git(copy, "status", "--short") == ""


def _lr(value: float) -> tuple[str, str]:
    return "-S", f"rows.shapes_tiny.train.optimizer.lr={value}"


def test_the_page_of_plots_loads_nothing_and_knows_every_template() -> None:
    page = (PROJECT / ".dvc/plots/page.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|import\s*\(|fetch\(""", page)
    for template in (PROJECT / ".dvc/plots").glob("*.json"):
        chart = json.loads(template.read_text())["usermeta"]
        assert f"function {chart['chart']}(rows, x, y)" in page
        assert (chart["x"], chart["y"]) == ("<DVC_METRIC_X>", "<DVC_METRIC_Y>")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_of_plots_draws_curves_confusions_and_classes(tmp_path: Path) -> None:
    copy = clone(tmp_path / "project")
    tables = {
        "curves/shapes_tiny": "training,figure,step,value\ns 0,loss,1,40\ns 0,loss,2,30\ns 0,mIoU in percent,2,7\n",
        "confusion/shapes_tiny": "actual,predicted,share\nsky,sky,90.00\nsky,hill,10.00\nhill,hill,100.00\n",
        "classes/shapes": "class,split,pixels,images,instances\nsky,train,900,8,\ncar,train,40,3,5\n",
    }
    for name, table in tables.items():
        (copy.folder / f"results/plots/{name}.csv").write_text(table)
    copy.dvc("plots", "show")
    url = (copy.folder / "dvc_plots/index.html").as_uri()
    # what a mouse would be told is put below the charts, to be read
    script = (
        "document.body.append([...document.querySelectorAll('svg title')].map(each => each.textContent).join('; '))"
    )
    drawn = ["s 0: 30 at step 2", "sky predicted as hill: 10.00 %", "car, train: 5 instances"]
    with Browser(tmp_path) as browser:
        said = browser.look(url, tmp_path / "page.png", words=[*drawn, "mIoU in percent"], script=script)
    assert "results/plots/curves/shapes_tiny.csv" in said
