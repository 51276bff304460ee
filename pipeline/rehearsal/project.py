"""The project of a rehearsal: params.yaml with one short row, on stand-ins that a server on this machine hands out."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import http.server
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from pipeline.cost.plan import checkpoint_bytes
from pipeline.data.images.sizes import ImageCounts, Size, counted
from pipeline.rehearsal.folders import folders_of, python_path
from pipeline.rehearsal.stand_ins import write_stand_ins
from pipeline.rehearsal.weights import write_random_backbone
from pipeline.storage.disk import Room, full_disk_said
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.folder import sound_result
from pipeline.storage.root import storage_root

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig, Params, Row
    from pipeline.storage.stores import StoredPath

_SIDE = 32
"""Scaled crops are multiples of this."""

_LEAST_SIDE = 64
"""Of a picture: generated ones have no less (pipeline.data.datasets.shapes)."""

_BESIDES = 128 * 2**20
"""Bytes that a rehearsal takes beside pictures and weights: MLflow's database, Ray's logs, results."""

_BYTES_PER_PIXEL = 6
"""Of a stand-in at most: an archive's PNG of noise with its labels, and as much again while it is packed."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much of the row is rehearsed."""

    steps: int
    images: int
    """Validated, and evaluated."""
    scale: float
    """Of the sides of pictures, crops and test sizes."""
    one_image: bool
    """For a CPU: a step is one group of one image, and images are evaluated at one size only."""
    real_weights: bool
    """Initial weights are the published ones; otherwise random ones in the same layout."""


@dataclass(frozen=True, kw_only=True)
class Project:
    """The folder in which the row's stages are run."""

    folder: Path
    storage: StoredPath
    size: Size
    """(height, width) of the stand-in pictures."""
    environment: Mapping[str, str]
    """Of the stages' processes."""


