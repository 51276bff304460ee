"""What DVC shows of an evaluated row: its figures (`dvc metrics`), its seeds' curves and confusions (`dvc plots`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.params.tasks import LABELS, MS_FLIP, headline, percent
from pipeline.runs.curve_file import read_curve, thinned
from pipeline.runs.outcome import evaluation_dir
from pipeline.storage.results.rows import Evaluation, PublishedEvaluation, TrainingResult
from pipeline.storage.root import storage_root

SHOWN_SHARE = 0.005
"""Confusions of a smaller share of the true class's pixels are left out: 150 classes have 22,500 pairs."""


def metrics(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Figures that a row is known by, in percent: median, lowest and highest of the seeds that were evaluated."""
    checkpoints = [seed.checkpoints[evaluation.decides] for seed in evaluation.seeds if seed.checkpoints]
    shown = {}
    for name in (*headline(evaluation.task), MS_FLIP):
        if (median := percent(evaluation.median.get(name))) is not None:
            values = [value for each in checkpoints if (value := percent(each.figures[name])) is not None]
            shown[LABELS[name]] = {"median": median, "lowest": min(values), "highest": max(values)}
    return shown


def curves(trained: TrainingResult, task: str, published: PublishedEvaluation | None) -> Iterator[tuple[object, ...]]:
    """Lines of the plot `curves`: the loss of every seed, and its validation in percent, beside the published curve."""
    folders = {f"seed {seed.seed}": f"{seed.run_dir}/curve.jsonl" for seed in trained.seeds}
    if published is not None and published.curve is not None:
        folders["published"] = published.curve
    for training, path in folders.items():
        yield from curve_lines(training, read_curve(storage_root() / path), task)


def curve_lines(training: str, points: Sequence[Mapping[str, Any]], task: str) -> Iterator[tuple[object, ...]]:
    """Training, figure, step and value of each of its points; long curves as the means of pieces."""
    keys = {"loss": "loss", **{f"{LABELS[name]} in percent": f"val_{name}" for name in headline(task)}}
    for figure, key in keys.items():
        known = [(float(point["step"]), float(point[key])) for point in points if point.get(key) is not None]
        for step, value in thinned(known):
            yield training, figure, round(step), f"{value if key == 'loss' else percent(value):.5g}"


def confusions(evaluation: Evaluation) -> Iterator[tuple[object, ...]]:
    """Lines of the plot `confusion`: how much of each true class is predicted as what, in percent of its pixels.

    The pixels of all seeds together, by the checkpoints that decide. Instances have none: they overlap.
    """
    total, class_names = None, []
    for seed in evaluation.seeds:
        if seed.checkpoints is not None:
            key = seed.checkpoints[evaluation.decides].key
            path = evaluation_dir(storage_root() / "runs" / seed.run_key, key) / "confusion.json"
            if path.exists():
                content = json.loads(path.read_text(encoding="utf-8"))
                counts, class_names = np.array(content["true_by_predicted"]), content["class_names"]
                total = counts if total is None else total + counts
    if total is not None:
        yield from confusion_lines(total, class_names)


def confusion_lines(counts: np.ndarray, class_names: Sequence[str]) -> Iterator[tuple[object, ...]]:
    """True class, predicted class and share in percent, of (C, C) pixels whose rows are the true class.

    Confusions of less than SHOWN_SHARE are left out, and classes without a pixel.
    """
    of_class = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(of_class, 1)
    shown = (of_class > 0) & ((shares >= SHOWN_SHARE) | np.eye(len(counts), dtype=bool))
    for true, predicted in np.argwhere(shown):
        yield class_names[true], class_names[predicted], f"{percent(float(shares[true, predicted])):.2f}"
