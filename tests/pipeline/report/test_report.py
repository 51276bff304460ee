from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.loader.val_pictures import Picture
from pipeline.evaluation.overlays import write_overlay
from pipeline.evaluation.task_metrics import Outcome
from pipeline.params.load import parse_params
from pipeline.params.schema import Params, VerdictConfig
from pipeline.params.tasks import FIGURES
from pipeline.report.html.svg import thinned, ticks
from pipeline.report.html.thumbnails import panels
from pipeline.report.rows import Interval, counts, row_facts
from pipeline.report.sentences import attention
from pipeline.report.tables import table_line
from pipeline.report.text import markdown, text_table
from pipeline.report.write import write_report
from pipeline.storage.files import write_json
from pipeline.storage.results import (
    Accepted,
    Aliases,
    Baseline,
    Benchmark,
    BestVersion,
    EvaluatedCheckpoint,
    EvaluatedSeed,
    Evaluation,
    PublishedEvaluation,
    RegisteredVersion,
    Registration,
    TrainingResult,
    write_result,
)
from tests.helpers import made_up
from tests.helpers.manifests import made_up_manifest
from tests.helpers.report_results import PageParser

AUGMENTATION = {"crop": [64, 64], "short_sides": [64], "long_side_max": 128}
ROW = {
    "dataset": "d",
    "weights": "none",
    "model": {"num_classes": 2},
    "train": {"steps": 100, "augmentation": AUGMENTATION},
    "test": {"short_side": 64, "long_side_max": 128},
}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
RULE = VerdictConfig()
METRICS = {"semantic": ["iou"], "panoptic": ["pq", "ap", "iou"], "instance": ["ap"]}


@pytest.fixture
def params() -> Params:
    return parse_params(
        {
            "datasets": {
                "d": {"layout": "folder", "class_names": ["road", "<sky>"], "thing_classes": ["car", "cup"]},
            },
            "rows": {
                "ours": {**ROW, "seeds": [0, 1, 2]},
                "published": {
                    **ROW,
                    "published": {"miou": 80.44, "inf_fps": 9.17, "train_mem_gib": 5.67, "device": "A100"},
                    "published_authors": {"miou": 79.4, "miou_ms_flip": 82.2},
                },
                "panoptic": {
                    **ROW,
                    "task": "panoptic",
                    "seeds": [0, 1, 2],
                    "published": {"pq": 52.0, "ap": 41.8},
                    "published_authors": {"pq": 51.9, "ap": 41.7, "miou": 61.7},
                },
                "instance": {
                    **ROW,
                    "task": "instance",
                    "seeds": [0, 1, 2],
                    "checkpoint_rule": "best",
                    "published_authors": {"ap": 43.7},
                },
            },
        }
    )


def figures(task: str, value: float, **others: Any) -> EvaluatedCheckpoint:
    """A checkpoint whose every figure is `value`, but for the given ones and the pixel accuracy."""
    own: dict[str, Any] = {"pixel_accuracy": 0.9} if task == "semantic" else {}
    per_class = {metric: {"road": value, "<sky>": None} for metric in METRICS[task]}
    return made_up.checkpoint(task, value, **{"per_class": per_class, **own, **others})


def evaluated(
    row: str,
    values: Sequence[float | EvaluatedCheckpoint | None],
    *,
    task: str = "semantic",
    key: str = "k",
    rule: str = "unknown",
    **fields: Any,
) -> Evaluation:
    """Evaluation of seeds 0, 1, ...: the last checkpoint's primary figure, or that checkpoint; None: diverged.

    The best on validation has a point more, at step 80.
    """
    seeds = []
    for seed, value in enumerate(values):
        if value is None:
            reason = "the loss is not finite at step 7"
            seeds.append(ended(seed, "diverged", reason, key=key))
        else:
            last = value if isinstance(value, EvaluatedCheckpoint) else figures(task, value)
            best = figures(task, (last.figures[FIGURES[task][0]] or 0.0) + 0.01, step=80)
            seeds.append(made_up.evaluated_seed(seed, last, best, key=key))
    baseline = {"miou": 0.0625, "mean_accuracy": 0.5, "pixel_accuracy": 0.3}
    of_rule = {"checkpoint_rule": rule, "decides": "best" if rule == "best" else "last"}
    fields = {"baseline": Baseline(class_name="road", figures=baseline) if task == "semantic" else None, **fields}
    return made_up.evaluation(row, seeds, task=task, **of_rule, **fields)


def ended(seed: int, status: Any, reason: str, *, key: str = "k") -> EvaluatedSeed:
    """A seed that did not finish."""
    return EvaluatedSeed(seed=seed, run_key=f"{key}{seed}", status=status, reason=reason, mlflow_run_id=None)


