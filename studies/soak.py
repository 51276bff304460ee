"""A training under random faults for a given time, on hosts in network namespaces: studies/soak.md shows what came out.

Needs what `make test-cluster` needs: Linux, root, openssh-server, rsync and iproute2. The faults, their times and
targets follow from the seed. Every 15 s the memory, open files and processor time of all processes are sampled, and
slopes are fitted to the first two.

python -m studies.soak [--minutes 45] [--seed 1] [--steps 1000] [--out soak.json] [--samples samples.csv]
python -m studies.soak --show soak.json                     # the tables of an earlier one
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.storage.results.data import Manifest
from pipeline.storage.results.folder import RESULTS, read_result
from tests.cluster.conftest import Cluster
from tests.cluster.hosts import Hosts, why_not
from tests.helpers.mlflow_server import free_port
from tests.helpers.shared import PROJECT

ROW = "shapes_tiny"
WORKERS = ("worker1", "worker2")
"""Hosts that train, one worker each."""

EVERY_S = (60.0, 120.0)
"""From one fault to the next."""
SAMPLE_EVERY_S = 15.0
PATIENCE_S = 180.0
"""How long the last fault may take to be got over."""
FINISH_S = 900.0
"""How much longer the training may take than it was given, until a seed has finished that can be compared."""
LEAST_LIFE_S = 600.0
"""A process that lived shorter, and the first quarter of another's observed life, say nothing about growth."""
SIGNIFICANT = 3.0
"""A slope of more standard errors than this is growth."""

PAUSE_S = 10.0
"""A shorter pause is a validation, a checkpoint or a busy machine."""

LOG_EVERY, CHECKPOINT_EVERY, VALIDATE_EVERY = 2, 20, 200
"""Steps. A training's position is known from its curve, so to LOG_EVERY steps."""


# Faults


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to whom, and when."""

    at_s: float
    """From the first step of the training."""
    fault_type: str
    host: str
    lasts_s: float = 0.0
    """Of a cut link and a stopped process."""


@dataclass(frozen=True, slots=True)
class FaultType:
    """How a fault of one type is made, and how often."""

    weight: int
    """How often it is drawn, compared with the others."""
    lasts_s: tuple[float, float] = (0.0, 0.0)
    """Least and greatest duration."""
    hosts: tuple[str, ...] = WORKERS
    process: str = ""
    """Name of the process that gets `sends`; empty: the host's link is cut."""
    sends: int = signal.SIGKILL


FAULT_TYPES: Mapping[str, FaultType] = {
    "worker killed": FaultType(3, process="RayTrainWorker"),
    "raylet killed": FaultType(2, process="raylet"),
    "link cut": FaultType(4, lasts_s=(2.0, 20.0)),
    "MLflow killed": FaultType(2, hosts=("head",), process="mlflow"),
    "worker stopped": FaultType(2, lasts_s=(2.0, 8.0), process="RayTrainWorker", sends=signal.SIGSTOP),
}


def schedule(seed: int, minutes: float) -> list[Fault]:
    """The faults of a seed, oldest first. A longer time adds some and changes none."""
    draws = random.Random(seed)
    faults: list[Fault] = []
    at_s = draws.uniform(*EVERY_S)
    while at_s < minutes * 60:
        name = draws.choices(list(FAULT_TYPES), [fault_type.weight for fault_type in FAULT_TYPES.values()])[0]
        fault_type = FAULT_TYPES[name]
        host, lasts_s = draws.choice(fault_type.hosts), draws.uniform(*fault_type.lasts_s)
        faults.append(Fault(round(at_s, 1), name, host, round(lasts_s, 1)))
        at_s += draws.uniform(*EVERY_S)
    return faults