@contextmanager
def opened(row: Row, params: Params, file: Path, extent: Extent) -> Iterator[Project]:
    """A project for the rehearsal of a row of the params.yaml `file`; whatever happens, nothing of it is left.

    ValueError or OSError where there is no room for it, or its folders cannot be written.
    """
    _check_room(row, extent)
    with folders_of(row.name) as (folder, storage):
        served = folder / "served"
        served.mkdir()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(served)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            with full_disk_said(folder):
                settings = _short_params(row, params, file, extent, served, address)
                (folder / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
            yield Project(
                folder=folder,
                storage=storage,
                size=stand_in_size(row, extent.scale),
                environment=_environment(folder, storage, extent),
            )
        finally:
            server.shutdown()
            server.server_close()


def stand_in_size(row: Row, scale: float = 1.0) -> Size:
    """(height, width) of the row's pictures: as its shards or the published data set have them, or as it tests them."""
    known: ImageCounts | None = counted(row.dataset, sound_result(Manifest, row.dataset))
    height, width = known.usual if known else (row.test.short_side, row.test.short_side * 4 // 3)
    return max(_LEAST_SIDE, round(height * scale)), max(_LEAST_SIDE, round(width * scale))


def _check_room(row: Row, extent: Extent) -> None:
    """ValueError where the temporary folder or the storage root has no room for a rehearsal."""
    height, width = stand_in_size(row, extent.scale)
    pixels = sum(_images(row, extent).values()) * height * width
    whole = checkpoint_bytes(row.model)  # of which a third are weights
    rehearsing = f"rehearsing {row.name}"
    temporary = Room(Path(tempfile.gettempdir()), "the temporary folder", "TMPDIR")
    temporary.check(rehearsing, _BESIDES + _BYTES_PER_PIXEL * pixels + 2 * whole // 3)
    root = storage_root()
    if isinstance(root, Path):
        there = next(path for path in (root, *root.parents) if path.is_dir())
        storage = Room(there, "the storage root", "M2F_STORAGE")
        storage.check(rehearsing, _BESIDES + 2 * _BYTES_PER_PIXEL * pixels + 3 * whole)


def _short_params(row: Row, params: Params, file: Path, extent: Extent, served: Path, address: str) -> dict[str, Any]:
    """params.yaml with this row alone, shortened, and with its data set and weights replaced by stand-ins."""
    original = yaml.safe_load(file.read_text(encoding="utf-8"))
    short = copy.deepcopy(original["rows"][row.name])
    every = max(1, extent.steps // 2)
    train = short.setdefault("train", {})
    train |= {"steps": extent.steps, "val_interval": extent.steps, "checkpoint_interval": every, "log_every": 1}
    if extent.one_image:
        train |= {"groups": 1, "group_size": 1}
    if extent.scale != 1:
        train["augmentation"] = _scaled_augmentation(row, extent.scale)
        short["test"] = _scaled_test(row, extent.scale)
    if extent.one_image and row.test.ms_flip is not None:  # twenty times as long, for the same code
        short["test"] = {**short.get("test", {}), "ms_flip": None}
    short["seeds"] = [row.seeds[0]]
    return {
        **{section: original[section] for section in ("presets", "recipes", "sites", "verdict") if section in original},
        "datasets": {row.dataset: _stand_in_dataset(original, row, params, extent, served, address)},
        "weights": {row.weights: _stand_in_weights(original, row, params, extent, served, address)},
        "rows": {row.name: short},
    }


def _images(row: Row, extent: Extent) -> dict[str, int]:
    """Stand-ins of each split."""
    batch = row.train.group_size * (1 if extent.one_image else row.train.groups)
    return {"train": 2 * batch, "val": extent.images}


def _stand_in_dataset(
    original: Mapping[str, Any], row: Row, params: Params, extent: Extent, served: Path, address: str
) -> dict[str, Any]:
    config: DatasetConfig = params.dataset(row.dataset)
    entry = copy.deepcopy(original["datasets"][row.dataset])
    images = _images(row, extent)
    size = stand_in_size(row, extent.scale)
    if config.layout == "shapes":
        entry["generate"] |= {**images, "height": size[0], "width": size[1]}
        return entry
    archives = write_stand_ins(config, served, size=size, images=images)
    for key in ("mirrors", "login", "terms"):
        entry.pop(key, None)
    return entry | {
        "sources": [f"{address}/{quote(path.name)}" for path in archives],
        "bytes": [path.stat().st_size for path in archives],
        "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in archives],
        "accept_terms": True,
    }


def _stand_in_weights(
    original: Mapping[str, Any], row: Row, params: Params, extent: Extent, served: Path, address: str
) -> dict[str, Any]:
    entry: dict[str, Any] = original.get("weights", {}).get(row.weights) or {}
    config = params.weights.get(row.weights)
    if extent.real_weights or config is None or not config.url:
        return entry if config is not None and config.url else {}
    if config.layout == "mask2former":
        return {}
    write_random_backbone(row.model, config.layout, served / "backbone.pth")
    return {"layout": config.layout, "url": f"{address}/backbone.pth"}


def _scaled_augmentation(row: Row, scale: float) -> dict[str, Any]:
    given = dataclasses.asdict(row.train.augmentation)
    crop = [max(2 * _SIDE, round(side * scale / _SIDE) * _SIDE) for side in given["crop"]]
    short_sides = sorted({max(_SIDE, round(side * scale)) for side in given["short_sides"]})
    return given | {
        "crop": crop,
        "short_sides": short_sides,
        "long_side_max": max([*short_sides, round(given["long_side_max"] * scale)]),
        "jitter": None if given["jitter"] is None else list(given["jitter"]),
    }


def _scaled_test(row: Row, scale: float) -> dict[str, Any]:
    given = {key: value for key, value in dataclasses.asdict(row.test).items() if value is not None}
    sides = {key: max(_SIDE, round(given[key] * scale)) for key in ("short_side", "long_side_max")}
    if views := given.get("ms_flip"):
        short_sides = sorted({max(_SIDE, round(side * scale)) for side in views["short_sides"]})
        long_side_max = max([*short_sides, round(views["long_side_max"] * scale)])
        sides["ms_flip"] = {"short_sides": short_sides, "long_side_max": long_side_max}
    return given | sides


def _environment(folder: Path, storage: StoredPath, extent: Extent) -> dict[str, str]:
    """Of this process, but another storage, no tracking server, and the package wherever it lies."""
    without = ("MLFLOW_TRACKING_URI", "M2F_SHARD_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment |= {
        "M2F_STORAGE": str(storage),
        "PYTHONPATH": python_path(),
    }
    for name in ("NO_PROXY", "no_proxy"):  # the stand-ins come from this machine
        environment[name] = ",".join([*filter(None, [os.environ.get(name)]), "127.0.0.1"])
    if not isinstance(storage, Path):  # whose shards are copied: not to a folder that stays
        environment["M2F_SHARD_CACHE"] = str(folder / "cache")
    if extent.one_image:
        environment.setdefault("M2F_WORKERS", "1")
    return environment


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""
