"""A row's own run in MLflow, from results that a row leaves: in a real database."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.comparison.rows import row_facts
from pipeline.params.schema import Params, Row, VerdictConfig
from pipeline.provenance.run_key import settings_key
from pipeline.runs.outcome import TrackedRow, evaluation_dir
from pipeline.storage.results.folder import write_result
from pipeline.tracking.client import mlflow_client
from pipeline.tracking.mlflow_runs import catch_up, log_row, open_training, track_row
from pipeline.tracking.rows import row_description, row_metrics, tracked_row
from pipeline.tracking.sender import shown_metric
from tests.helpers.made_up import checkpoint, evaluated_seed, evaluation, trained_seed, training
from tests.helpers.manifests import made_up_manifest

RULE = VerdictConfig()


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, storage: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test's own, with an empty database of MLflow's; the storage root lies in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def row(params: Params) -> Row:
    """A published row of three seeds; mIoU 60 is published, and 59 by the authors."""
    published = {"miou": 60.0, "train_mem_gib": 5.5, "inf_fps": 20.0, "device": "A100"}
    return dataclasses.replace(
        params.rows["ade20k_r50"], seeds=(0, 1, 2), published=published, published_authors={"miou": 59.0}
    )


def leave_results(row: Row, values: list[float | None]) -> Any:
    """results/ of a row whose seeds have these mIoUs; None: it diverged. The evaluated seeds."""
    ended = {"status": "diverged", "reason": "the loss is nan | in step 7"}
    trained = [trained_seed(n, **({} if value is not None else ended)) for n, value in enumerate(values)]
    evaluated = [
        evaluated_seed(
            n, checkpoint("semantic", value), **({} if value is not None else {**ended, "checkpoints": None})
        )
        for n, value in enumerate(values)
    ]
    write_result(training(row.name, trained, settings_key(row)), row.name)
    result = evaluation(row.name, evaluated, parameters=44_000_000)
    write_result(result, row.name)
    return result


def run_of(run_id: str | None) -> Any:
    assert run_id is not None
    return mlflow_client().get_run(run_id)


def test_a_rows_run_has_its_settings_as_parameters_and_its_figures_beside_the_published_ones(row: Row) -> None:
    result = leave_results(row, [0.61, 0.625, 0.6])
    ids = track_row(row, result.seeds, manifest=made_up_manifest(dataset="ade20k"), verdict=RULE)
    run = run_of(ids[row.name])
    assert run.info.run_name == "ade20k_r50" and run.info.status == "FINISHED"
    assert run.data.params == {
        "row": "ade20k_r50",
        "task": "semantic",
        "dataset": "ade20k",
        "backbone": "r50",
        "weights": "torchvision_r50",
        "crop": "512 x 512",
        "steps": "160000",
        "batch": "16",
        "learning_rate": "0.0001",
    }
    # percent: 60, 61 and 62.5, of which 61 is in the middle and 1 above what is published
    expected = {
        "test/miou_median": 61.0,
        "test/miou_lowest": 60.0,
        "test/miou_highest": 62.5,
        "published/miou": 60.0,
        "published/memory_gib": 5.5,
        "published/images_per_s": 20.0,
        "authors/miou": 59.0,
        "difference/miou": 1.0,
        "cost/parameters_million": 44.0,
        "cost/training_images_per_s": 10.0,
        "cost/training_hours": 0.0208,  # of 75 s; on a CPU there are no GPU-hours
    }
    assert expected.items() <= run.data.metrics.items()
    assert "cost/gpu_hours" not in run.data.metrics
    tags = {"m2f.task": "semantic", "m2f.verdict": "undecided", "m2f.seeds": "3 finished", "m2f.run_type": "row"}
    assert tags.items() <= run.data.tags.items()


def test_the_description_of_a_rows_run_has_the_verdict_and_a_line_for_every_seed(row: Row) -> None:
    result = leave_results(row, [0.61, None, 0.6])
    ids = track_row(row, result.seeds, verdict=RULE)
    lines = run_of(ids[row.name]).data.tags["mlflow.note.content"].splitlines()
    assert lines[0].startswith("**undecided** (incomplete): The median of 2 seeds, 60.50, is 0.50 above the published")
    assert "| mIoU | 60.50 | 60.00 to 61.00 | 60.00 | +0.50 | 59.00 |" in lines
    (failed,) = [line for line in lines if line.startswith("| 1 |")]
    assert "diverged: the loss is nan / in step 7" in failed  # a bar would end the cell
    assert failed.count("|") == lines[lines.index(failed) - 3].count("|") > 4  # as many cells as the headings have


def test_a_description_that_would_be_too_long_for_mlflow_says_how_many_seeds_it_leaves_out(row: Row) -> None:
    row = dataclasses.replace(row, seeds=tuple(range(200)))
    leave_results(row, [0.6] * 200)
    text = row_description(row_facts(row, Path("results"), RULE))
    shown = sum(line.startswith("| ") and line[2].isdigit() for line in text.splitlines())
    assert len(text) < 8000 and 20 < shown < 200
    assert text.rstrip().endswith(f"{200 - shown} more seeds: the report has them (python -m stages.report)")


def test_rows_of_one_name_and_other_settings_are_two_lines_of_the_table(row: Row) -> None:
    longer = dataclasses.replace(row, train=dataclasses.replace(row.train, steps=320_000))
    quiet = dataclasses.replace(row, train=dataclasses.replace(row.train, log_every=7), published={"miou": 1.0})
    first, second, third = (
        log_row(each, tracked_row(each, None), statuses=["finished"]) for each in (row, longer, quiet)
    )
    assert first != second and first == third  # how often it logs is no setting that counts
    assert [run_of(run).data.params["steps"] for run in (first, second)] == ["160000", "320000"]


def test_seeds_lie_below_the_run_of_their_rows_settings(row: Row, storage: Path) -> None:
    longer = dataclasses.replace(row, train=dataclasses.replace(row.train, steps=320_000))
    manifest = made_up_manifest(dataset="ade20k")
    runs = [
        open_training(storage / "runs" / key, each, seed=0, run_key=key, manifest=manifest, workers=1)
        for key, each in (("k0", row), ("k1", longer))
    ]
    parents = [run_of(run).data.tags["mlflow.parentRunId"] for run in runs]
    assert [run_of(parent).data.params["steps"] for parent in parents] == ["160000", "320000"]
    assert run_of(runs[0]).data.params["backbone"] == "r50"  # so that columns are of rows and seeds


def test_a_run_lists_the_splits_of_its_data_set_once(row: Row, storage: Path) -> None:
    manifest = made_up_manifest(dataset="ade20k")
    for _ in range(2):
        run_id = open_training(storage / "runs/k0", row, seed=0, run_key="k0", manifest=manifest, workers=1)
    run = run_of(run_id)
    for each in (run, run_of(run.data.tags["mlflow.parentRunId"])):
        inputs = {entry.dataset.name: entry for entry in each.inputs.dataset_inputs}
        assert set(inputs) == {"ade20k train", "ade20k val"} and len(each.inputs.dataset_inputs) == 2
        val = inputs["ade20k val"]
        assert val.dataset.digest == manifest.digest[:16] and val.dataset.source_type == "local"
        assert val.dataset.source == f'{{"uri": "{storage}/shards/5a5a"}}'
        assert {(tag.key, tag.value) for tag in val.tags} == {("mlflow.data.context", "val")}
        assert '"images": 1' in val.dataset.profile and '"mine.zip": "0b' in val.dataset.profile


def test_a_row_without_an_evaluation_shows_what_is_published_and_no_figures_of_its_own(row: Row) -> None:
    write_result(training(row.name, [trained_seed(0)]), row.name)
    metrics = row_metrics(row_facts(row, Path("results"), RULE))
    assert metrics["published/miou"] == 60.0
    assert not [name for name in metrics if name.startswith(("test/", "difference/"))]


def test_a_result_that_cannot_be_read_costs_the_comparison_and_nothing_else(
    row: Row, capsys: pytest.CaptureFixture[str]
) -> None:
    result = leave_results(row, [0.61])
    Path("results/benchmark").mkdir()
    Path("results/benchmark/ade20k_r50.json").write_text("{")
    run = run_of(track_row(row, result.seeds, verdict=RULE)[row.name])
    assert run.info.status == "FINISHED" and "m2f.verdict" not in run.data.tags
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: row ade20k_r50 is not compared with its published figures in MLflow")
    assert "ade20k_r50.json is not JSON" in warning


def test_a_run_folder_of_an_earlier_version_joins_the_rows_run(row: Row, storage: Path) -> None:
    folder = storage / "runs/k0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        '{"dataset": "ade20k", "row": "ade20k_r50", "name": "seed 0 of ade20k_r50", "run_key": "k0", '
        '"params": {"seed": 0}, "tags": {"m2f.seed": "0"}, "opened_ms": 5}'
    )
    (folder / "curve.jsonl").write_text('{"step": 5, "val_miou": 0.5, "aux3.loss_dice": 1.0, "time_ms": 7}\n')
    result = leave_results(row, [0.61])
    assert not evaluation_dir(folder, "e0").exists()
    ids = track_row(row, result.seeds, verdict=RULE)
    run = run_of(ids["k0"])
    assert run.data.tags["mlflow.parentRunId"] == ids[row.name]
    assert run.data.metrics == {"val/miou": 50.0} and run.data.params["backbone"] == "r50"


def test_the_seeds_of_a_renamed_row_lie_below_its_run_under_its_name(row: Row, storage: Path) -> None:
    manifest, new = made_up_manifest(dataset="ade20k"), dataclasses.replace(row, name="longer_name")
    old = open_training(storage / "runs/k0", row, seed=0, run_key="k0", manifest=manifest, workers=1)
    leave_results(row, [0.6]), leave_results(new, [0.6])
    seeds = [trained_seed(0)]
    for _ in range(2):  # both rows are there: each has its own
        before, after = (track_row(each, seeds, manifest=manifest, verdict=RULE) for each in (row, new))
        assert before["k0"] == old
        for ids, name in ((before, row.name), (after, "longer_name")):
            tags = run_of(ids["k0"]).data.tags
            assert (tags["m2f.row"], tags["mlflow.parentRunId"]) == (name, ids[name])
            assert tags["mlflow.source.name"] == f"stages.train {name}"
            assert run_of(ids["k0"]).info.run_name == f"seed 0 of {name}"
            assert run_of(ids["k0"]).data.params["row"] == name
    assert len({*before.values(), *after.values()}) == 4


def test_trainings_of_earlier_settings_are_not_shown_as_figures_of_the_present_ones(row: Row, storage: Path) -> None:
    manifest = made_up_manifest(dataset="ade20k")
    seeds = leave_results(row, [0.6]).seeds
    open_training(storage / "runs/k0", row, seed=0, run_key="k0", manifest=manifest, workers=1)
    ids = track_row(row, seeds, manifest=manifest, verdict=RULE)
    longer = dataclasses.replace(row, train=dataclasses.replace(row.train, steps=320_000))
    assert track_row(longer, seeds, manifest=manifest, verdict=RULE, stale=True) == {"k0": ids["k0"]}
    client = mlflow_client()
    (experiment,) = [each.experiment_id for each in client.search_experiments() if each.name == "mask2former"]
    assert {run.info.run_id for run in client.search_runs([experiment])} == set(ids.values())
    assert run_of(ids["k0"]).data.tags["mlflow.parentRunId"] == ids[row.name]


def test_of_a_folder_alone_nothing_is_known_of_its_row(storage: Path) -> None:
    assert catch_up(storage / "runs/k0", of_row=TrackedRow(settings="s", params={}, data=())) is None


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("val_miou", 0.57, ("val/miou", 57.0)),  # 100 * 0.57 is 56.99999999999999
        ("test_pq_things", 0.58572, ("test/pq_things", 58.572)),
        ("loss_dice", 0.5, ("train/loss_dice", 0.5)),
        ("system/gpu_0_power_usage_watts", 300.0, ("system/gpu_0_power_usage_watts", 300.0)),
        ("aux8.loss_dice", 0.5, None),
    ],
)
def test_values_get_the_section_of_charts_that_they_belong_to_and_figures_are_percent(
    name: str, value: float, shown: tuple[str, float] | None
) -> None:
    assert shown_metric(name, value) == shown