def inject(lab: Hosts, fault: Fault) -> int:
    """Do it, and where it lasts undo it; how many processes were hit (1: the link)."""
    fault_type = FAULT_TYPES[fault.fault_type]
    if not fault_type.process:
        lab.cut(fault.host)
        time.sleep(fault.lasts_s)
        lab.heal(fault.host)
        return 1
    hit = lab.pids(fault.host, fault_type.process)
    if fault_type.process == "raylet":  # the agents beside it bear its name among their arguments
        hit = [pid for pid in hit if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet"]
    for pid in hit:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, fault_type.sends)
    if fault_type.sends == signal.SIGSTOP:
        time.sleep(fault.lasts_s)
        for pid in hit:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    return len(hit)


# What a training does meanwhile


@dataclass(frozen=True, slots=True)
class Seen:
    """A look at a run's curve that found more than the one before, or less."""

    at_s: float
    run: str
    step: int
    """The last one in the curve."""
    kept: int | None = None
    """Where the training had gone back: the last step that it kept. What came after is done twice."""


class Watch:
    """Looks at the curves of all runs and at the job's log twice a second, from a thread of its own."""

    def __init__(self, runs: Path, log: Path, begun_s: float) -> None:
        self.runs, self.log, self.begun_s = runs, log, begun_s
        self.seen: list[Seen] = []
        self.said: list[tuple[float, str]] = []
        """Lines of the log, with the time at which they came."""
        self._last: dict[str, int] = {}
        self._read = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def now_s(self) -> float:
        return time.monotonic() - self.begun_s

    def _work(self) -> None:
        while not self._end.wait(0.5):
            for path in sorted(self.runs.glob("*/curve.jsonl")):
                with contextlib.suppress(OSError):
                    self.look(path.parent.name, path.read_text().splitlines())
            with contextlib.suppress(OSError), self.log.open(errors="replace") as file:
                file.seek(self._read)
                whole, _, _ = file.read().rpartition("\n")
                self._read += len(whole.encode()) + bool(whole)
                self.said += [(self.now_s(), line.rstrip()) for line in whole.splitlines()]

    def look(self, run: str, lines: Sequence[str]) -> None:
        """Compare a curve with how it was."""
        steps = [int(match[1]) for line in lines if (match := re.match(r'{"step": (\d+),.*}$', line))]
        before, now = self._last.get(run, 0), steps[-1] if steps else 0
        if now < before:
            self.seen.append(Seen(self.now_s(), run, before, kept=now))
        if now > before or now < before:
            self._last[run] = now
        if now > before:
            self.seen.append(Seen(self.now_s(), run, now))


_NOTICED = re.compile(
    r"lost a worker|fewer workers|waits for a worker group|kept on disk|is tried once more|going on from step"
)
"""What a job says when something has happened."""


def consequences(
    fault: Fault, at_s: float, until_s: float, seen: Sequence[Seen], said: Sequence[tuple[float, str]]
) -> dict[str, Any]:
    """What a fault at `at_s` did to the training until `until_s`, the next one.

    noticed_s, noticed: the first line of the log that says so (None: none does). pause_s: the longest time without a
    new point of the curve. again_s: from the fault to the end of that pause, where it was longer than PAUSE_S. twice:
    steps that were done again. seed_change: whether a seed ended meanwhile, which is a pause of its own.
    """
    points = [look for look in seen if look.kept is None]
    before = [look for look in points if look.at_s <= at_s]
    after = [look for look in points if at_s < look.at_s <= until_s]
    times = [before[-1].at_s if before else at_s, *(look.at_s for look in after)]
    gaps = [(end - start, end - at_s) for start, end in itertools.pairwise(times)]
    pause_s, again_s = max(gaps, default=(0.0, 0.0))
    line = next((each for each in said if at_s < each[0] <= until_s and _NOTICED.search(each[1])), None)
    runs = {look.run for look in (*before[-1:], *after)}
    return {
        "noticed_s": line and round(line[0] - at_s, 1),
        "noticed": line and line[1],
        "pause_s": round(pause_s, 1) if gaps else None,
        "again_s": round(again_s, 1) if pause_s > PAUSE_S else None,
        "twice": sum(look.step - look.kept for look in seen if look.kept is not None and at_s < look.at_s <= until_s),
        "seed_change": len(runs) > 1,
        "survived": bool(after),
    }


