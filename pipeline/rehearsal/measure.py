"""How fast the workers of a row load pictures and sum gradients, and how fast the storage root is: `python -m
pipeline.rehearsal.measure ROW`, in a project whose shards are made. Prints a line of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.params.schema import Row
    from pipeline.storage.results.data import Manifest

BATCHES = 6
"""Loaded by every worker at the same time; those after the first two count."""

SUMS = 5

RATE_MIB = 128
"""Written to the storage root, and read again."""


def main() -> None:
    """Measure the row that the command names."""
    from pipeline.compute.resources import cluster_resources
    from pipeline.params.load import load_params
    from pipeline.storage.results.data import Manifest
    from pipeline.storage.results.folder import read_result

    row = load_params("params.yaml").row(sys.argv[1])
    resources = cluster_resources(row)
    config: dict[str, Any] = {
        "row": row,
        "manifest": read_result(Manifest, row.dataset),
        "processes": resources.loader_processes,
        "values": _trained_values(row),
        "threads": resources.cpus_per_worker,
    }
    found = measured(config) if resources.workers == 0 else _on_workers(config, resources)
    print(json.dumps({**found, "workers": max(1, resources.workers), **storage_rates()}))


def _trained_values(row: Row) -> int:
    """Parameters that have gradients."""
    import torch

    from m2f.model import build_model

    with torch.device("meta"):  # shapes only
        return sum(parameter.numel() for parameter in build_model(row.model).parameters() if parameter.requires_grad)


def _on_workers(config: Mapping[str, Any], resources: Any) -> dict[str, float]:
    """The measurement of rank 0 of a worker group like the training's."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.compute.ray_session import connect, ray_storage
    from pipeline.storage.files import read_json
    from pipeline.storage.root import storage_root

    connect()
    out = storage_root() / "measured.json"
    TorchTrainer(
        _measure,
        train_loop_config={**config, "out": out},
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=resources.per_worker,
            placement_strategy="PACK",
            accelerator_type=resources.gpu_type,
        ),
        run_config=RunConfig(name=f"measure-{time.time_ns()}", **ray_storage(storage_root() / "ray")),
    ).fit()
    found: dict[str, float] = read_json(out, made_by="python -m stages.preflight")
    return found


def _measure(config: dict[str, Any]) -> None:
    """On every worker. What is reported to Ray without a checkpoint is not kept, so rank 0 writes a file."""
    import torch
    from ray.train.torch import get_device

    from pipeline.storage.files import write_json
    from pipeline.training.worker import Worker

    torch.set_num_threads(config["threads"])
    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    found = measured(config)
    if Worker.here().rank == 0:
        write_json(config["out"], found)


def measured(config: Mapping[str, Any]) -> dict[str, float]:
    """Of this worker group: `loaded_per_s`, pictures per second of all workers, who load at the same time, and `sum_s`,
    seconds for a sum of all gradients."""
    import torch

    from pipeline.training.worker import Worker

    worker = Worker.here()
    slowest = worker.largest(_seconds_per_batch(config["row"], config["manifest"], worker, config["processes"]))
    values = torch.zeros(config["values"], device=worker.device)
    seconds = []
    for _ in range(SUMS + 2):
        worker.largest(0.0)  # all begin together
        began = time.perf_counter()
        worker.sum(values)
        if worker.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "loaded_per_s": config["row"].train.global_batch / slowest,
        "sum_s": statistics.median(seconds[2:]) if worker.size > 1 else 0.0,
    }


def _seconds_per_batch(row: Row, manifest: Manifest, worker: Any, processes: int) -> float:
    """This worker's share of a step's pictures."""
    from pipeline.compute.resources import share
    from pipeline.data.loader.train_batches import TrainingOrder, training_batches

    groups = share(row.train.groups, worker=worker.rank, workers=worker.size)
    size = row.train.group_size
    ready = []
    for _ in training_batches(
        TrainingOrder.of(row, manifest, seed=0),
        first_step=0,
        steps=BATCHES,
        image_range=range(groups.start * size, groups.stop * size),
        processes=processes,
    ):
        ready.append(time.perf_counter())
    return (ready[-1] - ready[1]) / (len(ready) - 2)


def storage_rates() -> dict[str, float]:
    """MiB per second of a file that is written to the storage root, and read again (perhaps from the page cache)."""
    from pipeline.storage.files import delete
    from pipeline.storage.root import storage_root

    path, content = storage_root() / "rate.bin", bytes(RATE_MIB * 2**20)
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    path.write_bytes(content)
    written = time.perf_counter()
    path.read_bytes()
    read = time.perf_counter()
    delete(path)
    return {"write_mib_per_s": RATE_MIB / (written - began), "read_mib_per_s": RATE_MIB / (read - written)}


if __name__ == "__main__":
    main()
