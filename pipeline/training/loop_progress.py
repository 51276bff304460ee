"""What the loop shows of a training: lines on stderr, by its first worker; the other workers show nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.params.tasks import LABELS, in_words, primary
from pipeline.storage.progress import Progress
from pipeline.storage.results.rows import BelowReference
from pipeline.tracking.mlflow_runs import set_tags
from pipeline.training.early_warning import warning

if TYPE_CHECKING:
    from pipeline.runs.run import Run


class TrainingProgress:
    """Step, rate, loss and time left on stderr."""

    def __init__(self, run: Run, first_step: int, *, share: float, interval_s: float = 10.0) -> None:
        self.run = run
        self.share = share  # of the step's groups that this worker sees
        steps = run.row.train.steps
        self.shown = Progress(f"{run.row.name} seed {run.seed}", steps, unit="steps", interval_s=interval_s)
        if first_step:
            self.shown.restart(first_step, steps)
            self.shown.say(f"going on from step {first_step}")

    def step(self, done: int, losses: Mapping[str, Tensor]) -> None:
        """Say where the run is if the interval has passed. `losses`: this worker's share of each."""

        def note(steps_s: float) -> str:
            loss = float(torch.stack(list(losses.values())).sum()) / self.share
            return f"{steps_s * self.run.row.train.global_batch:.1f} images/s, loss {loss:.3f}"

        self.shown.add(done - self.shown.count, note=note)
        if done == self.run.row.train.steps:
            self.shown.done()

    def validated(self, done: int, metrics: Mapping[str, float | None]) -> None:
        """Say what a validation has measured."""
        self.shown.say(f"step {done}: validation {in_words(metrics, self.run.row.task)}")

    def warned(self, below_reference: BelowReference) -> None:
        """Say that a validation is clearly below its reference, and tag the MLflow run with it."""
        words = warning(below_reference, LABELS[primary(self.run.row.task)])
        self.shown.say(f"warning: {words}")
        set_tags(self.run.mlflow_run_id, {"m2f.below_reference": words})


class NoProgress:
    """What the other workers have in place of TrainingProgress."""

    def step(self, done: int, losses: Mapping[str, Tensor]) -> None:
        """Say nothing."""

    def validated(self, done: int, metrics: Mapping[str, float | None]) -> None:
        """Say nothing."""

    def warned(self, below_reference: BelowReference) -> None:
        """Say nothing."""


class NoCurve:
    """What the other workers have in place of the curve."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep nothing."""

    def save(self) -> None:
        """Nothing to save."""

    def close(self) -> None:
        """Nothing to close."""
