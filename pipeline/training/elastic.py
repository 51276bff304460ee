"""What follows when the workers of a training have ended before it has: a state, and what each end makes of it.

The decisions know neither Ray nor a clock: the driver (pipeline.training.worker_group) says what happened, and does
what is decided. Below them stands what asks Ray: for how many workers there is room, and for the rest of the worker
group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pipeline.compute.resources import Resources
from pipeline.params.schema import needs_synchronised_norm
from pipeline.runs.outcome import (
    worker_groups_of,
)
from pipeline.runs.run import say
from pipeline.storage.files import write_json

if TYPE_CHECKING:
    from pipeline.runs.run import Run


RESTARTS = 3
"""Times in a row that lost workers are replaced without the training getting any further."""

SAY_AGAIN_S = 600.0
"""How often a seed that waits for its whole worker group says so."""


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """The workers of a training as its driver sees them."""

    full: int
    """Workers of the whole worker group, with which a training starts."""
    workers: int
    """Workers that are started next, `full` or fewer."""
    saved: int
    """Steps of the newest checkpoint when a worker or the loop last failed."""
    lost: int = 0
    """Times in a row that workers were lost and the training got no further than `saved`."""
    bugs: int = 0
    """Times that the loop ended in an exception which is not the user's to mend."""
    spans: bool = False
    """Its whole worker group has been on several nodes, so what is left of them may go on."""
    fits: bool = True
    """Fewer workers than the worker group have the memory for it, as far as is known."""
    waits: bool = False
    """No place got free for the workers that were to be started last."""
    said_s: float = -math.inf
    """When it last said that it waits for its whole worker group."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How workers have ended before their training."""

    failure: Literal["no room", "yielded", "lost", "no memory", "final", "bug"]
    """As pipeline.training.failures.what_failed has it; no memory: a worker's GPU has not enough."""
    reason: str
    """One sentence."""
    saved: int
    """Steps of the newest checkpoint."""
    nodes: int
    """Nodes of the newest workers that came to their first step; 0 before any did."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the driver does before it starts `workers` again, in this order."""

    say: str | None = None
    fail: str | None = None
    """The training has failed, with this reason: nothing is started again."""
    count: bool = False
    """Count the places that the cluster has left: `counted` says what follows."""


def after(group: WorkerGroup, end: End) -> tuple[WorkerGroup, Decision]:
    """What an end makes of the group, and what is to be done."""
    if end.failure == "yielded":
        return yielded(group)
    if end.failure == "no room":
        return found_no_place(group)
    if end.failure == "no memory" and group.workers < group.full:
        return had_no_memory(group)
    if end.failure == "lost":
        return lost(group, end)
    if end.failure == "bug":
        return met_a_bug(group, end)
    return group, Decision(fail=end.reason)  # a retry would meet it again


def yielded(group: WorkerGroup) -> tuple[WorkerGroup, Decision]:
    """Fewer workers than the worker group have made place for it."""
    return replace(group, workers=group.full, waits=False), Decision()


def found_no_place(group: WorkerGroup) -> tuple[WorkerGroup, Decision]:
    """No failure: the next workers may be as many as there is room for by now, where fewer will do."""
    return replace(group, waits=True), Decision(count=group.spans)


def had_no_memory(group: WorkerGroup) -> tuple[WorkerGroup, Decision]:
    """Fewer workers, each with more groups, do not fit: only the whole worker group will do from now on."""
    say = f"{group.workers} workers have not the memory for it; it waits for its whole worker group"
    return replace(group, workers=group.full, spans=False, fits=False, waits=False), Decision(say=say)


def lost(group: WorkerGroup, end: End) -> tuple[WorkerGroup, Decision]:
    """A worker has died: RESTARTS times in a row they are replaced."""
    group = _checked_progress(group, end)
    group = replace(group, lost=group.lost + 1)
    if group.lost > RESTARTS:
        return group, Decision(fail=f"lost its workers {group.lost} times without getting further ({end.reason})")
    return _again(group, end, f"lost a worker ({group.lost} of {RESTARTS} times): {end.reason}")


def met_a_bug(group: WorkerGroup, end: End) -> tuple[WorkerGroup, Decision]:
    """The loop has ended in an exception: it may be the machine's, so it is tried once more."""
    group = _checked_progress(group, end)
    group = replace(group, bugs=group.bugs + 1)
    if group.bugs > 1:
        return group, Decision(fail=f"{end.reason}, and again when it was tried once more")
    return _again(group, end, f"failed, and is tried once more: {end.reason}")


