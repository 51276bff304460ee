"""A trained network by the name of a row, a registered model or a file: the right weights, or one sentence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from m2f.config import Kernels
from m2f.weights import to_reference
from pipeline.params.schema import DatasetConfig, Params, Row
from pipeline.registry.model_folder import served_settings
from pipeline.registry.register import register
from pipeline.registry.source import open_source
from pipeline.storage.results.folder import write_result
from tests.helpers.registered import CLASSES, decided_network, manifest_of, results_of, row_of

NAME = "odd_panoptic"


@pytest.fixture
def row(small_row: Row) -> Row:
    return row_of("panoptic", small_row)


@pytest.fixture
def own(row: Row) -> Params:
    """A params.yaml with this row alone."""
    dataset = DatasetConfig(layout="folder", class_names=CLASSES, thing_classes=("car",), exif="ignore")
    return Params(datasets={"mine": dataset}, rows={NAME: row})


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def same(network: nn.Module, expected: nn.Module) -> bool:
    theirs = expected.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in network.state_dict().items())


def test_a_row_is_its_best_seed_as_evaluated_or_the_one_that_is_asked_for(
    row: Row, own: Params, storage: Path, results: Path
) -> None:
    made = results_of(row, storage, {0: 0.5, 1: 0.7, 2: 0.6})
    write_result(made["trained"], NAME)
    write_result(made["evaluated"], NAME)
    found = open_source(NAME, params=own)
    assert found.description == "seed 1 of odd_panoptic, last checkpoint, step 2"
    assert same(found.network, decided_network(row, 1))
    assert (tuple(found.class_names), list(found.thing_ids), found.reading.exif) == (CLASSES, [2], "ignore")
    found = open_source(NAME, params=own, seed=2, checkpoint="best")
    assert found.description == "seed 2 of odd_panoptic, best checkpoint, step 2"
    assert same(found.network, decided_network(row, 2))


def test_a_row_that_is_not_evaluated_is_its_best_seed_at_the_last_validation(
    row: Row, own: Params, storage: Path, results: Path
) -> None:
    trained = results_of(row, storage, {0: 0.5, 1: 0.5})["trained"]
    seeds = [dataclasses.replace(seed, metrics={"pq": value}) for seed, value in zip(trained.seeds, (0.6, 0.4))]  # noqa: B905
    write_result(dataclasses.replace(trained, seeds=tuple(seeds)), NAME)
    assert open_source(NAME, params=own).description.startswith("seed 0 ")


def test_a_checkpoint_file_is_this_project_s_or_the_reference_s(
    row: Row, own: Params, storage: Path, tmp_path: Path
) -> None:
    made = results_of(row, storage, {3: 0.5})["trained"].seeds[0]
    assert made.checkpoints is not None
    checkpoint = storage / made.run_dir / made.checkpoints.last.path
    expected = decided_network(row, 3)
    found = open_source(str(checkpoint), params=own, row=NAME)
    assert same(found.network, expected)
    assert found.description == "step-00000002.safetensors as odd_panoptic"
    theirs = to_reference(expected.state_dict(), row.model, head="panoptic_head.")
    torch.save({"state_dict": theirs}, tmp_path / "theirs.pth")
    assert same(open_source(str(tmp_path / "theirs.pth"), params=own, row=NAME).network, expected)


def test_a_folder_of_shards_is_known_by_all_of_its_files(row: Row, own: Params, tmp_path: Path) -> None:
    state = decided_network(row, 3).state_dict()
    files = {"a.safetensors": {}, "b.safetensors": {}}  # type: dict[str, dict[str, torch.Tensor]]
    weight_map = {name: sorted(files)[place % 2] for place, name in enumerate(state)}
    for name, file in weight_map.items():
        files[file][name] = state[name]
    for file, tensors in files.items():
        save_file(tensors, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = open_source(str(tmp_path), params=own, row=NAME)
    assert same(found.network, decided_network(row, 3))
    assert open_source(str(index), params=own, row=NAME).digest == found.digest
    save_file({name: tensor + 1 for name, tensor in files["b.safetensors"].items()}, tmp_path / "b.safetensors")
    assert open_source(str(index), params=own, row=NAME).digest != found.digest


def test_classes_of_an_instance_row_are_in_the_order_of_the_networks_ids(
    small_row: Row, storage: Path, tmp_path: Path
) -> None:
    row = row_of("instance", small_row)
    row = dataclasses.replace(row, model=dataclasses.replace(row.model, num_classes=2))
    dataset = DatasetConfig(layout="folder", class_names=CLASSES, thing_classes=("car", "sky"))
    save_file(decided_network(row).state_dict(), tmp_path / "own.safetensors")
    params = Params(datasets={"mine": dataset}, rows={row.name: row})
    found = open_source(str(tmp_path / "own.safetensors"), params=params, row=row.name)
    manifest = dataclasses.replace(manifest_of(storage, [(64, 96)]), thing_classes=dataset.thing_classes)
    assert tuple(found.class_names) == ("sky", "car") == manifest.class_names_of("instance")


@pytest.mark.long
def test_a_registered_model_brings_its_weights_and_settings(
    row: Row, own: Params, storage: Path, tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(ValueError, match=r"models:/odd-panoptic@best cannot be had from sqlite:.*dvc repro register@"):
        open_source("models:/odd-panoptic@best", params=own)
    manifest = manifest_of(storage, sizes=[(64, 96)])
    register(row, manifest=manifest, weights_terms="", **results_of(row, storage, {0: 0.5, 1: 0.7}))
    for name, seed in (("models:/odd-panoptic@best", 1), ("models:/odd-panoptic/2", 0)):
        found = open_source(name, params=own)
        assert same(found.network, decided_network(row, seed))
        assert (tuple(found.class_names), found.task, found.test) == (CLASSES, row.task, row.test)
    assert found.description == "models:/odd-panoptic/2, version 2"


def test_what_cannot_be_a_source_is_refused_in_a_sentence(
    row: Row, own: Params, storage: Path, results: Path, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"nothing": torch.zeros(1)}, file)
    for sentence, source, options in (
        (r"no row is called 'odd_panoptik'; did you mean 'odd_panoptic'\?", "odd_panoptik", {}),
        (r"say with --row which row's network", str(file), {}),
        (r"--seed is not for a file", str(file), {"row": NAME, "seed": 1}),
        (r"--row is not for a row", NAME, {"row": NAME}),
        (r"mask2former\.pth is not there; give a checkpoint file", "mask2former.pth", {}),
        (r"^models is not there; give a checkpoint file", "models", {"row": NAME}),
        (r"models:/odd-panoptic names no version; write models:/odd-panoptic@best", "models:/odd-panoptic", {}),
        (r"results/train/odd_panoptic\.json does not exist; make it with", NAME, {}),
    ):
        with pytest.raises(ValueError, match=sentence):
            open_source(source, params=own, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no checkpoint of Mask2Former: its names"):
        open_source(str(file), params=own, row=NAME)
    write_result(results_of(row, storage, {0: "lost its workers", 1: 0.5})["trained"], NAME)
    with pytest.raises(ValueError, match=r"seed 0 of row odd_panoptic has not finished; there are the seeds 1"):
        open_source(NAME, params=own, seed=0)


@pytest.mark.parametrize(("chosen", "predicting"), [("auto", "auto"), ("compiled", "auto"), ("plain", "plain")])
def test_who_predicts_needs_no_compiler_because_the_training_did(
    row: Row, storage: Path, results: Path, chosen: Kernels, predicting: Kernels
) -> None:
    row = dataclasses.replace(row, train=dataclasses.replace(row.train, kernels=chosen))
    made = results_of(row, storage, {0: 0.5})
    write_result(made["trained"], NAME)
    write_result(made["evaluated"], NAME)
    dataset = DatasetConfig(layout="folder", class_names=CLASSES, thing_classes=("car",))
    params = Params(datasets={"mine": dataset}, rows={NAME: row})
    assert open_source(NAME, params=params).kernels == predicting
    assert served_settings(row, manifest_of(storage))["kernels"] == predicting