def trained(row: str, seeds: int, key: str = "k", **of_each: Any) -> TrainingResult:
    return made_up.training(row, [made_up.trained_seed(seed, key=key, **of_each) for seed in range(seeds)])


def written(results: Path, *made: Any) -> None:
    """Write results of rows as their stages do."""
    for each in made:
        write_result(each, each.row, results=results)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def published(
    row: str,
    task: str,
    checkpoint: EvaluatedCheckpoint,
    *,
    difference: Mapping[str, float] | None = None,
    pad_multiple: int = 1,
    **fields: Any,
) -> PublishedEvaluation:
    """Evaluation of a published checkpoint, unpadded only."""
    theirs = made_up.padded(checkpoint, difference=difference, pad_multiple=pad_multiple)
    return made_up.published_evaluation(row, theirs, task=task, **fields)


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


def test_a_difference_that_rounds_to_nothing_has_no_minus(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("published", [0.804399]))  # 80.4399 - 80.44
    facts = row_facts(params.rows["published"], tmp_path, RULE)
    assert str(facts.difference["miou"]) == "0.0"
    assert table_line("published", facts)["difference miou"].text == "+0.00"


def test_multi_scale_and_flip_stands_beside_the_authors(params: Params, tmp_path: Path) -> None:
    checkpoint = figures("semantic", 0.8, miou_ms_flip=0.815)
    written(tmp_path, evaluated("published", [checkpoint]))
    facts = row_facts(params.rows["published"], tmp_path, RULE)
    assert facts.median["miou_ms_flip"] == 81.5
    assert facts.difference == {"miou": -0.44}  # the authors' 82.2 is not judged against
    text = markdown({"published": facts})
    assert (
        "| Row | Verdict | mIoU | seeds | published | difference | mIoU authors' | mIoU (ms+flip) "
        "| mIoU (ms+flip) authors' | memory, GiB, published | pictures/s, published |\n" in text
    )
    assert "| published | undecided | 80.00 | 1 | 80.44 | -0.44 | 79.40 | 81.50 | 82.20 | 5.67 | 9.17 A100 |\n" in text


def test_a_panoptic_row_compares_pq_and_ap(params: Params, tmp_path: Path) -> None:
    # PQ 51.5, 52.6, 52.1: median 52.1, 52.1 - 52.0 = +0.10. AP 41.0, 41.9, 41.5: median 41.5, 41.5 - 41.8 = -0.30.
    # mIoU 61, 63, 62: median 62, published by nobody but the authors. The other figures are PQ's.
    seeds = [
        figures("panoptic", pq, ap=ap, miou=miou)
        for pq, ap, miou in ((0.515, 0.41, 0.61), (0.526, 0.419, 0.63), (0.521, 0.415, 0.62))
    ]
    written(tmp_path, evaluated("panoptic", [*seeds], task="panoptic"))
    facts = row_facts(params.rows["panoptic"], tmp_path, RULE)
    assert facts.difference == {"pq": 0.1, "ap": -0.3}
    assert (facts.task, facts.primary, facts.status) == ("panoptic", "pq", "finished")
    text = markdown({"panoptic": facts})
    assert (
        "## Panoptic segmentation\n" in text
        and "| Row | Verdict | PQ | range | seeds | published | difference | PQ authors' | AP | AP published "
        "| AP difference | mIoU | mIoU authors' |\n"
        in text
    )
    # Mean 52.067, s = sqrt((0.567^2 + 0.533^2 + 0.033^2) / 2) = 0.551; 52.067 -+ 2.920 * 0.551 * sqrt(4 / 3) is
    # 50.21 to 53.92, which holds 52.0 and reaches further than a point from it.
    assert (
        "| panoptic | undecided | 52.10 | 51.50 to 52.60 | 3 | 52.00 | +0.10 | 51.90 | 41.50 | 41.80 | -0.30 | 62.00 "
        "| 61.70 |\n" in text
    )
    assert "one further training is expected between 50.21 and 53.92 (90 %)" in text
    assert "| 0 | 51.50 | 52.50 (step 80) | 51.50 | 51.50 | 51.50 | 51.50 | 41.00 | 61.00 | - | k0 |\n" in text
    assert "Semantic" not in text and "Instance" not in text


def test_a_row_without_published_figures_has_no_difference_and_shows_the_authors(
    params: Params, tmp_path: Path
) -> None:
    # The best checkpoints decide: 43.0, 45.0 and 44.0, each a point above the last.
    result = evaluated("instance", [0.42, 0.44, 0.43], task="instance", rule="best")
    written(tmp_path, result)
    facts = row_facts(params.rows["instance"], tmp_path, RULE)
    assert facts.difference == {}
    text = markdown({"instance": facts})
    assert "| Row | Verdict | AP | range | seeds | AP authors' |\n" in text  # nothing is published but the authors'
    assert "| instance | no verdict | 44.00 | 43.00 to 45.00 | 3 | 43.70 |\n" in text
    assert "\nAP is published only by the authors, under another recipe: 43.70.\n" in text


