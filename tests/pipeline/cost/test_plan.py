"""What rows cost, worked out by hand: from published speeds, a benchmark, finished seeds; and on how many pools."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cost.plan import Settings, checkpoint_bytes, make_plan
from pipeline.cost.plan_table import text
from pipeline.cost.speed import estimated_gpu_hours
from pipeline.data.images.sizes import counted, input_size, ms_flip_factor
from pipeline.params.load import load_params
from pipeline.params.schema import Params, Row, TrainConfig
from pipeline.storage.results import Manifest, PictureSizes, Split, TrainedSeed, write_result
from tests.helpers.made_up import (
    A100,
    CPU,
    benchmark,
    checkpoint,
    evaluated_seed,
    evaluation,
    padded,
    published_evaluation,
    trained_seed,
    training,
)
from tests.helpers.manifests import made_up_manifest

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(PROJECT / "params.yaml")


def write(results: Path, stage: str, name: str, value: Any) -> None:
    path = results / stage / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


H200 = dataclasses.replace(A100, device="NVIDIA H200")


def write_benchmark(
    results: Path, row: str, *, step_s: float, pictures: int, fps: float = 10.0, kind: str = "cuda", **fields: Any
) -> None:
    """A benchmark, as far as a plan reads it."""
    environment = H200 if kind == "cuda" else dataclasses.replace(CPU, device="AMD EPYC")
    made = benchmark(row, environment=environment, fps=fps, step_s=step_s, pictures=pictures, **fields)
    write_result(made, row, results=results)


def write_trained(results: Path, row: str, *seeds: TrainedSeed) -> None:
    write_result(training(row, seeds), row, results=results)


def seed(number: int, *, status: str = "finished", steps: int, images_per_s: float | None = 10.0) -> TrainedSeed:
    """A training on 4 GPUs, as far as a plan reads it."""
    return trained_seed(number, status=status, steps=steps, workers=4, images_per_s=images_per_s, environment=H200)


def write_log(results: Path, row: Row, *, step_s: float | None) -> None:
    """A published checkpoint's evaluation, with the step time of its log."""
    made = published_evaluation(row.name, padded(checkpoint("semantic", 0.5)), step_s=step_s)
    write_result(made, row.name, results=results)


def manifest(*, train: int, val: int) -> Manifest:
    """Of so many pictures; a plan reads no more of it than is said here."""
    sides = PictureSizes(height=(100, 128, 200), width=(100, 192, 300))
    return made_up_manifest(
        splits={"train": Split(records=train, shards=()), "val": Split(records=val, shards=())},
        picture_sizes={"train": sides, "val": sides},
        bytes={"train": 3 * 2**30, "val": 2**30},
    )


# Sizes


def test_a_picture_is_shown_at_the_rows_short_side_and_padded(params: Params) -> None:
    # 512 x 683 stays as it is: 512 x 704. 480 x 640: short side 800, so 800 x 1066.7 -> 1067, padded to 1088; the
    # 640 x 640 rows are not padded: 640 x 853.75 -> 854.
    assert input_size((512, 683), params.rows["ade20k_r50"].test) == (512, 704)
    assert input_size((480, 640), params.rows["coco_panoptic_r50"].test) == (800, 1088)
    assert input_size((512, 683), params.rows["ade20k_swin-b"].test) == (640, 854)
    # 400 x 1600: the long side stops at 1333, 333.25 x 1333 -> 333 x 1333 -> 352 x 1344
    assert input_size((400, 1600), params.rows["coco_panoptic_r50"].test) == (352, 1344)


def test_ms_flip_costs_as_many_pictures_as_its_views_have_pixels(params: Params) -> None:
    # Cityscapes: six sizes of 0.5 to 1.75, each also mirrored: 2 * (0.25 + 0.5625 + 1 + 1.5625 + 2.25 + 3.0625)
    assert ms_flip_factor((1024, 2048), params.rows["cityscapes_r50"].test) == 17.375
    assert ms_flip_factor((480, 640), params.rows["coco_panoptic_r50"].test) == 0


def test_pictures_are_counted_by_shards_where_there_are_some() -> None:
    published = counted("ade20k", None)
    assert published is not None and (published.train, published.val) == (20210, 2000)
    made = counted("ade20k", manifest(train=7, val=3))
    assert made is not None and (made.train, made.val, made.usual) == (7, 3, (128, 192))
    assert counted("mine", None) is None


# Estimates


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


