"""A small generated dataset and a small row that train in seconds."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.params.load import load_params
from pipeline.params.schema import AugmentationConfig, DatasetConfig, Params, Row, TrainConfig
from pipeline.storage.results.data import ConvertedWeights, Manifest
from tests.helpers.train_process import STEPS, Job

PROJECT = Path(__file__).resolve().parents[2]

NO_WEIGHTS = ConvertedWeights(name="none", url="", source_sha256=None, sha256=None, path=None)
"""results/weights/none.json."""


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """(storage root, manifest) of 10 training and 3 validation pictures of 64 x 96."""
    from pipeline.data.fetch import fetch, open_sources
    from pipeline.data.shards.build import build

    root = tmp_path_factory.mktemp("small") / "storage"
    shapes = load_params(PROJECT / "params.yaml").dataset("shapes")
    config: DatasetConfig = dataclasses.replace(
        shapes, generate={"train": 10, "val": 3, "height": 64, "width": 96, "seed": 3}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M2F_STORAGE", str(root))
        facts = fetch("shapes", config, base=PROJECT)
        manifest = build("shapes", config, open_sources(facts), facts=facts.sources, processes=0)
    return root, manifest


@pytest.fixture
def small_manifest(small_data: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """The small dataset's manifest, with M2F_STORAGE set to where its shards are."""
    monkeypatch.setenv("M2F_STORAGE", str(small_data[0]))
    return small_data[1]


@pytest.fixture(scope="session")
def params() -> Params:
    """The project's."""
    return load_params(PROJECT / "params.yaml")


@pytest.fixture(scope="session")
def small_row() -> Row:
    """`shapes_tiny` cut down: 6 steps of 4 groups of one 64 x 64 crop."""
    row = load_params(PROJECT / "params.yaml").row("shapes_tiny")
    train: TrainConfig = dataclasses.replace(
        row.train,
        steps=6,
        groups=4,
        group_size=1,
        augmentation=AugmentationConfig(crop=(64, 64), short_sides=(56, 64, 80), long_side_max=160),
        optimizer=dataclasses.replace(row.train.optimizer, lr=1e-3),
        schedule=dataclasses.replace(row.train.schedule, warmup_steps=0),
        val_interval=3,
        checkpoint_interval=2,
        log_every=1,
    )
    model = dataclasses.replace(
        row.model,
        query_decoder=dataclasses.replace(row.model.query_decoder, queries=12, layers=2),
        loss=dataclasses.replace(row.model.loss, points=256),
    )
    return dataclasses.replace(row, name="small", train=train, model=model)


@pytest.fixture
def two_steps(
    small_row: Row,
    small_data: tuple[Path, Manifest],
    empty_mlflow: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Row:
    """The small row for two steps of one seed, trained in this process, in a storage root of its own."""
    shutil.copytree(small_data[0], tmp_path / "storage")
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setenv("M2F_WORKERS", "0")
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return dataclasses.replace(small_row, train=dataclasses.replace(small_row.train, steps=2), seeds=(1,))


@pytest.fixture
def make_job(
    small_data: tuple[Path, Manifest], small_row: Row, empty_mlflow: Path, tmp_path: Path
) -> Iterator[Callable[..., Job]]:
    """A Job of the small row for 24 steps; keywords replace fields of the row."""
    jobs: list[Job] = []
    train = dataclasses.replace(small_row.train, steps=STEPS, val_interval=12, checkpoint_interval=4)

    def make(name: str, *, workers: int = 2, **fields: Any) -> Job:
        row = dataclasses.replace(small_row, train=train, **{"seeds": (5,), **fields})
        jobs.append(Job(tmp_path / name, small_data[0], row, small_data[1], workers=workers))
        shutil.copy(empty_mlflow, tmp_path / name / "mlflow.db")
        return jobs[-1]

    yield make
    for job in jobs:
        job.kill_everything()
        shutil.rmtree(job.ray, ignore_errors=True)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """(folder, URL): an HTTP server on loopback that serves the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU torch cannot use."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr("torch.cuda.init", init)
