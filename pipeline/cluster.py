"""Where things run: read from the environment and the machine, never part of a result.

M2F_WORKERS            processes per training (default: one per GPU, on a CPU one per core; 0: this process, no Ray)
M2F_LOADER_PROCESSES   loader processes per worker (default: the worker's cores less one, at most 8)
M2F_GROUPS_AT_ONCE     groups per forward pass (default: all of the worker's; less saves memory)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Host:
    """A machine of the cluster."""

    gpus: int
    cpus: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one training gets: a pool of workers."""

    workers: int
    """Processes; 0: the calling process, without Ray."""
    use_gpu: bool
    cpus_per_worker: int
    loader_processes: int
    groups_at_once: int | None
    pools: int = 1
    """Seeds of the row that train at the same time, each on a pool of its own."""

    @property
    def per_worker(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1} if self.use_gpu else {})}

    def __str__(self) -> str:
        """2 workers with 1 GPU and 8 cores each."""
        workers = f"{self.workers} worker{'s' if self.workers != 1 else ''}"
        cores = f"{self.cpus_per_worker} core{'s' if self.cpus_per_worker != 1 else ''}"
        return f"{workers} with {'1 GPU and ' if self.use_gpu else ''}{cores}{' each' if self.workers != 1 else ''}"


def resources_for(row: Row, hosts: Sequence[Host], *, training: bool = True) -> Resources:
    """Share the hosts' GPUs (or cores where there is none) among the workers that train or evaluate a row.

    A training takes a pool of workers, and there are as many pools as the hosts hold, but no more than the row has
    seeds. A worker has one GPU and its share of its host's cores, or a share of the cores. ValueError when M2F_WORKERS
    asks for more training workers than the row has groups or the hosts have room for, or for several on a CPU where
    batch statistics would have to be synchronised.
    """
    wanted = environment_int("M2F_WORKERS")
    use_gpu = any(host.gpus for host in hosts)
    places = sum(min(host.gpus, host.cpus) if use_gpu else host.cpus for host in hosts)
    if places == 0:
        raise ValueError("the Ray cluster has no GPU and no core that a worker could take; add hosts to it")
    pools = 1
    if training:
        alone = not use_gpu and needs_synchronised_norm(row)
        workers = min(row.train.groups, 1 if alone else places) if wanted is None else wanted
        check_workers(row, workers=workers, use_gpu=use_gpu)
        if workers > places:  # Ray would wait for ever for the rest
            raise ValueError(
                f"M2F_WORKERS={workers}, but there are {places} {'GPUs' if use_gpu else 'cores'} here; "
                f"set it to {places} or less"
            )
        if workers:
            pools = min(len(row.seeds), places // workers)
    else:
        workers = places if wanted is None else min(wanted, places)
    if use_gpu:
        cpus_per_worker = max(1, min(host.cpus // host.gpus for host in hosts if host.gpus))
    else:
        cpus_per_worker = sum(host.cpus for host in hosts) // max(1, workers * pools)
        while workers and sum(host.cpus // cpus_per_worker for host in hosts) < workers * pools:
            cpus_per_worker -= 1  # a worker's cores are all of one host
    loaders = environment_int("M2F_LOADER_PROCESSES")
    return Resources(
        workers=workers,
        use_gpu=use_gpu,
        cpus_per_worker=cpus_per_worker,
        loader_processes=min(8, cpus_per_worker - 1) if loaders is None else loaders,
        groups_at_once=environment_int("M2F_GROUPS_AT_ONCE") or None,
        pools=pools,
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

    Ray's own log lines stay in its log files: what a person should read comes through `pipeline.relay`.
    """
    import logging
    import signal
    import threading

    import ray

    from pipeline.files import store_of
    from pipeline.mlflow_client import tracking_uri
    from pipeline.shard_cache import cache_folder
    from pipeline.storage import storage_root

    if ray.is_initialized():
        return
    # workers run in folders of their own, where "storage/" and "mlflow.db" would be others
    variables = {"M2F_STORAGE": str(storage_root()), "MLFLOW_TRACKING_URI": tracking_uri()}
    variables |= {name: os.environ[name] for name in ("M2F_SHARD_CACHE", "M2F_SHARD_CACHE_GIB") if name in os.environ}
    if store_of(storage_root()) is not None:  # a host's copy of an archive has the same path on all of them
        variables["M2F_SHARD_CACHE"] = str(cache_folder())
    places = {"env_vars": variables}
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray puts its own there
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING, runtime_env=places)
    else:  # a cluster of this machine's own: no dashboard, no token file in the home folder, little shared memory
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=places,
        )
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)


def ray_storage(folder: Any) -> dict[str, Any]:
    """Where Ray Train and Ray Tune keep their own notes, as their RunConfig wants it: a Path, or a UPath of a URL."""
    from pipeline.files import store_of

    store = store_of(folder)
    if store is None:
        return {"storage_path": str(folder)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": folder.path, "storage_filesystem": PyFileSystem(FSSpecHandler(store))}


def cluster_resources(row: Row, *, training: bool = True) -> Resources:
    """`resources_for` with what is here: the connected Ray cluster's hosts, or this machine."""
    if environment_int("M2F_WORKERS") != 0 and os.environ.get("RAY_ADDRESS"):
        import ray

        connect()
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        hosts = [Host(int(node.get("GPU", 0)), int(node.get("CPU", 0))) for node in alive]
    else:
        import torch

        hosts = [Host(torch.cuda.device_count(), len(os.sched_getaffinity(0)))]
    return resources_for(row, hosts, training=training)
