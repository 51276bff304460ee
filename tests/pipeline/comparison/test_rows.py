from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.comparison.rows import Interval, row_facts
from pipeline.comparison.tables import table_line
from pipeline.params.schema import Params
from pipeline.storage.files import write_json
from pipeline.storage.results.rows import EvaluatedCheckpoint
from tests.helpers import made_up
from tests.helpers.report_rows import RULE, evaluated, figures, trained, written


def test_the_median_and_range_are_those_of_the_unrounded_seeds(params: Params, tmp_path: Path) -> None:
    # Percent: 71.234, 70.456, 72.9. Middle: 71.234 -> 71.23; lowest 70.456 -> 70.46; highest 72.9.
    written(tmp_path, evaluated("ours", [0.71234, 0.70456, 0.729]))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert facts.median["miou"] == 71.23
    assert facts.range["miou"] == (70.46, 72.9)
    assert [seed.figures["miou"] for seed in facts.seeds] == [71.23, 70.46, 72.9]
    assert facts.as_json()["baseline"] == {"class": "road", "miou": 6.25, "mean_accuracy": 50.0, "pixel_accuracy": 30.0}
    assert facts.status == "finished"


def test_the_median_of_an_even_number_of_seeds_is_the_mean_of_the_middle_two(params: Params, tmp_path: Path) -> None:
    # 70.004 and 71.004 would be 70.50 from rounded figures too; 70.004 and 70.014 give 70.009 -> 70.01, rounded 70.005.
    written(tmp_path, evaluated("ours", [0.70004, 0.70014]))
    assert row_facts(params.rows["ours"], tmp_path, RULE).median["miou"] == 70.01


def test_the_difference_is_ours_less_the_published_figure(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("published", [0.8]))
    facts = row_facts(params.rows["published"], tmp_path, RULE)
    assert facts.difference == {"miou": -0.44}  # 80.00 - 80.44
    assert facts.published == {"miou": 80.44, "inf_fps": 9.17, "train_mem_gib": 5.67, "device": "A100"}
    assert facts.published_authors == {"miou": 79.4, "miou_ms_flip": 82.2}


def test_a_row_of_the_authors_recipe_is_compared_with_their_figures(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("published", [0.8]))
    row = dataclasses.replace(params.rows["published"], figures="published_authors")
    facts = row_facts(row, tmp_path, RULE)
    assert facts.reference == facts.published_authors and facts.difference == {"miou": 0.6}  # 80.00 - 79.40
    (cell,) = [cell for key, cell in table_line("published", facts).items() if key == "difference miou"]
    assert cell.text == "+0.60" and "published 79.40" in facts.verdict.reason


def test_a_row_without_results_is_not_run(params: Params, tmp_path: Path) -> None:
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert (facts.status, facts.seeds, facts.median) == ("not run", (), {})


def test_a_row_that_was_only_trained_says_so(params: Params, tmp_path: Path) -> None:
    written(tmp_path, trained("ours", 3))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert (facts.status, facts.median, len(facts.seeds)) == ("trained", {}, 3)


def test_a_missing_seed_makes_a_row_incomplete(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("ours", [0.7, 0.71]))
    assert row_facts(params.rows["ours"], tmp_path, RULE).status == "incomplete"


def test_figures_of_an_earlier_training_are_out_of_date(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("ours", [0.7, 0.71, 0.72], key="old"))
    written(tmp_path, trained("ours", 3, key="new"))
    assert row_facts(params.rows["ours"], tmp_path, RULE).status == "out of date"


def test_figures_of_other_settings_than_the_rows_are_out_of_date(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("ours", [0.7, 0.71, 0.72]), trained("ours", 3))
    row = params.rows["ours"]
    assert row_facts(row, tmp_path, RULE).status == "finished"
    longer = dataclasses.replace(row, train=dataclasses.replace(row.train, steps=200))
    assert row_facts(longer, tmp_path, RULE).status == "out of date"
    assert row_facts(dataclasses.replace(row, dataset="e"), tmp_path, RULE).status == "out of date"
    logged = dataclasses.replace(row, train=dataclasses.replace(row.train, log_every=1), seeds=(0, 1, 2))
    assert row_facts(logged, tmp_path, RULE).status == "finished"  # shapes no training


def test_a_torn_result_is_named_with_the_command_that_makes_it(params: Params, tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "ours.json").write_text("{")
    with pytest.raises(ValueError, match=r"ours\.json is not JSON .*make it again with: dvc repro -f evaluate@ours"):
        row_facts(params.rows["ours"], tmp_path, RULE)


@pytest.mark.parametrize(
    ("stage", "content", "sentence"),
    [
        ("evaluate", {"decides": "last", "seeds": [], "baseline": {"class": "road", "miou": 0.1}}, "layout"),
        ("evaluate", {"version": 1, "seeds": []}, "'row' is missing"),
        ("published", {"figures": {"miou": 0.8}, "difference": -0.004}, "layout"),
        ("train", ["nothing"], ""),
        ("train", {"version": 2, "row": "ours", "dataset": "d", "seeds": []}, "'settings' is missing"),
    ],
)
def test_a_result_of_another_layout_is_named_with_the_command_that_makes_it(
    params: Params, tmp_path: Path, stage: str, content: Any, sentence: str
) -> None:
    write_json(tmp_path / stage / "ours.json", content)
    with pytest.raises(ValueError, match=rf"ours\.json.*{sentence}.* with: dvc repro -f {stage}@ours$"):
        row_facts(params.rows["ours"], tmp_path, RULE)


def test_a_checkpoint_without_a_figure_of_its_task_is_named_with_the_command_that_makes_it(
    params: Params, tmp_path: Path
) -> None:
    last = figures("semantic", 0.7)
    best = EvaluatedCheckpoint(key="e0", step=80, figures={"miou": 0.71, "pixel_accuracy": 0.9}, per_class={})
    written(tmp_path, made_up.evaluation("ours", [made_up.evaluated_seed(0, last, best)]))
    lacking = r"ours\.json has no 'mean_accuracy' of the checkpoint of step 80; .* dvc repro -f evaluate@ours$"
    with pytest.raises(ValueError, match=lacking):
        row_facts(params.rows["ours"], tmp_path, RULE)


def test_a_result_of_another_task_than_its_row_is_named(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("panoptic", [0.7]))
    with pytest.raises(ValueError, match=r"is of the task semantic, but row panoptic is panoptic now; make it again"):
        row_facts(params.rows["panoptic"], tmp_path, RULE)


def test_five_seeds_bound_their_median_with_a_coverage_of_93_75_percent(params: Params, tmp_path: Path) -> None:
    # Between the lowest and the highest of five: 1 - 2 / 2^5.
    row = dataclasses.replace(params.rows["ours"], seeds=(0, 1, 2, 3, 4))
    written(tmp_path, evaluated("ours", [0.7, 0.71, 0.72, 0.73, 0.74]))
    assert row_facts(row, tmp_path, RULE).median_interval == Interval(low=70.0, high=74.0, coverage=93.75)


def test_the_median_seed_is_the_one_nearest_to_the_median(params: Params, tmp_path: Path) -> None:
    # Of 70, 72, 74 and 71 the median is 71.5: seeds 1 and 3 are as near, and the first is taken.
    row = dataclasses.replace(params.rows["ours"], seeds=(0, 1, 2, 3))
    written(tmp_path, evaluated("ours", [0.7, 0.72, 0.74, 0.71]))
    assert row_facts(row, tmp_path, RULE).median_seed == 1
