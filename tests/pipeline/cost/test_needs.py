"""What a row needs before it can be trained here, in words that say what to do."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.cost import needs as module
from pipeline.cost.needs import needs, training_needs, untrained_weights
from pipeline.cost.speed import Estimate
from pipeline.params.schema import DatasetConfig, Params, WeightsConfig
from pipeline.storage.results.data import FetchedDataset, FetchedSource, Manifest
from pipeline.storage.results.folder import write_result
from tests.helpers.images import write_folder
from tests.helpers.made_up import trained_seed, training
from tests.helpers.manifests import made_up_manifest

GPU = "a GPU (or M2F_WORKERS=1, which trains on the CPU all the same)"
TERMS = "(the terms are beside it in params.yaml)"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, storage: Path) -> None:
    monkeypatch.setattr(module, "gpus_here", lambda row: False)
    monkeypatch.delenv("M2F_WORKERS", raising=False)


def of(params: Params, row: str, folder: Path, **how: Any) -> list[str]:
    return needs(params.rows[row], params, base=folder, results=folder / "results", **how)


def with_dataset(params: Params, name: str, **fields: Any) -> Params:
    changed = dataclasses.replace(params.datasets[name], **fields)
    return dataclasses.replace(params, datasets={**params.datasets, name: changed})


def test_the_embedded_row_needs_nothing(params: Params, tmp_path: Path) -> None:
    assert of(params, "shapes_tiny", tmp_path) == []


def test_pictures_of_ones_own_are_to_be_where_params_yaml_says(params: Params, tmp_path: Path) -> None:
    said = "data/camvid.zip (or another datasets.camvid.sources in params.yaml)"
    assert of(params, "camvid_tiny", tmp_path) == [said]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/camvid.zip").touch()
    assert of(params, "camvid_tiny", tmp_path) == []


@pytest.mark.parametrize("torn", ["{", '{"version": 0}', "[]"])
@pytest.mark.parametrize("stage", ["fetch", "shard"])
def test_a_result_that_cannot_be_read_is_no_data(params: Params, tmp_path: Path, stage: str, torn: str) -> None:
    path = tmp_path / f"results/{stage}/camvid.json"
    path.parent.mkdir(parents=True)
    path.write_text(torn)
    assert of(params, "camvid_tiny", tmp_path)[0].startswith("data/camvid.zip (or another")


def test_what_was_fetched_and_is_gone_is_asked_for(params: Params, tmp_path: Path, storage: Path) -> None:
    source = FetchedSource(name="camvid.zip", bytes=3, sha256="a" * 64, path="archives/aa/camvid.zip")
    fetched = FetchedDataset(dataset="camvid", sources=(source,), terms="", generate={})
    write_result(fetched, "camvid", results=tmp_path / "results")
    assert of(params, "camvid_tiny", tmp_path)[0].startswith("data/camvid.zip (or another")
    (storage / "archives/aa").mkdir(parents=True)
    (storage / "archives/aa/camvid.zip").write_bytes(b"abc")
    assert of(params, "camvid_tiny", tmp_path) == []


def test_a_published_dataset_needs_its_terms_accepted_or_its_archive_here_in_its_length(
    params: Params, tmp_path: Path
) -> None:
    said = f"ADEChallengeData2016.zip in data/, or datasets.ade20k.accept_terms: true {TERMS}"
    assert of(params, "ade20k_r50", tmp_path) == [said, GPU]
    archive = tmp_path / "data/ADEChallengeData2016.zip"
    archive.parent.mkdir()
    archive.write_bytes(b"cut")
    assert of(params, "ade20k_r50", tmp_path) == [said, GPU]
    with open(archive, "wb") as file:
        file.truncate(967382037)  # as published; no byte of it is read
    assert of(params, "ade20k_r50", tmp_path) == [GPU]
    archive.unlink()
    accepted = with_dataset(params, "ade20k", accept_terms=True)
    assert of(accepted, "ade20k_r50", tmp_path) == [GPU]
    write_folder(tmp_path / "data/ade20k")  # unpacked
    assert of(params, "ade20k_r50", tmp_path) == [GPU]


def test_a_dataset_behind_a_login_needs_its_credentials(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("CITYSCAPES_USERNAME", "CITYSCAPES_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    accepted = with_dataset(params, "cityscapes", accept_terms=True)
    archives = "leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip in data/, or"
    login = "a login (CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD, or an entry in ~/.netrc)"
    assert of(accepted, "cityscapes_r50", tmp_path) == [f"{archives} {login}", GPU]
    both = f"{archives} datasets.cityscapes.accept_terms: true {TERMS} and {login}"
    assert of(params, "cityscapes_r50", tmp_path) == [both, GPU]
    monkeypatch.setenv("CITYSCAPES_USERNAME", "me")
    monkeypatch.setenv("CITYSCAPES_PASSWORD", "secret")
    assert of(accepted, "cityscapes_r50", tmp_path) == [GPU]


@pytest.mark.parametrize("result_type", [FetchedDataset, Manifest])
def test_what_was_fetched_or_sharded_is_not_asked_for_again(params: Params, tmp_path: Path, result_type: type) -> None:
    made = {
        FetchedDataset: FetchedDataset(dataset="camvid", sources=(), terms="", generate={}),
        Manifest: made_up_manifest(dataset="camvid"),
    }[result_type]
    write_result(made, "camvid", results=tmp_path / "results")
    assert of(params, "camvid_tiny", tmp_path) == []


def test_evaluating_a_published_checkpoint_needs_no_gpu(params: Params, tmp_path: Path) -> None:
    accepted = with_dataset(params, "ade20k", accept_terms=True)
    assert of(accepted, "ade20k_r50", tmp_path, training=False) == []


def test_a_row_whose_seeds_are_trained_needs_no_gpu_where_that_counts(params: Params, tmp_path: Path) -> None:
    accepted = with_dataset(params, "ade20k", accept_terms=True)
    seeds = [trained_seed(seed) for seed in accepted.rows["ade20k_r50"].seeds]
    write_result(training("ade20k_r50", seeds), "ade20k_r50", results=tmp_path / "results")
    assert of(accepted, "ade20k_r50", tmp_path, trained_counts=True) == []
    assert of(accepted, "ade20k_r50", tmp_path) == [GPU]  # its runs may be in another storage root
    seeds[0] = trained_seed(seeds[0].seed, status="failed")
    write_result(training("ade20k_r50", seeds), "ade20k_r50", results=tmp_path / "results")
    assert of(accepted, "ade20k_r50", tmp_path, trained_counts=True) == [GPU]


def test_a_row_that_starts_from_another_needs_that_row_s_seed(params: Params, tmp_path: Path) -> None:
    results = tmp_path / "results"
    started = {"mine": WeightsConfig(layout="mask2former", row="shapes_tiny", seed=1, terms="")}
    own = dataclasses.replace(params.rows["camvid_tiny"], weights="mine")
    more = dataclasses.replace(params, weights={**params.weights, **started})
    said = "a finished seed 1 of row shapes_tiny, from which it starts (dvc repro train@shapes_tiny)"
    assert untrained_weights(params.rows["camvid_tiny"], more, results=results) == []
    assert untrained_weights(own, more, results=results) == [said]
    for status, expected in (("failed", [said]), ("finished", [])):
        seeds = [trained_seed(0), trained_seed(1, status=status)]
        write_result(training("shapes_tiny", seeds), "shapes_tiny", results=results)
        assert untrained_weights(own, more, results=results) == expected


def test_whoever_sets_the_number_of_workers_means_the_cpu(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = with_dataset(params, "ade20k", accept_terms=True)
    monkeypatch.setenv("M2F_WORKERS", "1")
    assert of(accepted, "ade20k_r50", tmp_path) == []
    assert training_needs(params.rows["ade20k_r50"], tmp_path) == []


def test_a_repro_of_everything_trains_no_large_row_on_a_cpu(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M2F_WORKERS", "2")
    accepted = with_dataset(params, "ade20k", accept_terms=True)
    assert of(accepted, "ade20k_r50", tmp_path) == []
    assert of(accepted, "ade20k_r50", tmp_path, by_name=False) == ["a GPU"]
    assert of(params, "shapes_tiny", tmp_path, by_name=False) == []


def test_a_seed_that_would_cost_more_gpu_hours_than_its_row_allows_does_not_start(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = params.rows["cityscapes_r50"]  # nothing is measured here: its published speed, 9.17 fps on an A100, tells
    assert training_needs(row, tmp_path) == [GPU]
    monkeypatch.setattr(module, "gpus_here", lambda row: True)
    (need,) = training_needs(row, tmp_path)
    assert re.match(
        r"rows\.cityscapes_r50\.max_gpu_hours above \d+ in params\.yaml \(now 8; .* by published speed", need
    )
    assert training_needs(dataclasses.replace(row, max_gpu_hours=1000.0), tmp_path) == []
    tiny = params.rows["shapes_tiny"]  # nobody knows its speed on a GPU: its first steps will judge
    assert training_needs(tiny, tmp_path) == []


@pytest.mark.parametrize(("hours", "allowed"), [(9.0, False), (7.0, True)])
def test_a_row_of_any_size_is_held_to_its_gpu_hours_once_they_are_known(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: float, allowed: bool
) -> None:
    monkeypatch.setattr(module, "gpus_here", lambda row: True)
    monkeypatch.setattr(module, "estimated_gpu_hours", lambda row, results: Estimate(hours, "benchmark"))
    found = of(params, "shapes_tiny", tmp_path)
    assert (found == []) == allowed
    if not allowed:
        assert found[0].startswith("rows.shapes_tiny.max_gpu_hours above 9 in params.yaml (now 8;")


def test_a_dataset_without_sources_is_named(params: Params, tmp_path: Path) -> None:
    mine = DatasetConfig(layout="folder", class_names=("a", "b"))
    changed = dataclasses.replace(params, datasets={**params.datasets, "camvid": mine})
    assert of(changed, "camvid_tiny", tmp_path) == ["datasets.camvid.sources in params.yaml"]


def test_a_torn_training_result_says_nothing_of_what_is_trained(params: Params, tmp_path: Path) -> None:
    accepted = with_dataset(params, "ade20k", accept_terms=True)
    path = write_result(training("ade20k_r50", []), "ade20k_r50", results=tmp_path / "results")
    path.write_text("{")
    tiny = dataclasses.replace(params.rows["shapes_tiny"], name="ade20k_r50")
    assert training_needs(tiny, tmp_path / "results") == []
    assert of(accepted, "ade20k_r50", tmp_path, trained_counts=True) == [GPU]
