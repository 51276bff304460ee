"""Where things run: read from the environment and the machine, never part of a result.

M2F_WORKERS            processes per training, its pool (default: one per GPU, on a CPU one per core; 0: this process,
                       no Ray)
M2F_LOADER_PROCESSES   loader processes per worker (default: the worker's cores less one, at most 8)
M2F_GROUPS_AT_ONCE     groups per forward pass (default: all of the worker's; less saves memory)
M2F_ACCELERATOR_TYPE   only hosts with GPUs of this kind, by Ray's name for it: A100, H100, L40S (default: any)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.compute.ray_session import connect
from pipeline.params.schema import Row, needs_synchronised_norm

_KIND = "accelerator_type:"
"""How Ray begins the name of the resource that says a host's kind of GPU."""


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
    kind: str | None = None
    """Ray's name for its kind of GPU; None where it knows none."""

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Host:
        """From what Ray says a node has: {"CPU": 96.0, "GPU": 8.0, "accelerator_type:A100": 1.0}."""
        kinds = [name.removeprefix(_KIND) for name in resources if name.startswith(_KIND)]
        return cls(int(resources.get("GPU", 0)), int(resources.get("CPU", 0)), kinds[0] if kinds else None)


def accelerator_type() -> str | None:
    """M2F_ACCELERATOR_TYPE: the only kind of GPU to use; None for any."""
    return os.environ.get("M2F_ACCELERATOR_TYPE") or None


def gpus_here(row: Row) -> bool:
    """Whether a row would find a GPU: in the Ray cluster at RAY_ADDRESS, or else in this machine."""
    import ctypes

    if os.environ.get("RAY_ADDRESS") or accelerator_type():
        return cluster_resources(row).use_gpu
    try:
        ctypes.CDLL("libcuda.so.1")  # of the driver; without it there is no need to import torch, which takes seconds
    except OSError:
        return False
    import torch

    return torch.cuda.device_count() > 0


def resources_of_kind(kind: str | None) -> dict[str, float]:
    """What a worker asks Ray for besides cores and GPUs, so that it runs where this kind of GPU is."""
    return {f"{_KIND}{kind}": 0.001} if kind else {}


def hosts_of_kind(hosts: Sequence[Host], kind: str) -> list[Host]:
    """The hosts with this kind of GPU; ValueError, with the kinds that are there, when there is none."""
    found = [host for host in hosts if host.kind == kind]
    if not found:
        kinds = sorted({host.kind for host in hosts if host.kind})
        there = f"there are {' and '.join(kinds)}" if kinds else "Ray knows the kind of none"
        raise ValueError(f"M2F_ACCELERATOR_TYPE={kind}, but no host here has such GPUs; {there}")
    return found


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
    kind: str | None = None
    """The only kind of GPU that a worker may have, by Ray's name; None: any."""

    @property
    def device_kind(self) -> Literal["cuda", "cpu"]:
        """What a worker computes on."""
        return "cuda" if self.use_gpu else "cpu"

    @property
    def per_worker(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        gpu: dict[str, float] = {"GPU": 1} if self.use_gpu else {}
        return {"CPU": self.cpus_per_worker, **gpu, **resources_of_kind(self.kind)}

    def __str__(self) -> str:
        """2 workers with 1 GPU and 8 cores each."""
        workers = f"{self.workers} worker{'s' if self.workers != 1 else ''}"
        cores = f"{self.cpus_per_worker} core{'s' if self.cpus_per_worker != 1 else ''}"
        gpu = f"1 {self.kind or 'GPU'} and " if self.use_gpu else ""
        return f"{workers} with {gpu}{cores}{' each' if self.workers != 1 else ''}"


def resources_for(row: Row, hosts: Sequence[Host], *, training: bool = True) -> Resources:
    """Share the hosts' GPUs (or cores where there is none) among the workers that train or evaluate a row.

    A training takes a pool of workers, and there are as many pools as the hosts hold, but no more than the row has
    seeds. A worker has one GPU and its share of its host's cores, or a share of the cores. ValueError when M2F_WORKERS
    asks for more training workers than the row has groups or the hosts have room for, or for several on a CPU where
    batch statistics would have to be synchronised, and when no host has the GPUs that M2F_ACCELERATOR_TYPE asks for.
    """
    wanted = environment_int("M2F_WORKERS")
    kind = accelerator_type() if wanted != 0 else None
    if kind is not None:
        hosts = hosts_of_kind(hosts, kind)
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
            what = f"{kind or ''} GPUs".strip() if use_gpu else "cores"
            raise ValueError(f"M2F_WORKERS={workers}, but there are {places} {what} here; set it to {places} or less")
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
        kind=kind,
    )


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


def cluster_resources(row: Row, *, training: bool = True) -> Resources:
    """`resources_for` with what is here: the connected Ray cluster's hosts, or this machine."""
    if environment_int("M2F_WORKERS") != 0 and (os.environ.get("RAY_ADDRESS") or accelerator_type()):
        import ray

        connect()
        hosts = [Host.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    else:
        import torch

        hosts = [Host(torch.cuda.device_count(), len(os.sched_getaffinity(0)))]
    return resources_for(row, hosts, training=training)
