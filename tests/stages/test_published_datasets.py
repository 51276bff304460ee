"""Small imitations of the published archives go from a server through fetch and shard to the loader."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from pipeline.data.loader.train_batches import TrainingOrder, training_batches
from pipeline.data.loader.val_images import validation_images
from pipeline.params.load import load_params
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.folder import read_result
from tests.helpers.http_server import Server, serving
from tests.helpers.project_copy import Copy
from tests.helpers.shared import PROJECT, shared

# Dataset, archives by their published names, a row that trains on it.
IMITATED: list[tuple[str, dict[str, str], str]] = [
    ("ade20k", {"ADEChallengeData2016.zip": "ADEChallengeData2016-sample.zip"}, "ade20k_r50"),
    (
        "cityscapes",
        {
            "leftImg8bit_trainvaltest.zip": "leftImg8bit_trainvaltest-sample.zip",
            "gtFine_trainvaltest.zip": "gtFine_trainvaltest-sample.zip",
        },
        "cityscapes_r50",
    ),
    ("coco", {"val2017.zip": "coco-panoptic-sample.zip"}, "coco_panoptic_r50"),
]


def source(server: Server, dataset: str, number: int, name: str) -> str:
    """The address of an archive, of the form that its publisher uses."""
    return server.package(number, name) if dataset == "cityscapes" else server.url(name)


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "archives", "row"), IMITATED, ids=[name for name, *_ in IMITATED])
def test_published_archives_reach_the_loader(
    dataset: str, archives: dict[str, str], row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Copy(tmp_path)
    with serving() as server:
        contents = {name: shared(f"data/{sample}").read_bytes() for name, sample in archives.items()}
        server.files = contents | {f"?packageID={n}": content for n, content in enumerate(contents.values())}
        entry = copy.params["datasets"][dataset]
        entry["sources"] = [source(server, dataset, number, name) for number, name in enumerate(archives)]
        entry["bytes"] = [len(content) for content in contents.values()]
        entry["sha256"] = [hashlib.sha256(content).hexdigest() for content in contents.values()]
        entry["accept_terms"] = True
        if dataset == "coco":  # the sample has validation pictures only
            entry["splits"] = {"train": "val2017", "val": "val2017"}
        secrets = {}
        if dataset == "cityscapes":
            server.accounts = {"someone": "a secret"}
            secrets = {"CITYSCAPES_USERNAME": "someone", "CITYSCAPES_PASSWORD": "a secret"}
            code = tmp_path / "pipeline" / "data" / "login.py"
            text = code.read_text()
            assert '"https://www.cityscapes-dataset.com/login/"' in text
            code.write_text(text.replace("https://www.cityscapes-dataset.com/login/", server.login_url))
        copy.write_params()
        said = copy.dvc("repro", f"shard@{dataset}", **secrets)
    assert "a secret" not in said
    assert not any("a secret" in path.read_text() for path in (tmp_path / "results").rglob("*.json"))

    manifest = read_result(Manifest, dataset, results=tmp_path / "results")
    assert manifest.pixel_layout == ("encoded" if dataset == "coco" else "raw")
    assert [source.name for source in manifest.sources] == list(archives)
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "storage"))
    recipe = load_params(PROJECT / "params.yaml").rows[row]
    batches = training_batches(TrainingOrder.of(recipe, manifest, seed=0), first_step=0, steps=1, image_range=range(2))
    (batch,) = batches
    assert batch.images.shape == (2, 3, *recipe.train.augmentation.crop)
    assert all(len(labels) for labels in batch.labels)
    test = dataclasses.replace(recipe.test, ms_flip=None)
    images = list(validation_images(manifest, test, task=recipe.task))
    assert len(images) == manifest.splits["val"].records == {"ade20k": 3, "cityscapes": 6, "coco": 2}[dataset]
    assert all(image.label_map is not None and image.label_map.unique().numel() > 2 for image in images)
