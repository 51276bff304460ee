from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pipeline import __main__ as command
from benchmarks.pipeline import parts
from benchmarks.pipeline.processes import PROJECT
from pipeline.params.schema import Row


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["pipeline", "--out", str(out), *words])
    command.main()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_parts_of_the_way_to_a_first_step_add_up() -> None:
    # fetch ran from 3 to 5 s, training began at 8 s, Ray at 10 s, its worker came at 17 s and made a step by 18.5 s:
    # DVC had the 8 s but for fetch's 2
    stages = {"fetch shapes": [3.0, 5.0], "train shapes_tiny": [8.0, 30.0]}
    found = parts.split(stages, trains="train shapes_tiny", ray_s=10.0, worker_s=17.0, step_s=18.5)
    assert found["parts"] == {
        "fetch shapes": 2.0,
        "DVC": 6.0,
        "train shapes_tiny: before Ray": 2.0,
        "Ray and its worker": 7.0,
        "the first step": 1.5,
    }
    assert sum(found["parts"].values()) == found["s"] == 18.5


def test_a_validation_and_an_interval_at_the_same_step_save_once(params_row: Row) -> None:
    # of 12 steps: validated after 4, 8, 12; saved besides after 6: 4 checkpoints
    train = dataclasses.replace(params_row.train, steps=12, val_interval=4, checkpoint_interval=6)
    assert parts.saves_per_step(dataclasses.replace(params_row, train=train)) == pytest.approx(4 / 12)


def test_the_share_of_a_step_is_that_of_its_points_and_checkpoints(params_row: Row) -> None:
    # 0.02 s every 10 steps and half a GiB at 3 s per GiB every 100: 0.002 + 0.015 = 0.017 s of 0.5 s or 1 s
    train = dataclasses.replace(params_row.train, steps=200, val_interval=200, checkpoint_interval=100, log_every=10)
    found = parts.shares(
        dataclasses.replace(params_row, train=train),
        log_s=0.02,
        checkpoint_s_per_gib=3.0,
        checkpoint_bytes=2**29,
        step_s=(0.5, 1.0),
    )
    assert found == {"0.5 s": 0.034, "1 s": 0.017}


def test_a_part_that_takes_too_long_is_stopped_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "found.json", "--only", "help", "--limit-s", "0.2")
    assert ended.value.code == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["help"]["error"] == "stopped after 0.2 s (--limit-s)" and found["machine"]["cores"] >= 1
    assert found["left"] == []


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--steps", "-1"], ["--images", "0"], ["--limit-s", "0"]])
def test_counts_that_measure_nothing_are_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="error: --rounds, --steps and --images must be at least 1, and --limit-s"):
        run(monkeypatch, tmp_path / "found.json", *words)
    assert not list(tmp_path.iterdir())


def test_the_time_of_a_help_is_that_of_its_process() -> None:
    found = command.help_times(["stages.fetch"], rounds=2)["stages.fetch"]
    assert found["cpu_s"] > 0 and found["wall_s"] > 0
    assert "stages.fetch" in command.commands() and "benchmarks.loader.tables" not in command.commands()


@pytest.mark.full
def test_the_bare_loop_is_compared_with_one_that_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--only", "overhead", "--forms", "bare", "mlflow", "--steps", "3", "--rounds", "1"]
    found = run(monkeypatch, tmp_path / "found.json", *words)["overhead"]
    assert set(found["measured"]["step_s"]) == {"bare", "mlflow"}
    (ratio,) = found["measured"]["to_bare"].values()
    bare, tracked = (found["measured"]["step_s"][form][0] for form in ("bare", "mlflow"))
    assert ratio == pytest.approx(tracked / bare, rel=0.01)
    assert 0 < found["measured"]["point"]["sent"] <= parts.POINTS  # those that MLflow had in time
    share = found["derived"]["cityscapes_r50"]["share"]
    assert share["0.3 s"] == pytest.approx(share["1 s"] / 0.3, abs=1e-4)


@pytest.fixture
def params_row() -> Row:
    from pipeline.params.load import load_params

    return load_params(PROJECT / "params.yaml").row("shapes_tiny")