# Memory and open files


ROLES: Mapping[str, str] = {
    "gcs_server": "gcs_server",
    "raylet/raylet": "raylet",
    "RayTrainWorker": "training worker",
    "TrainController": "train controller",
    "ImplicitFunc": "trial (driver of a seed)",
    "_QueueActor": "queue of log lines",
    "JobSupervisor": "job supervisor",
    "_AutoscalingCoordinator": "autoscaling coordinator",
    "RuntimeEnvAgent": "runtime environment agent",
    "DashboardAgent": "dashboard agent",
    "ray::IDLE": "idle Ray worker",
    "ray::": "other Ray actor",
    "dashboard": "dashboard",
    "log_monitor": "log monitor",
    "autoscaler": "autoscaler",
    "ray.util.client": "Ray client server",
    "mlflow": "MLflow server",
    "stages.train": "stage of the row (stages.train)",
    "-m dvc": "dvc repro",
    "submit.py": "job driver (pipeline/submit.py)",
}
"""What a command line holds, and the role of its process; the first that fits."""


_NOT_OURS = {"sshd", "sshd:", "bash", "sh", "flock", "setsid", "sleep", "unshare"}
"""Programs of a host and its shells."""


def role(command: str) -> str | None:
    """The role of a process; None: it is none of ours."""
    program = command.partition(" ")[0]
    if not command or program.rpartition("/")[2] in _NOT_OURS:
        return None
    return next((name for needle, name in ROLES.items() if needle in command), f"other: {program.rpartition('/')[2]}")


@dataclass(frozen=True, slots=True)
class Sample:
    """A process at one moment."""

    at_s: float
    host: str
    role: str
    pid: int
    pss_mib: float
    """Its memory; of what it shares with others, its part."""
    own_mib: float
    """Its own (anonymous) memory, which no other process's start or end moves."""
    files: int
    """Open ones."""
    cpu_s: float
    """Processor time since its start, of user and system."""


def sample(lab: Hosts, hosts: Iterable[str], at_s: float) -> Iterator[Sample]:
    """Every process of ours on the hosts."""
    for host in hosts:
        for pid in lab.pids(host, ""):
            with contextlib.suppress(OSError, ValueError):
                name = role(
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                )
                if name is not None:
                    yield sample_of(pid, host, name, at_s)


def sample_of(pid: int, host: str, name: str, at_s: float) -> Sample:
    """One process; OSError or ValueError when it has ended."""
    proc = Path(f"/proc/{pid}")
    memory = dict(re.findall(r"^(\w+): +(\d+) kB", proc.joinpath("smaps_rollup").read_text(), re.MULTILINE))
    if not memory:
        raise ValueError(f"process {pid} has no memory any more")
    pss_mib, own_mib = (int(memory[key]) / 1024 for key in ("Pss", "Anonymous"))
    after_name = proc.joinpath("stat").read_text().rpartition(")")[2].split()
    cpu_s = sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")
    files = len(list(proc.joinpath("fd").iterdir()))
    return Sample(at_s, host, name, pid, pss_mib, own_mib, files, cpu_s)


@dataclass(frozen=True, slots=True)
class Slope:
    """How fast something grows, in its unit per hour."""

    per_hour: float
    error: float
    """Standard error of `per_hour`."""
    processes: int
    samples: int

    @property
    def grows(self) -> bool:
        """Whether it is more than noise."""
        return self.per_hour > SIGNIFICANT * self.error


