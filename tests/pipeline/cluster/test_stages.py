"""What a job runs, and in which order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster.stages import Plan, plan, run_plan
from pipeline.params.load import read_settings
from tests.helpers.shared import PROJECT

PIPELINE: Mapping[str, Any] = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
PARAMS: Mapping[str, Any] = read_settings(PROJECT / "params.yaml")


def test_rows_of_one_dataset_share_its_stages_and_run_side_by_side() -> None:
    todo = plan(["evaluate@ade20k_r50", "evaluate@ade20k_r101", "report"], PIPELINE, PARAMS)
    assert todo.shared == ("fetch@ade20k", "shard@ade20k", "weights@torchvision_r50", "weights@torchvision_r101")
    assert todo.rows == {
        "ade20k_r50": ("ready@ade20k_r50", "train@ade20k_r50", "evaluate@ade20k_r50"),
        "ade20k_r101": ("ready@ade20k_r101", "train@ade20k_r101", "evaluate@ade20k_r101"),
    }
    assert todo.last == ("report",)
    assert todo.needs["ade20k_r50"] == {"fetch@ade20k", "shard@ade20k", "weights@torchvision_r50"}


def test_a_target_may_hold_wildcards_and_may_be_a_shared_stage() -> None:
    todo = plan(["published@coco_instance_*", "shard@shapes"], PIPELINE, PARAMS)
    rows = [name for name in PARAMS["rows"] if name.startswith("coco_instance_") and not name.endswith("_authors")]
    assert list(todo.rows) == sorted(rows, key=list(todo.rows).index) and len(rows) == 7
    assert todo.rows["coco_instance_swin-b"] == (
        "ready@coco_instance_swin-b",
        "published@coco_instance_swin-b_authors",
        "published@coco_instance_swin-b_hf",
    )
    assert todo.shared == ("fetch@coco", "shard@coco", "fetch@shapes", "shard@shapes")


def test_a_target_that_is_no_stage_is_said() -> None:
    with pytest.raises(
        ValueError, match=r"evaluate@ade20k is no stage of dvc.yaml; there are evaluate@<entry of rows>"
    ):
        plan(["evaluate@ade20k"], PIPELINE, PARAMS)


# Running it, with DVC


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of three stages on two rows; row b's training fails."""
    commands = {
        "shard": "echo sharding ${key} && echo 1 > results/shard/${key}.json",
        "train": "echo training ${key} && test ${key} != b && echo 2 > results/train/${key}.json",
        "evaluate": "cat results/train/${key}.json > results/evaluate/${key}.json",
    }
    deps = {"train": ["results/shard/${item.dataset}.json"], "evaluate": ["results/train/${key}.json"]}
    stages = {
        name: {
            "foreach": "${datasets}" if name == "shard" else "${rows}",
            "do": {
                "cmd": command,
                "deps": deps.get(name, []),
                "outs": [{f"results/{name}/${{key}}.json": {"cache": False, "persist": True}}],
            },
        }
        for name, command in commands.items()
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (tmp_path / "params.yaml").write_text(
        "datasets: {d: 1, e: 1}\nrows: {a: {dataset: d}, b: {dataset: d}, c: {dataset: e}}\n"
    )
    for name in ("shard", "train", "evaluate"):
        (tmp_path / "results" / name).mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def made(project: Path, *targets: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    files = [yaml.safe_load((project / name).read_text()) for name in ("dvc.yaml", "params.yaml")]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    todo = plan(targets, files[0]["stages"], files[1])
    return run_plan(todo, project, side_by_side=3, environment=environment, write=lines.append), lines


@pytest.mark.slow
def test_a_failing_row_leaves_the_others_and_its_code_is_the_jobs(project: Path) -> None:
    code, lines = made(project, "evaluate@*")
    assert code != 0
    assert lines.index("shard@d | > echo sharding d && echo 1 > results/shard/d.json") < min(
        i for i, line in enumerate(lines) if " | > echo training" in line
    )
    assert {"a | training a", "b | training b", "c | training c"} <= set(lines)
    outcomes = dict(line.strip().split(": ", 1) for line in lines[lines.index("") + 1 :])
    assert {row: text.split()[0] for row, text in outcomes.items()} == {
        "shard@d": "done", "shard@e": "done", "a": "done", "b": "FAILED", "c": "done"
    }  # fmt: skip
    assert [(project / f"results/evaluate/{row}.json").exists() for row in "abc"] == [True, False, True]
    assert set(yaml.safe_load((project / "dvc.lock").read_text())["stages"]) == {
        "shard@d", "shard@e", "train@a", "evaluate@a", "train@c", "evaluate@c"
    }  # fmt: skip
    code, lines = made(project, "evaluate@a", "evaluate@c")
    assert code == 0 and not any("> echo" in line for line in lines)  # nothing runs twice


@pytest.mark.slow
def test_a_row_whose_pictures_failed_is_not_run(project: Path) -> None:
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("echo sharding ${key}", "test ${key} != e"))
    code, lines = made(project, "train@a", "train@c")
    assert code != 0
    assert "  c: NOT RUN, for shard@e failed" in lines
    assert (project / "results/train/a.json").exists()


def test_an_empty_plan_is_done(tmp_path: Path) -> None:
    assert run_plan(Plan((), {}, (), {}), tmp_path, side_by_side=1, environment={}, write=lambda line: None) == 0
