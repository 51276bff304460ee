"""What one training needs to know besides its row, and how its lines on a terminal begin."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.params.schema import Row
from pipeline.params.tasks import LABELS, headline, percent
from pipeline.storage.stores import StoredPath

if TYPE_CHECKING:
    from pipeline.storage.results.data import Manifest


YIELD = "yield.json"
"""A file of this name in the run folder asks the run to yield its workers after its next checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training needs to know besides its row."""

    row: Row
    seed: int
    run_key: str
    run_dir: StoredPath
    """Absolute; environment.json, checkpoints/, curve.jsonl and how it ended (pipeline.runs.outcome)."""
    manifest: Manifest
    weights: StoredPath | None = None
    """Converted initial weights of the backbone."""
    network: StoredPath | None = None
    """Those of the whole network instead (m2f.weights.start)."""
    mlflow_run_id: str | None = None
    loader_processes: int = 0
    groups_at_once: int | None = None
    """Groups per forward pass; None: all of the worker's. Less saves memory and changes nothing else."""
    checkpoint_activations: bool = False
    """Whether blocks are made again in the backward pass (m2f.model.Mask2Former.checkpoint_activations)."""
    published_curve: Sequence[tuple[int, float]] = ()
    """(step, the row's first figure) of the published training, which the early warning compares with."""
    other_seeds: tuple[StoredPath, ...] = ()
    """Run folders of the row's other seeds, whose curves it compares with too."""


def say(run: Run, text: str) -> None:
    """One line on stderr."""
    print(f"{run_name(run)}: {text}", file=sys.stderr, flush=True)


def run_name(run: Run) -> str:
    """How progress lines call a run."""
    return f"{run.row.name} seed {run.seed}"


def reported(run: Run, step: int, metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """A validation as Ray shows it: row, seed, step, and the figures that the task is known by, in percent."""
    figures = {LABELS[name]: percent(metrics[name]) for name in headline(run.row.task)}
    return {"row": run.row.name, "seed": run.seed, "step": step, **figures}
