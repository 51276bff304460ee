"""What rows cost on how many pools, worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cost.plan import Settings, checkpoint_bytes, make_plan
from pipeline.cost.plan_table import text
from pipeline.data.images.sizes import ms_flip_factor
from pipeline.params.schema import Params, Row, TrainConfig
from pipeline.storage.results import Manifest, write_result
from tests.helpers.costs import manifest, seed, write_benchmark, write_trained
from tests.helpers.made_up import checkpoint, evaluated_seed, evaluation

PROJECT = Path(__file__).resolve().parents[3]


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
    write_result(manifest(train=600, val=0, dataset="shapes"), "shapes", results=tmp_path)
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
