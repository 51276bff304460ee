from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from m2f import ModelConfig, build_model
from m2f.config import BackboneConfig
from m2f.weights import load_backbone, read_checkpoint, to_detectron2
from pipeline.data.pretrained_weights import convert_network, convert_weights
from pipeline.params.schema import Params, WeightsConfig
from pipeline.runs.checkpoints import save_model
from pipeline.storage.files import sha256
from pipeline.storage.results.folder import write_result
from pipeline.storage.results.rows import TrainedCheckpoint
from pipeline.storage.root import storage_root
from tests.helpers import made_up


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A torchvision ResNet-50 checkpoint, as published but random."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    state = resnet50().state_dict()
    path = tmp_path_factory.mktemp("published") / "resnet50-random.pth"
    torch.save(state, path)
    return path, state


@pytest.fixture
def url(published: tuple[Path, dict[str, torch.Tensor]], served: tuple[Path, str]) -> str:
    shutil.copy(published[0], served[0])
    return f"{served[1]}/{published[0].name}"


def test_a_published_backbone_is_stored_in_our_names(
    storage: Path, url: str, published: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    prefix = sha256(published[0])[:8]
    facts = convert_weights("r50", WeightsConfig(url=url, sha256_prefix=prefix))
    path = storage / (facts.path or "")
    assert (facts.url, facts.source_sha256, facts.sha256) == (url, sha256(published[0]), sha256(path))
    assert facts.path == f"weights/{facts.sha256}.safetensors"
    tensors = load_file(path)
    assert all(name.startswith("backbone.") for name in tensors)
    model = build_model(ModelConfig(num_classes=3, backbone=BackboneConfig(name="r50")))
    load_backbone(model, tensors)
    # ours holds every published tensor but the classifier's two
    total = sum(float(value.double().abs().sum()) for name, value in published[1].items() if not name.startswith("fc."))
    assert sum(float(value.double().abs().sum()) for value in tensors.values()) == pytest.approx(total)
    assert convert_weights("r50", WeightsConfig(url=url, sha256_prefix=prefix)) == facts


def test_weights_of_another_digest_are_refused(storage: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"resnet50-random\.pth has sha256 .*, expected 00000000"):
        convert_weights("r50", WeightsConfig(url=url, sha256_prefix="00000000"))


# Whole networks


@pytest.fixture
def whole(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Params, Path, dict[str, Tensor]]:
    """A row that starts from a file with the authors' names, the file, and its tensors under ours."""
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "storage"))
    row = dataclasses.replace(params.row("shapes_tiny"), weights="whole")
    state = build_model(row.model).state_dict()
    path = tmp_path / "model.pkl"
    arrays = {name: value.numpy() for name, value in to_detectron2(state, row.model).items()}
    path.write_bytes(pickle.dumps({"model": arrays}))
    return dataclasses.replace(params, rows={row.name: row}), path, state


def entry(path: Path, **fields: Any) -> WeightsConfig:
    return WeightsConfig(layout="mask2former", path=str(path), **fields)


def test_a_whole_network_is_stored_in_our_names_with_a_sentence_of_what_is_kept(
    whole: tuple[Params, Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    params, path, state = whole
    made = convert_network("whole", entry(path), params)
    assert (made.url, made.source_sha256) == (str(path), sha256(path))
    assert made.path is not None and sha256(tmp_path / "storage" / made.path) == made.sha256
    stored = read_checkpoint(tmp_path / "storage" / made.path)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], value) for name, value in state.items())
    assert made.network == (
        "kept of a checkpoint of the authors: backbone, pixel decoder, query decoder and class head"
    )


def test_other_classes_need_permission_to_begin_anew(whole: tuple[Params, Path, dict[str, Tensor]]) -> None:
    params, path, _ = whole
    row = params.row("shapes_tiny")
    names = ("car", "lamp")
    data = dataclasses.replace(params.dataset("shapes"), class_names=names, thing_classes=("car",))
    fewer = dataclasses.replace(row, model=dataclasses.replace(row.model, num_classes=2))
    params = dataclasses.replace(params, rows={row.name: fewer}, datasets={"shapes": data})
    with pytest.raises(ValueError, match=r"model.pkl has 9 classes, and row shapes_tiny has 2; write classes: anew"):
        convert_network("whole", entry(path), params)
    anew = convert_network("whole", entry(path, classes="anew"), params)
    assert anew.network.endswith("; the class head begins anew, with 2 classes instead of 9")
    known = ("sky", "hill", "road", "pavement", "building", "tree", "car", "person", "sign")
    match = convert_network("whole", entry(path, classes="match", class_names=known), params)
    assert match.network.endswith(", no-object and 1 of 2 classes (car); other classes begin anew")
    assert match.sha256 != anew.sha256  # and so other keys


def test_weights_that_no_row_or_different_rows_start_from_are_refused(
    whole: tuple[Params, Path, dict[str, Tensor]],
) -> None:
    params, path, _ = whole
    row = params.row("shapes_tiny")
    with pytest.raises(ValueError, match="no row starts from weights.unused"):
        convert_network("unused", entry(path), params)
    model = dataclasses.replace(row.model, query_decoder=dataclasses.replace(row.model.query_decoder, queries=5))
    rows = {row.name: row, "other": dataclasses.replace(row, name="other", model=model)}
    with pytest.raises(ValueError, match="rows shapes_tiny and other start from weights.whole with another network"):
        convert_network("whole", entry(path), dataclasses.replace(params, rows=rows))


def test_a_row_that_is_not_trained_cannot_be_started_from(
    whole: tuple[Params, Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, _, _ = whole
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"results/train/shapes_tiny.json does not exist; make it with: dvc repro"):
        convert_network("whole", WeightsConfig(layout="mask2former", row="shapes_tiny"), params)


def test_a_trained_row_is_started_from_with_its_classes_matched_by_name(
    whole: tuple[Params, Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, _, state = whole
    monkeypatch.chdir(tmp_path)
    source = dataclasses.replace(params.row("shapes_tiny"), name="source", weights="none")
    path = save_model(storage_root() / "runs" / "k3", step=7, run_key="k3", tensors=state)
    last = TrainedCheckpoint(step=7, path=f"checkpoints/{path.name}", sha256=sha256(path))
    seed = made_up.trained_seed(3)
    assert seed.checkpoints is not None
    seed = dataclasses.replace(seed, checkpoints=dataclasses.replace(seed.checkpoints, last=last))
    write_result(made_up.training("source", [seed]), "source")
    params = dataclasses.replace(params, rows={**params.rows, "source": source})
    config = WeightsConfig(layout="mask2former", row="source", seed=3, classes="match")
    made = convert_network("whole", config, params)
    assert (made.url, made.source_sha256) == ("train@source, seed 3, step 7", last.sha256)
    assert "no-object and 9 of 9 classes (sky, hill, road, pavement, building, ...)" in made.network
    with pytest.raises(
        ValueError, match=r"weights.whole is seed 0 of row source, which is not trained here; dvc repro"
    ):
        convert_network("whole", dataclasses.replace(config, seed=0), params)