def test_both_checkpoints_are_shown_and_the_one_in_the_table_is_named(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("published", [0.8]))
    written(tmp_path, evaluated("instance", [0.42], task="instance", rule="best", key="i"))
    rows = {name: row_facts(params.rows[name], tmp_path, RULE) for name in ("published", "instance")}
    rows["instance"] = dataclasses.replace(rows["instance"], published={"ap": 42.9})
    text = markdown(rows)
    assert "| Seed | mIoU, last (in the table) | mIoU, best on validation | mIoU (ms+flip) | mean acc. | pixel" in text
    assert "| 0 | 80.00 | 81.00 (step 80) | - | 80.00 | 90.00 | - | k0 |" in text
    assert "| Seed | AP, last | AP, best on validation (in the table) | AP50 |" in text
    assert "| 0 | 42.00 | 43.00 (step 80) | 43.00 |" in text
    semantic, instance = text.split("## Instance segmentation")
    assert "Where it is not known which checkpoint a published figure is of, both" in semantic
    known = "The checkpoint whose figures are published, and compared, is the"
    assert known not in semantic
    assert f"{known} best on validation: instance." in instance
    assert (rows["instance"].seeds[0].step, rows["published"].seeds[0].step) == (80, 100)


def test_a_figure_that_one_seed_lacks_has_no_median(params: Params, tmp_path: Path) -> None:
    seeds = [figures("instance", 0.4), figures("instance", 0.4, ap_large=None), figures("instance", 0.4)]
    written(tmp_path, evaluated("instance", [*seeds], task="instance"))
    facts = row_facts(params.rows["instance"], tmp_path, RULE)
    assert (facts.median["ap_large"], facts.range["ap_large"]) == (None, None)
    assert (facts.median["ap_medium"], facts.status) == (40.0, "finished")
    line = table_line("instance", facts)
    assert (line["ap"].text, line["range"].text) == ("40.00", "40.00 to 40.00")
    assert "| 1 | 40.00 | 41.00 (step 80) | 40.00 | 40.00 | 40.00 | 40.00 | - | - | k1 |" in markdown(
        {"instance": facts}
    )


def test_a_row_whose_primary_figure_counts_nothing_is_shown_without_it(params: Params, tmp_path: Path) -> None:
    nothing = figures("instance", 0.4, ap=None)
    seeds = evaluated("instance", [0.4, 0.4, 0.4], task="instance").seeds
    seeds = (seeds[0], made_up.evaluated_seed(1, nothing), seeds[2])
    result = made_up.evaluation("instance", seeds, task="instance")
    written(tmp_path, result)
    table = write_report(params, results=tmp_path, out=tmp_path / "reports")
    assert table.splitlines()[3].split() == ["instance", "no", "verdict", "-", "3"]
    assert "has no AP, because" in (tmp_path / "reports" / "index.html").read_text()


def test_the_published_checkpoint_evaluated_here_stands_beside_the_published_figures(
    params: Params, tmp_path: Path
) -> None:
    checkpoint = figures("semantic", 0.80436, pixel_accuracy=0.95)
    result = published("published", "semantic", checkpoint, difference={"miou": -0.004}, pad_multiple=32)
    written(tmp_path, result)
    facts = row_facts(params.rows["published"], tmp_path, RULE)
    assert facts.as_json()["published_checkpoint"] == {
        "miou": 80.44,
        "mean_accuracy": 80.44,
        "pixel_accuracy": 95.0,
        "difference": {"miou": 0.0},
        "pad_multiple": 32,
        "other_padding": None,
        "agrees": None,
        "per_class": {"iou": {"road": 80.44, "<sky>": None}},
    }
    assert (
        "\n- published: the published checkpoint, evaluated here, has mIoU 80.44 (+0.00 from the published figure), "
        "mean acc. 80.44, pixel acc. 95.00.\n" in markdown({"published": facts})
    )
    assert row_facts(params.rows["ours"], tmp_path, RULE).published_checkpoint is None