def test_nothing_is_known_of_an_own_network_until_it_was_measured_on_a_gpu(params: Params, tmp_path: Path) -> None:
    row = params.rows["shapes_tiny"]
    assert estimated_gpu_hours(row, tmp_path) is None
    write_benchmark(tmp_path, row.name, step_s=9.0, pictures=2, kind="cpu")
    assert estimated_gpu_hours(row, tmp_path) is None
    # 1,000 steps of 8 pictures at 0.5 s each: 4,000 s; shards say 90 validation pictures: 2 validations at 10 fps: 18 s
    write_benchmark(tmp_path, row.name, step_s=1.0, pictures=2)
    write_result(manifest(train=600, val=90), "shapes", results=tmp_path)
    estimate = estimated_gpu_hours(row, tmp_path)
    assert estimate is not None
    assert estimate.hours == pytest.approx(4018 / 3600)
    assert estimate.source == "benchmark@shapes_tiny on NVIDIA H200"


def test_a_benchmark_replaces_published_speeds_and_finished_seeds_replace_both(params: Params, tmp_path: Path) -> None:
    row = params.rows["ade20k_r50"]
    write_benchmark(tmp_path, row.name, step_s=0.36, pictures=2, fps=20)
    # 160,000 * 16 * 0.18 s = 128 h, and 32 validations of 2,000 pictures at 20 fps, 3,200 s
    estimate = estimated_gpu_hours(row, tmp_path)
    assert estimate is not None and estimate.hours == pytest.approx(128 + 3200 / 3600)
    # 10 images/s on 4 GPUs: 0.4 GPU-seconds each, validations included. 2,560,000 * 0.4 s = 284.4 h
    write_trained(tmp_path, row.name, seed(0, steps=160_000))
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
    write_benchmark(tmp_path, row.name, step_s=500.0, pictures=2, kind="cpu")
    assert estimated_gpu_hours(row, tmp_path) == before


def test_a_benchmark_that_found_no_room_to_train_is_no_evidence(params: Params, tmp_path: Path) -> None:
    row = params.rows["ade20k_r50"]
    before = estimated_gpu_hours(row, tmp_path)
    write_benchmark(tmp_path, row.name, step_s=1.0, pictures=2, skipped="2 pictures do not fit")
    assert estimated_gpu_hours(row, tmp_path) == before


# Plans


@pytest.fixture
def row(params: Params) -> Row:
    """A row of 3 seeds, 8 groups of 2 pictures, 3,600 steps, on a dataset that is sharded."""
    base = params.rows["ade20k_r50"]
    train: TrainConfig = dataclasses.replace(base.train, steps=3600, val_interval=3600, checkpoint_interval=360)
    return dataclasses.replace(base, name="mine", train=train, seeds=(0, 1, 2), published={})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The row's shards are made and hold no validation pictures; a step of one group took a second on a GPU."""
    write_result(manifest(train=100, val=0), "ade20k", results=tmp_path)
    write_benchmark(tmp_path, "mine", step_s=1.0, pictures=2)
    return tmp_path


def planned(params: Params, row: Row, results: Path, **settings: Any) -> dict[str, Any]:
    known = dataclasses.replace(params, rows={**params.rows, row.name: row})
    return make_plan(known, [row.name], Settings(efficiency=1.0, **settings), results=results)


def test_three_seeds_of_an_hour_on_two_pools_take_two_hours_and_what_is_used_is_paid(
    params: Params, row: Row, results: Path
) -> None:
    # 3,600 steps; each of 8 GPUs has one group, so a second a step: 1 h a seed, 8 GPU-hours
    plan = planned(params, row, results, pools=2, price_per_gpu_hour=2.5)
    (entry,) = plan["rows"]
    assert (entry["step_s"], entry["seed_h"][1], entry["workers"]) == (1.0, 1.0, 8)
    assert entry["gpu_hours"] == pytest.approx([0.9 * 24, 24, 1.15 * 24])
    assert plan["total"]["money"] == pytest.approx([0.9 * 60, 60, 1.15 * 60])
    assert plan["total"]["ends_h"] == pytest.approx([1.8, 2, 2.3])
    assert plan["total"]["utilisation"] == [1.0, 0.5]
    assert plan["total"]["steps"] == 10_800


def test_groups_that_do_not_divide_evenly_make_the_others_wait(params: Params, row: Row, results: Path) -> None:
    # 8 groups on 3 GPUs: 3, 3 and 2, so 3 s a step; 3 h a seed, and 9 GPU-hours for 8 hours of work
    (entry,) = planned(params, row, results, pool_gpus=3)["rows"]
    assert entry["step_s"] == 3.0
    assert entry["gpu_hours"][1] == pytest.approx(3 * 9)


def test_a_pool_is_paid_whole_although_the_row_uses_half_of_it(params: Params, row: Row, results: Path) -> None:
    # 16 GPUs, 8 groups: 8 workers, 1 h a seed
    (entry,) = planned(params, row, results, pool_gpus=16, price_per_pool_hour=40)["rows"]
    assert (entry["workers"], entry["gpu_hours"][1], entry["money"][1]) == (8, 48, 120)


