"""`train_row` in a process of its own, which tests interrupt and kill."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pipeline.params.schema import Row
from pipeline.runs.curve_file import read_curve
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.folder import read_result, result_path
from pipeline.storage.results.rows import PublishedEvaluation, TrainingResult
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S, until

STEPS = 24

DRIVER = """
import pickle
from pathlib import Path

from pipeline.training.seeds import train_row
from stages import run
from tests.pipeline.conftest import NO_WEIGHTS


def main() -> None:
    row, manifest, published = pickle.loads(Path("job.pickle").read_bytes())
    train_row(row, manifest=manifest, weights=NO_WEIGHTS, published=published, results=Path("results"))


if __name__ == "__main__":
    run(main)
"""


class Job:
    """`train_row` as `stages.train` calls it, with its own workspace, storage root and Ray."""

    def __init__(self, folder: Path, shards: Path, row: Row, manifest: Manifest, *, workers: int) -> None:
        folder.mkdir()
        self.folder, self.storage = folder, folder / "storage"
        shutil.copytree(shards, self.storage)
        self.row, self.manifest, self.workers_wanted = row, manifest, workers
        self.published: PublishedEvaluation | None = None
        (folder / "driver.py").write_text(DRIVER)
        self.ray = tempfile.mkdtemp(prefix="m2f-ray-", dir="/tmp")  # Ray's socket paths must be short
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **settings: str) -> None:
        (self.folder / "job.pickle").write_bytes(pickle.dumps((self.row, self.manifest, self.published)))
        environment = {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "M2F_STORAGE": str(self.storage),
            "M2F_WORKERS": str(self.workers_wanted),
            "M2F_LOADER_PROCESSES": "0",
            "RAY_TMPDIR": self.ray,
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db",
            **settings,
        }
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "driver.py"],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
            )

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def ended(self) -> int:
        """The exit code."""
        assert self.process is not None
        return self.process.wait(LIMIT_S)

    def wait(self) -> TrainingResult:
        """What the stage has written, after an end without an error."""
        assert self.ended() == 0, self.log()[-3000:]
        return self.result()

    @property
    def has_result(self) -> bool:
        return result_path(TrainingResult, self.row.name, results=self.folder / "results").exists()

    def result(self) -> TrainingResult:
        return read_result(TrainingResult, self.row.name, results=self.folder / "results")

    def run_dir(self, seed: int) -> Path | None:
        """The run folder of a seed that has begun; None before."""
        for line in self.log().splitlines():
            if line.startswith(f"{self.row.name}: seed {seed} ("):
                return self.storage / "runs" / line.split("run ")[1].split(":")[0]
        return None

    def until(self, holds: Callable[[], object]) -> None:
        """Wait until something holds. AssertionError with the log when the process ends before."""
        process = self.process
        assert process is not None
        until(holds, ended=lambda: process.poll() is not None, said=lambda: self.log()[-3000:])

    def wait_for_step(self, step: int, seed: int = 5) -> None:
        """Until the curve of a seed shows that `step` steps are done and a checkpoint exists."""

        def reached() -> bool:
            folder = self.run_dir(seed)
            return (
                folder is not None
                and any(point["step"] >= step for point in read_curve(folder / "curve.jsonl"))
                and bool(list(folder.glob("checkpoints/step-*.safetensors")))
            )

        self.until(reached)

    def tree(self) -> list[psutil.Process]:
        """The process and all that it has started."""
        if self.process is None:
            return []
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.tree() if "RayTrainWorker" in " ".join(process.cmdline())]

    def kill_everything(self) -> None:
        for process in self.tree():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        if self.process is not None:
            self.process.wait(LIMIT_S)

    def weights(self, seed: int = 5) -> bytes:
        """The tensors after the last step; the file's header says how long the training took."""
        from safetensors.torch import load_file, save

        folder = self.run_dir(seed)
        assert folder is not None
        return save(load_file(folder / f"checkpoints/step-{self.row.train.steps:08d}.safetensors"))

    def curve(self, seed: int = 5) -> list[dict[str, Any]]:
        folder = self.run_dir(seed)
        assert folder is not None
        return read_curve(folder / "curve.jsonl")