def test_the_padding_that_agrees_better_is_told_with_both_values(params: Params, tmp_path: Path) -> None:
    other = made_up.padded(figures("panoptic", 0.519), pad_multiple=32, difference={"pq": -0.1})
    result = published(
        "panoptic",
        "panoptic",
        figures("panoptic", 0.5203, ap=0.419),
        difference={"pq": 0.03, "ap": 0.1},
        other_padding=other,
        agrees=1,
    )
    written(tmp_path, result)
    facts = row_facts(params.rows["panoptic"], tmp_path, RULE)
    assert facts.as_json()["published_checkpoint"]["other_padding"] == {
        **dict.fromkeys(FIGURES["panoptic"], 51.9),
        "difference": {"pq": -0.1},
        "pad_multiple": 32,
    }
    text = markdown({"panoptic": facts})
    assert "has PQ 52.03 (+0.03 from the published figure), SQ 52.03, " in text
    assert "AP 41.90 (+0.10), mIoU 52.03. PQ is 52.03 (+0.03) without padding and 51.90 (-0.10) padded to multiples "
    assert text.count(": without padding agrees better.\n") == 1


def test_without_a_published_figure_no_padding_agrees_better(params: Params, tmp_path: Path) -> None:
    other = made_up.padded(figures("instance", 0.42))
    result = published("instance", "instance", figures("instance", 0.43), pad_multiple=32, other_padding=other)
    written(tmp_path, result)
    text = markdown({"instance": row_facts(params.rows["instance"], tmp_path, RULE)})
    assert "AP is 42.00 without padding and 43.00 padded to multiples of 32.\n" in text


def test_a_row_without_results_is_not_run(params: Params, tmp_path: Path) -> None:
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert (facts.status, facts.seeds, facts.median) == ("not run", (), {})


def test_a_row_that_was_only_trained_says_so(params: Params, tmp_path: Path) -> None:
    written(tmp_path, trained("ours", 3))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert (facts.status, facts.median, len(facts.seeds)) == ("trained", {}, 3)


def test_a_diverged_seed_counts_as_failed_and_its_reason_is_told(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("ours", [0.7, None, 0.72]))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert facts.status == "incomplete"
    assert facts.median["miou"] == 71.0
    text = markdown({"ours": facts})
    assert "| ours | no verdict (incomplete) | 71.00 | 70.00 to 72.00 | 2 of 3 |\n" in text
    assert "| 1 | diverged: the loss is not finite at step 7 | - | - | - | - | - | k1 |\n" in text
    assert "- ours: seed 1 diverged: the loss is not finite at step 7.\n" in text
    assert "\nPredicting road everywhere gives mIoU 6.25.\n" in text


def test_a_missing_seed_makes_a_row_incomplete(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("ours", [0.7, 0.71]))
    assert row_facts(params.rows["ours"], tmp_path, RULE).status == "incomplete"


def test_figures_of_an_earlier_training_are_out_of_date(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("ours", [0.7, 0.71, 0.72], key="old"))
    written(tmp_path, trained("ours", 3, key="new"))
    assert row_facts(params.rows["ours"], tmp_path, RULE).status == "out of date"


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
        ("train", {"version": 1, "row": "ours", "dataset": "d", "seeds": [{"seed": 0}]}, "'run_key' is missing"),
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


def test_the_terminals_tables_show_rows_and_columns_with_figures_and_name_the_others(
    params: Params, tmp_path: Path
) -> None:
    written(tmp_path, evaluated("published", [0.8]))
    written(tmp_path, evaluated("panoptic", [0.52] * 3, task="panoptic"))
    rows = {name: row_facts(row, tmp_path, RULE) for name, row in params.rows.items()}
    lines = text_table(rows).splitlines()
    assert lines[0] == "Semantic segmentation"
    assert lines[1].split() == ["Row", "Verdict", "mIoU", "seeds", "published", "difference"]
    assert lines[3].split() == ["published", "undecided", "80.00", "1", "80.44", "-0.44"]
    assert lines[4:6] == ["", "Panoptic segmentation"]
    assert lines[8].startswith("panoptic")
    assert lines[9:] == ["", "not run: ours, instance", "", "Of 3 published rows: 2 undecided, 1 not run."]


def on_gpu(row: str, seeds: int, **of_each: Any) -> TrainingResult:
    """Trainings of 2 hours on 4 workers, on GPUs."""
    times = {"train_s": 7200.0, "worker_s": 28800.0, "workers": 4}
    return trained(row, seeds, environment=made_up.A100, **times, **of_each)


def benchmark(row: str, *, device: str = "NVIDIA A100-PCIE-40GB", **fields: Any) -> Benchmark:
    """A step of 2 pictures took 5,632 MiB; 9.5 pictures/s."""
    environment = dataclasses.replace(made_up.A100 if "NVIDIA" in device else made_up.CPU, device=device)
    return made_up.benchmark(row, environment=environment, **fields)


