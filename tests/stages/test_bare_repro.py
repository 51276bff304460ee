"""`dvc repro` without a name makes what is cheap and possible; a name makes a row, or says in a sentence why not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.images import write_folder
from tests.helpers.project_copy import Copy

WITH_GPU = {"M2F_WORKERS": "0"}
"""Trains a published network on the CPU, without Ray, as if there were a GPU for it."""


def repro(copy: Copy, *names: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(copy.folder)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "M2F_WORKERS": "", **settings}
    return subprocess.run(
        [sys.executable, "-m", "dvc", "repro", *names],
        cwd=copy.folder,
        env={name: value for name, value in environment.items() if value},
        capture_output=True,
        text=True,
    )


def result(copy: Copy, stage: str, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((copy.folder / "results" / stage / f"{name}.json").read_text())
    return content


def results(copy: Copy, name: str) -> dict[str, bytes]:
    """All that the stages of a row have written, but for what it needs now."""
    files = sorted((copy.folder / "results").glob(f"*/{name}.json"))
    return {str(file.relative_to(copy.folder)): file.read_bytes() for file in files if file.parent.name != "ready"}


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A project with the embedded row, a row that wants a GPU, and one whose pictures are not there; all tiny."""
    copy = Copy(tmp_path)
    copy.keep_rows("shapes_tiny", "camvid_tiny")
    rows, datasets = copy.params["rows"], copy.params["datasets"]
    short = {"steps": 2, "groups": 1, "group_size": 1, "val_interval": 2, "checkpoint_interval": 2}
    for row in rows.values():
        row["train"] |= {**short, "schedule": {"warmup_steps": 0}}
        row |= {"seeds": [0], "published": {}}
    rows["large"] = {**rows["shapes_tiny"], "model": {"backbone": {"name": "r50"}}}
    rows["mine"] = {**rows.pop("camvid_tiny"), "dataset": "mine"}
    datasets["shapes"]["generate"] = {"train": 2, "val": 2, "height": 64, "width": 96, "seed": 7}
    copy.params["datasets"] = {
        "shapes": datasets["shapes"],
        "mine": {"layout": "folder", "sources": ["data/mine"], "class_names": ["a", "b", "c"], "ignore_label": 9},
    }
    copy.write_params()
    pipeline = yaml.safe_load((copy.folder / "dvc.yaml").read_text())
    del pipeline["stages"]["benchmark"]  # it measures for two minutes
    (copy.folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    return copy


@pytest.mark.long
def test_a_row_that_waits_is_made_by_its_name_and_then_kept(copy: Copy) -> None:
    copy.params["rows"] = {"large": copy.params["rows"]["large"]}
    del copy.params["datasets"]["mine"]
    copy.write_params()
    pipeline = yaml.safe_load((copy.folder / "dvc.yaml").read_text())
    for stage in ("published", "register", "report"):
        del pipeline["stages"][stage]
    (copy.folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    assert repro(copy).returncode == 0
    assert set(result(copy, "train", "large")) == {"version", "waiting"}
    refused = repro(copy, "evaluate@large")
    assert refused.returncode != 0 and "error: row large cannot be made here: it needs a GPU (or" in refused.stderr
    assert repro(copy, "evaluate@large", **WITH_GPU).returncode == 0
    assert result(copy, "train", "large")["seeds"][0]["status"] == "finished"
    before = results(copy, "large")
    assert repro(copy).returncode == 0
    assert results(copy, "large") == before


@pytest.mark.full
def test_a_bare_repro_never_undoes_a_row_and_a_name_always_makes_it(copy: Copy) -> None:
    bare = repro(copy)  # bare, before anything was named
    assert bare.returncode == 0, bare.stdout + bare.stderr
    lines = bare.stdout.splitlines()
    assert "large waits for a GPU" in lines
    assert "mine waits for data/mine (or another datasets.mine.sources in params.yaml)" in lines
    ended = lines.index(next(line for line in lines if line.startswith("shapes_tiny: median PQ")))
    assert ended < lines.index("Running stage 'ready@large':")  # the embedded row first, and to its end
    for row in ("large", "mine"):
        assert set(result(copy, "train", row)) == set(result(copy, "register", row)) == {"version", "waiting"}
        assert (copy.folder / f"results/metrics/{row}.json").read_text() == "{}\n"
    assert result(copy, "metrics", "shapes_tiny")["PQ"]["median"] >= 0
    (seed,) = result(copy, "train", "shapes_tiny")["seeds"]
    assert os.listdir(copy.folder / "storage" / "runs") == [seed["run_key"]]

    for row, need in (("large", "a GPU"), ("mine", "data/mine")):  # by name, and still nothing is there
        before = results(copy, row)
        refused = repro(copy, f"evaluate@{row}")
        assert refused.returncode != 0
        assert re.search(rf"^error: row {row} cannot be made here: it needs {need} \(or .*\)$", refused.stderr, re.M)
        assert results(copy, row) == before

    again = repro(copy)  # nothing has changed: nothing but the looks
    assert again.returncode == 0
    ran = re.findall(r"Running stage '(.*?)@", again.stdout)
    assert set(ran) == {"ready", "fetch", "weights"}

    made = repro(copy, "evaluate@large", **WITH_GPU)  # named after bare: without -f
    assert made.returncode == 0, made.stdout + made.stderr
    assert result(copy, "train", "large")["seeds"][0]["status"] == "finished"
    write_folder(copy.folder / "data" / "mine")
    made = repro(copy, "evaluate@mine", M2F_WORKERS="0")
    assert made.returncode == 0, made.stdout + made.stderr
    assert result(copy, "evaluate", "mine")["seeds"][0]["status"] == "finished"

    for settings in ({}, WITH_GPU):  # bare after named, without and with GPUs
        before = results(copy, "large")
        bare = repro(copy, **settings)
        assert bare.returncode == 0, bare.stdout + bare.stderr
        kept = {name: content for name, content in results(copy, "large").items() if name in before}
        finished = {name for name, content in before.items() if b'"waiting"' not in content}
        assert {"results/train/large.json", "results/evaluate/large.json"} <= finished
        assert {name: kept[name] for name in finished} == {name: before[name] for name in finished}
    named = repro(copy, "evaluate@large", **WITH_GPU)  # and what is finished is found again
    assert named.returncode == 0
    assert results(copy, "large")["results/train/large.json"] == before["results/train/large.json"]
