"""A job on the cluster's head: the stages that rows share once, then the rows side by side.

One `dvc repro` runs its stages one after the other, so every row gets its own. A failing row leaves the others alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.cluster.config import LEFT_ON_HEAD, NodeGroup, node_groups
from pipeline.cluster.stages import Alone, Plan, plan, run_command, run_plan, say
from pipeline.compute.resources import Node, accelerator_type, nodes_of_gpu_type, resources_of_gpu_type
from pipeline.compute.variables import environment_int
from pipeline.params.load import load_params, read_settings
from pipeline.params.schema import Row
from pipeline.storage.results.folder import RESULTS, sound_result
from pipeline.storage.results.rows import Registration
from pipeline.tracking.client import LOGIN

JOIN_WAIT_S = 180.0
"""How long machines that `ray up` has started may take to join."""
WORKER_GROUP_WAIT_S = 1800.0
"""How long the first worker group may take to start before the job gives up (M2F_WORKER_GROUP_WAIT_S); a cloud may be
out of GPUs."""
PREFLIGHT = "preflight@"
"""Before a row in a target: its rehearsal (stages.preflight), which is no stage of dvc.yaml and comes first."""


# What it needs


@dataclass(frozen=True, slots=True)
class Need:
    """The GPUs, or the cores, that one row takes."""

    row: str
    gpus: int
    cpus: int
    gpu_type: str = "GPU"
    """The only type of GPU that will do, by Ray's name (M2F_ACCELERATOR_TYPE); GPU: any."""


def need(row: Row, *, trains: bool = True) -> Need:
    """What training a row takes, or only evaluating it.

    A published network trains on a GPU for each group of pictures, or on M2F_WORKERS of them, and is evaluated on any
    number; a tiny one needs cores only.
    """
    workers = environment_int("M2F_WORKERS")
    if row.model.backbone.name == "tiny":
        return Need(row.name, 0, max(1, workers or 1))
    gpus = row.train.groups if workers is None else max(1, workers)
    return Need(row.name, gpus if trains else 1, 1, accelerator_type() or "GPU")


def missing(needs: Sequence[Need], *, here: Sequence[NodeGroup], more: Sequence[NodeGroup]) -> list[str]:
    """What the cluster lacks for these rows, one sentence each; what it may start counts like what it has.

    Of the machines, those with the type of GPU that the rows want.
    """
    gpus, cpus = (sum(m.count * getattr(m, resource) for m in (*here, *more)) for resource in ("gpus", "cpus"))
    found = []
    for each in needs:
        if each.gpus > gpus:
            has = f"the cluster has {gpus} and can start no more" if gpus else "the cluster has none and can start none"
            less = f"set M2F_WORKERS={gpus} to train on those, or " if gpus else ""
            what = each.gpu_type if each.gpu_type == "GPU" else f"{each.gpu_type} GPU"
            found.append(f"row {each.row} needs {each.gpus} {what}s, but {has}; {less}add machines to the cluster")
        elif each.cpus > cpus:
            found.append(
                f"row {each.row} needs {each.cpus} cores (M2F_WORKERS), but the cluster has {cpus}; "
                f"set M2F_WORKERS={cpus} or less"
            )
    return found