def test_gpu_hours_of_a_seed_are_its_time_on_all_its_workers(params: Params, tmp_path: Path) -> None:
    # 7,200 s x 4 workers = 8 GPU-hours a seed, 24 of three. On a CPU the time is told: 75 s.
    written(tmp_path, evaluated("ours", [0.7, 0.71, 0.72]))
    written(tmp_path, on_gpu("ours", 3))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert facts.cost is not None
    assert (facts.cost.gpu_hours, facts.cost.gpu_hours_all) == (8.0, 24.0)
    assert str(table_line("ours", facts)["training"]) == "8.0 GPU-h A100"
    assert "| 2.0 h on 4 x A100, 8.0 GPU-h | k0 |" in markdown({"ours": facts})
    written(tmp_path, trained("ours", 3))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert facts.cost is not None
    assert (facts.cost.gpu_hours, facts.cost.gpu_hours_all) == (None, None)
    assert str(table_line("ours", facts)["training"]) == "75 s CPU"


def test_memory_is_the_benchmarks_or_else_the_most_of_the_trainings(params: Params, tmp_path: Path) -> None:
    # 5,632 MiB = 5.50 GiB, with 2 pictures a GPU as published. 16 pictures over 4 workers are 4 a GPU: not comparable.
    written(tmp_path, on_gpu("published", 1, peak_memory_mib=8192.0))
    row = params.rows["published"]
    cell = table_line("published", row_facts(row, tmp_path, RULE))["memory"]
    assert (str(cell), cell.apart) == ("8.00 4 pictures *", True)
    written(tmp_path, benchmark("published"))
    cell = table_line("published", row_facts(row, tmp_path, RULE))["memory"]
    assert (str(cell), cell.apart) == ("5.50 A100", False)
    written(tmp_path, benchmark("published", skipped="does not fit"))
    assert "not measured: does not fit" in page_of(params, tmp_path)


def test_a_speed_measured_on_another_device_is_marked_and_told_with_its_device(params: Params, tmp_path: Path) -> None:
    row = params.rows["published"]
    for device, shown in (
        ("NVIDIA A100-SXM4-80GB", "9.50 A100"),
        ("NVIDIA A100 80GB PCIe", "9.50 A100"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "9.50 A100 MIG 1g.10gb *"),
        ("NVIDIA H200", "9.50 H200 *"),
        ("NVIDIA GeForce RTX 4090", "9.50 RTX 4090 *"),
        ("AMD EPYC 9B14", "9.50 CPU *"),
    ):
        written(tmp_path, benchmark("published", device=device))
        line = table_line("published", row_facts(row, tmp_path, RULE))
        assert (str(line["fps"]), str(line["published fps"])) == (shown, "9.17 A100")
    written(tmp_path, benchmark("published", device="a CPU", fps=0.0123))
    assert str(table_line("published", row_facts(row, tmp_path, RULE))["fps"]) == "0.012 CPU *"


def test_verdicts_are_counted_and_told_with_their_reason(params: Params, tmp_path: Path) -> None:
    # 80.2, 80.3, 80.4: mean 80.3, s 0.1; 80.3 -+ 2.920 * 0.1 * sqrt(4 / 3) is 79.96 to 80.64, within 80.44 -+ 1.
    row = dataclasses.replace(params.rows["published"], seeds=(0, 1, 2))
    written(tmp_path, evaluated("published", [0.802, 0.803, 0.804]))
    facts = row_facts(row, tmp_path, RULE)
    assert (facts.verdict.kind, facts.verdict.interval) == ("reproduced", (79.96, 80.64))
    rows = {"published": facts} | {
        name: row_facts(params.rows[name], tmp_path, RULE) for name in ("ours", "panoptic", "instance")
    }
    assert counts(rows) == {
        "reproduced": 1, "above": 0, "below": 0, "undecided": 0, "no verdict": 0, "not run": 2,
    }  # fmt: skip
    text = markdown(rows)
    assert "Of 3 published rows: 1 reproduced, 2 not run.\n" in text
    assert "\nThe median of 3 seeds, 80.30, is 0.14 below the published 80.44; " in text
    assert "\nThe median of all seeds there could be lies between 80.20 and 80.40 with 75 % confidence.\n" in text


def test_five_seeds_bound_their_median_with_a_coverage_of_93_75_percent(params: Params, tmp_path: Path) -> None:
    # Between the lowest and the highest of five: 1 - 2 / 2^5.
    row = dataclasses.replace(params.rows["ours"], seeds=(0, 1, 2, 3, 4))
    written(tmp_path, evaluated("ours", [0.7, 0.71, 0.72, 0.73, 0.74]))
    assert row_facts(row, tmp_path, RULE).median_interval == Interval(low=70.0, high=74.0, coverage=93.75)


