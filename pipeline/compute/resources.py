"""Where things run: read from the environment and the machine, never part of a result.

M2F_WORKERS            processes per training, its worker group (default: one per GPU, on a CPU one per core; 0: this
                       process, no Ray)
M2F_LOADER_PROCESSES   loader processes per worker (default: the worker's cores less one, at most 8)
M2F_GROUPS_AT_ONCE     groups per forward pass (default: all of the worker's; less saves memory)
M2F_CHECKPOINT_ACTIVATIONS
                       1: make blocks again in the backward pass (saves memory, takes time; default: 0)
M2F_ACCELERATOR_TYPE   only nodes with GPUs of this type, by Ray's name for it: A100, H100, L40S (default: any)
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.compute.ray_session import connect, cores_here
from pipeline.compute.variables import CHECKPOINT_ACTIVATIONS, GROUPS_AT_ONCE, environment_int
from pipeline.params.schema import Row, needs_synchronised_norm
from pipeline.params.sentences import error_shown

_GPU_TYPE = "accelerator_type:"
"""How Ray begins the name of the resource that says the type of a node's GPUs."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster."""

    gpus: int
    cpus: int
    gpu_type: str | None = None
    """Ray's name for the type of its GPUs; None where it knows none."""

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Node:
        """From what Ray says a node has: {"CPU": 96.0, "GPU": 8.0, "accelerator_type:A100": 1.0}."""
        gpu_types = [name.removeprefix(_GPU_TYPE) for name in resources if name.startswith(_GPU_TYPE)]
        return cls(int(resources.get("GPU", 0)), int(resources.get("CPU", 0)), gpu_types[0] if gpu_types else None)


def accelerator_type() -> str | None:
    """M2F_ACCELERATOR_TYPE: the only type of GPU to use; None for any."""
    return os.environ.get("M2F_ACCELERATOR_TYPE") or None


def gpus_here(row: Row) -> bool:
    """Whether a row would find a GPU: in the Ray cluster at RAY_ADDRESS, or else in this machine."""
    if os.environ.get("RAY_ADDRESS") or accelerator_type():
        return cluster_resources(row).use_gpu
    return _gpus_of_this_machine() > 0


def _gpus_of_this_machine() -> int:
    """Those that torch can use."""
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")  # of the driver; without it there is no need to import torch, which takes seconds
    except OSError:
        return 0
    import torch

    return torch.cuda.device_count()


def check_gpu() -> None:
    """ValueError, with torch's reason, where this process has a GPU that torch cannot use: its driver is older than
    torch's CUDA, or torch is a build for CPUs. Without it, the CPU would do the GPU's work."""
    import torch

    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # of a build for CPUs; of the driver
        raise ValueError(
            f"torch {torch.__version__} cannot use the GPU of host {socket.gethostname()} ({error_shown(error)}); "
            "install a newer driver there, or a torch for the one that is there; CUDA_VISIBLE_DEVICES= with nothing "
            "behind it leaves the GPU out"
        ) from None


def resources_of_gpu_type(gpu_type: str | None) -> dict[str, float]:
    """What a worker asks Ray for besides cores and GPUs, so that it runs where this type of GPU is."""
    return {f"{_GPU_TYPE}{gpu_type}": 0.001} if gpu_type else {}


