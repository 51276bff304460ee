"""Where things run: read from the environment and the machine, never part of a result.

M2F_WORKERS            processes per training (default: one per GPU, on a CPU one per core; 0: this process, no Ray)
M2F_LOADER_PROCESSES   loader processes per worker (default: the worker's cores less one, at most 8)
M2F_GROUPS_AT_ONCE     groups per forward pass (default: all of the worker's; less saves memory)
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from m2f.config import BATCH_NORM_BACKBONES
from pipeline.params import Row


def environment_int(name: str) -> int | None:
    """An environment variable as a non-negative int; None when unset."""
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r}; it must be a whole number, 0 or more")
    return int(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one training gets."""

    workers: int
    """Processes; 0: the calling process, without Ray."""
    use_gpu: bool
    cpus_per_worker: int
    loader_processes: int
    groups_at_once: int | None


def resources_for(row: Row, *, gpus: int, cpus: int, training: bool = True) -> Resources:
    """Share `gpus` GPUs (or `cpus` cores where there is none) among the workers that train or evaluate a row.

    ValueError when M2F_WORKERS asks for more training workers than the row has groups, or for several on a
    CPU where batch statistics would have to be synchronised.
    """
    wanted, devices = environment_int("M2F_WORKERS"), gpus or cpus
    if training:
        alone = gpus == 0 and needs_synchronised_norm(row)
        workers = min(row.train.groups, 1 if alone else devices) if wanted is None else wanted
        check_workers(row, workers=workers, use_gpu=gpus > 0)
        if workers > devices:  # Ray would wait for ever for the rest
            raise ValueError(
                f"M2F_WORKERS={workers}, but there are {devices} {'GPUs' if gpus else 'cores'} here; "
                f"set it to {devices} or less"
            )
    else:
        workers = devices if wanted is None else min(wanted, devices)
    cpus_per_worker = max(1, cpus // max(1, workers))
    loaders = environment_int("M2F_LOADER_PROCESSES")
    return Resources(
        workers=workers,
        use_gpu=gpus > 0,
        cpus_per_worker=cpus_per_worker,
        loader_processes=min(8, cpus_per_worker - 1) if loaders is None else loaders,
        groups_at_once=environment_int("M2F_GROUPS_AT_ONCE") or None,
    )


def needs_synchronised_norm(row: Row) -> bool:
    """Whether the row's batch norm takes its statistics over the whole step."""
    backbone = row.model.backbone
    return backbone.name in BATCH_NORM_BACKBONES and backbone.batch_statistics


def check_workers(row: Row, *, workers: int, use_gpu: bool) -> None:
    """ValueError unless `workers` processes can train the row."""
    if workers > row.train.groups:
        raise ValueError(
            f"{workers} workers for row {row.name}, which has {row.train.groups} groups; "
            f"use 1 to {row.train.groups} (M2F_WORKERS)"
        )
    if workers > 1 and not use_gpu and needs_synchronised_norm(row):
        raise ValueError(
            f"row {row.name} normalises with statistics of the whole step, which needs SyncBatchNorm, "
            f"which the CPU lacks; set M2F_WORKERS=1"
        )


def share(count: int, *, worker: int, workers: int) -> range:
    """The part of range(count) that one worker takes: contiguous, sizes differing by at most one."""
    base, extra = divmod(count, max(1, workers))
    start = worker * base + min(worker, extra)
    return range(start, start + base + (worker < extra))


def connect() -> None:
    """Join the Ray cluster this process belongs to, or start one on this machine.

    Ray's own log lines stay in its log files: what a person should read comes through `progress.log` of a run.
    """
    import logging

    import ray

    from pipeline.storage import storage_root
    from pipeline.tracking import tracking_uri

    if ray.is_initialized():
        return
    # workers run in folders of their own, where "storage/" and "mlflow.db" would be others
    variables = {"M2F_STORAGE": str(storage_root()), "MLFLOW_TRACKING_URI": tracking_uri()}
    variables |= {name: os.environ[name] for name in ("M2F_SHARD_CACHE", "M2F_SHARD_CACHE_GIB") if name in os.environ}
    places = {"env_vars": variables}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING, runtime_env=places)
        return
    # a cluster of this machine's own: no dashboard, no token file in the home folder, little shared memory
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env=places,
    )


def cluster_resources(row: Row, *, training: bool = True) -> Resources:
    """`resources_for` with what is here: the connected Ray cluster's GPUs and cores, or this machine's."""
    import torch

    if environment_int("M2F_WORKERS") != 0 and os.environ.get("RAY_ADDRESS"):
        import ray

        connect()
        total = ray.cluster_resources()
        return resources_for(row, gpus=int(total.get("GPU", 0)), cpus=int(total.get("CPU", 1)), training=training)
    return resources_for(row, gpus=torch.cuda.device_count(), cpus=len(os.sched_getaffinity(0)), training=training)
