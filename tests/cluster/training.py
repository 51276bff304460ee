"""One training of the row `faults` by two workers on two hosts, watched from its start to its end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.tracking.sender import shown_metric
from tests.cluster.conftest import CHECKPOINT_INTERVAL, STEPS, Cluster, wait_for

_MLFLOW = """
import json, urllib.parse, urllib.request
def ask(path, body=None, **query):
    url = f"http://10.77.0.10:5000/api/2.0/mlflow/{path}?{urllib.parse.urlencode(query)}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))
def trainings():
    experiments = [e["experiment_id"] for e in ask("experiments/search", {"max_results": 100}).get("experiments", [])]
    query = {"experiment_ids": experiments, "filter": "tags.`m2f.run_type` = 'training' and tags.`m2f.row` = 'faults'"}
    return ask("runs/search", query).get("runs", []) if experiments else []
"""
"""MLflow's own interface, for a Python without MLflow, which takes seconds to import."""


@dataclass(frozen=True)
class Seen:
    """A line of a job's log, and when it was seen (time.monotonic)."""

    at_s: float
    text: str


class Training:
    """A job on the head, submitted there as `ray submit` does it."""

    def __init__(self, cluster: Cluster, name: str, row: str = "faults") -> None:
        """Submit it; `name`: of its log."""
        self.cluster, self.lab = cluster, cluster.lab
        self.log = self.lab.folder / f"{name}.log"
        self.lines: list[Seen] = []
        self.steps = [(time.monotonic(), last_step(cluster))]
        submit = f"python ~/m2f-upload/pipeline/submit.py repro train@{row} M2F_WORKERS=2"
        self.process = self.lab.start("head", submit, self.log)
        self.begun_s = time.monotonic()
        self.ended_s: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        read = 0
        while self.ended_s is None:
            ended = self.process.poll() is not None
            step = last_step(self.cluster)
            if step not in (0, self.steps[-1][1]):
                self.steps.append((time.monotonic(), step))
            text = self.log.read_text(errors="replace")
            whole = text.rfind("\n") + 1
            for line in text[read:whole].splitlines():
                self.lines.append(Seen(time.monotonic(), line))
            read = whole
            if ended:
                self.ended_s = time.monotonic()
            time.sleep(0.1)

    def output(self) -> str:
        """The job's log so far."""
        return self.log.read_text(errors="replace")

    def said(self, pattern: str, since_s: float = 0.0) -> list[Seen]:
        """Lines of the log that hold a pattern."""
        return [line for line in list(self.lines) if line.at_s >= since_s and re.search(pattern, line.text)]

    def reaches(self, step: int) -> None:
        """Wait until the training is at a step."""

        def there() -> bool:
            assert self.ended_s is None, self.output()
            return self.steps[-1][1] >= step

        wait_for(f"step {step}", there)

    def steps_since(self, at_s: float) -> list[tuple[float, int]]:
        """The steps that were made after a time, and when each was seen."""
        pairs = pairwise(list(self.steps))
        return [(now_s, step) for (_, before), (now_s, step) in pairs if now_s > at_s and step > before]

    def ends(self) -> int:
        """Wait for the end of the job; its exit code."""
        try:
            wait_for("the end of the job", lambda: self.ended_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None
        return int(self.process.wait())


@dataclass(frozen=True)
class Ending:
    """What a training leaves: its weights' digest, its curve, and what MLflow has of it."""

    weights: str
    """SHA-256 of the last checkpoint's tensors, those of the optimiser included."""
    curve: list[dict[str, Any]]
    worker_groups: list[tuple[int, int]]
    """(from which step, how many workers)."""
    pq: float
    """Of the last validation."""
    status: str
    shown: dict[str, list[tuple[int, float]]]
    """Metric -> (step, value) of every point that MLflow has."""

    @property
    def shrank(self) -> int | None:
        """The step from which another number of workers went on; None: there were two from start to end."""
        return next((step for step, workers in self.worker_groups if workers != 2), None)


def forget(cluster: Cluster) -> None:
    """Remove all that earlier trainings of the row have left, so that it is trained again."""
    shutil.rmtree(cluster.lab.shared / "storage" / "runs", ignore_errors=True)
    result_file(cluster).unlink(missing_ok=True)
    script = 'for run in trainings(): ask("runs/delete", {"run_id": run["info"]["run_id"]})'
    cluster.lab.on("head", f"python3 - <<'END'\n{_MLFLOW}\n{script}\nEND")


def result_file(cluster: Cluster, row: str = "faults") -> Path:
    """The row's result, where the job writes it."""
    return cluster.lab.home("head") / f"m2f/results/train/{row}.json"


def run_folder(cluster: Cluster) -> Path:
    """The one run folder there is."""
    (folder,) = (cluster.lab.shared / "storage" / "runs").iterdir()
    return folder


def curve_file(cluster: Cluster) -> Path:
    """The curve of the one training there is."""
    return next((cluster.lab.shared / "storage" / "runs").glob("*/curve.jsonl"), Path("there is none yet"))


def last_step(cluster: Cluster) -> int:
    """The last step in the curve of the one training there is; 0: there is none yet."""
    with contextlib.suppress(OSError, IndexError, json.JSONDecodeError):
        return int(json.loads(curve_file(cluster).read_text().splitlines()[-1])["step"])
    return 0


def ending(cluster: Cluster) -> Ending:
    """What the training that has just ended has left."""
    (seed,) = json.loads(result_file(cluster).read_text())["seeds"]
    assert seed["status"] == "finished", seed
    points = [json.loads(line) for line in curve_file(cluster).read_text().splitlines()]
    curve = [{key: value for key, value in point.items() if key != "time_ms"} for point in points]
    metrics = sorted(as_shown(curve))
    script = f"""
(run,) = trainings()
def history(name):
    found = ask("metrics/get-history", run_id=run["info"]["run_id"], metric_key=name, max_results=10000)
    return [(point["step"], point["value"]) for point in found.get("metrics", [])]
print(json.dumps([run["info"]["status"], {{name: history(name) for name in {metrics}}}]))
"""
    status, shown = json.loads(cluster.lab.on("head", f"python3 - <<'END'\n{_MLFLOW}\n{script}\nEND").stdout)
    shown = {name: sorted((int(step), float(value)) for step, value in points) for name, points in shown.items()}
    return Ending(
        weights=digest_of_tensors(run_folder(cluster) / seed["checkpoints"]["last"]["path"]),
        curve=curve,
        worker_groups=[(span["from_step"], span["workers"]) for span in seed.get("worker_groups", [])],
        pq=seed["metrics"]["pq"],
        status=status,
        shown=shown,
    )


def as_shown(curve: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """A curve's points as MLflow is to show them, (step, value) by its names."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for point in curve:
        for name, value in point.items():
            if name != "step" and value is not None and (metric := shown_metric(name, value)) is not None:
                shown.setdefault(metric[0], []).append((point["step"], metric[1]))
    return shown


def digest_of_tensors(checkpoint: Path) -> str:
    """SHA-256 of a safetensors file but for its metadata, which say how long the training took."""
    content = checkpoint.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    del header["__metadata__"]
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + content[length:]).hexdigest()


def check_nothing_is_missing_or_double(end: Ending) -> None:
    """Every step is in the curve once, and MLflow has every point of it once."""
    assert [point["step"] for point in end.curve] == list(range(1, STEPS + 1))
    assert end.status == "FINISHED"
    as_logged = as_shown(end.curve)
    for name, shown in end.shown.items():
        points = as_logged[name]
        if (
            end.shrank is not None
        ):  # steps done twice, with rounding of their own, are shown as they were the first time
            shown, points = [(step, 0.0) for step, _ in shown], [(step, 0.0) for step, _ in points]
        assert shown == points, name


def check_nothing_is_left_over(cluster: Cluster) -> None:
    """No half-written file, and none of Ray's notes."""
    folder = run_folder(cluster)
    names = [path.name for path in folder.rglob("*")]
    assert not [name for name in names if name.endswith((".part", ".damaged"))], names
    assert not (folder / "ray").exists()


def done_twice(training: Training) -> list[int]:
    """For every restart that is seen, how many steps were done again.

    A training that goes on from a checkpoint shortens its curve to that step.
    """
    steps = [step for _, step in training.steps]
    drops = ((before, after) for before, after in pairwise(steps) if after < before)
    return [before - after // CHECKPOINT_INTERVAL * CHECKPOINT_INTERVAL for before, after in drops]