def test_what_needs_a_look_is_told_with_the_command_that_mends_it(params: Params, tmp_path: Path) -> None:
    warning = made_up.behind(50, 0.31, 0.4125, "sisters")
    warned = made_up.training(
        "panoptic", [made_up.trained_seed(seed, behind=(warning,) if seed == 1 else ()) for seed in range(3)]
    )
    result = evaluated("panoptic", [0.52, 0.52, 0.52], task="panoptic")
    written(tmp_path, result)
    written(tmp_path, warned)
    written(tmp_path, trained("instance", 3))
    written(tmp_path, evaluated("ours", [0.7, 0.71], key="old"))
    written(tmp_path, trained("ours", 2, key="new"))
    stopped = made_up.evaluation("published", [ended(0, "stopped", "mIoU 31.00 is 10 points behind")])
    written(tmp_path, stopped)
    rows = {name: row_facts(row, tmp_path, RULE) for name, row in params.rows.items()}
    assert attention(rows) == [
        ("ours", "the figures belong to an earlier training; dvc repro evaluate@ours"),
        ("published", "seed 0 stopped: mIoU 31.00 is 10 points behind"),
        (
            "panoptic",
            "seed 1 was clearly behind the other seeds at step 50: PQ 31.00, where 41.25 was expected",
        ),
        ("instance", "trained, but not evaluated; dvc repro evaluate@instance"),
    ]
    page = page_of(params, tmp_path)
    assert all(f">{name}</a>: {sentence}</li>" in page for name, sentence in attention(rows))


def test_a_seed_that_has_no_result_yet_is_missing(params: Params, tmp_path: Path) -> None:
    written(tmp_path, evaluated("ours", [0.7, 0.71]))
    facts = row_facts(params.rows["ours"], tmp_path, RULE)
    assert table_line("ours", facts)["seeds"].text == "2 of 3"
    assert attention({"ours": facts}) == [("ours", "a seed has no result yet; dvc repro evaluate@ours")]


def page_of(params: Params, results: Path) -> str:
    """The page that results make."""
    write_report(params, results=results, out=results / "reports")
    return (results / "reports" / "index.html").read_text()


