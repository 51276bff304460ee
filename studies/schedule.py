"""When jobs run on pools of GPUs: simulated, since neither the longest job nor a job for two pools divides evenly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Something that occupies whole pools from its start to its end."""

    name: str
    duration_s: float
    pools: int = 1
    """Occupied at the same time."""
    ready_s: float = 0.0
    """Not before this time,"""
    after: tuple[int, ...] = ()
    """nor before these jobs have ended (their places in the list)."""
    first: bool = False
    """Goes before longer jobs that may start too."""
    saves_every_s: float | None = None
    """What is done since the last save is lost when a pool is taken away; None: the whole job begins again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preemptions:
    """Pools that are taken away now and then (spot instances)."""

    mean_s: float
    """Mean time between two of one pool; the times are drawn from an exponential distribution."""
    restart_s: float
    """From losing a pool until the training runs again on another."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A job's place in the schedule."""

    start_s: float
    end_s: float
    pools: tuple[int, ...]
    preempted: int = 0


def simulate(jobs: Sequence[Job], *, pools: int, preemptions: Preemptions | None = None) -> list[Placed]:
    """Every job's place, in the jobs' order.

    List scheduling: whenever pools are free, the longest job that may start and fits takes them. So a job for two
    pools lets shorter ones pass while only one is free, as jobs that wait for a Ray placement group do. ValueError for
    a job that can never start, or that is preempted more often than it saves.
    """
    for job in jobs:
        if job.pools > pools:
            raise ValueError(f"{job.name} needs {job.pools} pools at once, and there are {pools}")
    draws = random.Random(preemptions.seed if preemptions else 0)
    waiting = sorted(range(len(jobs)), key=lambda place: (not jobs[place].first, -jobs[place].duration_s, place))
    free = list(range(pools))
    placed: dict[int, Placed] = {}
    now_s = 0.0
    while waiting:
        ended = {place for place, at in placed.items() if at.end_s <= now_s}
        for place in list(waiting):
            job = jobs[place]
            if len(free) >= job.pools and job.ready_s <= now_s and ended.issuperset(job.after):
                takes_s, preempted = _with_preemptions(job, preemptions, draws)
                placed[place] = Placed(
                    start_s=now_s, end_s=now_s + takes_s, pools=tuple(free[: job.pools]), preempted=preempted
                )
                free = free[job.pools :]
                waiting.remove(place)
        if not waiting:
            break
        times = {at.end_s for at in placed.values()} | {jobs[place].ready_s for place in waiting}
        later_s = [time for time in times if time > now_s]
        if not later_s:
            raise ValueError(f"{jobs[waiting[0]].name} waits for a job that waits for it")
        now_s = min(later_s)
        free = sorted(set(range(pools)) - {pool for at in placed.values() if at.end_s > now_s for pool in at.pools})
    return [placed[place] for place in range(len(jobs))]


def _with_preemptions(job: Job, preemptions: Preemptions | None, draws: random.Random) -> tuple[float, int]:
    """How long a job takes, restarts and work done again included, and how often it is preempted."""
    if preemptions is None:
        return job.duration_s, 0
    mean_s = preemptions.mean_s / job.pools  # it loses all of its pools with any of them
    at_once_s = min(job.saves_every_s or job.duration_s, job.duration_s)
    if at_once_s > 5 * mean_s:
        raise ValueError(
            f"{job.name} saves every {at_once_s / 3600:.1f} h and would be preempted every {mean_s / 3600:.1f} h, so "
            "it would hardly get on; save more often (train.checkpoint_interval) or use pools that stay longer"
        )
    spent_s = done_s = 0.0
    count = 0
    while (runs_s := draws.expovariate(1 / mean_s)) < job.duration_s - done_s:
        done_s += runs_s
        done_s -= done_s % at_once_s
        spent_s += runs_s + preemptions.restart_s
        count += 1
    return spent_s + job.duration_s - done_s, count


def utilisation(placed: Sequence[Placed], *, pools: int) -> list[float]:
    """Share of the time from 0 to the last end that each pool is occupied."""
    end_s = max((at.end_s for at in placed), default=0.0)
    busy_s = [sum(at.end_s - at.start_s for at in placed if pool in at.pools) for pool in range(pools)]
    return [busy / end_s if end_s else 0.0 for busy in busy_s]
