"""Results that no stage has made, whole, for tests that look at some of their values: keywords replace fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.params.tasks import FIGURES, primary
from pipeline.provenance.environment import Environment
from pipeline.storage.results.rows import (
    BelowReference,
    Benchmark,
    BestCheckpoint,
    EvaluatedCheckpoint,
    EvaluatedCheckpoints,
    EvaluatedSeed,
    Evaluation,
    InferenceCost,
    Operations,
    PaddedEvaluation,
    PublishedEvaluation,
    Spread,
    TrainedCheckpoint,
    TrainedCheckpoints,
    TrainedSeed,
    TrainingCost,
    TrainingResult,
    WorkerGroupSpan,
)

CPU = Environment(
    python="3.11.9",
    platform="Linux x86_64",
    libraries={"torch": "2.0"},
    device="a CPU",
    cuda=None,
    tf32=None,
    git_commit="c0ffee",
    git_changed=False,
)

A100 = dataclasses.replace(CPU, device="NVIDIA A100-SXM4-80GB", cuda="12.8", tf32="convolutions")


def span(*, workers: int, from_step: int = 0, train_s: float = 0.0, nodes: int = 1) -> WorkerGroupSpan:
    return WorkerGroupSpan(
        from_step=from_step, train_s=train_s, time_ms=0, workers=workers, nodes=nodes, devices=("x",)
    )


def trained_seed(seed: int, *, key: str = "k", **fields: Any) -> TrainedSeed:
    """A finished training of 75 s on 2 workers; one of another status has no checkpoints and no times."""
    run_key = f"{key}{seed}"
    finished = fields.get("status", "finished") == "finished"
    last = TrainedCheckpoint(step=100, path="x", sha256="feed" * 16)
    best = BestCheckpoint(step=80, path="y", sha256="be57" * 16, figure="miou", value=0.5)
    made = TrainedSeed(
        seed=seed,
        run_key=run_key,
        status="finished",
        reason=None if finished else "for a reason",
        run_dir=f"runs/{run_key}",
        steps=100,
        checkpoints=TrainedCheckpoints(last=last, best=best) if finished else None,
        metrics={},
        below_reference=(),
        peak_memory_mib=None,
        train_s=75.0 if finished else None,
        worker_s=150.0 if finished else None,
        workers=2,
        worker_groups=(),
        images_per_s=10.0 if finished else None,
        mlflow_run_id=None,
        environment=CPU,
    )
    return dataclasses.replace(made, **fields)


def training(row: str, seeds: Sequence[TrainedSeed], settings: str = "of the row") -> TrainingResult:
    return TrainingResult(row=row, dataset="d", settings=settings, seeds=tuple(seeds))


def below_reference(step: int, value: float, expected: float, reference: Any = "published") -> BelowReference:
    return BelowReference(step=step, value=value, reference=reference, expected=expected)


def checkpoint(
    task: str,
    value: float | None,
    *,
    step: int = 100,
    per_class: Mapping[str, Mapping[str, float | None]] | None = None,
    **others: float | None,
) -> EvaluatedCheckpoint:
    """A checkpoint whose every figure is `value`, but for the given ones."""
    figures = dict.fromkeys(FIGURES[task], value) | others
    return EvaluatedCheckpoint(key="e0", step=step, figures=figures, per_class=per_class or {})


def evaluated_seed(
    seed: int, last: EvaluatedCheckpoint, best: EvaluatedCheckpoint | None = None, *, key: str = "k", **fields: Any
) -> EvaluatedSeed:
    """A finished seed; without `best`, it is the last."""
    made = EvaluatedSeed(
        seed=seed,
        run_key=f"{key}{seed}",
        status="finished",
        reason=None,
        mlflow_run_id=None,
        checkpoints=EvaluatedCheckpoints(last=last, best=best or last),
    )
    return dataclasses.replace(made, **fields)


def evaluation(row: str, seeds: Sequence[EvaluatedSeed], *, task: Any = "semantic", **fields: Any) -> Evaluation:
    made = Evaluation(
        row=row,
        dataset="d",
        task=task,
        primary=primary(task),
        checkpoint_rule="unknown",
        decides="last",
        seeds=tuple(seeds),
        median={},
        baseline=None,
        overlays=(),
    )
    return dataclasses.replace(made, **fields)


def padded(
    checkpoint: EvaluatedCheckpoint, *, pad_multiple: int = 1, difference: Mapping[str, float] | None = None
) -> PaddedEvaluation:
    return PaddedEvaluation(pad_multiple=pad_multiple, checkpoint=checkpoint, difference=difference or {})


def published_evaluation(
    row: str, evaluated: PaddedEvaluation, *, task: Any = "semantic", **fields: Any
) -> PublishedEvaluation:
    made = PublishedEvaluation(
        row=row,
        dataset="d",
        task=task,
        primary=primary(task),
        url="https://published.example/a.pth",
        sha256="ab" * 32,
        published={},
        evaluated=evaluated,
        other_padding=None,
        agrees=None,
        mlflow_run_id=None,
        step_s=None,
        curve=None,
    )
    return dataclasses.replace(made, **fields)


def benchmark(
    row: str,
    *,
    task: Any = "semantic",
    environment: Environment = A100,
    fps: float = 9.5,
    skipped: str | None = None,
    **training: Any,
) -> Benchmark:
    """On a GPU where the environment has CUDA; `training`: fields of its cost."""
    spread = Spread(median=0.3, p10=0.2, p90=0.4)
    cost = TrainingCost(
        step_s=0.3,
        seconds=spread,
        steps=20,
        workers=1,
        groups=1,
        images=2,
        crop=(512, 1024),
        memory_mib=5632.0,
        reserved_mib=6000.0,
        precision="float32",
        protocol="Random crops.",
    )
    return Benchmark(
        key="b0",
        row=row,
        dataset="d",
        task=task,
        device_type="cuda" if environment.cuda else "cpu",
        threads=None if environment.cuda else 8,
        other_load=0.0,
        environment=environment,
        parameters=44_000_000,
        parameters_trained=43_900_000,
        flops=Operations(
            image_size=(1024, 2048), forward=527_000_000_000, counted="a multiplication with an addition is two"
        ),
        inference=InferenceCost(
            fps=fps,
            images=195,
            sizes=((1024, 2048, 195),),
            memory_mib=3900.0 if environment.cuda else None,
            reserved_mib=None,
            seconds=spread,
            protocol="Batch 1.",
            differs="Fresh weights.",
        ),
        training=None if skipped else dataclasses.replace(cost, **training),
        skipped=skipped,
    )