def test_a_row_of_sixteen_groups_takes_two_pools_and_one_where_there_is_only_one(
    params: Params, row: Row, results: Path
) -> None:
    wide = dataclasses.replace(row, train=dataclasses.replace(row.train, groups=16, group_size=1))
    # a picture takes 0.5 s, so a step 0.5 s on two pools: 30 min a seed, one after the other
    plan = planned(params, wide, results, pools=3)
    assert (plan["rows"][0]["pools"], plan["rows"][0]["workers"]) == (2, 16)
    assert plan["total"]["ends_h"][1] == pytest.approx(1.5)
    assert plan["rows"][0]["gpu_hours"][1] == pytest.approx(1.5 * 16)
    # on one pool every GPU takes two of the groups
    plan = planned(params, wide, results, pools=1)
    assert (plan["rows"][0]["pools"], plan["rows"][0]["step_s"]) == (1, 1.0)
    assert plan["total"]["ends_h"][1] == pytest.approx(3)


def test_finished_and_diverged_seeds_are_not_planned_again(params: Params, row: Row, results: Path) -> None:
    seeds = [
        seed(0, steps=3600, images_per_s=16.0),
        seed(1, steps=3600, status="diverged", images_per_s=None),
        seed(2, steps=3600, status="failed", images_per_s=None),
        seed(9, steps=3600),  # no longer one of the row's
    ]
    write_trained(results, row.name, *seeds)
    plan = planned(params, row, results)
    assert plan["rows"][0]["seeds_left"] == 1
    # from the finished seed: 16 images/s on 4 GPUs, 0.25 s each; 2 pictures a GPU: 0.5 s a step, 0.5 h
    assert plan["rows"][0]["seed_h"] == [0.5, 0.5, 0.5]
    assert plan["total"]["ends_h"][1] == pytest.approx(0.5)


def test_a_seed_that_finished_after_other_steps_is_to_be_trained_again(params: Params, row: Row, results: Path) -> None:
    write_trained(results, row.name, seed(0, steps=1000))
    assert planned(params, row, results)["rows"][0]["seeds_left"] == 3


def test_validations_and_the_evaluation_take_their_time(params: Params, row: Row, results: Path) -> None:
    # 720 validation pictures at 10 fps on 8 GPUs: 9 s a validation, one at the end of each seed. The evaluation shows
    # both checkpoints of 3 seeds to the network once and in 12 views.
    write_result(manifest(train=100, val=720), "ade20k", results=results)
    plan = planned(params, row, results, pools=3)
    assert plan["rows"][0]["seed_h"][1] == pytest.approx(3609 / 3600)
    views = ms_flip_factor((128, 192), row.test)
    assert plan["rows"][0]["evaluation_h"][1] == pytest.approx(3 * 2 * 9 * (1 + views) / 3600)
    assert plan["total"]["ends_h"][1] == pytest.approx(3609 / 3600 + plan["rows"][0]["evaluation_h"][1])
    assert [job["what"] for job in plan["schedule"]] == ["train"] * 3 + ["evaluate"]


def test_finished_seeds_that_were_not_evaluated_are_and_others_are_not_again(
    params: Params, row: Row, results: Path
) -> None:
    write_result(manifest(train=100, val=720), "ade20k", results=results)
    write_trained(results, row.name, *(seed(number, steps=3600) for number in range(3)))
    plan = planned(params, row, results)
    assert [(job["what"], job["start_h"]) for job in plan["schedule"]] == [("evaluate", 0)]
    assert plan["rows"][0]["evaluation_h"][1] > 0
    seeds = [evaluated_seed(number, checkpoint("semantic", 0.5)) for number in range(3)]
    write_result(evaluation(row.name, seeds), row.name, results=results)
    assert planned(params, row, results)["schedule"] == []


def test_an_interrupted_plan_counts_work_that_is_done_again(params: Params, row: Row, results: Path) -> None:
    plan = planned(params, row, results, preemption_hours=0.5, restart_minutes=6)
    # 3 h of work, lost every half hour: some 6 times, each for 6 min and half of a checkpoint's 6 min
    assert 2 < plan["total"]["preempted"] < 14
    assert plan["total"]["ends_h"][1] == pytest.approx(3 + 0.15 * plan["total"]["preempted"], abs=0.3)
    assert plan == planned(params, row, results, preemption_hours=0.5, restart_minutes=6)