def counted(group: WorkerGroup, places: int) -> tuple[WorkerGroup, Decision]:
    """The cluster has places for this many workers, up to a worker group: they go on, or it waits for the whole worker
    group."""
    workers = places or group.full
    group = replace(group, workers=workers)
    if workers == group.full:
        return group, Decision()
    say = f"goes on with {workers} of its {group.full} workers until the others' places are free again"
    return group, Decision(say=say)


def is_to_say_it_waits(group: WorkerGroup, now_s: float) -> bool:
    """Whether it waits for its whole worker group, and has not said so for a while."""
    return group.waits and group.workers == group.full and now_s - group.said_s > SAY_AGAIN_S


def _checked_progress(group: WorkerGroup, end: End) -> WorkerGroup:
    """Losses count in a row: none when the training has got further since the failure before."""
    return replace(group, saved=end.saved, lost=0) if end.saved > group.saved else group


def _again(group: WorkerGroup, end: End, say: str) -> tuple[WorkerGroup, Decision]:
    spans = group.fits and (group.spans or end.nodes > 1)
    return replace(group, spans=spans, waits=False), Decision(say=say, count=spans)


COUNT_S = 10.0
"""How long what a loss has left is counted at most: longer than a dead node may still be taken for alive (6 s, with the
health checks of cluster.yaml)."""


def places(resources: Resources) -> int:
    """Workers, up to a worker group, for which the cluster has room now.

    Each place is reserved for a moment, so what a dead node had or another row holds does not count.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    groups = [placement_group([resources.per_worker]) for _ in range(resources.workers)]
    try:
        ready, _ = ray.wait([group.ready() for group in groups], num_returns=len(groups), timeout=COUNT_S)
        return len(ready)
    finally:
        for group in groups:
            remove_placement_group(group)


@contextlib.contextmanager
def growing(run: Run, resources: Resources, workers: int) -> Iterator[None]:
    """While a run works on less than its worker group: reserve the rest once it is free, and ask the run to yield then.

    The reservation, which waits until the workers have their own places, is also what makes an autoscaler start
    machines. It is given back when the block ends, so that the whole worker group can be taken.
    """
    from pipeline.runs.run import YIELD

    ask, missing = run.run_dir / YIELD, resources.workers - workers
    if missing == 0:
        yield
        return
    from ray.util import placement_group, remove_placement_group

    before, over = worker_groups_of(run.run_dir), threading.Event()

    def watch() -> None:
        while worker_groups_of(run.run_dir) == before:
            if over.wait(0.5):
                return
        rest = placement_group([resources.per_worker] * missing, strategy="PACK")
        while not (over.wait(0.5) or rest.wait(1)):
            pass
        if not over.is_set():
            say(run, f"goes on with all {resources.workers} workers after its next checkpoint: there is room again")
            write_json(ask, {"workers": resources.workers})
            over.wait()
        remove_placement_group(rest)

    thread = threading.Thread(target=watch, daemon=True, name="the rest of the worker group")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        ask.unlink(missing_ok=True)


def sized(run: Run, resources: Resources, workers: int) -> Run:
    """The run for this many of its worker group's workers: each takes as many groups at once as in the whole worker
    group, for which its memory is known to suffice, and the others after them."""
    if workers == resources.workers or run.groups_at_once or needs_synchronised_norm(run.row):
        return run
    return dataclasses.replace(run, groups_at_once=math.ceil(run.row.train.groups / resources.workers))


def group_fits(resources: Resources) -> bool:
    """Whether the cluster as a whole has as much left as a worker group needs."""
    import ray

    free = ray.available_resources()
    return all(free.get(name, 0) >= resources.workers * amount for name, amount in resources.per_worker.items())


def say_it_waits(run: Run, resources: Resources) -> float:
    """Say that there is no worker group yet, what one is and what there is; the time."""
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    name = "GPU" if resources.use_gpu else "CPU"
    what = "GPUs" if resources.use_gpu else "cores"
    there = f"{int(free.get(name, 0))} of the cluster's {int(total.get(name, 0))} {what} are free"
    say(run, f"waits for a worker group of {resources}; {there}")
    return time.monotonic()
