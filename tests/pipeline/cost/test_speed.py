"""What is known of speeds, worked out by hand: from published ones, a benchmark, finished seeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.cost.plan import Settings, make_plan
from pipeline.cost.speed import estimated_gpu_hours
from pipeline.params.schema import Params
from pipeline.storage.results.folder import write_result
from tests.helpers.costs import manifest, seed, write_benchmark, write_log, write_trained


def test_without_measurements_a_step_is_three_forward_passes_at_the_published_speed(
    params: Params, tmp_path: Path
) -> None:
    # 9.17 fps at 1024 x 2048: a crop of 512 x 1024 is a quarter, three passes 3/4: 0.75 / 9.17 s per picture, and 16 in
    # each of 90,000 steps: 32.72 h. And 18 validations of 500 pictures: 9,000 / 9.17 s = 0.27 h.
    estimate = estimated_gpu_hours(params.rows["cityscapes_r50"], tmp_path)
    assert estimate is not None
    assert estimate.hours == pytest.approx(90_000 * 16 * 0.75 / 9.17 / 3600 + 9_000 / 9.17 / 3600)
    assert estimate.hours == pytest.approx(32.99, abs=0.01)
    assert estimate.source == "published speed of cityscapes_r50 on an A100, 9.17 fps"


def test_a_row_without_a_published_speed_takes_its_backbones_per_pixel(params: Params, tmp_path: Path) -> None:
    # crop 1024 x 1024, half of 1024 x 2048: 1.5 / 2.86 s per picture; val: 800 x 1088 is 0.41504 of it, 148 times 5,000
    estimate = estimated_gpu_hours(params.rows["coco_panoptic_swin-l-in22k"], tmp_path)
    assert estimate is not None
    training_h = 737_500 * 16 * 1.5 / 2.86 / 3600
    assert estimate.hours == pytest.approx(training_h + 148 * 5000 * 800 * 1088 / (1024 * 2048) / 2.86 / 3600)
    assert "published speed of swin-l" in estimate.source


def test_fapns_pixel_decoder_takes_as_many_times_longer_as_it_has_operations(params: Params, tmp_path: Path) -> None:
    fapn, default = (
        estimated_gpu_hours(params.rows[name], tmp_path) for name in ("ade20k_swin-l-fapn-in22k", "ade20k_swin-l-in22k")
    )
    assert fapn is not None and default is not None
    assert fapn.hours == pytest.approx(1.06 * default.hours)
    assert fapn.source == (
        "published speed of swin-l on an A100, 8.81 fps at 854 x 640, and 1.06 times its operations with FaPN"
    )


def test_a_row_without_a_published_speed_takes_that_of_the_row_with_its_data_and_backbone(
    params: Params, tmp_path: Path
) -> None:
    for row in params.rows.values():
        published = estimated_gpu_hours(row, tmp_path)
        other = estimated_gpu_hours(dataclasses.replace(row, published={}), tmp_path)
        if published is not None and other is not None:
            assert other.hours == pytest.approx(published.hours, rel=0.005), row.name  # 12.48 and 12.43 fps


def test_nothing_is_known_of_an_own_network_until_it_was_measured_on_a_gpu(params: Params, tmp_path: Path) -> None:
    row = params.rows["shapes_tiny"]
    assert estimated_gpu_hours(row, tmp_path) is None
    write_benchmark(tmp_path, row.name, step_s=9.0, images=2, device_type="cpu")
    assert estimated_gpu_hours(row, tmp_path) is None
    # 1,000 steps of 8 pictures at 0.5 s each: 4,000 s; shards say 90 validation pictures: 2 validations at 10 fps: 18 s
    write_benchmark(tmp_path, row.name, step_s=1.0, images=2)
    write_result(manifest(train=600, val=90, dataset="shapes"), "shapes", results=tmp_path)
    estimate = estimated_gpu_hours(row, tmp_path)
    assert estimate is not None
    assert estimate.hours == pytest.approx(4018 / 3600)
    assert estimate.source == "benchmark@shapes_tiny on NVIDIA H200"


def test_a_benchmark_replaces_published_speeds_and_finished_seeds_replace_both(params: Params, tmp_path: Path) -> None:
    row = params.rows["ade20k_r50"]
    write_benchmark(tmp_path, row.name, step_s=0.36, images=2, fps=20)
    # 160,000 * 16 * 0.18 s = 128 h, and 32 validations of 2,000 pictures at 20 fps, 3,200 s
    estimate = estimated_gpu_hours(row, tmp_path)
    assert estimate is not None and estimate.hours == pytest.approx(128 + 3200 / 3600)
    # 10 images/s on 4 GPUs: 0.4 GPU-seconds each, validations included. 2,560,000 * 0.4 s = 284.4 h
    write_trained(tmp_path, row, seed(0, steps=160_000))
    estimate = estimated_gpu_hours(row, tmp_path)
    assert estimate is not None and estimate.hours == pytest.approx(2_560_000 * 0.4 / 3600)
    assert estimate.source == "1 finished seed on NVIDIA H200"


def test_the_log_of_the_published_training_is_better_than_the_published_inference_speed(
    params: Params, tmp_path: Path
) -> None:
    # 0.4 s a step on 8 GPUs that have 2 pictures each: 160,000 * 8 * 0.4 s = 142.2 h; 32 validations of 2,000 at 26.59
    row = params.rows["ade20k_r50"]
    write_log(tmp_path, row, step_s=0.4)
    estimate = estimated_gpu_hours(row, tmp_path)
    assert estimate is not None and estimate.hours == pytest.approx((160_000 * 8 * 0.4 + 64_000 / 26.59) / 3600)
    assert estimate.source == "the log of the published training, 0.4 s a step on 8 GPUs"
    # it has the losses of eight GPUs in it already
    assert make_plan(params, [row.name], Settings(), results=tmp_path)["rows"][0]["step_s"] == 0.4
    before = estimated_gpu_hours(row, tmp_path / "elsewhere")
    write_log(tmp_path, row, step_s=None)
    assert estimated_gpu_hours(row, tmp_path) == before


def test_a_measurement_on_a_cpu_says_nothing_about_gpus(params: Params, tmp_path: Path) -> None:
    row = params.rows["ade20k_r50"]
    before = estimated_gpu_hours(row, tmp_path)
    write_benchmark(tmp_path, row.name, step_s=500.0, images=2, device_type="cpu")
    assert estimated_gpu_hours(row, tmp_path) == before


def test_a_benchmark_that_found_no_room_to_train_is_no_evidence(params: Params, tmp_path: Path) -> None:
    row = params.rows["ade20k_r50"]
    before = estimated_gpu_hours(row, tmp_path)
    write_benchmark(tmp_path, row.name, step_s=1.0, images=2, skipped="2 pictures do not fit")
    assert estimated_gpu_hours(row, tmp_path) == before


def test_a_benchmark_of_another_precision_is_no_evidence(params: Params, tmp_path: Path) -> None:
    row = params.rows["ade20k_r50"]
    before = estimated_gpu_hours(row, tmp_path)
    write_benchmark(tmp_path, row.name, step_s=1.0, images=2, precision="bf16")
    assert estimated_gpu_hours(row, tmp_path) == before