def test_trainings_wait_for_the_download_and_the_shards_of_their_dataset(params: Params, tmp_path: Path) -> None:
    # ADE20K: 967,382,037 bytes at 10 MiB/s are 92.26 s; 22,210 pictures of 512 x 683 at 18 Mpx/s on 4 cores 107.87 s
    settings = Settings(download_mib_s=10, cores=4)
    plan = make_plan(params, ["ade20k_r50"], settings, results=tmp_path)
    ready_h = (967_382_037 / (10 * 2**20) + 22_210 * 512 * 683 / 72e6) / 3600
    assert plan["datasets"]["ade20k"]["ready_h"] == pytest.approx(ready_h)
    assert plan["schedule"][0]["start_h"] == pytest.approx(ready_h)
    # raw: 4 bytes a pixel
    assert plan["datasets"]["ade20k"]["shards_gib"] == pytest.approx(22_210 * 512 * 683 * 4 / 2**30)
    write_result(manifest(train=20210, val=0), "ade20k", results=tmp_path)
    plan = make_plan(params, ["ade20k_r50"], settings, results=tmp_path)
    assert (plan["datasets"]["ade20k"]["shards_gib"], plan["schedule"][0]["start_h"]) == (4.0, 0.0)


def test_a_checkpoint_holds_weights_and_two_moments_of_what_is_trained(
    two_steps: Row, small_data: tuple[Path, Manifest]
) -> None:
    from pipeline.training.seeds import train_row
    from tests.pipeline.conftest import NO_WEIGHTS

    (trained,) = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    from pipeline.storage.root import stored

    assert trained.checkpoints is not None
    path = stored(f"{trained.run_dir}/{trained.checkpoints.last.path}", made_by="")
    expected = checkpoint_bytes(two_steps.model)
    assert expected <= path.stat().st_size < 1.01 * expected + 100_000  # and a header with the entries' names


def test_without_names_all_rows_of_the_tables_are_planned(params: Params, tmp_path: Path) -> None:
    plan = make_plan(params, [], Settings(pools=2), results=tmp_path)
    assert len(plan["rows"]) == 27
    assert "shapes_tiny" not in {entry["row"] for entry in plan["rows"]}
    assert plan["total"]["seeds_left"] == 13 * 5 + 14
    json.dumps(plan, allow_nan=False)
    shown = text(plan)
    assert all(entry["row"] in shown for entry in plan["rows"])
    assert max(len(line) for line in shown.splitlines() if line.startswith("pool")) == 73


def test_a_row_of_unknown_speed_is_shown_and_not_counted(params: Params, tmp_path: Path) -> None:
    plan = make_plan(params, ["shapes_tiny", "cityscapes_r50"], Settings(), results=tmp_path)
    alone = make_plan(params, ["cityscapes_r50"], Settings(), results=tmp_path)
    assert plan["total"]["gpu_hours"] == alone["total"]["gpu_hours"]
    assert "python -m stages.benchmark shapes_tiny measures it" in text(plan)


def test_a_row_measured_on_a_cpu_takes_time_but_no_gpu_hours(params: Params, tmp_path: Path) -> None:
    # a machine takes all 4 groups of shapes_tiny one after the other: 4 * 0.9 s * 1,000 steps = 1 h for each of 2 seeds
    write_benchmark(tmp_path, "shapes_tiny", step_s=0.9, pictures=2, kind="cpu")
    write_result(manifest(train=600, val=0), "shapes", results=tmp_path)
    plan = make_plan(params, ["shapes_tiny"], Settings(pools=1, price_per_gpu_hour=3), results=tmp_path)
    (entry,) = plan["rows"]
    assert (entry["seed_h"][1], entry["gpu_hours"], entry["money"]) == (1.0, None, None)
    assert plan["total"]["ends_h"][1] == 2.0
    assert plan["total"]["money"] == [0, 0, 0]
    assert "measured on a CPU" in text(plan)


def test_when_nothing_is_left_the_plan_says_so_in_figures(params: Params, row: Row, results: Path) -> None:
    write_trained(results, row.name, *(seed(number, steps=3600) for number in range(3)))
    plan = planned(params, row, results)  # no validation pictures, so nothing to evaluate
    assert plan["total"]["gpu_hours"] == [0, 0, 0]
    assert "0 of 3" in text(plan)


def test_a_mistyped_row_is_answered_with_the_nearest(params: Params, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row is called 'ade20k_r5'; did you mean 'ade20k_r50'"):
        make_plan(params, ["ade20k_r5"], Settings(), results=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pools": 0}, "--pools is 0; it must be at least 1"),
        ({"pool_gpus": 0}, "--pool-gpus is 0; it must be at least 1"),
        ({"efficiency": 1.5}, "--efficiency is 1.5; it must be above 0 and at most 1"),
        ({"price_per_gpu_hour": -1.0}, "--price-per-gpu-hour is -1; it must be above 0"),
        ({"preemption_hours": 0.0}, "--preemption-hours is 0; it must be above 0"),
        ({"price_per_gpu_hour": 1.0, "price_per_pool_hour": 8.0}, "or --price-per-pool-hour, not both"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)
