"""What rows cost on how many GPUs, worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cost.plan import NETWORKS, Settings, built_checkpoint_bytes, checkpoint_bytes, make_plan
from pipeline.cost.plan_table import text
from pipeline.data.images.sizes import ms_flip_factor
from pipeline.params.schema import Params, Row, TrainConfig
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.folder import write_result
from tests.helpers.cluster_files import filled
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
    write_benchmark(tmp_path, "mine", step_s=1.0, images=2)
    return tmp_path


def planned(params: Params, row: Row, results: Path, **settings: Any) -> dict[str, Any]:
    known = dataclasses.replace(params, rows={**params.rows, row.name: row})
    return make_plan(known, [row.name], Settings(efficiency=1.0, **settings), results=results)


def test_three_seeds_of_an_hour_side_by_side_and_one_after_the_other(params: Params, row: Row, results: Path) -> None:
    # a step of one group takes 1 s on a GPU: 3,600 steps on 8 GPUs, a group each, an hour
    plan = planned(params, row, results, gpus=16, price_per_gpu_hour=3.0)
    (entry,) = plan["rows"]
    assert (entry["seeds_left"], entry["workers"], entry["step_s"]) == (3, 8, 1.0)
    assert entry["seed_h"] == pytest.approx([0.9, 1.0, 1.15])
    assert entry["hours"] == pytest.approx([1.8, 2.0, 2.3])  # two at once, then the third
    assert entry["gpu_hours"] == pytest.approx([21.6, 24, 27.6])
    assert entry["money"] == pytest.approx([64.8, 72, 82.8])
    assert plan["total"]["hours"][1] == 2.0  # 24 GPU-hours on 16 GPUs are 1.5 h, but the row takes 2
    assert planned(params, row, results, gpus=8)["rows"][0]["hours"][1] == 3.0
    assert planned(params, row, results, gpus=32)["rows"][0]["hours"][1] == 1.0


def test_one_three_and_five_seeds_cost_as_many_times_a_seed_whatever_is_finished(
    params: Params, row: Row, results: Path
) -> None:
    # an hour on 8 GPUs and 9 s * (1 + ms+flip) * 2 checkpoints of an evaluation of 720 images; 8.0... GPU-hours a seed
    write_result(manifest(train=100, val=720), "ade20k", results=results)
    write_trained(results, row, seed(0, steps=3600, images_per_s=None))
    (entry,) = planned(params, row, results, gpus=8, price_per_gpu_hour=3.0)["rows"]
    one = 8 * (3609 + 2 * 9 * (1 + ms_flip_factor((128, 192), row.test))) / 3600
    assert entry["seeds_left"] == 2 and [*entry["by_seeds"]] == ["1", "3", "5"]
    for count, of_seeds in entry["by_seeds"].items():
        assert of_seeds["gpu_hours"] == pytest.approx(
            [0.9 * int(count) * one, int(count) * one, 1.15 * int(count) * one]
        )
        assert of_seeds["money"] == pytest.approx([3 * hours for hours in of_seeds["gpu_hours"]])
        assert of_seeds["chance"] is None  # nothing is published


def test_the_chance_to_tell_half_a_point_follows_the_spread_and_what_is_published(
    params: Params, row: Row, results: Path
) -> None:
    single = dataclasses.replace(row, published={"miou": 48.0})
    median = dataclasses.replace(single, published_trainings=5)

    def chances(of: Row, **settings: Any) -> list[float]:
        (entry,) = planned(params, of, results, **settings)["rows"]
        return [round(of_seeds["chance"], 3) for of_seeds in entry["by_seeds"].values()]

    # params.yaml assumes 1 point; a seed: Phi(0.5 / sqrt(2) - 1.6449) = Phi(-1.2913)
    assert chances(single)[0] == chances(single, spread=1.0)[0] == 0.098
    assert chances(dataclasses.replace(row, figures="published_authors")) == chances(single)  # judged by theirs
    # one seed shows no spread, so 1 is assumed, whatever it truly is: Phi((0.5 / sqrt(2) - 1.6449) / 0.3)
    assert chances(single, spread=0.3)[0] == 0.0
    # studies/verdicts.md: seeds of spread 1 show half a point in 9 and 10 % (median of 5: 10 and 13), simulated
    assert chances(single)[1:] == pytest.approx([0.09, 0.10], abs=0.01)
    assert chances(median)[1:] == pytest.approx([0.10, 0.13], abs=0.015)


def test_every_plan_of_published_rows_fits_a_hundred_columns(params: Params, tmp_path: Path) -> None:
    write_benchmark(tmp_path, "coco_panoptic_swin-b-in22k", step_s=9, images=2, device_type="cpu")
    published = [name for name, row in params.rows.items() if row.published_authors]
    for settings in (Settings(), Settings(price_per_gpu_hour=32.77, spread=0.25)):
        for names in ([], *([name] for name in published)):
            plan = make_plan(params, names, settings, results=tmp_path)
            for details in (False, True):
                assert max(map(len, text(plan, details=details).splitlines())) <= 100, names


def test_what_the_table_has_no_room_for_goes_on_below_and_details_have_steps_cost_and_evidence(
    params: Params, row: Row, results: Path
) -> None:
    plan = planned(params, row, results, gpus=16, price_per_gpu_hour=3.0)
    assert "3,600" not in text(plan) and "--details shows" in text(plan)
    (entry,) = plan["rows"]
    shown = [re.split("  +", line) for line in text(plan, details=True).splitlines()]
    assert ["mine", "3,600", "1", "72 (65 to 83)", f"benchmark, {entry['device']}"] in shown
    entry["device"] = "a processor of many words " * 4
    long = text(plan, details=True).splitlines()
    first = next(place for place, line in enumerate(long) if "benchmark, a processor" in line)
    assert long[first + 1].strip() and long[first + 1].startswith(" " * long[first].index("benchmark"))


def test_gpus_and_price_come_from_a_cluster_file_unless_they_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stages.plan import main

    cluster = filled("cluster.yaml", tmp_path, provider__price_per_hour={"p4d_24xlarge": 32.0})
    for words, expected in (([], (32, 4.0)), (["--gpus", "5"], (5, 4.0)), (["--price-per-gpu-hour", "1"], (32, 1.0))):
        command = ["plan", "cityscapes_r50", "--json", "--params", str(PROJECT / "params.yaml"), *words]
        monkeypatch.setattr("sys.argv", [*command, "--cluster", str(cluster)])
        main()
        settings = json.loads(capsys.readouterr().out)["settings"]
        assert (settings["gpus"], settings["price_per_gpu_hour"]) == expected


def test_several_rows_keep_all_gpus_busy(params: Params, row: Row, results: Path) -> None:
    write_benchmark(results, "mine too", step_s=1.0, images=2)
    rows = {name: dataclasses.replace(row, name=name) for name in ("mine", "mine too")}
    known = dataclasses.replace(params, rows=rows)
    total = make_plan(known, list(rows), Settings(efficiency=1.0, gpus=16), results=results)["total"]
    assert total["gpu_hours"][1] == 48 and total["hours"][1] == 3.0  # 48 GPU-hours on 16 GPUs


def test_groups_that_do_not_divide_evenly_make_the_others_wait(params: Params, row: Row, results: Path) -> None:
    # 8 groups on 6 GPUs: two have two groups, and a step takes as long as they do
    (entry,) = planned(params, row, results, gpus=6)["rows"]
    assert (entry["workers"], entry["step_s"]) == (6, 2.0)
    assert entry["gpu_hours"][1] == pytest.approx(6 * 2 * 3)


def test_a_row_of_sixteen_groups_takes_as_many_gpus_as_there_are(params: Params, row: Row, results: Path) -> None:
    wide = dataclasses.replace(row, train=dataclasses.replace(row.train, groups=16, group_size=1))
    # a picture takes 0.5 s, so a step 0.5 s on 16 GPUs: 30 min a seed
    (entry,) = planned(params, wide, results, gpus=16)["rows"]
    assert (entry["workers"], entry["hours"][1], entry["gpu_hours"][1]) == (16, 1.5, 24)
    (entry,) = planned(params, wide, results, gpus=8)["rows"]
    assert (entry["workers"], entry["step_s"], entry["hours"][1]) == (8, 1.0, 3.0)


def test_several_gpus_keep_a_share_of_perfect_scaling(params: Params, row: Row, results: Path) -> None:
    known = dataclasses.replace(params, rows={"mine": row})
    step_s = {
        gpus: make_plan(known, ["mine"], Settings(gpus=gpus, efficiency=0.8), results=results)["rows"][0]["step_s"]
        for gpus in (8, 1)
    }
    assert step_s == {8: 1.25, 1: 8.0}  # a single GPU loses nothing


def test_finished_and_diverged_seeds_are_not_planned_again(params: Params, row: Row, results: Path) -> None:
    seeds = [
        seed(0, steps=3600, images_per_s=16.0),
        seed(1, steps=3600, status="diverged", images_per_s=None),
        seed(2, steps=3600, status="failed", images_per_s=None),
        seed(9, steps=3600),  # no longer one of the row's
    ]
    write_trained(results, row, *seeds)
    plan = planned(params, row, results)
    assert plan["rows"][0]["seeds_left"] == 1
    # from the finished seed: 16 images/s on 4 GPUs, 0.25 s each; 2 pictures a GPU: 0.5 s a step, 0.5 h
    assert plan["rows"][0]["seed_h"] == [0.5, 0.5, 0.5]
    assert plan["total"]["hours"][1] == pytest.approx(0.5)


def test_a_seed_that_finished_after_other_steps_is_to_be_trained_again(params: Params, row: Row, results: Path) -> None:
    write_trained(results, row, seed(0, steps=1000))
    assert planned(params, row, results)["rows"][0]["seeds_left"] == 3


def test_a_seed_that_finished_with_another_precision_is_to_be_trained_again(
    params: Params, row: Row, results: Path
) -> None:
    write_trained(results, row, seed(0, steps=3600))
    assert planned(params, row, results)["rows"][0]["seeds_left"] == 2
    bf16 = dataclasses.replace(row, train=dataclasses.replace(row.train, precision="bf16"))
    assert planned(params, bf16, results)["rows"][0]["seeds_left"] == 3


def test_validations_and_the_evaluation_take_their_time(params: Params, row: Row, results: Path) -> None:
    # 720 validation pictures at 10 fps on 8 GPUs: 9 s a validation, one at the end of each seed. The evaluation shows
    # both checkpoints of 3 seeds to the network once and in 12 views.
    write_result(manifest(train=100, val=720), "ade20k", results=results)
    (entry,) = planned(params, row, results, gpus=24)["rows"]
    assert entry["seed_h"][1] == pytest.approx(3609 / 3600)
    views = ms_flip_factor((128, 192), row.test)
    assert entry["evaluation_h"][1] == pytest.approx(3 * 2 * 9 * (1 + views) / 3600)
    assert entry["hours"][1] == pytest.approx(3609 / 3600 + entry["evaluation_h"][1])
    assert entry["gpu_hours"][1] == pytest.approx(8 * (3 * 3609 / 3600 + entry["evaluation_h"][1]))


def test_finished_seeds_that_were_not_evaluated_are_and_others_are_not_again(
    params: Params, row: Row, results: Path
) -> None:
    write_result(manifest(train=100, val=720), "ade20k", results=results)
    write_trained(results, row, *(seed(number, steps=3600) for number in range(3)))
    (entry,) = planned(params, row, results)["rows"]
    assert entry["seeds_left"] == 0 and entry["hours"] == entry["evaluation_h"] and entry["evaluation_h"][1] > 0
    seeds = [evaluated_seed(number, checkpoint("semantic", 0.5)) for number in range(3)]
    write_result(evaluation(row.name, seeds), row.name, results=results)
    assert planned(params, row, results)["rows"][0]["hours"] == [0, 0, 0]


def test_shards_take_what_they_took_and_before_that_what_their_pixels_will(params: Params, tmp_path: Path) -> None:
    # raw: 4 bytes for each pixel of 22,210 pictures, usually 512 x 683
    plan = make_plan(params, ["ade20k_r50"], Settings(), results=tmp_path)
    assert plan["datasets"]["ade20k"]["shards_gib"] == pytest.approx(22_210 * 512 * 683 * 4 / 2**30)
    write_result(manifest(train=20210, val=0), "ade20k", results=tmp_path)
    plan = make_plan(params, ["ade20k_r50"], Settings(), results=tmp_path)
    assert plan["datasets"]["ade20k"]["shards_gib"] == 4.0


def test_an_archive_of_two_datasets_counts_once_and_an_unknown_size_is_said(params: Params, tmp_path: Path) -> None:
    plan = make_plan(params, ["ade20k_r50", "ade20k_panoptic_r50"], Settings(), results=tmp_path)
    shards = 2 * 22_210 * 512 * 683 * 4
    checkpoints = sum(entry["gib"] for entry in plan["rows"])
    assert plan["total"]["gib"] == pytest.approx(checkpoints + (967382037 + 90398720 + shards) / 2**30)
    plan = make_plan(params, ["vistas_r50"], Settings(), results=tmp_path)
    assert plan["total"]["gib"] == plan["rows"][0]["gib"]
    said = text(plan)
    assert "  vistas  unknown of archives, unknown of shards (encoded, to be made)" in said
    assert "GiB in all but for what is unknown, with" in said and "unknown" not in text(
        make_plan(params, ["ade20k_r50"], Settings(), results=tmp_path)
    )


@pytest.mark.slow
def test_the_size_of_a_published_rows_checkpoint_is_known_without_building_its_network(params: Params) -> None:
    rows = [
        f"ade20k_{name}" for name in ("r50", "r101", "swin-t", "swin-s", "swin-b", "swin-l-in22k", "swin-l-fapn-in22k")
    ]
    others = ["coco_instance_r50", "coco_panoptic_swin-l-in22k", "cityscapes_r50_authors"]  # other classes and queries
    for name in [*rows, *others]:
        model = params.rows[name].model
        assert checkpoint_bytes(model) == built_checkpoint_bytes(model), name
    networks = [row.model for row in params.rows.values() if row.published or row.published_authors]
    assert {(network.backbone.name, network.pixel_decoder.name) for network in networks} == {*NETWORKS}


def test_a_plan_of_all_rows_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['plan', '--json']\n"
        "try: runpy.run_module('stages.plan', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'pyarrow') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
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
    plan = make_plan(params, [], Settings(), results=tmp_path)
    published = [row for row in params.rows.values() if row.published or row.published_authors]
    assert [entry["row"] for entry in plan["rows"]] == [row.name for row in published]
    assert "shapes_tiny" not in {entry["row"] for entry in plan["rows"]}
    assert plan["total"]["seeds_left"] == sum(len(row.seeds) for row in published)
    json.dumps(plan, allow_nan=False)
    shown = text(plan)
    assert all(entry["row"] in shown for entry in plan["rows"])
    assert "On 8 GPUs that are always busy: " in shown


def test_without_names_and_tables_all_rows_are_planned_and_without_rows_there_is_one_sentence(
    params: Params, tmp_path: Path
) -> None:
    own = dataclasses.replace(params, rows={"shapes_tiny": params.row("shapes_tiny")})
    assert [entry["row"] for entry in make_plan(own, [], Settings(), results=tmp_path)["rows"]] == ["shapes_tiny"]
    with pytest.raises(ValueError, match=r"^params.yaml has no rows, so there is nothing to plan; add one to `rows`$"):
        make_plan(dataclasses.replace(params, rows={}), [], Settings(), results=tmp_path)


def test_a_row_of_unknown_speed_is_shown_and_not_counted(params: Params, tmp_path: Path) -> None:
    plan = make_plan(params, ["shapes_tiny", "cityscapes_r50"], Settings(), results=tmp_path)
    alone = make_plan(params, ["cityscapes_r50"], Settings(), results=tmp_path)
    assert plan["total"]["gpu_hours"] == alone["total"]["gpu_hours"]
    assert "not known: shapes_tiny. What measures it:\n  python -m stages.benchmark shapes_tiny" in text(plan)


def test_a_row_measured_on_a_cpu_takes_time_but_no_gpu_hours(params: Params, tmp_path: Path) -> None:
    # a machine takes all 4 groups of shapes_tiny one after the other: 4 * 0.9 s * 1,000 steps = 1 h for each of 2 seeds
    write_benchmark(tmp_path, "shapes_tiny", step_s=0.9, images=2, device_type="cpu")
    write_result(manifest(train=600, val=0, dataset="shapes"), "shapes", results=tmp_path)
    plan = make_plan(params, ["shapes_tiny"], Settings(price_per_gpu_hour=3), results=tmp_path)
    (entry,) = plan["rows"]
    assert (entry["seed_h"][1], entry["gpu_hours"], entry["money"]) == (1.0, None, None)
    assert entry["hours"][1] == 2.0
    assert plan["total"]["money"] == [0, 0, 0]
    assert "measured on a CPU" in text(plan)


def test_when_nothing_is_left_the_plan_says_so_in_figures(params: Params, row: Row, results: Path) -> None:
    write_trained(results, row, *(seed(number, steps=3600) for number in range(3)))
    plan = planned(params, row, results)  # no validation pictures, so nothing to evaluate
    assert plan["total"]["gpu_hours"] == [0, 0, 0]
    assert "0 of 3" in text(plan)


def test_a_mistyped_row_is_answered_with_the_nearest(params: Params, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row is called 'ade20k_r5'; did you mean 'ade20k_r50'"):
        make_plan(params, ["ade20k_r5"], Settings(), results=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 0}, "--gpus is 0; it must be at least 1"),
        ({"efficiency": 1.5}, "--efficiency is 1.5; it must be above 0 and at most 1"),
        ({"price_per_gpu_hour": -1.0}, "--price-per-gpu-hour is -1; it must be above 0"),
        ({"spread": 0.0}, "--spread is 0 points; it must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)