def nodes_of_gpu_type(nodes: Sequence[Node], gpu_type: str) -> list[Node]:
    """The nodes with this type of GPU; ValueError, with the types that are there, when there is none."""
    found = [node for node in nodes if node.gpu_type == gpu_type]
    if not found:
        gpu_types = sorted({node.gpu_type for node in nodes if node.gpu_type})
        there = f"there are {' and '.join(gpu_types)}" if gpu_types else "Ray knows the type of none"
        raise ValueError(f"M2F_ACCELERATOR_TYPE={gpu_type}, but no node here has such GPUs; {there}")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one training gets: its worker group."""

    workers: int
    """Processes; 0: the calling process, without Ray."""
    use_gpu: bool
    cpus_per_worker: int
    loader_processes: int
    groups_at_once: int | None
    seeds_at_once: int = 1
    """Seeds of the row that train at the same time, each on a worker group of its own."""
    checkpoint_activations: bool = False
    """Whether blocks are made again in the backward pass."""
    gpu_type: str | None = None
    """The only type of GPU that a worker may have, by Ray's name; None: any."""

    @property
    def device_type(self) -> Literal["cuda", "cpu"]:
        """What a worker computes on."""
        return "cuda" if self.use_gpu else "cpu"

    @property
    def per_worker(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        gpu: dict[str, float] = {"GPU": 1} if self.use_gpu else {}
        return {"CPU": self.cpus_per_worker, **gpu, **resources_of_gpu_type(self.gpu_type)}

    def __str__(self) -> str:
        """2 workers with 1 GPU and 8 cores each."""
        workers = f"{self.workers} worker{'s' if self.workers != 1 else ''}"
        cores = f"{self.cpus_per_worker} core{'s' if self.cpus_per_worker != 1 else ''}"
        gpu = f"1 {self.gpu_type or 'GPU'} and " if self.use_gpu else ""
        return f"{workers} with {gpu}{cores}{' each' if self.workers != 1 else ''}"


def resources_for(row: Row, nodes: Sequence[Node], *, training: bool = True) -> Resources:
    """Share the nodes' GPUs (or cores where there is none) among the workers that train or evaluate a row.

    A training takes a worker group, and there are as many worker groups as the nodes hold, but no more than the row has
    seeds. A worker has one GPU and its share of its node's cores, or a share of the cores. ValueError when M2F_WORKERS
    asks for more training workers than the row has groups or the nodes have room for, or for several on a CPU where
    batch statistics would have to be synchronised, and when no node has the GPUs that M2F_ACCELERATOR_TYPE asks for.
    """
    wanted = environment_int("M2F_WORKERS")
    gpu_type = accelerator_type() if wanted != 0 else None
    if gpu_type is not None:
        nodes = nodes_of_gpu_type(nodes, gpu_type)
    use_gpu = any(node.gpus for node in nodes)
    places = sum(min(node.gpus, node.cpus) if use_gpu else node.cpus for node in nodes)
    if places == 0:
        raise ValueError("the Ray cluster has no GPU and no core that a worker could take; add nodes to it")
    seeds_at_once = 1
    if training:
        alone = not use_gpu and needs_synchronised_norm(row)
        workers = min(row.train.groups, 1 if alone else places) if wanted is None else wanted
        check_workers(row, workers=workers, use_gpu=use_gpu)
        if workers > places:  # Ray would wait for ever for the rest
            what = f"{gpu_type or ''} GPUs".strip() if use_gpu else "cores"
            raise ValueError(f"M2F_WORKERS={workers}, but there are {places} {what} here; set it to {places} or less")
        if workers:
            seeds_at_once = min(len(row.seeds), places // workers)
    else:
        workers = places if wanted is None else min(wanted, places)
    if use_gpu:
        cpus_per_worker = max(1, min(node.cpus // node.gpus for node in nodes if node.gpus))
    else:
        cpus_per_worker = sum(node.cpus for node in nodes) // max(1, workers * seeds_at_once)
        while workers and sum(node.cpus // cpus_per_worker for node in nodes) < workers * seeds_at_once:
            cpus_per_worker -= 1  # a worker's cores are all of one node
    loaders = environment_int("M2F_LOADER_PROCESSES")
    return Resources(
        workers=workers,
        use_gpu=use_gpu,
        cpus_per_worker=cpus_per_worker,
        loader_processes=min(8, cpus_per_worker - 1) if loaders is None else loaders,
        groups_at_once=environment_int(GROUPS_AT_ONCE) or None,
        checkpoint_activations=bool(environment_int(CHECKPOINT_ACTIVATIONS)),
        seeds_at_once=seeds_at_once,
        gpu_type=gpu_type,
    )


def check_workers(row: Row, *, workers: int, use_gpu: bool) -> None:
    """ValueError unless `workers` processes can train the row, M2F_GROUPS_AT_ONCE of its groups at a time."""
    if workers > row.train.groups:
        raise ValueError(
            f"{workers} workers for row {row.name}, which has {row.train.groups} groups; "
            f"use 1 to {row.train.groups} (M2F_WORKERS)"
        )
    if workers > 1 and not use_gpu and needs_synchronised_norm(row):
        raise ValueError(
            f"row {row.name} normalises with statistics of the whole step, which workers on CPUs do not share; "
            "set M2F_WORKERS=1"
        )
    at_once, groups = environment_int(GROUPS_AT_ONCE), math.ceil(row.train.groups / max(1, workers))
    if at_once and at_once < groups and needs_synchronised_norm(row):
        raise ValueError(
            f"row {row.name} normalises with statistics of the whole step, so the {groups} groups of a worker cannot "
            f"be taken {at_once} at a time; unset M2F_GROUPS_AT_ONCE, or use {math.ceil(row.train.groups / at_once)} "
            "workers (M2F_WORKERS)"
        )


def share(count: int, *, worker: int, workers: int) -> range:
    """The part of range(count) that one worker takes: contiguous, sizes differing by at most one."""
    base, extra = divmod(count, max(1, workers))
    start = worker * base + min(worker, extra)
    return range(start, start + base + (worker < extra))


def cluster_resources(row: Row, *, training: bool = True) -> Resources:
    """`resources_for` with what is here: the connected Ray cluster's nodes, or this machine."""
    if environment_int("M2F_WORKERS") != 0 and (os.environ.get("RAY_ADDRESS") or accelerator_type()):
        import ray

        connect()
        nodes = [Node.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    else:
        nodes = [Node(_gpus_of_this_machine(), cores_here())]
    return resources_for(row, nodes, training=training)
