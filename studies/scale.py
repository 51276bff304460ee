"""What bounds the system at 8, 64 and 512 GPUs: studies/scale.md shows and explains the tables.

Formulas and small simulations on figures that others publish or that were measured here (MEASURED). A training uses 8
or 16 GPUs, so more GPUs are more trainings side by side. Equal settings print equal tables, in half a minute.

python -m studies.scale [--chart studies/scale.svg]
python -m studies.scale --measure mlflow [--database sqlite:////tmp/x.db] [--seconds 20]
python -m studies.scale --measure checkpoint [--folder /tmp]
python -m studies.scale --measure head --samples samples.csv   # of studies.soak
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import http.client
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cost.plan import RAW_BYTES_PER_PIXEL, checkpoint_bytes
from pipeline.cost.speed import known_speed
from pipeline.data.images.sizes import PUBLISHED, area
from pipeline.params.load import load_params
from pipeline.params.schema import Params, Row
from pipeline.tracking.sender import SAMPLE_EVERY_S
from studies.schedule import Job, Preemptions, simulate
from studies.verdicts import table
from tests.helpers.mlflow_server import free_port
from tests.helpers.shared import PROJECT

SIZES = (8, 64, 512)
POOL_GPUS = 8
TABLES = {("cityscapes", "semantic"), ("ade20k", "semantic"), ("coco", "panoptic"), ("coco", "instance")}
"""Datasets and tasks of mmsegmentation's and mmdetection's tables."""
DATASETS = [name for name in PUBLISHED if any(name == dataset for dataset, _ in TABLES)]
EFFICIENCY = 0.9
"""Of 8 GPUs, as in pipeline.cost.plan."""
DAY_S, HOUR_S, GIB, GB = 86_400.0, 3600.0, 2**30, 1e9

# Published figures, sources in studies/scale.md

NVLINK = 300 * GB
"""Bytes a second that an A100 sends through NVLink: 600 GB/s count both directions."""
LINKS: Mapping[str, float] = {
    "400 Gbit/s": 50 * GB,
    "100 Gbit/s": 12.5 * GB,
    "25 Gbit/s": 3.125 * GB,
    "10 Gbit/s": 1.25 * GB,
}
"""Between two machines, bytes a second each way; 400: the four cards of a p4d.24xlarge."""
S3_HOST = 10 * 85e6
"""Bytes a second between a host and S3: s3fs has ten requests under way, of 85 to 90 MB/s each."""
STORAGE: Mapping[str, tuple[float, float]] = {
    "S3": (S3_HOST, math.inf),
    "FSx for Lustre, 4.8 TiB at 250 MB/s": (12.5 * GB, 1.2 * GB),
    "NFS on 10 Gbit/s": (1.25 * GB, 1.25 * GB),
}
"""Kind of storage root -> bytes a second that one host gets, and that all get together."""
RAY_LIMITS = {"machines": 250, "actors": 10_000, "placement groups": 1_000}
"""That Ray's own release tests go up to."""
HEAD_MIB, HEAD_CORES = 32 * 1024, 8
"""An m6i.2xlarge, the head of cluster.yaml."""
NODE_DAYS: Mapping[str, float] = {
    "Meta's research clusters, 8-GPU jobs": 47.7,
    "OPT-175B, 7.5 h on 992 A100": 7.5 / 24 * 992 / 8,
    "Llama 3, 419 in 54 days on 16,384 H100": 54 * 16_384 / 8 / 419,
}
"""Days that a machine of 8 GPUs trains until something interrupts it."""

# Measured here