def slope(series: Iterable[Sequence[tuple[float, float]]]) -> Slope | None:
    """The common slope of several processes of one role by least squares; None: too few samples.

    `series`: for each process (seconds, value), oldest first. Each has a level of its own, so that a restarted one that
    needs less says nothing about growth. LEAST_LIFE_S counts. Successive samples resemble each other, so the
    standard error is widened by sqrt((1 + r) / (1 - r)) where r is the correlation of a residual with
    the one before it.
    """
    kept = []
    for points in series:
        if not points:
            continue
        first, last = points[0][0], points[-1][0]
        if last - first >= LEAST_LIFE_S:
            settled = [(at, value) for at, value in points if at - first >= (last - first) / 4]
            mean_t, mean_v = (statistics.fmean(column) for column in zip(*settled, strict=True))
            kept.append([((at - mean_t) / 3600, value - mean_v) for at, value in settled])
    count = sum(map(len, kept))
    freedom = count - len(kept) - 1
    spread = sum(t * t for points in kept for t, _ in points)
    if freedom < 2 or spread == 0:
        return None
    per_hour = sum(t * v for points in kept for t, v in points) / spread
    rests = [[v - per_hour * t for t, v in points] for points in kept]
    square = sum(rest * rest for rests_of_one in rests for rest in rests_of_one)
    error = math.sqrt(square / freedom / spread)
    if square > 0:
        pairs = sum(a * b for each in rests for a, b in itertools.pairwise(each))
        r = min(0.95, max(0.0, pairs / square))
        error *= math.sqrt((1 + r) / (1 - r))
    return Slope(per_hour, error, len(kept), count)


