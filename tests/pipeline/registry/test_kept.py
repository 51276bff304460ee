"""Which runs `python -m stages.storage prune --runs` leaves: what results, the registry, a row or a process needs."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.params.load import load_params
from pipeline.params.schema import Params, Row
from pipeline.provenance.run_key import run_key
from pipeline.registry.kept import kept_runs
from pipeline.runs.outcome import TrackedRun, write_note
from pipeline.runs.owner import owned
from pipeline.storage.files import write_text
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.folder import read_result, write_result
from pipeline.storage.results.rows import Reused
from pipeline.storage.stores import store_of
from stages.storage import main
from tests.helpers.made_up import checkpoint, evaluated_seed, evaluation, trained_seed, training
from tests.helpers.shared import PROJECT
from tests.pipeline.conftest import NO_WEIGHTS


@pytest.fixture
def project(tmp_path: Path, storage: Path, small_data: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with results of a dataset, a storage root, and no tracking database."""
    monkeypatch.chdir(tmp_path)
    write_result(small_data[1], "shapes")
    write_result(NO_WEIGHTS, "none")
    return tmp_path


@pytest.fixture
def row(small_row: Row) -> Row:
    return dataclasses.replace(small_row, weights="none", seeds=(1, 2))


def params_of(*rows: Row) -> Params:
    return dataclasses.replace(load_params(PROJECT / "params.yaml"), rows={row.name: row for row in rows})


def runs(storage: Path, *keys: str) -> None:
    for key in keys:
        write_text(storage / "runs" / key / "curve.jsonl", "")


def key_of(row: Row, seed: int) -> str:
    return run_key(row, seed=seed, data_digest=read_result(Manifest, "shapes").digest, weights_sha256=None)


def test_the_runs_of_a_row_are_kept_before_it_has_results(project: Path, storage: Path, row: Row) -> None:
    key = key_of(row, 2)
    runs(storage, key, "another")
    assert kept_runs(params_of(row)) == {
        f"runs/{key_of(row, 1)}": "it is seed 1 of row small of params.yaml",
        f"runs/{key}": "it is seed 2 of row small of params.yaml",
    }


def test_without_a_manifest_the_runs_that_say_they_are_of_the_row_are_kept(
    project: Path, storage: Path, row: Row
) -> None:
    runs(storage, "mine", "another", "nobodys")
    for name, of in (("mine", row.name), ("another", "a_row_that_is_gone")):
        tracked = TrackedRun(dataset="shapes", row=of, name="n", run_key=name, params={}, tags={}, opened_ms=0)
        write_note(storage / "runs" / name, tracked)
    Path("results/shard/shapes.json").unlink()
    why = "it is of row small of params.yaml, whose run keys nobody knows without results/shard/shapes.json"
    assert kept_runs(params_of(row)) == {"runs/mine": why}


def test_a_run_that_stands_for_one_that_is_kept_is_kept_too(
    project: Path, storage: Path, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_of(row, 1)
    runs(storage, "earlier")
    note = Reused(
        run_key="earlier", instead_of=key, reason="r", differences=("d",), reused_s=1, note=f"runs/{key}/reused.json"
    )
    write_note(storage / "runs" / key, note)
    monkeypatch.setattr("pipeline.runs.reuse.finished_result", lambda folder: folder.name == "earlier" or None)
    assert kept_runs(params_of(row))["runs/earlier"] == f"it is reused for run {key}"


def test_what_a_process_is_at_is_kept(project: Path, storage: Path) -> None:
    runs(storage, "k", "old")
    building = storage / "shards/.building-x"
    with owned([storage / "runs/k"]), store_of(building).held_alone("busy"):
        assert kept_runs(params_of()) == {
            "runs/k": f"process {os.getpid()} on host {socket.gethostname()} trains it",
            "shards/.building-x": "another process is making it",
        }
    assert kept_runs(params_of()) == {}


@pytest.fixture
def registry(empty_mlflow: Path, project: Path) -> MlflowClient:
    shutil.copy(empty_mlflow, project / "mlflow.db")
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    client.create_registered_model("shapes-tiny")
    return client


def prune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["storage", "prune", "--params", str(PROJECT / "params.yaml"), *words])
    main()
    return capsys.readouterr().out.splitlines()


def test_prune_says_of_each_run_why_it_is_kept_or_goes(
    project: Path,
    storage: Path,
    registry: MlflowClient,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # results/train is of a later training than results/evaluate, whose figures the report still shows.
    write_result(training("r", [trained_seed(1, key="new")]), "r")
    write_result(evaluation("r", [evaluated_seed(1, checkpoint("semantic", 0.5), key="old")], task="semantic"), "r")
    registry.create_model_version("shapes-tiny", source=str(storage), tags={"run_key": "best1"})
    runs(storage, "new1", "old1", "best1", "gone1")
    assert prune(capsys, monkeypatch, "--runs") == [
        "would keep runs/best1 (0.0 MiB): version 1 of shapes-tiny of the registry comes from it",
        "would delete runs/gone1 (0.0 MiB): nothing names it",
        "would keep runs/new1 (0.0 MiB): results/train/r.json names it",
        "would keep runs/old1 (0.0 MiB): results/evaluate/r.json names it",
        "nothing was deleted; add --yes to delete",
    ]
    assert prune(capsys, monkeypatch, "--runs", "--yes") == ["deleted runs/gone1 (0.0 MiB): nothing names it"]
    assert sorted(path.name for path in (storage / "runs").iterdir()) == ["best1", "new1", "old1"]
    assert prune(capsys, monkeypatch, "--runs")[-1] == "there is nothing to delete"
    assert prune(capsys, monkeypatch, "--runs", "--yes") == ["there is nothing to delete"]


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("nothing of the kind"), None])
def test_runs_are_not_pruned_while_the_registry_does_not_answer(
    project: Path,
    storage: Path,
    spoil: Callable[[Path], object] | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if spoil is None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    else:
        spoil(project / "mlflow.db")
    runs(storage, "gone1")
    with pytest.raises(ValueError, match="^which runs registered models come from is not known: .* without --runs$"):
        prune(capsys, monkeypatch, "--runs", "--yes")
    assert (storage / "runs/gone1").exists()