@dataclass(frozen=True, slots=True)
class HeadLoad:
    """What some processes take on a cluster's head."""

    mib: float
    """Memory (PSS)."""
    cores: float
    """Cores kept busy in the mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """On an AMD EPYC with 2 cores, all but the head beside other work; studies/scale.md has the commands."""

    mlflow_metrics_s: Mapping[str, float]
    """Database -> values a second that one MLflow server stores, of eight senders of a point at a time."""
    checkpoint_bytes_s: float
    """Of writing a checkpoint to a local disk."""
    head_base: HeadLoad
    """Ray, the dashboard, MLflow and a job on a head."""
    head_row: HeadLoad
    """What a row takes there: dvc repro, stages.train, the queue of its log lines."""
    head_pool: HeadLoad
    """What a training takes there: the driver of its seed, Ray Train's controller and its helpers."""
    actors_per_pool: int
    """Besides its workers."""


MEASURED = Measured(
    mlflow_metrics_s={"sqlite": 724, "PostgreSQL": 781},
    checkpoint_bytes_s=166e6,
    head_base=HeadLoad(1463, 0.144),
    head_row=HeadLoad(677, 0.017),
    head_pool=HeadLoad(1507, 0.039),
    actors_per_pool=5,
)


# One training


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What one training of a row asks of what all share."""

    row: Row
    gpus: int
    step_s: float
    gradient_bytes: int
    checkpoint_bytes: int
    image_bytes: float
    """Of its record in a shard."""

    @property
    def pools(self) -> int:
        """Of 8 GPUs."""
        return math.ceil(self.gpus / POOL_GPUS)

    @property
    def images_s(self) -> float:
        """That it trains on."""
        return self.row.train.global_batch / self.step_s

    @property
    def read_bytes_s(self) -> float:
        """From shards, if whole records are read: an upper bound for raw ones, of which a crop's rows are read."""
        return self.images_s * self.image_bytes

    @property
    def interval_s(self) -> float:
        """From one checkpoint to the next."""
        return self.row.train.checkpoint_interval * self.step_s

    @property
    def metrics_s(self) -> float:
        """Values sent to MLflow: a point of the curve every `log_every` steps, the machine's load every 10 s."""
        return POINT / (self.row.train.log_every * self.step_s) + (8 + 5 * POOL_GPUS) / SAMPLE_EVERY_S


POINT = 33
"""Values of a curve's point: three losses of ten predictions, their sum, learning rate and norm of the gradient. A
sample of the load has 8 of the machine and 5 of each GPU."""


def dataset_bytes(params: Params, name: str) -> float:
    """Of a published dataset's training and validation shards."""
    config, images = params.dataset(name), PUBLISHED[name]
    if config.pixels == "raw":
        return RAW_BYTES_PER_PIXEL * (images.train + images.val) * area(images.usual)
    return float(sum(config.bytes))


def trainings(params: Params, names: Iterable[str] | None = None) -> list[Training]:
    """Of every row of mmsegmentation's and mmdetection's tables, on the recipe's GPUs, by the published speed of its
    network on an A100."""
    of_tables = (
        row for row in params.rows.values() if (row.dataset, row.task) in TABLES and row.figures == "published"
    )
    rows = [row for row in of_tables if row.model.pixel_decoder.name == "deformable"]
    sizes: dict[str, int] = {}  # by backbone: the number of classes moves it by 0.1 %
    found = []
    for row in rows:
        if names is not None and row.name not in names:
            continue
        speed = known_speed(row, Path("there are no results"))
        assert speed is not None, row.name
        if row.model.backbone.name not in sizes:
            sizes[row.model.backbone.name] = checkpoint_bytes(row.model)
        saved = sizes[row.model.backbone.name]
        images = PUBLISHED[row.dataset]
        found.append(
            Training(
                row=row,
                gpus=row.train.groups,
                step_s=row.train.group_size * speed.train_s / EFFICIENCY,
                gradient_bytes=saved // 3,  # weights and two moments, float32 as the gradient
                checkpoint_bytes=saved,
                image_bytes=dataset_bytes(params, row.dataset) / (images.train + images.val),
            )
        )
    return found


# Formulas and simulations


def all_reduce_s(size: float, *, workers: int, bytes_s: float) -> float:
    """Least time of a ring all-reduce of `size` bytes: each worker sends 2 (n - 1) / n of them."""
    return 2 * (workers - 1) / workers * size / bytes_s


