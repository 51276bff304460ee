"""Every row of the tables trains: two steps at a small crop, saved, loaded again, one picture evaluated."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import pytest

from pipeline.compute.resources import Resources
from pipeline.evaluation.evaluate_checkpoint import Job, evaluate, overlays_of
from pipeline.params.load import load_params
from pipeline.params.tasks import FIGURES, primary
from pipeline.runs.curve_file import read_curve
from pipeline.runs.run import Run
from pipeline.storage.results.data import Manifest
from pipeline.storage.root import storage_root
from pipeline.training.loop import train

PROJECT = Path(__file__).resolve().parents[3]
PARAMS = load_params(PROJECT / "params.yaml")
ROWS = [name for name, row in PARAMS.rows.items() if row.published or row.published_authors]


ONE_OF_EACH = ("cityscapes_r50", "ade20k_swin-t", "coco_panoptic_r50", "coco_instance_swin-t")
"""Each task, dataset and kind of backbone once."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in ONE_OF_EACH else pytest.mark.full) for name in ROWS],
)
def test_a_row_trains_two_steps_and_its_checkpoint_evaluates_to_the_same_figures(
    name: str, small_manifest: Manifest
) -> None:
    # The row as it is, but for: two groups, a crop of 64 x 64 with scales to match, pictures of 64 x 96 at their own
    # size, and bf16 for fp16. The generated pictures' nine classes stand for the dataset's first nine.
    row = PARAMS.rows[name]
    data = PARAMS.datasets[row.dataset]
    train_images = dataclasses.replace(row.train.augmentation, crop=(64, 64))
    if train_images.short_sides:
        train_images = dataclasses.replace(train_images, short_sides=(56, 64, 80), long_side_max=160)
    settings = dataclasses.replace(
        row.train,
        steps=2,
        groups=2,
        augmentation=train_images,
        log_every=1,
        # the first steps of fp16 look for the loss's factor
        precision="bf16" if row.train.precision == "fp16" else row.train.precision,
    )
    test = dataclasses.replace(row.test, short_side=64, long_side_max=96, ms_flip=None)
    row = dataclasses.replace(row, train=settings, test=test)
    things = data.thing_classes or small_manifest.thing_classes
    names = data.class_names[::-1] if row.dataset == "cityscapes_objects" else data.class_names  # stuff is first there
    splits = {**small_manifest.splits, "val": dataclasses.replace(small_manifest.splits["val"], records=1)}
    manifest = dataclasses.replace(small_manifest, class_names=names, thing_classes=tuple(things), splits=splits)

    run = Run(row=row, seed=0, run_key=name, run_dir=storage_root() / "runs" / name, manifest=manifest)
    result = train(run)
    assert result is not None
    curve = read_curve(run.run_dir / "curve.jsonl")
    assert [point["step"] for point in curve] == [1, 2]
    assert all(math.isfinite(point["loss"]) and point["grad_norm"] > 0 for point in curve)
    # poly ends at 0; the first milestone is far away
    assert curve[1]["lr"] == (0 if row.train.schedule.name == "poly" else row.train.optimizer.lr)

    path = run.run_dir / result.checkpoints.last.path
    alone = Resources(workers=0, use_gpu=False, cpus_per_worker=2, loader_processes=0, groups_at_once=None)
    job = Job(
        row=row,
        manifest=manifest,
        checkpoint=path,
        sha256=result.checkpoints.last.sha256,
        run_key=run.run_key,
        step=2,
        run_dir=run.run_dir,
        key="e0",
        what="two steps",
        processes=0,
    )
    figures = evaluate(job, alone).figures
    assert figures == result.metrics and set(figures) == set(FIGURES[row.task])
    assert figures[primary(row.task)] is not None
    assert len(overlays_of(job.folder)) == 1
    shutil.rmtree(run.run_dir)  # gigabytes
