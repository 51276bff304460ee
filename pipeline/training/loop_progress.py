"""What the loop shows of a training: lines on stderr, by its first worker; the other workers show nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.params.tasks import LABELS, in_words, primary
from pipeline.storage.results import Behind
from pipeline.tracking.mlflow_runs import set_tags
from pipeline.training.early_warning import warning

if TYPE_CHECKING:
    from pipeline.runs.run import Run


class TrainingProgress:
    """Step, loss, pictures/s and time left on stderr: renewed in place on a terminal, a line every 10 s elsewhere."""

    def __init__(self, run: Run, first_step: int, *, share: float, interval_s: float = 10.0) -> None:
        self.run = run
        self.share = share  # of the step's groups that this worker sees
        self.terminal = sys.stderr.isatty()
        self.interval_s = 0.5 if self.terminal else interval_s
        self.begun = self.said = (first_step, time.monotonic())
        if first_step:
            self._say(f"going on from step {first_step}")

    def step(self, done: int, losses: Mapping[str, Tensor]) -> None:
        """Say where the run is if the interval has passed. `losses`: this worker's share of each."""
        now_s, config = time.monotonic(), self.run.row.train
        if now_s - self.said[1] < self.interval_s and done != config.steps:
            return
        rate = (done - self.said[0]) / max(now_s - self.said[1], 1e-9)
        overall = (done - self.begun[0]) / max(now_s - self.begun[1], 1e-9)
        left_s = (config.steps - done) / overall
        loss = float(torch.stack(list(losses.values())).sum()) / self.share
        self.said = (done, now_s)
        self._say(
            f"step {done}/{config.steps}, loss {loss:.3f}, {rate * config.global_batch:.1f} pictures/s, "
            f"{_duration(left_s)} left of this seed",
            end="\r" if self.terminal and done < config.steps else "\n",
        )

    def validated(self, done: int, metrics: Mapping[str, float | None]) -> None:
        """Say what a validation has measured."""
        self._say(f"step {done}: validation {in_words(metrics, self.run.row.task)}")

    def warned(self, behind: Behind) -> None:
        """Say that a validation is clearly behind, and tag the MLflow run with it."""
        words = warning(behind, LABELS[primary(self.run.row.task)])
        self._say(f"warning: {words}")
        set_tags(self.run.mlflow_run_id, {"m2f.behind": words})

    def _say(self, text: str, end: str = "\n") -> None:
        line = f"{self.run.row.name} seed {self.run.seed}: {text}"
        print(f"{line:<79}" if self.terminal else line, end=end, file=sys.stderr, flush=True)


class NoProgress:
    """What the other workers have in place of TrainingProgress."""

    def step(self, done: int, losses: Mapping[str, Tensor]) -> None:
        """Say nothing."""

    def validated(self, done: int, metrics: Mapping[str, float | None]) -> None:
        """Say nothing."""

    def warned(self, behind: Behind) -> None:
        """Say nothing."""


class NoCurve:
    """What the other workers have in place of the curve."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep nothing."""

    def save(self) -> None:
        """Nothing to save."""

    def close(self) -> None:
        """Nothing to close."""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