def share_s(arrivals_s: Sequence[float], size: float, *, each: float, together: float) -> list[float]:
    """How long transfers of `size` bytes take that begin at given times and share a server.

    One gets `each` bytes a second at most, all get `together`, equally divided. Infinite rates are allowed.
    """
    waiting = sorted(range(len(arrivals_s)), key=lambda place: arrivals_s[place])
    left: dict[int, float] = {}
    ends = [0.0] * len(arrivals_s)
    now_s = 0.0
    while waiting or left:
        rate = min(each, together / len(left)) if left else math.inf
        end_s = now_s + min(left.values()) / rate if left else math.inf
        next_s = arrivals_s[waiting[0]] if waiting else math.inf
        then_s = min(end_s, next_s)
        if left:
            done = rate * (then_s - now_s)
            left = {place: rest - done for place, rest in left.items()}
        now_s = then_s
        if next_s <= end_s:
            left[waiting.pop(0)] = size
        for place in [place for place, rest in left.items() if rest <= 1e-6 * size]:
            ends[place] = now_s
            del left[place]
    return [end_s - start_s for start_s, end_s in zip(arrivals_s, ends, strict=True)]


def checkpoint_stall_s(training: Training, *, pools: int, each: float, together: float) -> float:
    """Mean time of writing a checkpoint while as many pools write theirs, each at a moment of its own."""
    draws = random.Random(0)
    rounds = 5
    arrivals = [(draws.random() + number) * training.interval_s for _ in range(pools) for number in range(rounds)]
    return statistics.fmean(share_s(arrivals, training.checkpoint_bytes, each=each, together=together))


def best_interval_s(stall_s: float, mean_s: float) -> float:
    """Time between checkpoints that loses least, to first order: sqrt(2 x time of one x mean time between faults)
    (Young, Communications of the ACM 17, 1974; Daly, FGCS 22, 2006, has the higher orders)."""
    return math.sqrt(2 * stall_s * mean_s)


def lost_share(interval_s: float, stall_s: float, mean_s: float, restart_s: float) -> float:
    """Share of the time that goes to checkpoints, to work done again and to restarts, to first order."""
    return stall_s / interval_s + interval_s / (2 * mean_s) + restart_s / mean_s


FAULTS = 2000
"""That a simulated training goes through."""


def simulated_loss(interval_s: float, stall_s: float, mean_s: float, restart_s: float) -> float:
    """The same by studies.schedule's simulation of a training that is interrupted some FAULTS times."""
    work_s = FAULTS * mean_s
    whole_s = work_s * (1 + stall_s / interval_s)
    job = Job(name="training", duration_s=whole_s, saves_every_s=interval_s + stall_s)
    (placed,) = simulate([job], pools=1, preemptions=Preemptions(mean_s=mean_s, restart_s=restart_s))
    return 1 - work_s / placed.end_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """A shared thing: how much of it a cluster of pools takes, and how much there is."""

    name: str
    unit: str
    base: float
    """Without any pool."""
    per_pool: float
    limit: float
    change: str
    """What to do at the limit."""

    def load(self, gpus: int) -> float:
        """What so many GPUs take, in the unit."""
        return self.base + self.per_pool * gpus / POOL_GPUS

    @property
    def binds_at(self) -> int:
        """GPUs in whole pools at which the limit is passed."""
        return POOL_GPUS * math.ceil(max(1.0, (self.limit - self.base) / self.per_pool))


