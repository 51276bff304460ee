"""Generated results, curves and overlays of all rows, as the stages write them: to test the report and to look at it.

`python -m tests.helpers.report_results <folder>` writes <folder>/results and <folder>/storage and makes the report.
Every number is invented: drawn around the published figures from a fixed seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.params.load import load_params
from pipeline.params.schema import Params, Row
from pipeline.params.tasks import FIGURES, MS_FLIP, primary
from pipeline.provenance.environment import Environment
from pipeline.provenance.run_key import settings_key
from pipeline.storage.files import write_text
from pipeline.storage.results.data import ConvertedWeights
from pipeline.storage.results.folder import write_result
from pipeline.storage.results.rows import (
    Aliases,
    Baseline,
    BestCheckpoint,
    BestVersion,
    EvaluatedCheckpoint,
    EvaluatedCheckpoints,
    EvaluatedSeed,
    RegisteredVersion,
    Registration,
    TrainedCheckpoint,
    TrainedCheckpoints,
    TrainedSeed,
    TrainingResult,
)
from tests.helpers import made_up
from tests.helpers.manifests import made_up_manifest

PROJECT = Path(__file__).resolve().parents[2]
A100 = "NVIDIA A100-SXM4-80GB"
CPU = "AMD EPYC 9B14"
METRICS = {"semantic": ("iou",), "panoptic": ("pq", "ap", "iou"), "instance": ("ap",)}

SHIFT = {"cityscapes_r101": -1.9, "ade20k_swin-b": 2.3, "ade20k_r101": 0.4}
"""How far a row's seeds lie from its published figure, in points."""
SPREAD = {"ade20k_r101": 1.1}
"""Standard deviation of a row's seeds; others: 0.25."""


def write_results(
    params: Params,
    folder: Path,
    *,
    rows: list[str] | None = None,
    points: int = 1800,
    size: tuple[int, int] = (512, 1024),
) -> None:
    """`folder`/results and `folder`/storage of the named rows (None: all but two of a user's own and
    the last of the published ones).

    points: of a training curve; size: of an overlay's panels.
    """
    left_out = ("camvid_tiny", "nuclei_tiny", "coco_instance_swin-l-in22k")
    names = rows if rows is not None else [name for name in params.rows if name not in left_out]
    for name in names:
        _write_row(params, params.rows[name], folder, points, size)