def at_once(needs: Sequence[Need], *, here: Sequence[NodeGroup], more: Sequence[NodeGroup]) -> int:
    """How many rows run side by side: as many as there may be worker groups for, at least one."""
    group_gpus = max((each.gpus for each in needs), default=0)
    if group_gpus:
        return max(1, sum(m.count * m.gpus for m in (*here, *more)) // group_gpus)
    workers = environment_int("M2F_WORKERS")  # without it a row takes all cores
    return max(1, sum(m.count * m.cpus for m in here) // workers) if workers else 1


def wait_for_machines(expected: int, count: Callable[[], int], *, wait_s: float = JOIN_WAIT_S) -> None:
    """Wait until the machines that the cluster file promises have joined, or say how many have not."""
    deadline, said = time.monotonic() + wait_s, False
    while (joined := count()) < expected:
        if time.monotonic() > deadline:
            say(f"warning: {joined} of {expected} machines have joined; going on with these (see: ray status)")
            return
        if not said:
            say(f"waiting for {expected - joined} of {expected} machines to join")
            said = True
        time.sleep(1)


# The job


def drive(targets: Sequence[str], *, upload: Path, workspace: Path, others: Mapping[str, Sequence[str]]) -> int:
    """Take over the uploaded code, check that the cluster has what the rows need, and run them. The exit code.

    `others`: jobs that work in the workspace now, and their targets. ValueError with everything the user can mend.
    """
    from pipeline.cluster.workspace import add_missing_results, code_changes, take_code, without_git

    if others:
        names = ", ".join(others)
        if changes := code_changes(upload, workspace):
            raise ValueError(
                f"{names} works with other code or settings than yours ({len(changes)} files differ: "
                f"{', '.join(changes[:3])}{', ...' if len(changes) > 3 else ''}); wait for it (attach), or stop it"
            )
    else:
        take_code(upload, workspace)
        without_git(workspace)
    add_missing_results(upload, workspace)

    todo = planned(targets, workspace)
    for job, theirs in others.items():
        if both := sorted(set(planned(theirs, workspace).stages.rows) & set(todo.stages.rows)):
            raise ValueError(f"{job} works on {', '.join(both)}; join it with: attach {job}")
    code = run_todo(todo, workspace)
    if not todo.stages.rows and todo.rehearsed:
        say(f"\nwhat the rehearsal found: {workspace}/reports/preflight of the head; home: {_home()}")
    else:
        say("\n" + "\n".join(where_things_are(workspace, list(todo.stages.rows))))
    return code


@dataclass(frozen=True, slots=True)
class Todo:
    """What a job does, in this order."""

    rehearsed: tuple[str, ...]
    """Rows that are rehearsed first."""
    stages: Plan
    needs: tuple[Need, ...]
    """What the rows take."""


def planned(targets: Sequence[str], workspace: Path) -> Todo:
    """What targets mean by a workspace's dvc.yaml and params.yaml. ValueError for one that names no stage."""
    tree = read_settings(workspace / "params.yaml")
    pipeline = yaml.safe_load((workspace / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    rehearsed = tuple(target.removeprefix(PREFLIGHT) for target in targets if target.startswith(PREFLIGHT))
    asked = [target for target in targets if not target.startswith(PREFLIGHT)]
    todo = plan(asked, pipeline, tree) if asked else Plan((), {}, (), {})
    rows = load_params(workspace / "params.yaml")
    needs = [need(rows.row(row), trains=f"train@{row}" in stages) for row, stages in todo.rows.items()]
    return Todo(rehearsed, todo, (*needs, *(need(rows.row(row)) for row in rehearsed)))


def run_todo(todo: Todo, workspace: Path, *, machines: int | None = None, alone: Alone = nullcontext) -> int:
    """Wait for what the rows need, rehearse, then run shared stages and rows. The exit code; ValueError for what the
    cluster lacks.

    `machines`: how many are to join, where no cluster file says it. `alone`: held while shared stages run.
    """
    side_by_side = _prepare(todo.needs, machines)
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # dvc calls `python`
    environment = {**os.environ, "PATH": path}
    for row in todo.rehearsed:
        command = [sys.executable, "-m", "stages.preflight", row]
        if code := run_command(command, workspace, f"preflight {row}", environment):
            say(f"the rehearsal of {row} failed, so nothing else is run; its page is in reports/preflight")
            return code
    stages = todo.stages
    if not (stages.shared or stages.rows or stages.last):
        return 0
    say(f"shared stages: {' '.join(stages.shared) or 'none'}")
    for row, theirs in stages.rows.items():
        say(f"row {row}: {' '.join(stage.partition('@')[0] for stage in theirs)}")
    if len(stages.rows) > 1:
        say(f"{min(side_by_side, len(stages.rows))} of {len(stages.rows)} rows side by side")
    return run_plan(stages, workspace, side_by_side=side_by_side, environment=environment, alone=alone)


def where_things_are(workspace: Path, rows: Sequence[str], *, home: bool = False) -> list[str]:
    """Where results, curves and registered models of rows are after a job, and how they come home; lines to print.

    `home`: the workspace is the user's own.
    """
    storage = os.environ.get("M2F_STORAGE") or "the storage root"
    at = "" if home else " on the head"
    lines = [f"results    {workspace}/results{at}; checkpoints and overlays: {storage}/runs"]
    report = workspace / "reports" / "index.html"
    make = "python -m stages.report" if home else "at home: python -m stages.report"
    lines.append(f"report     {report}{at}; {make}" if report.is_file() and not home else f"report     {make}")
    if tracking := os.environ.get("MLFLOW_TRACKING_URI"):
        lines.append(f"curves     {LOGIN.sub('', tracking)} (MLflow; docs/cluster.md has the way there)")
    for row in rows:
        if model := sound_result(Registration, row, results=workspace / RESULTS):
            best, median = model.aliases.best.version, model.aliases.median.version
            lines.append(f"model      models:/{model.model}@best (version {best}), @median (version {median})")
    return lines if home else [*lines, f"bring home {_home()}"]


def _home() -> str:
    if os.environ.get("KUBERNETES_SERVICE_HOST"):  # in every pod
        return "as docs/cluster.md says for Kubernetes"
    return f"python -m pipeline.submit results {os.environ.get('M2F_CLUSTER_FILE') or 'cluster.yaml'}"


def _prepare(needs: Sequence[Need], machines: int | None) -> int:
    """Wait for the machines and the first worker group; how many rows may run side by side. ValueError for what is
    missing."""
    import ray

    config = _cluster_file()
    ray.init(address="auto", log_to_driver=False, logging_level="WARNING")
    try:
        fixed = [entry.get("min_workers", 0) for entry in (config.get("available_node_types") or {}).values()]
        wait_for_machines(machines or 1 + sum(fixed), lambda: len(_here()))
        gpu_type = accelerator_type()
        if gpu_type is not None and any(each.gpus for each in needs):
            types = (config.get("available_node_types") or {}).values()
            nodes_of_gpu_type([*_nodes(), *(Node.of(_resources(entry)) for entry in types)], gpu_type)
        here, more = _here(), node_groups(of_gpu_type(config, gpu_type))
        if lacking := missing(needs, here=here, more=more):
            raise ValueError("; ".join(lacking))
        group_gpus = max((each.gpus for each in needs), default=0)
        if group_gpus > sum(m.gpus for m in here):
            _start_worker_group(group_gpus)
            here = _here()
        return at_once(needs, here=here, more=more)
    finally:
        ray.shutdown()


def of_gpu_type(config: Mapping[str, Any], gpu_type: str | None) -> Mapping[str, Any]:
    """A cluster file without the machines whose GPUs are not of this type.

    `ray up` writes the type of an EC2 machine's GPUs among its resources; elsewhere it is to stand there.
    """
    head, types = config.get("head_node_type"), config.get("available_node_types") or {}
    fit = {
        name: entry
        for name, entry in types.items()
        if name == head or gpu_type in (None, Node.of(_resources(entry)).gpu_type)
    }
    return {**config, "available_node_types": fit}


def _resources(entry: Mapping[str, Any]) -> Mapping[str, float]:
    return entry.get("resources") or {}


def _cluster_file() -> Mapping[str, Any]:
    """What `ray up` left on the head; empty where Ray was started by hand."""
    path = Path(LEFT_ON_HEAD).expanduser()
    content: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def _nodes() -> list[Node]:
    """The machines that have joined."""
    import ray

    return [Node.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _here() -> list[NodeGroup]:
    """The machines that have joined, with their GPUs where they are of the wanted type."""
    gpu_type = accelerator_type()
    return [
        NodeGroup(
            node_type="joined", count=1, gpus=node.gpus if gpu_type in (None, node.gpu_type) else 0, cpus=node.cpus
        )
        for node in _nodes()
    ]


def _start_worker_group(gpus: int) -> None:
    """Have the autoscaler start machines with so many GPUs, and wait for them: stages count what is there.

    The request is a placement group, which ends with this process: nothing keeps machines running for a job that died.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    wait_s = float(os.environ.get("M2F_WORKER_GROUP_WAIT_S") or WORKER_GROUP_WAIT_S)
    say(f"asking for {gpus} GPUs; starting a machine takes some minutes")
    group = placement_group([{"GPU": 1, **resources_of_gpu_type(accelerator_type())}] * gpus, strategy="PACK")
    start = time.monotonic()
    while not ray.wait([group.ready()], timeout=60)[0]:
        waited = time.monotonic() - start
        if waited > wait_s:
            raise ValueError(
                f"the {gpus} GPUs were not there after {waited / 60:.0f} minutes: the cloud may have none left, or "
                f"your quota may be used up; `ray status` on the head says which, M2F_WORKER_GROUP_WAIT_S waits longer"
            )
        say(f"waiting for {gpus} GPUs since {waited / 60:.0f} minutes; there are {sum(m.gpus for m in _here())}")
    remove_placement_group(group)