def bounds(found: Sequence[Training], measured: Measured = MEASURED) -> list[Bound]:
    """All that pools share, by what the mean of the rows asks for."""

    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    rows = 5  # seeds of a row train side by side: one row's processes on the head for five pools
    reads = mean(each.read_bytes_s / each.pools for each in found) / GB
    writes = mean(each.checkpoint_bytes / each.interval_s / each.pools for each in found) / GB
    metrics = mean(each.metrics_s / each.pools for each in found)
    head, row, pool = measured.head_base, measured.head_row, measured.head_pool
    return [
        Bound(
            name="head: memory",
            unit="GiB",
            base=head.mib / 1024,
            per_pool=(pool.mib + row.mib / rows) / 1024,
            limit=HEAD_MIB / 1024,
            change="a larger head: m6i.8xlarge (128 GiB)",
        ),
        Bound(
            name="head: processor",
            unit="cores",
            base=head.cores,
            per_pool=pool.cores + row.cores / rows,
            limit=HEAD_CORES,
            change="a larger head: m6i.8xlarge (32 cores)",
        ),
        Bound(
            name="MLflow on sqlite",
            unit="values/s",
            base=0,
            per_pool=metrics,
            limit=measured.mlflow_metrics_s["sqlite"],
            change="MLFLOW_BACKEND_STORE_URI of a PostgreSQL; log_every up",
        ),
        Bound(
            name="MLflow on PostgreSQL",
            unit="values/s",
            base=0,
            per_pool=metrics,
            limit=measured.mlflow_metrics_s["PostgreSQL"],
            change="more server processes (--workers); log_every up",
        ),
        Bound(
            name="shard reads, NFS on 10 Gbit/s, no cache",
            unit="GB/s",
            base=0,
            per_pool=reads,
            limit=1.25,
            change="M2F_SHARD_CACHE on every machine's own disk: read once",
        ),
        Bound(
            name="checkpoints, NFS on 10 Gbit/s",
            unit="GB/s",
            base=0,
            per_pool=writes,
            limit=1.25,
            change="a parallel file system or s3://",
        ),
        Bound(
            name="Ray: machines",
            unit="machines",
            base=1,
            per_pool=1,
            limit=RAY_LIMITS["machines"],
            change="several clusters with one storage root",
        ),
        Bound(
            name="Ray: actors",
            unit="actors",
            base=0,
            per_pool=POOL_GPUS + measured.actors_per_pool,
            limit=RAY_LIMITS["actors"],
            change="several clusters with one storage root",
        ),
        Bound(
            name="Ray: placement groups",
            unit="groups",
            base=0,
            per_pool=2,
            limit=RAY_LIMITS["placement groups"],
            change="several clusters with one storage root",
        ),
    ]


# The tables


def show_bounds(found: Sequence[Training]) -> None:
    """What is shared, at three sizes."""
    lines = []
    for bound in bounds(found):
        loads = [f"{bound.load(gpus):,.3g} ({bound.load(gpus) / bound.limit:.0%})" for gpus in SIZES]
        at = f"{bound.binds_at:,}"
        limit = f"{bound.limit:,.0f}" if bound.limit > 10 else f"{bound.limit:g}"
        lines.append([bound.name, f"{limit} {bound.unit}", *loads, at, bound.change])
    table(
        "What pools share: load, and in brackets its part of the limit",
        ["", "limit", *(f"{gpus} GPUs" for gpus in SIZES), "passed at GPUs", "then"],
        lines,
    )


def show_gradients(found: Sequence[Training]) -> None:
    """The exchange of gradients, once in a step and not hidden behind other work."""
    lines = []
    for each in found:
        inside = all_reduce_s(each.gradient_bytes, workers=min(8, each.gpus), bytes_s=NVLINK)
        between = [all_reduce_s(each.gradient_bytes, workers=each.gpus, bytes_s=rate) for rate in LINKS.values()]
        lines.append(
            [
                each.row.name,
                str(each.gpus),
                f"{each.gradient_bytes / 1e6:.0f}",
                f"{1000 * each.step_s:.0f}",
                f"{1000 * inside:.1f} ({inside / each.step_s:.1%})" if each.pools == 1 else "",
                *(f"{1000 * time_s:.0f} ({time_s / each.step_s:.0%})" for time_s in between),
            ]
        )
    table(
        "Summing gradients in a step: least ms, and in brackets its part of the step without it",
        ["row", "GPUs", "MB", "step, ms", "one machine, NVLink", *(f"two, {name}" for name in LINKS)],
        lines,
    )