def growth(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """By role: number of processes, most memory (PSS) and files of one, the slopes of their own memory and files, and
    how many cores all of them together kept busy, in the mean between the first and the last sample of one."""
    lines = []
    for name in dict.fromkeys(each.role for each in sorted(samples, key=lambda each: each.role)):
        by_process: dict[tuple[str, int], list[Sample]] = {}
        for each in samples:
            if each.role == name:
                by_process.setdefault((each.host, each.pid), []).append(each)
        processes = list(by_process.values())
        memory = slope([(each.at_s, each.own_mib) for each in process] for process in processes)
        files = slope([(each.at_s, float(each.files)) for each in process] for process in processes)
        times = [each.at_s for process in processes for each in process]
        observed_s = max(times) - min(times)
        cpu_s = sum(process[-1].cpu_s - process[0].cpu_s for process in processes)
        lines.append(
            {
                "role": name,
                "processes": len(processes),
                "longest_min": max((process[-1].at_s - process[0].at_s) / 60 for process in processes),
                "most_mib": max(each.pss_mib for process in processes for each in process),
                "most_files": max(each.files for process in processes for each in process),
                "cores": cpu_s / observed_s if observed_s else 0.0,
                "mib": memory and asdict(memory) | {"grows": memory.grows},
                "files": files and asdict(files) | {"grows": files.grows},
            }
        )
    return lines


# The whole


@dataclass
class Soak:
    """The lab, the cluster and the job."""

    minutes: float
    seed: int
    steps: int
    lab: Hosts
    record: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    begun_s: float = field(default_factory=time.monotonic)

    @property
    def runs(self) -> Path:
        """The run folders, while there are hosts."""
        return self.lab.shared / "storage/runs"

    @property
    def kept(self) -> Path:
        """A copy of the storage root: what the hosts share is gone with them."""
        return self.lab.folder / "kept"

    def go(self) -> None:
        """Cluster up, training, faults, end; the record of it."""
        cluster = Cluster(self.lab)
        params = cluster.project / "params.yaml"
        config = yaml.safe_load(params.read_text())
        row = config["rows"][ROW]
        row["train"] |= {"steps": self.steps, "val_interval": VALIDATE_EVERY, "log_every": LOG_EVERY}
        row["train"] |= {"checkpoint_interval": CHECKPOINT_EVERY}
        row["seeds"] = list(range(math.ceil(self.minutes * 60 / (self.steps * 0.02))))  # more than can be trained
        params.write_text(yaml.safe_dump(config))
        cluster.laptop("python -m pipeline.submit up cluster.yaml", timeout_s=600)
        log = self.lab.folder / "soak.log"
        command = f"python -m pipeline.submit run cluster.yaml repro train@{ROW} M2F_WORKERS=2"
        job = self.lab.start("laptop", f"cd ~/project && {command}", log)
        try:
            with Watch(self.runs, log, self.begun_s) as watch:
                self._wait(lambda: bool(watch.seen), 600, job, "the first step", log)
                say("the training has begun")
                self._disturb(watch, job)
                self.record["job_ended_by_itself"] = job.poll() is not None
                in_mlflow = self._steps_in_mlflow()
                cluster.laptop("python -m pipeline.submit run cluster.yaml stop", timeout_s=300, check=False)
            job.wait(timeout=300)
            shutil.copytree(self.lab.home("head") / "m2f" / RESULTS, self.lab.folder / RESULTS, dirs_exist_ok=True)
            shutil.copy(params, self.lab.folder / "params.yaml")
            say("ray down")
            cluster.laptop("python -m pipeline.submit down cluster.yaml", timeout_s=300)
            time.sleep(3)
            self.record["left"] = self._left()
            shutil.copytree(self.lab.shared / "storage", self.kept)
            self.record["seeds"] = [
                about(folder, in_mlflow.get(folder.name, []), self.steps) for folder in sorted(self.runs.iterdir())
            ]
        finally:
            if job.poll() is None:
                job.kill()
            self.record["log_tail"] = log.read_text(errors="replace").splitlines()[-40:]
            self.record["memory"] = growth(self.samples)

    def _disturb(self, watch: Watch, job: subprocess.Popen[bytes]) -> None:
        """Faults at their times, samples in between; then until the last fault is got over and a seed has finished."""
        start_s = watch.now_s()
        sampler = threading.Thread(target=self._sample, args=(watch, end := threading.Event()), daemon=True)
        sampler.start()
        faults = schedule(self.seed, self.minutes)
        entries: list[dict[str, Any]] = []
        for fault in faults:
            while watch.now_s() - start_s < fault.at_s and job.poll() is None:
                time.sleep(0.2)
            if job.poll() is not None:
                break
            at_s = watch.now_s()
            say(
                f"{at_s - start_s:6.0f} s: {fault.fault_type} on {fault.host}"
                + f", {fault.lasts_s} s" * bool(fault.lasts_s)
            )
            entries.append({**asdict(fault), "done_at_s": at_s, "hit": inject(self.lab, fault)})
        deadline_s = max(start_s + self.minutes * 60, watch.now_s() + 1)
        while watch.now_s() < deadline_s and job.poll() is None:
            time.sleep(0.2)
        last_s = entries[-1]["done_at_s"] + entries[-1]["lasts_s"] if entries else 0.0
        while watch.now_s() < last_s + PATIENCE_S and job.poll() is None:
            if any(look.at_s > last_s + 30 and look.kept is None for look in watch.seen):
                break
            time.sleep(0.2)
        while watch.now_s() < deadline_s + FINISH_S and job.poll() is None:
            if any(self.runs.glob("*/finished.json")):
                break
            time.sleep(1)
        end.set()
        sampler.join()
        until = [entry["done_at_s"] for entry in entries[1:]] + [math.inf]
        for fault, entry, until_s in zip(faults, entries, until, strict=False):
            entry |= consequences(fault, entry["done_at_s"], until_s, watch.seen, watch.said)
            entry["done_at_s"] = round(entry["done_at_s"] - start_s, 1)
        self.record["faults"] = entries
        self.record["trained_min"] = round((watch.now_s() - start_s) / 60, 1)
        self.record["steps_done_twice"] = sum(look.step - look.kept for look in watch.seen if look.kept is not None)

    def _sample(self, watch: Watch, end: threading.Event) -> None:
        while not end.wait(SAMPLE_EVERY_S):
            self.samples += sample(self.lab, ("head", *WORKERS), watch.now_s())

    def _steps_in_mlflow(self) -> dict[str, list[int]]:
        """By run key, the steps of the loss that MLflow has, in the order it has them."""
        ask = (
            "from mlflow import MlflowClient; c = MlflowClient('http://10.77.0.10:5000'); import json;"
            "e = [x.experiment_id for x in c.search_experiments()];"
            "h = lambda r: [m.step for m in c.get_metric_history(r.info.run_id, 'train/loss')];"
            "print(json.dumps({r.data.tags['m2f.run_key']: h(r) for r in c.search_runs(e)"
            " if 'm2f.run_key' in r.data.tags}))"
        )
        answer = self.lab.on("worker1", f'python -c "{ask}"', timeout_s=300)
        found: dict[str, list[int]] = json.loads(answer.stdout.splitlines()[-1])
        return found

    def _left(self) -> list[str]:
        """Processes of ours that `ray down` has left, but for the tracking server, which is to stay."""
        found = sample(self.lab, ("head", *WORKERS), 0.0)
        return [f"{each.role} on {each.host}" for each in found if each.role != "MLflow server"]

    def check(self) -> None:
        """Put finished runs beside undisturbed trainings of their seeds. Needs the lab's folder, not its hosts."""
        for entry in self.record["seeds"]:
            if entry["finished"]:
                say(f"seed {entry['seed']} again, undisturbed")
                entry |= beside(self.kept / "runs" / entry["run"], self._undisturbed(entry), self.steps)
        self.record["memory"] = growth(self.samples)

    def _undisturbed(self, entry: Mapping[str, Any]) -> Path:
        """The run folder of two processes that train a run's seed without Ray."""
        again = self.lab.folder / "again" / entry["run"]
        params = str(self.lab.folder / "params.yaml")
        job = {"params": params, "seed": entry["seed"], "run_key": entry["run"], "run_dir": again}
        (self.lab.folder / "job.pickle").write_bytes(
            pickle.dumps(job | {"manifest": read_result(Manifest, "shapes", results=self.lab.folder / RESULTS)})
        )
        environment = {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "M2F_STORAGE": str(self.kept),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": "2",
        }
        command = [sys.executable, "-c", _ALONE, str(self.lab.folder / "job.pickle")]
        with open(self.lab.folder / "again.log", "wb") as log:
            processes = [
                subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=log, stderr=log)
                for rank in range(2)
            ]
            try:
                failed = self._wait_for_both(processes)
            finally:
                for process in processes:
                    process.kill()
        if any(failed):
            raise RuntimeError((self.lab.folder / "again.log").read_text()[-2000:])
        return again

    def _wait_for_both(self, processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
        """Exit statuses of two that train alone; meanwhile they are sampled as well."""
        while all(process.poll() is None for process in processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                processes[0].wait(SAMPLE_EVERY_S)
            for process in processes:
                with contextlib.suppress(OSError, ValueError):
                    self.samples.append(sample_of(process.pid, "", "training without Ray", self._now_s()))
        return [process.wait(timeout=60) for process in processes]

    def _now_s(self) -> float:
        return time.monotonic() - self.begun_s

    def _wait(self, condition: Any, timeout_s: float, job: subprocess.Popen[bytes], what: str, log: Path) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline or job.poll() is not None:
                raise RuntimeError(f"waited for {what} in vain: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.3)


def about(folder: Path, in_mlflow: Sequence[int], steps: int) -> dict[str, Any]:
    """A run: whether it finished, its pools, and what MLflow lacks of it or has twice.

    `in_mlflow`: steps of its loss that MLflow has. `steps`: of a whole training.
    """
    finished, pools = folder / "finished.json", folder / "worker_groups.json"
    entry: dict[str, Any] = {
        "run": folder.name,
        "finished": finished.exists(),
        "pools": [
            (pool["from_step"], pool["workers"]) for pool in (json.loads(pools.read_text()) if pools.exists() else ())
        ],
        "mlflow_doubled": len(in_mlflow) - len(set(in_mlflow)),
    }
    if finished.exists():
        entry["seed"] = json.loads(finished.read_text())["seed"]
        entry["mlflow_lost"] = len(set(range(LOG_EVERY, steps + 1, LOG_EVERY)) - set(in_mlflow))
    return entry


def beside(disturbed: Path, undisturbed: Path, steps: int) -> dict[str, Any]:
    """Two finished runs of a seed.

    `equal`: weights and optimiser are, bit for bit. `same_to`: the step to which all losses are. `apart`: by what part
    of it the next loss differs; None: there is none. `pq`: of both at the end.
    """
    name = f"checkpoints/step-{steps:08d}.safetensors"
    ours, theirs = losses(disturbed), losses(undisturbed)
    same_to, apart = 0, None
    for step, loss in theirs.items():
        if ours.get(step) != loss:
            apart = abs(ours.get(step, math.nan) / loss - 1)
            break
        same_to = step
    return {
        "equal": equal(disturbed / name, undisturbed / name),
        "same_to": same_to,
        "apart": apart,
        "pq": [json.loads((run / "finished.json").read_text())["metrics"]["pq"] for run in (disturbed, undisturbed)],
    }


def losses(folder: Path) -> dict[int, float]:
    """A run's loss by step, oldest first."""
    points = (json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines())
    return {point["step"]: point["loss"] for point in points if "loss" in point}


def equal(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit; their headers say how long a training took."""
    from safetensors.torch import load_file, save

    return save(load_file(one)) == save(load_file(other))


_ALONE = """
import pickle, sys
from pathlib import Path
import torch
import torch.distributed as dist
from pipeline.params.load import load_params
from pipeline.training.loop import Run, train
job = pickle.loads(Path(sys.argv[1]).read_bytes())
torch.set_num_threads(1)
dist.init_process_group("gloo")
row = load_params(job.pop("params")).row("shapes_tiny")
train(Run(row=row, **job))
dist.destroy_process_group()
"""
"""One rank of a training without Ray."""


def say(line: str) -> None:
    """On stderr."""
    print(line, file=sys.stderr, flush=True)


def tables(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    text: list[str] = []

    def table(title: str, headings: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
        text.append(f"\n{title}\n\n| {' | '.join(headings)} |\n|{' --- |' * len(headings)}")
        text.extend(f"| {' | '.join('-' if cell is None else str(cell) for cell in line)} |" for line in lines)

    faults = record["faults"]
    table(
        f"{len(faults)} faults in {record['trained_min']} min of training (seed {record['seed']})",
        [
            "at, s",
            "fault",
            "lasted, s",
            "noticed after, s",
            "longest pause, s",
            "training again after, s",
            "steps done twice",
            "survived",
        ],
        (
            [
                f"{entry['done_at_s']:.0f}",
                f"{entry['fault_type']}, {entry['host']}" + (" (none there)" if not entry["hit"] else ""),
                entry["lasts_s"] or None,
                entry["noticed_s"],
                entry["pause_s"],
                f"{entry['again_s']}{' (a seed ended)' if entry['seed_change'] else ''}" if entry["again_s"] else None,
                entry["twice"],
                "yes" if entry["survived"] else "no",
            ]
            for entry in faults
        ),
    )

    def faults_of(name: str) -> list[object]:
        mine = [entry for entry in faults if entry["fault_type"] == name]
        again = sorted(entry["again_s"] for entry in mine if entry["again_s"] is not None and not entry["seed_change"])
        survived = sum(entry["survived"] for entry in mine)
        middle = f"{statistics.median(again):.1f} ({again[0]} to {again[-1]})" if again else None
        return [name, len(mine), survived, len(again), middle, max((entry["twice"] for entry in mine), default=None)]

    table(
        "By kind",
        [
            "fault",
            "times",
            "survived",
            "paused",
            "then training again after, s: median (range)",
            "most steps done twice",
        ],
        (faults_of(name) for name in FAULT_TYPES if any(entry["fault_type"] == name for entry in faults)),
    )

    def rate(fit: Mapping[str, Any] | None) -> str:
        if fit is None:
            return "too short"
        return f"{fit['per_hour']:+.1f} ± {fit['error']:.1f}" + (" **grows**" if fit["grows"] else "")

    table(
        "Memory (PSS), files and busy cores by kind of process; slopes of own memory and of files, with standard error",
        [
            "process",
            "how many",
            "longest life, min",
            "most MiB",
            "MiB per hour",
            "most files",
            "files per hour",
            "cores",
        ],
        (
            [
                line["role"],
                line["processes"],
                f"{line['longest_min']:.0f}",
                f"{line['most_mib']:.0f}",
                rate(line["mib"]),
                line["most_files"],
                rate(line["files"]),
                f"{line['cores']:.3f}",
            ]
            for line in record["memory"]
        ),
    )

    def compared(line: Mapping[str, Any]) -> str | None:
        if not line["finished"]:
            return None
        if line["equal"]:
            return "bit for bit"
        apart = "" if line["apart"] is None else f", the next {line['apart']:.0e} apart"
        return f"no: losses equal to step {line['same_to']}{apart}"

    seeds = sorted(record["seeds"], key=lambda line: line.get("seed", math.inf))
    table(
        "Seeds",
        [
            "seed",
            "workers",
            "equals an undisturbed training",
            "PQ, undisturbed",
            "steps MLflow lacks",
            "steps MLflow has twice",
        ],
        (
            [
                line["seed"] if line["finished"] else "(not finished)",
                in_turn(line["pools"]),
                compared(line),
                ", ".join(f"{100 * value:.2f}" for value in line["pq"]) if line["finished"] else None,
                line.get("mlflow_lost"),
                line["mlflow_doubled"],
            ]
            for line in seeds
        ),
    )
    left = ", ".join(record["left"]) or "nothing"
    text.append(f"\nSteps done twice: {record['steps_done_twice']}. After `down` there was still: {left}.")
    return "\n".join(text)


def in_turn(pools: Sequence[tuple[int, int]]) -> str | None:
    """How many workers there were: 2, 1 from step 120, 2 from step 140; None before the first."""
    before, text = None, []
    for step, workers in pools:
        if workers != before:
            text.append(f"{workers} from step {step}" if text else str(workers))
        before = workers
    return ", ".join(text) or None


def machine() -> str:
    """Processor, cores and memory."""
    words = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = words[1] if words else platform.processor()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB, load {os.getloadavg()[0]:.1f} at the start"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=45, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the faults; default: %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="of one training; default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file for the record; default: only the tables, on stdout")
    parser.add_argument("--samples", type=Path, help="CSV file for every sample of memory and files")
    parser.add_argument("--show", type=Path, help="print the tables of this record; nothing is run")
    arguments = parser.parse_args()
    if arguments.show:
        try:
            record = json.loads(arguments.show.read_text())
        except (OSError, ValueError) as error:
            sys.exit(f"error: {arguments.show} is no record of a soak ({error}); --out writes one")
        print(tables(record))
        return
    if reason := why_not():
        sys.exit(f"error: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was recorded is written
    facts = {"machine": machine(), "minutes": arguments.minutes, "seed": arguments.seed, "steps": arguments.steps}
    folder = Path("/tmp/m2f-soak")  # not that of the tests, which may run while seeds are compared
    soak = Soak(arguments.minutes, arguments.seed, arguments.steps, Hosts(folder), record=facts)

    def write() -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(soak.record, indent=1) + "\n")
        if arguments.samples:
            with arguments.samples.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(Sample.__slots__)
                writer.writerows([getattr(each, name) for name in Sample.__slots__] for each in soak.samples)

    try:
        with soak.lab:
            soak.go()
        write()  # what follows takes as long again as the finished seeds did
        soak.check()
    finally:
        write()
    shutil.rmtree(folder)
    print(tables(soak.record))


if __name__ == "__main__":
    main()
