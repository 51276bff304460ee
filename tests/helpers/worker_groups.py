"""A training's workers: their resources, and what is raised when one is lost."""

from __future__ import annotations

from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipeline.compute.resources import Resources


def lost() -> WorkerGroupError:
    return WorkerGroupError("", {0: RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc] Connection closed"),
                                 1: WorkerHealthCheckFailedError("", ActorDiedError())})  # fmt: skip


def group_of(workers: int) -> Resources:
    return Resources(workers=workers, use_gpu=False, cpus_per_worker=1, loader_processes=0, groups_at_once=None)