def show_reads(params: Params, found: Sequence[Training]) -> None:
    """Pictures, and what they take from the storage root without and with a copy on every machine."""
    lines = []
    for name in DATASETS:
        rows = [each for each in found if each.row.dataset == name]
        most = max(rows, key=lambda each: each.read_bytes_s / each.pools)
        lines.append(
            [
                f"{name} ({params.dataset(name).pixels})",
                f"{dataset_bytes(params, name) / GIB:.1f}",
                most.row.name,
                f"{most.images_s / most.gpus:.1f}",
                f"{most.image_bytes / 1e6:.2f}",
                *(f"{most.read_bytes_s / most.pools * gpus / POOL_GPUS / GB:.2f}" for gpus in SIZES),
            ]
        )
    table(
        "Shards read without a cache, GB/s in all, by the row of each dataset that reads most",
        ["dataset", "GiB", "row", "images/s of a GPU", "MB each", *(f"{gpus} GPUs" for gpus in SIZES)],
        lines,
    )

    lines = []
    for name in DATASETS:
        for store, (each_rate, together) in STORAGE.items():
            cells = []
            for gpus in SIZES:
                pools = gpus // POOL_GPUS
                at_once = max(share_s([0.0] * pools, dataset_bytes(params, name), each=each_rate, together=together))
                draws = random.Random(0)
                spread = [600 * draws.random() for _ in range(pools)]
                later = statistics.fmean(
                    share_s(spread, dataset_bytes(params, name), each=each_rate, together=together)
                )
                cells.append(f"{at_once / 60:.1f} / {later / 60:.1f}")
            lines.append([name, store, *cells])
    table(
        "Copying a dataset to every machine, min: when all begin at once / mean of those that begin within 10 min",
        ["dataset", "storage root", *(f"{gpus} GPUs" for gpus in SIZES)],
        lines,
    )


def show_checkpoints(found: Sequence[Training]) -> None:
    """What a checkpoint costs a training, which waits for it."""
    lines = []
    for each in found:
        cells = []
        for each_rate, together in (STORAGE["S3"], STORAGE["NFS on 10 Gbit/s"]):
            for pools in (1, 64):
                stall_s = checkpoint_stall_s(each, pools=pools, each=each_rate, together=together)
                cells.append(f"{stall_s:.1f} ({stall_s / (each.interval_s + stall_s):.1%})")
        lines.append(
            [
                each.row.name,
                f"{each.checkpoint_bytes / 1e6:,.0f}",
                f"{each.interval_s / 60:.1f}",
                *cells,
            ]
        )
    headings = [f"{store}, {pools} writing" for store in ("S3", "NFS") for pools in ("1 pool", "64 pools")]
    table(
        "Checkpoints: s that the training stands still for one, and in brackets its part of the time",
        ["row", "MB", "every, min", *headings],
        lines,
    )


RESTART_S = 600.0
"""From losing a machine to steps again, where the next one comes from the cloud: pipeline.cost.plan's default."""


