"""The figures of every picture alone: those that a metric of this picture alone would give."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from m2f import build_model
from pipeline.evaluation.evaluate_checkpoint import Job
from pipeline.evaluation.image_figures import ImageFigures, images_file, merged_lines
from pipeline.evaluation.task_metrics import TaskMetrics, predict_images
from pipeline.params.schema import Row
from pipeline.storage.files import write_json
from pipeline.storage.results.data import Manifest

FIGURES = {"panoptic": ("pq", "miou", "ap"), "instance": ("ap",), "semantic": ("miou",)}


def job_of(row: Row, manifest: Manifest, folder: Path) -> Job:
    """The evaluation of a checkpoint that nobody reads."""
    return Job(
        row=row,
        manifest=manifest,
        checkpoint=folder,
        sha256="",
        run_key="k",
        step=1,
        run_dir=folder,
        key="e0",
        what="a test",
        processes=0,
    )


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_every_picture_has_the_figures_that_it_has_alone(
    task: str, small_row: Row, small_manifest: Manifest, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    classes = 3 if task == "instance" else small_row.model.num_classes
    row = dataclasses.replace(small_row, task=task, model=dataclasses.replace(small_row.model, num_classes=classes))
    row = dataclasses.replace(row, test=dataclasses.replace(row.test, score_threshold=0.0, overlap_threshold=0.0))
    network = build_model(row.model)
    job = job_of(row, small_manifest, tmp_path)
    part, metrics = range(3), TaskMetrics(row, small_manifest)
    images, expected = ImageFigures(job, part), []
    for val_image, predictions in predict_images(network, small_manifest, row, places=list(part)):
        metrics.update(val_image, predictions)
        images.add(val_image, metrics)
        alone = TaskMetrics(row, small_manifest)
        alone.update(val_image, predictions)
        expected.append({"image": val_image.name, **alone.figures()})
    images.save(metrics)
    lines = merged_lines([images_file(job.folder, part)])
    assert [line["image"] for line in lines] == [each["image"] for each in expected]
    for line, each in zip(lines, expected, strict=True):
        assert {name: line[name] for name in FIGURES[task]} == pytest.approx({n: each[n] for n in FIGURES[task]})
        assert task == "semantic" or (line["instances"] > 0 and line["predicted_instances"] > 0)
    assert task == "instance" or all(line["miou"] > 0 for line in lines)


def test_a_picture_whose_instances_are_all_found_has_ap_1_whatever_the_others_have(
    small_row: Row, small_manifest: Manifest, tmp_path: Path
) -> None:
    row = dataclasses.replace(small_row, task="instance", model=dataclasses.replace(small_row.model, num_classes=3))
    metrics, images = TaskMetrics(row, small_manifest), ImageFigures(job_of(row, small_manifest, tmp_path), range(3))
    assert metrics.instance is not None
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    for index, predicted in enumerate(([2], [1], [2])):  # the last picture holds nothing
        truth = (mask, [2]) if index < 2 else (mask[:0], [])
        metrics.instance.update(mask, predicted, [0.9], *truth, image_id=index)
        images.add(SimpleNamespace(index=index, name=f"p{index}"), metrics)  # type: ignore[arg-type]
    images.save(metrics)
    lines = merged_lines([images_file(tmp_path / "evaluations" / "e0", range(3))])
    assert [line["ap"] for line in lines] == [pytest.approx(1.0), 0.0, None]
    assert [(line["instances"], line["predicted_instances"]) for line in lines] == [(1, 1), (1, 1), (0, 1)]


def test_the_panoptic_quality_of_a_picture_is_not_that_of_those_before(
    small_row: Row, small_manifest: Manifest, tmp_path: Path
) -> None:
    row = dataclasses.replace(small_row, task="panoptic")
    metrics, images = TaskMetrics(row, small_manifest), ImageFigures(job_of(row, small_manifest, tmp_path), range(3))
    assert metrics.panoptic is not None
    everywhere = torch.zeros(8, 8, dtype=torch.int64)
    for index, predicted in enumerate(([1], [0], [1])):  # one segment of class 1: found, taken for class 0, found
        metrics.panoptic.update(everywhere, predicted, everywhere, [1])
        images.add(SimpleNamespace(index=index, name=f"p{index}"), metrics)  # type: ignore[arg-type]
    images.save(metrics)
    lines = merged_lines([images_file(tmp_path / "evaluations" / "e0", range(3))])
    assert [line["pq"] for line in lines] == [pytest.approx(1.0), 0.0, pytest.approx(1.0)]


def test_parts_follow_one_another_and_a_part_without_lines_leaves_no_table(tmp_path: Path) -> None:
    files = [images_file(tmp_path, part) for part in (range(2), range(2, 3))]
    write_json(files[0], [{"image": "a"}, {"image": "b"}])
    assert merged_lines(files) == []  # the other was made by an earlier version
    write_json(files[1], [{"image": "c"}])
    assert [line["image"] for line in merged_lines(files)] == ["a", "b", "c"]