def test_the_page_is_whole_and_loads_nothing_from_outside(params: Params, tmp_path: Path, storage: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "reports"
    overlays = ("runs/k0/overlays/00000.png", "runs/gone.png")
    facts = evaluated("ours", [0.7, 0.71, 0.72], overlays=overlays)
    written(results, facts)
    written(results, trained("ours", 3), dataclasses.replace(facts, row="renamed"))
    write_result(made_up_manifest(digest="da7a"), "d", results=results)
    (storage / "runs" / "k0" / "overlays").mkdir(parents=True)
    (storage / "runs" / "k0" / "overlays" / "00000.png").write_bytes(PNG)
    curve = "".join(json.dumps({"step": s, "loss": 10 - s / 10, "lr": 0.1}) + "\n" for s in range(10, 60, 10))
    (storage / "runs" / "k0" / "curve.jsonl").write_text(curve + '{"step": 50, "val_miou": 0.5}\n')

    table = write_report(params, results=results, out=out)
    assert table.splitlines()[3].startswith("ours")
    page = (out / "index.html").read_text()
    parser = PageParser()
    parser.feed(page)
    assert parser.open == []
    assert [load[:23] for load in parser.loads] == ["data:image/jpeg;base64,"]
    assert "#ours" in parser.links
    assert "url(" not in page
    assert "@import" not in page
    assert page.count("<polyline") == 2  # loss and mIoU of seed 0
    assert "Curves or pictures are left out: 3 files could not be read" in page  # two seeds' curves, a picture
    assert "&lt;sky&gt;" in page
    assert "<sky>" not in page
    for fact in ("k0", "c0ffee", "da7a", "feed" * 16, "be57" * 16, "torch 2.0", "a CPU", "71.00", "6.25", "renamed"):
        assert fact in page, fact
    assert "no such row any more: renamed" in (out / "results.md").read_text()
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows["ours"]["median"]["miou"] == 71.0
    assert rows["published"]["status"] == "not run"


def test_the_page_shows_every_task_with_its_own_figure_and_classes(
    params: Params, tmp_path: Path, storage: Path
) -> None:
    for task in ("panoptic", "instance"):
        written(tmp_path, evaluated(task, [0.5, 0.51, 0.52], task=task, key=task))
        written(tmp_path, trained(task, 3, key=task))
        (storage / "runs" / f"{task}0").mkdir(parents=True)
        points = ({"step": 50, f"val_{FIGURES[task][0]}": 0.4, "val_miou": 0.3}, {"step": 100, "val_ap_large": None})
        (storage / "runs" / f"{task}0" / "curve.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    written(tmp_path, published("panoptic", "panoptic", figures("panoptic", 0.52)))
    write_report(params, results=tmp_path, out=tmp_path / "reports")
    page = (tmp_path / "reports" / "index.html").read_text()
    titles = ["Semantic segmentation", "Panoptic segmentation", "Instance segmentation"]
    assert re.findall("<h2>(.*?)</h2>", page) == ["How the rows stand", *titles, "Row by row"]
    assert page.count("<polyline") == 2  # one validation curve each, of its own figure
    assert "Validation PQ during training" in page and "Validation AP during training" in page
    assert "published 52.00</text>" in page  # the dashed line in the chart of PQ
    assert "Validation mIoU" not in page
    assert re.findall("<summary>(.*?) of every class", page) == ["AP", "IoU"]  # PQ's two classes are all shown
    headline = "</b> {} of the last checkpoint, median of 3 seeds (50.00 to 52.00)</p>"
    assert f"<b>51.00{headline.format('PQ')}" in page and f"<b>51.00{headline.format('AP')}" in page
    assert "<li>panoptic: the published checkpoint, evaluated here, has PQ 52.00, " in page
    assert page.count("<table") == page.count('<div class="wide"><table')


def test_the_page_of_nothing_says_what_to_do(params: Params, tmp_path: Path) -> None:
    page = page_of(params, tmp_path)
    assert "Nothing has run yet" in page and "<code>make demo</code>" in page
    assert "80.44" in page  # what is published is shown all the same
    assert "Accuracy against speed" not in page and "Row by row" not in page


def test_classes_are_compared_with_the_published_checkpoint_the_largest_difference_first(
    params: Params, tmp_path: Path
) -> None:
    # Seed 0 is the only one. road 70 - 75 = -5, sky 90 - 88 = +2, car 50 - 50 = 0; bus is absent from the pictures.
    ours = figures("semantic", 0.8, per_class={"iou": {"car": 0.5, "sky": 0.9, "bus": None, "road": 0.7}})
    theirs = figures("semantic", 0.8044, per_class={"iou": {"car": 0.5, "sky": 0.88, "bus": None, "road": 0.75}})
    written(tmp_path, evaluated("published", [ours]))
    written(tmp_path, published("published", "semantic", theirs))
    page = page_of(params, tmp_path)
    lines = re.findall(
        r'<tr><th scope="row">(\w+)</th><td>([\w.]+)</td><td>([\w.]+)</td><td>([-+.\d]+)</td><td>',
        page.partition("<h4>")[2],
    )
    assert lines == [
        ("road", "70.00", "75.00", "-5.00"),
        ("sky", "90.00", "88.00", "+2.00"),
        ("car", "50.00", "50.00", "+0.00"),
        ("bus", "absent", "absent", "-"),
    ]
    assert "seed 0, the one at the median, less the published checkpoint evaluated here</h4>" in page


def test_without_a_published_checkpoint_classes_are_compared_between_seeds(params: Params, tmp_path: Path) -> None:
    # car 40, 60, 50: apart by 20; road 70, 71, 70: apart by 1.
    seeds = [
        figures("semantic", 0.7 + i / 100, per_class={"iou": {"road": road, "car": car}})
        for i, (road, car) in enumerate(((0.7, 0.4), (0.71, 0.6), (0.7, 0.5)))
    ]
    written(tmp_path, evaluated("ours", [*seeds]))
    page = page_of(params, tmp_path)
    car = '<th scope="row">car</th><td>40.00</td><td>50.00</td><td>60.00</td><td>20.00</td>'
    road = '<th scope="row">road</th><td>70.00</td><td>70.00</td><td>71.00</td><td>1.00</td>'
    assert 0 < page.index(car) < page.index(road)


def test_the_median_seed_is_the_one_nearest_to_the_median(params: Params, tmp_path: Path) -> None:
    # Of 70, 72, 74 and 71 the median is 71.5: seeds 1 and 3 are as near, and the first is taken.
    row = dataclasses.replace(params.rows["ours"], seeds=(0, 1, 2, 3))
    written(tmp_path, evaluated("ours", [0.7, 0.72, 0.74, 0.71]))
    assert row_facts(row, tmp_path, RULE).median_seed == 1


def test_registered_models_and_runs_are_named_and_no_password_is_shown(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example:5000/base")
    best = BestVersion(version=7, seed=0, run_key="k0", figure="miou", value=0.7)
    by_hand = RegisteredVersion(version=3, seed=None, run_key=None, figure=None, value=None)
    aliases = Aliases(best=best, median=by_hand)
    registered = Registration(row="ours", model="d-r50", aliases=aliases, tracking_uri="https://mlflow.example:5000")
    written(tmp_path, trained("ours", 1, mlflow_run_id="1f00"), evaluated("ours", [0.7]), registered)
    page = page_of(params, tmp_path)
    assert "models:/d-r50@best: version 7, seed 0, mIoU 70.00" in page
    assert "models:/d-r50@median: version 3, not said of which seed" in page
    assert "<dd>https://mlflow.example:5000/base</dd>" in page and "1f00" in page
    assert "secret" not in page


def test_a_storage_root_that_fails_is_asked_once_and_the_report_is_made(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(path: Path) -> Any:
        asked.append(path)
        raise OSError("the bucket does not answer")

    monkeypatch.setattr("pipeline.report.write.read_curve", refuse)
    written(tmp_path, trained("ours", 3))
    written(tmp_path, evaluated("ours", [0.7, 0.71, 0.72]))
    left_out = "Curves or pictures are left out: 3 files could not be read from the storage root (the bucket does not"
    assert left_out in page_of(params, tmp_path)
    assert len(asked) == 1


def test_a_training_that_was_accepted_for_another_key_is_told_with_reason_and_differences(
    params: Params, tmp_path: Path
) -> None:
    accepted = Accepted(
        run_key="k0",
        instead_of="newer",
        reason="a module was <renamed>",
        differences=("code, or initial weights",),
        accepted_s=0,
        note="runs/newer/accepted.json",
    )
    result = trained("ours", 1, accepted=accepted)
    written(tmp_path, result)
    written(tmp_path, evaluated("ours", [0.7]))
    told = "accepted instead of <code>newer</code>: a module was &lt;renamed&gt; (code, or initial weights)"
    assert told in page_of(params, tmp_path)
    assert "| k0 (accepted) |" in (tmp_path / "reports" / "results.md").read_text()


def test_what_a_user_may_name_is_escaped(params: Params, tmp_path: Path) -> None:
    first, _, third = evaluated("ours", [0.7, None, 0.72]).seeds
    result = made_up.evaluation("ours", [first, ended(1, "diverged", "<script>alert(1)</script> | a"), third])
    written(tmp_path, result)
    assert "<script" not in page_of(params, tmp_path)
    text = (tmp_path / "reports" / "results.md").read_text()
    assert "| 1 | diverged: &lt;script>alert(1)&lt;/script> \\| a | - |" in text


def test_an_overlay_is_shown_as_its_three_panels_within_a_limit() -> None:
    # Three panels of 120 x 80 noise with 4 white columns between them: 120 + 4 + 120 + 4 + 120 = 368.
    noise = np.random.default_rng(0).integers(0, 256, (80, 368, 3), dtype=np.uint8)
    shown = panels(png(noise), 3000)
    assert len(shown) == 3
    for uri in shown:
        data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
        assert len(data) <= 3000
        width, height = Image.open(io.BytesIO(data)).size
        assert width < 120 and width / height == pytest.approx(1.5, abs=0.1)


def test_panels_are_those_that_evaluation_joins(tmp_path: Path) -> None:
    picture = Picture(
        image=torch.full((3, 40, 60), 200, dtype=torch.uint8),
        original_size=(40, 60),
        label_map=torch.zeros(40, 60, dtype=torch.uint8),
        segments=None,
        labels=torch.zeros(0, dtype=torch.int64),
        crowd=torch.zeros(0, dtype=torch.bool),
        instances=None,
        original=None,
        name="grey",
        index=0,
    )
    outcome = Outcome(labels=torch.ones(40, 60, dtype=torch.int64))
    write_overlay(tmp_path / "o.png", picture, outcome, 2)
    shown = panels((tmp_path / "o.png").read_bytes(), 10_000)
    assert [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size for uri in shown] == [(60, 40)] * 3


def test_a_picture_that_is_no_overlay_is_shown_whole_and_no_picture_is_an_error() -> None:
    assert len(panels(png(np.zeros((5, 7, 3), np.uint8)), 1000)) == 1  # 7 - 2 * 4 < 1
    with pytest.raises(ValueError, match="it is no picture"):
        panels(b"text", 1000)


def test_ticks_are_round_and_enclose_the_values() -> None:
    assert ticks(0.0, 600.0) == [0, 200, 400, 600]
    assert ticks(68.9, 71.2) == [68.5, 69, 69.5, 70, 70.5, 71, 71.5]
    assert ticks(5.0, 5.0) == [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]


def test_a_long_curve_keeps_its_last_point_and_the_means_of_pieces() -> None:
    # 7 points, 4 wanted: three pieces of two, and the last.
    points = [(float(x), 10.0 * x) for x in range(7)]
    assert thinned(points, 4) == [(0.5, 5.0), (2.5, 25.0), (4.5, 45.0), (6.0, 60.0)]
    assert thinned(points, 7) == points