def show_faults(found: Sequence[Training]) -> None:
    """Faults of the whole cluster, and what they cost one training."""
    lines = []
    for name, days in NODE_DAYS.items():
        counts = [gpus / POOL_GPUS / days for gpus in SIZES]
        lines.append([name, f"{days:.0f}", *(_rate(count) for count in counts)])
    table(
        "Interruptions of the whole cluster",
        ["by", "machine-days for one", *(f"{gpus} GPUs" for gpus in SIZES)],
        lines,
    )
    short = min(found, key=lambda each: each.interval_s)
    long = max(found, key=lambda each: each.interval_s)
    lines = []
    cases = {
        "A100 machines (47.7 days)": 47.7 * DAY_S,
        "spot, once in 12 h": 12 * HOUR_S,
        "spot, once in 2 h": 2 * HOUR_S,
    }
    for title, mean_s in cases.items():
        for each in (short, long):
            stall_s = each.checkpoint_bytes / S3_HOST
            best_s = best_interval_s(stall_s, mean_s / each.pools)
            facts = {"stall_s": stall_s, "mean_s": mean_s / each.pools, "restart_s": RESTART_S}
            lines.append(
                [
                    title,
                    each.row.name,
                    f"{stall_s:.1f}",
                    f"{each.interval_s / 60:.1f}",
                    f"{simulated_loss(each.interval_s, **facts):.2%}",
                    f"{lost_share(each.interval_s, **facts):.2%}",
                    f"{best_s / 60:.0f} ({best_s / each.step_s:,.0f} steps)",
                    f"{simulated_loss(best_s, **facts):.2%}",
                ]
            )
    headings = ["faults", "row", "checkpoint, s", "ours every, min", "lost, simulated", "lost, formula"]
    table(
        "What faults and checkpoints cost one training, whatever the number of others",
        [*headings, "best every, min", "lost then"],
        lines,
    )


def _rate(per_day: float) -> str:
    return f"one in {1 / per_day:.1f} days" if per_day < 1 else f"{per_day:.1f} a day"


def show_inputs(found: Sequence[Training]) -> None:
    """What a pool asks of the head and of MLflow."""
    metrics = [each.metrics_s / each.pools for each in found]
    lines = [
        ["MLflow: values a second of a pool, least to most", f"{min(metrics):.1f} to {max(metrics):.1f}"],
        *([f"MLflow on {name}: values a second", f"{rate:,.0f}"] for name, rate in MEASURED.mlflow_metrics_s.items()),
        ["writing a checkpoint to this machine's disk, MB/s", f"{MEASURED.checkpoint_bytes_s / 1e6:,.0f}"],
        *(
            [f"head, {what}: MiB, busy cores", f"{load.mib:,.0f}, {load.cores:.3f}"]
            for what, load in (
                ("without a row", MEASURED.head_base),
                ("for each row", MEASURED.head_row),
                ("for each training", MEASURED.head_pool),
            )
        ),
        ["Ray actors of a training besides its workers", str(MEASURED.actors_per_pool)],
    ]
    table("Measured on an AMD EPYC with 2 cores; MLflow and the disk beside other work", ["", ""], lines)


