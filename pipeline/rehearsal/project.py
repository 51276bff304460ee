"""The project of a rehearsal: params.yaml with one short row, on stand-ins that a server on this machine hands out."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import http.server
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from pipeline.data.images.sizes import ImageCounts, Size, counted
from pipeline.rehearsal.stand_ins import write_stand_ins
from pipeline.rehearsal.weights import write_random_backbone
from pipeline.storage.results import Manifest, sound_result
from pipeline.storage.root import storage_root

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig, Params, Row
    from pipeline.storage.stores import StoredPath

FOLDER = "preflight"
"""Below the storage root: the storage of rehearsals, which is deleted at their ends."""

_PREFIX = "m2f-preflight-"
"""Of the folders of rehearsals among the system's temporary ones."""

_SIDE = 32
"""Scaled crops are multiples of this."""


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

    ValueError where the storage root cannot be written.
    """
    root = storage_root()
    was_there = root.exists()
    forget_ended()
    mine = f"{row.name}-{socket.gethostname()}-{os.getpid()}"
    storage = root / FOLDER / mine
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{mine}-"))
    served = folder / "served"
    served.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        (folder / "params.yaml").write_text(
            yaml.safe_dump(
                _short_params(row, params, file, extent, served, f"http://127.0.0.1:{server.server_port}"),
                sort_keys=False,
            ),
            encoding="utf-8",
        )
        yield Project(
            folder=folder,
            storage=storage,
            size=stand_in_size(row, extent.scale),
            environment=_environment(folder, storage, extent),
        )
    finally:
        server.shutdown()
        server.server_close()
        shutil.rmtree(folder, ignore_errors=True)
        _delete(storage)
        if isinstance(root, Path) and not was_there:
            with suppress(OSError):  # another process has put something there
                root.rmdir()


def forget_ended() -> None:
    """End and delete what rehearsals of this machine have left that were killed."""
    root = storage_root() / FOLDER
    left: list[StoredPath] = list(root.iterdir()) if root.exists() else []
    for path in left:
        if _has_ended(path.name):
            _end_processes(str(path))
            _delete(path)
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if _has_ended(folder.name.removeprefix(_PREFIX).rpartition("-")[0]):
            shutil.rmtree(folder, ignore_errors=True)  # unless it is another user's


def _has_ended(name: str) -> bool:
    """Whether <row>-<host>-<process> was a process of this machine; row and host may have dashes."""
    import psutil

    rest, _, process = name.rpartition("-")
    here = rest.endswith(f"-{socket.gethostname()}")
    return here and process.isdecimal() and not psutil.pid_exists(int(process))


def _end_processes(storage: str) -> None:
    """End the stages that a killed rehearsal has left running, by their storage root."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            if process.environ().get("M2F_STORAGE") == storage:
                process.kill()


def stand_in_size(row: Row, scale: float = 1.0) -> Size:
    """(height, width) of the row's pictures: as its shards or the published data set have them, or as it tests them."""
    known: ImageCounts | None = counted(row.dataset, sound_result(Manifest, row.dataset))
    height, width = known.usual if known else (row.test.short_side, row.test.short_side * 4 // 3)
    return max(_SIDE, round(height * scale)), max(_SIDE, round(width * scale))


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
        **{section: original[section] for section in ("presets", "sites", "verdict") if section in original},
        "datasets": {row.dataset: _stand_in_dataset(original, row, params, extent, served, address)},
        "weights": {row.weights: _stand_in_weights(original, row, params, extent, served, address)},
        "rows": {row.name: short},
    }


def _stand_in_dataset(
    original: Mapping[str, Any], row: Row, params: Params, extent: Extent, served: Path, address: str
) -> dict[str, Any]:
    config: DatasetConfig = params.dataset(row.dataset)
    entry = copy.deepcopy(original["datasets"][row.dataset])
    batch = row.train.group_size * (1 if extent.one_image else row.train.groups)
    images = {"train": 2 * batch, "val": extent.images}
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
    home = str(Path(__file__).parents[2])
    without = ("MLFLOW_TRACKING_URI", "M2F_SHARD_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment |= {
        "M2F_STORAGE": str(storage),
        "PYTHONPATH": os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    for name in ("NO_PROXY", "no_proxy"):  # the stand-ins come from this machine
        environment[name] = ",".join([*filter(None, [os.environ.get(name)]), "127.0.0.1"])
    if not isinstance(storage, Path):  # whose shards are copied: not to a folder that stays
        environment["M2F_SHARD_CACHE"] = str(folder / "cache")
    if extent.one_image:
        environment.setdefault("M2F_WORKERS", "1")
    return environment


def _delete(storage: StoredPath) -> None:
    if isinstance(storage, Path):
        shutil.rmtree(storage, ignore_errors=True)
        with suppress(OSError):  # other rehearsals are there, or it is gone
            storage.parent.rmdir()
    elif storage.exists():
        storage.fs.rm(storage.path, recursive=True)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""