class PageParser(HTMLParser):
    """Addresses a page would load, where its links go, and tags left open."""

    VOID = frozenset({"meta", "img", "br", "link", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        addresses = [value or "" for key, value in attrs if key in ("src", "srcset", "href", "xlink:href", "data")]
        (self.links if tag == "a" else self.loads).extend(addresses)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _write_row(params: Params, row: Row, folder: Path, points: int, size: tuple[int, int]) -> None:
    results, storage = folder / "results", folder / "storage"
    draws = np.random.default_rng(int(_digest(row.name)[:8], 16))
    first = primary(row.task)
    target = row.reference.get(first, row.published_authors.get(first, 60.0))
    names = params.datasets[row.dataset].class_names or ("road", "sky")
    if row.task == "instance":
        names = params.datasets[row.dataset].thing_classes
    base = np.clip(draws.normal(target, 18, len(names)), 2, 98)
    trained: list[TrainedSeed] = []
    evaluated: list[EvaluatedSeed] = []
    cpu = row.dataset == "shapes"
    for number, seed in enumerate(row.seeds):
        key = _digest(f"{row.name} {seed}")[:16]
        value = target + SHIFT.get(row.name, 0.05) + draws.normal(0, SPREAD.get(row.name, 0.25))
        status, reason = "finished", None
        if row.name == "cityscapes_swin-s" and number == 3:
            status, reason = "diverged", "the loss is not finite at step 41,250 (positions 659984 to 659999)"
        if row.name == "ade20k_swin-t" and number == 4:
            status, reason = "failed", "worker 3 was lost 3 times: CUDA out of memory; lower M2F_GROUPS_AT_ONCE"
        entry: dict[str, Any] = {"seed": seed, "run_key": key, "status": status, "reason": reason}
        entry["mlflow_run_id"] = _digest(f"mlflow {key}")[:32]
        below_reference = made_up.below_reference(10000, 0.6012, 0.6744)
        train_s = 160.0 + 10 * number if cpu else row.train.steps * (0.31 + 0.01 * number)
        last, best = (
            {"step": step, "path": f"{step}.safetensors", "sha256": _digest(f"{key} {which}")}
            for which, step in (("last", row.train.steps), ("best", row.train.steps - row.train.val_interval))
        )
        trained.append(
            made_up.trained_seed(
                **entry,
                run_dir=f"runs/{key}",
                steps=row.train.steps,
                checkpoints=TrainedCheckpoints(
                    last=TrainedCheckpoint(**last), best=BestCheckpoint(**best, figure=first, value=value / 100)
                ),
                train_s=train_s,
                worker_s=train_s * (2 if cpu else 8),
                workers=2 if cpu else 8,
                images_per_s=10.0 if cpu else 51.0,
                peak_memory_mib=None if cpu else 1024 * (row.published.get("train_mem_gib", 14.0) + 0.1),
                below_reference=(below_reference,) if row.name == "cityscapes_r101" and number == 2 else (),
                environment=_environment(cpu),
            )
        )
        if status == "finished":
            per_class = {
                metric: {
                    name: None if i == 3 and metric == "ap" else round(float(np.clip(v, 0, 100)) / 100, 6)
                    for i, (name, v) in enumerate(zip(names, base + draws.normal(0, 1.5, len(names)), strict=True))
                }
                for metric in METRICS[row.task]
            }
            at_end, at_best = row.train.steps, row.train.steps - row.train.val_interval
            checkpoints = EvaluatedCheckpoints(
                last=_checkpoint(row, value, draws, at_end, per_class),
                best=_checkpoint(row, value + 0.15, draws, at_best, per_class),
            )
            evaluated.append(EvaluatedSeed(**entry, checkpoints=checkpoints))
            _write_curve(storage / "runs" / key / "curve.jsonl", row, value, draws, points)
        else:
            evaluated.append(EvaluatedSeed(**entry))
            _write_curve(storage / "runs" / key / "curve.jsonl", row, value, draws, points, until=0.46)
    overlays = [f"{trained[0].run_dir}/overlays/{i:05d}.png" for i in range(8)]
    for i, path in enumerate(overlays[:4]):
        _write_overlay(storage / path, size, i)
    write_result(
        TrainingResult(row=row.name, dataset=row.dataset, settings=settings_key(row), seeds=tuple(trained)),
        row.name,
        results=results,
    )
    guessed = {"miou": 0.0217, "mean_accuracy": 0.0526, "pixel_accuracy": 0.327}
    evaluation = made_up.evaluation(
        row.name,
        evaluated,
        task=row.task,
        dataset=row.dataset,
        checkpoint_rule=row.checkpoint_rule,
        decides="best" if row.checkpoint_rule == "best" else "last",
        baseline=None if row.task == "instance" else Baseline(class_name=names[0], figures=guessed),
        overlays=tuple(overlays),
    )
    write_result(evaluation, row.name, results=results)
    if row.name in params.checkpoints:
        _write_published(params, row, folder, base, names, draws, points)
    _write_benchmark(row, results, cpu)
    write_result(made_up_manifest(dataset=row.dataset), row.dataset, results=results)
    digest = None if row.weights == "none" else _digest(row.weights)
    write_result(
        ConvertedWeights(
            name=row.weights,
            url=f"https://weights.example/{row.weights}" if digest else "",
            source_sha256=digest,
            sha256=digest,
            path=digest and f"weights/{digest}.safetensors",
        ),
        row.weights,
        results=results,
    )
    finished = [entry for entry in evaluated if entry.checkpoints]
    best_seed, middle = (
        {
            "version": version,
            "seed": entry.seed,
            "run_key": entry.run_key,
            "figure": first,
            "value": entry.checkpoints.last.figures[first],
        }
        for version, entry in enumerate((finished[0], finished[len(finished) // 2]), start=1)
    )
    registered = Registration(
        row=row.name,
        model=row.name.replace("_", "-"),
        aliases=Aliases(best=BestVersion(**best_seed), median=RegisteredVersion(**middle)),
        tracking_uri="http://mlflow.example:5000",
    )
    write_result(registered, row.name, results=results)


def _environment(cpu: bool) -> Environment:
    return dataclasses.replace(
        made_up.CPU if cpu else made_up.A100,
        libraries={"torch": "2.15.0", "numpy": "2.3.1", "ray": "2.58.0", "mlflow": "3.9.0"},
        device=CPU if cpu else A100,
        git_commit=_digest("commit")[:40],
    )


def _checkpoint(
    row: Row,
    value: float,
    draws: np.random.Generator,
    step: int,
    per_class: dict[str, dict[str, float | None]],
) -> EvaluatedCheckpoint:
    """A checkpoint whose primary figure is `value` percent; the others near those published, or near it."""
    figures: dict[str, float | None] = {}
    for name in (*FIGURES[row.task], *([MS_FLIP] if row.test.ms_flip else ())):
        near = row.published.get(name, row.published_authors.get(name, value + 3))
        figures[name] = round(float(np.clip(near + draws.normal(0, 0.3), 0, 100)) / 100, 6)
    figures[primary(row.task)] = round(value / 100, 6)
    return EvaluatedCheckpoint(key="e0", step=step, figures=figures, per_class=per_class)


def _write_curve(
    path: Path, row: Row, value: float, draws: np.random.Generator, points: int, *, until: float = 1.0
) -> None:
    steps, lines = row.train.steps, []
    every = max(1, steps // points)
    for step in range(every, int(steps * until) + 1, every):
        done = step / steps
        loss = 14 + 75 * math.exp(-30 * done) + 9 * (1 - done) + draws.normal(0, 1.2)
        lines.append({"step": step, "loss": loss, "lr": 1e-4 * (1 - done) ** 0.9})
    validations = range(row.train.val_interval, int(steps * until) + 1, row.train.val_interval)
    for step in validations:
        short = 22 * math.exp(-5 * step / steps) + abs(draws.normal(0, 0.5)) * (step < steps)
        lines.append({"step": step, f"val_{primary(row.task)}": (value - short) / 100})
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _write_published(
    params: Params, row: Row, folder: Path, base: np.ndarray, names: Any, draws: np.random.Generator, points: int
) -> None:
    first = primary(row.task)
    value = row.reference[first] + 0.004
    key = f"published-{_digest(row.name)[:16]}"
    log = bool(params.checkpoints[row.name].log_url)
    if log:
        _write_curve(folder / "storage" / "runs" / key / "curve.jsonl", row, value, draws, points)
    per_class: dict[str, dict[str, float | None]] = {
        metric: {name: round(float(np.clip(v, 0, 100)) / 100, 6) for name, v in zip(names, base, strict=True)}
        for metric in METRICS[row.task]
    }
    evaluated = made_up.padded(
        _checkpoint(row, value, draws, row.train.steps, per_class),
        pad_multiple=row.test.pad_multiple,
        difference={first: 0.004},
    )
    result = made_up.published_evaluation(
        row.name,
        evaluated,
        task=row.task,
        dataset=row.dataset,
        url=params.checkpoints[row.name].url,
        sha256=_digest(key),
        published=dict(row.reference),
        curve=f"runs/{key}/curve.jsonl" if log else None,
    )
    write_result(result, row.name, results=folder / "results")


def _write_benchmark(row: Row, results: Path, cpu: bool) -> None:
    """On an A100; ade20k_r50 on a CPU; none of cityscapes_swin-l-in22k."""
    if row.name == "cityscapes_swin-l-in22k":
        return
    cpu = cpu or row.name in ("ade20k_r50", "ade20k_r101")
    fps = 1.04 * row.published.get("inf_fps", 700.0 / row.published.get("train_mem_gb_as_printed", 30.0) ** 1.5)
    fps *= 0.011 if cpu else 1.0
    result = made_up.benchmark(
        row.name,
        task=row.task,
        environment=_environment(cpu),
        fps=fps,
        skipped="takes too long on a CPU" if cpu else None,
        step_s=0.31,
        images=row.train.group_size,
        crop=row.train.augmentation.crop,
        memory_mib=1024 * (row.published.get("train_mem_gib", 14.0) * 0.97),
        precision=row.train.precision,
    )
    write_result(dataclasses.replace(result, dataset=row.dataset), row.name, results=results)


def _write_overlay(path: Path, size: tuple[int, int], number: int) -> None:
    """Three panels of waves and noise, as hard to compress as a photograph."""
    import cv2

    height, width = size
    y, x = np.mgrid[:height, :width]
    draws = np.random.default_rng(number)
    grey = 120 + 60 * np.sin(x / 37 + number) * np.cos(y / 23) + draws.normal(0, 6, size)
    panels = []
    for panel in range(3):
        tint = np.array([[40, 90, 160], [150, 60, 60], [60, 140, 70]])[((x // 60 + y // 50 + number) % 3)]
        share = 0.0 if panel == 0 else 0.6
        panels.append(np.clip((1 - share) * grey[..., None] + share * tint, 0, 255).astype(np.uint8))
    gap = np.full((height, 4, 3), 255, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.hstack([panels[0], gap, panels[1], gap, panels[2]]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Command line."""
    import os

    from pipeline.report.write import write_report

    folder = Path(sys.argv[1]).absolute()
    params = load_params(PROJECT / "params.yaml")
    write_results(params, folder, rows=sys.argv[2:] or None)
    os.environ["M2F_STORAGE"] = str(folder / "storage")
    print(write_report(params, results=folder / "results", out=folder / "reports"))


if __name__ == "__main__":
    main()