def chart(found: Sequence[Training], path: str) -> None:
    """Draw each load as a part of its limit, by the number of GPUs."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "scale", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9.5, 4.2))
    sizes = [8 * 2**power for power in range(10)]
    axis.axhspan(1, 100, color="#f3e3e0", linewidth=0)
    colours = ["#2f8f6b", "#b5483c", "#3c6fb0", "#7aa2d0", "#c08a2e", "#82bfa4", "#8d5fa8", "#555555", "#aaaaaa"]
    steepest = sorted(bounds(found), key=lambda bound: -bound.load(4096) / bound.limit)
    for number, (bound, colour) in enumerate(zip(steepest, colours, strict=True)):
        parts = [bound.load(gpus) / bound.limit for gpus in sizes]
        axis.plot(sizes, parts, color=colour, linestyle=["-", "--"][number % 2], label=bound.name)
    axis.set(xscale="log", yscale="log", ylim=(1e-3, 20), xlim=(8, 4096), xlabel="GPUs", ylabel="part of the limit")
    axis.set_xticks(sizes, [f"{gpus:,}" for gpus in sizes])
    axis.set_yticks([0.001, 0.01, 0.1, 1, 10], ["0.1 %", "1 %", "10 %", "100 %", "10 x"])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, facecolor="white", metadata={"Date": None} if path.endswith(".svg") else None)


# Measurements


def measure_mlflow(database: str, seconds: float) -> None:
    """Values a second that an MLflow server, started as on a cluster's head, stores for several senders."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="m2f-scale-") as folder:
        environment = {
            **os.environ,
            "MLFLOW_BACKEND_STORE_URI": database or f"sqlite:///{folder}/mlflow.db",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--artifacts-destination", f"{folder}/artifacts"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        with open(f"{folder}/log", "wb") as log:
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(port, server, Path(folder, "log"))
            lines = []
            for senders, points, every_s in ((1, 1, 0.0), (8, 1, 0.0), (8, 30, 0.0), (64, 1, SEND_TWICE_S)):
                values = POINT * points
                times, failed = _send(port, senders=senders, values=values, every_s=every_s, seconds=seconds)
                lines.append(
                    [
                        f"{senders}, {f'each every {every_s:g} s' if every_s else 'without a pause'}",
                        str(values),
                        f"{len(times) / seconds:.1f}",
                        f"{len(times) * values / seconds:,.0f}",
                        f"{1000 * statistics.median(times or [math.nan]):,.0f}",
                        f"{1000 * max(times, default=math.nan):,.0f}",
                        str(failed),
                    ]
                )
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    store = database.partition(":")[0] or "sqlite"
    table(
        f"One MLflow server, {store}, {seconds:g} s each, load {os.getloadavg()[0]:.1f}",
        ["senders", "values in a request", "requests/s", "values/s", "median, ms", "longest, ms", "refused"],
        lines,
    )


SEND_TWICE_S = SAMPLE_EVERY_S / 2
"""A training sends its load every 10 s, and a point of its curve about as often: a request every 5 s."""


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 600
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        if time.monotonic() > deadline or server.poll() is not None:
            raise ValueError(f"the MLflow server does not start: {log.read_text()[-500:]}")
        time.sleep(0.3)


def _send(port: int, *, senders: int, values: int, every_s: float, seconds: float) -> tuple[list[float], int]:
    """How long each answered request took, and how many were refused. Every sender has a run of its own; `every_s`: the
    time from one of its requests to the next, 0: at once."""
    took: list[list[float]] = [[] for _ in range(senders)]
    refused = [0] * senders

    def ask(connection: http.client.HTTPConnection, path: str, body: object) -> tuple[int, str]:
        connection.request("POST", f"/api/2.0/mlflow/{path}", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        if every_s:  # the server closes it after 5 s
            connection.close()
        return answer.status, text

    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=120) for _ in range(senders)]
    runs = []
    for connection in connections:
        status, text = ask(connection, "runs/create", {"experiment_id": "0"})
        if status != 200:
            raise ValueError(f"MLflow answers {status} when a run is opened: {text[:200]}")
        runs.append(json.loads(text)["run"]["info"]["run_id"])
    begun_s = time.monotonic()

    def work(place: int) -> None:
        step, due_s = 0, begun_s + every_s * place / senders
        while due_s < begun_s + seconds:
            time.sleep(max(0.0, due_s - time.monotonic()))
            metrics = [
                {"key": f"loss_{number % POINT}", "value": 0.5, "timestamp": 1, "step": step + number // POINT}
                for number in range(values)
            ]
            step += values // POINT
            sent_s = time.monotonic()
            status, _ = ask(connections[place], "runs/log-batch", {"run_id": runs[place], "metrics": metrics})
            if status != 200:
                refused[place] += 1
            elif time.monotonic() < begun_s + seconds:
                took[place].append(time.monotonic() - sent_s)
            due_s = max(time.monotonic(), due_s + every_s)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [each for of_one in took for each in of_one], sum(refused)


def measure_checkpoint(params: Params, folder: str) -> None:
    """How fast checkpoints are written here, as the training does it."""
    import torch

    from m2f.model import build_model
    from m2f.optim import build_optimizer
    from pipeline.runs.checkpoints import save_checkpoint

    lines = []
    for name in ("ade20k_r50", "ade20k_swin-l-in22k"):
        row = params.row(name)
        model = build_model(row.model)
        optimizer = build_optimizer(model, row.train.optimizer)
        for parameter in model.parameters():
            if parameter.requires_grad:
                shape = torch.zeros_like(parameter)
                optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": shape, "exp_avg_sq": shape.clone()}
        times = []
        with tempfile.TemporaryDirectory(prefix="m2f-scale-", dir=folder) as run_dir:
            for step in range(3):
                begun_s = time.monotonic()
                path = save_checkpoint(Path(run_dir), step=step, run_key="", model=model, optimizer=optimizer, state={})
                times.append(time.monotonic() - begun_s)
                size = path.stat().st_size
                path.unlink()
        middle_s = statistics.median(times)
        lines.append([name, f"{size / 1e6:,.0f}", f"{middle_s:.2f}", f"{size / middle_s / 1e6:,.0f}"])
    table(
        f"Writing a checkpoint to {folder}, median of 3, load {os.getloadavg()[0]:.1f}",
        ["row", "MB", "s", "MB/s"],
        lines,
    )


PARTS: Mapping[str, str] = {
    "stage of the row (stages.train)": "row",
    "dvc repro": "row",
    "queue of log lines": "row",
    "trial (driver of a seed)": "training",
    "train controller": "training",
    "other Ray actor": "training",
}
"""Role of studies.soak -> what needs it; what else runs on a head is there without a row ("base")."""


def head_loads(samples: Iterable[Mapping[str, str]]) -> dict[str, HeadLoad]:
    """What the head's processes take, by "base", "row" and "training", of studies.soak's samples with one training
    at a time: memory, for each role the median over the samples of all its processes together; processor time, that of
    all of them over the whole time. ValueError without two moments of the head."""
    mib: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    cpu_s: dict[tuple[str, str], list[float]] = defaultdict(list)
    for each in samples:
        if each["host"] == "head":
            mib[each["role"]][float(each["at_s"])] += float(each["pss_mib"])
            cpu_s[each["role"], each["pid"]].append(float(each["cpu_s"]))
    times = sorted({at_s for of_role in mib.values() for at_s in of_role})
    if len(times) < 2:
        raise ValueError("these samples show the head less than twice; a soak of a minute or more has enough")
    loads = {}
    for name in ("base", "row", "training"):
        roles = {role for role in mib if PARTS.get(role, "base") == name}
        loads[name] = HeadLoad(
            mib=sum(statistics.median(mib[role].get(at_s, 0.0) for at_s in times) for role in roles),
            cores=sum(of[-1] - of[0] for (role, _), of in cpu_s.items() if role in roles) / (times[-1] - times[0]),
        )
    return loads


def measure_head(path: str) -> None:
    """What the head took in a soak."""
    with open(path, newline="") as file:
        loads = head_loads(csv.DictReader(file))
    lines = [[name, f"{load.mib:,.0f}", f"{load.cores:.3f}"] for name, load in loads.items()]
    table(f"The head in {path}", ["", "MiB", "busy cores"], lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--chart", help="file to draw a chart into, .svg or .png; default: none is drawn")
    parser.add_argument(
        "--measure", choices=("mlflow", "checkpoint", "head"), help="measure this, instead of the tables"
    )
    parser.add_argument("--database", default="", help="of the MLflow server; default: a new sqlite")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement; default: %(default)s")
    parser.add_argument("--samples", default="samples.csv", help="of a soak; default: %(default)s")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="that checkpoints are written to")
    arguments = parser.parse_args()
    params = load_params(PROJECT / "params.yaml")
    if arguments.measure == "mlflow":
        measure_mlflow(arguments.database, arguments.seconds)
        return
    if arguments.measure == "checkpoint":
        measure_checkpoint(params, arguments.folder)
        return
    if arguments.measure == "head":
        try:
            measure_head(arguments.samples)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}; python -m studies.soak --samples {arguments.samples} writes them")
        return
    found = trainings(params)
    show_inputs(found)
    show_bounds(found)
    chosen = [each for each in found if each.row.name.startswith("ade20k_") or each.pools > 1]
    show_gradients(chosen)
    show_reads(params, found)
    show_checkpoints(chosen)
    show_faults(found)
    if arguments.chart:
        chart(found, arguments.chart)


if __name__ == "__main__":
    main()
