from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.files import write_json
from pipeline.params import Params, parse_params
from pipeline.report import markdown, row_facts, table_line, text_table, write_report
from pipeline.report_page import _ticks, thinned
from pipeline.tasks import FIGURES

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
                    "published": {"miou": 80.44, "device": "A100"},
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


def figures(task: str, value: float, step: int = 100, **others: float | None) -> dict[str, Any]:
    """A checkpoint whose every figure is `value`, but for the given ones."""
    of_task = dict.fromkeys(FIGURES[task], value) | ({"pixel_accuracy": 0.9} if task == "semantic" else {})
    per_class = {metric: {"road": value, "<sky>": None} for metric in METRICS[task]}
    return {"step": step, **of_task, **others, "per_class": per_class}


def evaluated(
    row: str,
    values: list[float | dict[str, Any] | None],
    *,
    task: str = "semantic",
    key: str = "k",
    rule: str = "unknown",
) -> dict[str, Any]:
    """Evaluation of seeds 0, 1, ...: the last checkpoint's primary figure, or that checkpoint; None: diverged.

    The best on validation has a point more, at step 80.
    """
    seeds: list[dict[str, Any]] = []
    for seed, value in enumerate(values):
        entry: dict[str, Any] = {"seed": seed, "run_key": f"{key}{seed}", "reason": None, "mlflow_run_id": None}
        if value is None:
            entry |= {"status": "diverged", "reason": "the loss is not finite at step 7"}
        else:
            last = value if isinstance(value, dict) else figures(task, value)
            best = figures(task, last[FIGURES[task][0]] + 0.01, step=80)
            entry |= {"status": "finished", "checkpoints": {"last": last, "best": best}}
        seeds.append(entry)
    baseline = {"class": "road", "miou": 0.0625, "mean_accuracy": 0.5, "pixel_accuracy": 0.3}
    return {
        "row": row,
        "dataset": "d",
        "task": task,
        "primary": FIGURES[task][0],
        "checkpoint_rule": rule,
        "decides": "best" if rule == "best" else "last",
        "seeds": seeds,
        "baseline": baseline if task == "semantic" else None,
        "overlays": [],
    }


def trained(row: str, seeds: int, key: str = "k") -> dict[str, Any]:
    return {
        "row": row,
        "dataset": "d",
        "seeds": [
            {
                "seed": seed,
                "run_key": f"{key}{seed}",
                "status": "finished",
                "run_dir": f"runs/{key}{seed}",
                "checkpoints": {
                    "last": {"step": 100, "path": "x", "sha256": "feed" * 16},
                    "best": {"step": 80, "path": "y", "sha256": "be57" * 16, "figure": "miou", "value": 0.5},
                },
                "train_s": 75.0,
                "workers": 2,
                "images_per_s": 10.0,
                "mlflow_run_id": None,
                "environment": {"device": "a CPU", "git_commit": "c0ffee", "libraries": {"torch": "2.0"}},
            }
            for seed in range(seeds)
        ],
    }


def published(row: str, task: str, checkpoint: dict[str, Any], **others: Any) -> dict[str, Any]:
    """Evaluation of a published checkpoint, unpadded only."""
    fixed = {"row": row, "dataset": "d", "task": task, "primary": FIGURES[task][0], "figures": checkpoint}
    return fixed | {"difference": {}, "pad_multiple": 1, "other_padding": None, "agrees": None} | others


def test_the_median_and_range_are_those_of_the_unrounded_seeds(params: Params, tmp_path: Path) -> None:
    # Percent: 71.234, 70.456, 72.9. Middle: 71.234 -> 71.23; lowest 70.456 -> 70.46; highest 72.9.
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.71234, 0.70456, 0.729]))
    facts = row_facts(params.rows["ours"], tmp_path)
    assert facts["median"]["miou"] == 71.23
    assert facts["range"]["miou"] == [70.46, 72.9]
    assert [seed["miou"] for seed in facts["seeds"]] == [71.23, 70.46, 72.9]
    assert facts["baseline"] == {"class": "road", "miou": 6.25, "mean_accuracy": 50.0, "pixel_accuracy": 30.0}
    assert facts["status"] == "finished"


def test_the_median_of_an_even_number_of_seeds_is_the_mean_of_the_middle_two(params: Params, tmp_path: Path) -> None:
    # 70.004 and 71.004 would be 70.50 from rounded figures too; 70.004 and 70.014 give 70.009 -> 70.01, rounded 70.005.
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.70004, 0.70014]))
    assert row_facts(params.rows["ours"], tmp_path)["median"]["miou"] == 70.01


def test_the_difference_is_ours_less_the_published_figure(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "published.json", evaluated("published", [0.8]))
    facts = row_facts(params.rows["published"], tmp_path)
    assert facts["difference"] == {"miou": -0.44}  # 80.00 - 80.44
    assert facts["published"] == {"miou": 80.44, "device": "A100"}
    assert facts["published_authors"] == {"miou": 79.4, "miou_ms_flip": 82.2}


def test_a_difference_that_rounds_to_nothing_has_no_minus(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "published.json", evaluated("published", [0.804399]))  # 80.4399 - 80.44
    facts = row_facts(params.rows["published"], tmp_path)
    assert str(facts["difference"]["miou"]) == "0.0"
    assert table_line("published", facts)["difference miou"] == "+0.00"


def test_multi_scale_and_flip_stands_beside_the_authors(params: Params, tmp_path: Path) -> None:
    checkpoint = figures("semantic", 0.8, miou_ms_flip=0.815)
    write_json(tmp_path / "evaluate" / "published.json", evaluated("published", [checkpoint]))
    facts = row_facts(params.rows["published"], tmp_path)
    assert facts["median"]["miou_ms_flip"] == 81.5
    assert facts["difference"] == {"miou": -0.44}  # the authors' 82.2 is not judged against
    assert (
        "| Row | Seeds | mIoU | range | published | difference | authors' mIoU | mIoU (ms+flip) "
        "| authors' mIoU (ms+flip) | pixel acc. | commonest class |\n" in markdown({"published": facts})
    )
    assert (
        "| published | 1 | 80.00 | 80.00 to 80.00 | 80.44 | -0.44 | 79.40 | 81.50 | 82.20 | 90.00 | 6.25 (road) |\n"
        in markdown({"published": facts})
    )


def test_a_panoptic_row_compares_pq_and_ap(params: Params, tmp_path: Path) -> None:
    # PQ 51.5, 52.6, 52.1: median 52.1, 52.1 - 52.0 = +0.10. AP 41.0, 41.9, 41.5: median 41.5, 41.5 - 41.8 = -0.30.
    # mIoU 61, 63, 62: median 62, published by nobody but the authors. The other figures are PQ's.
    seeds = [
        figures("panoptic", pq, ap=ap, miou=miou)
        for pq, ap, miou in ((0.515, 0.41, 0.61), (0.526, 0.419, 0.63), (0.521, 0.415, 0.62))
    ]
    write_json(tmp_path / "evaluate" / "panoptic.json", evaluated("panoptic", [*seeds], task="panoptic"))
    facts = row_facts(params.rows["panoptic"], tmp_path)
    assert facts["difference"] == {"pq": 0.1, "ap": -0.3}
    assert (facts["task"], facts["primary"], facts["status"]) == ("panoptic", "pq", "finished")
    text = markdown({"panoptic": facts})
    assert (
        "## Panoptic segmentation\n" in text
        and "| Row | Seeds | PQ | range | published | difference | authors' PQ | SQ | RQ | PQ things | PQ stuff | AP "
        "| published AP | difference AP | mIoU |\n"
        in text
    )
    assert (
        "| panoptic | 3 | 52.10 | 51.50 to 52.60 | 52.00 | +0.10 | 51.90 | 52.10 | 52.10 | 52.10 | 52.10 | 41.50 "
        "| 41.80 | -0.30 | 62.00 |\n" in text
    )
    assert "Semantic" not in text and "Instance" not in text


def test_a_row_without_published_figures_has_no_difference_and_shows_the_authors(
    params: Params, tmp_path: Path
) -> None:
    # The best checkpoints decide: 43.0, 45.0 and 44.0, each a point above the last.
    result = evaluated("instance", [0.42, 0.44, 0.43], task="instance", rule="best")
    write_json(tmp_path / "evaluate" / "instance.json", result)
    facts = row_facts(params.rows["instance"], tmp_path)
    assert facts["difference"] == {}
    text = markdown({"instance": facts})
    assert (
        "| Row | Seeds | AP | range | published | difference | authors' AP | AP50 | AP75 | AP small | AP medium "
        "| AP large |\n" in text
    )
    assert "| instance | 3 | 44.00 | 43.00 to 45.00 | - | - | 43.70 | 44.00 | 44.00 | 44.00 | 44.00 | 44.00 |\n" in text


def test_both_checkpoints_are_shown_and_the_one_in_the_table_is_named(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "published.json", evaluated("published", [0.8]))
    write_json(
        tmp_path / "evaluate" / "instance.json", evaluated("instance", [0.42], task="instance", rule="best", key="i")
    )
    rows = {name: row_facts(params.rows[name], tmp_path) for name in ("published", "instance")}
    rows["instance"]["published"] = {"ap": 42.9}
    text = markdown(rows)
    assert "| Seed | mIoU, last (in the table) | mIoU, best on validation | mIoU (ms+flip) | pixel acc. |" in text
    assert "| 0 | 80.00 | 81.00 (step 80) | - | 90.00 | - | k0 |" in text
    assert "| Seed | AP, last | AP, best on validation (in the table) | AP50 |" in text
    assert "| 0 | 42.00 | 43.00 (step 80) | 43.00 |" in text
    semantic, instance = text.split("## Instance segmentation")
    assert "Where it is not known which checkpoint a published figure is of, both" in semantic
    known = "The checkpoint whose figures are published, and compared, is the"
    assert known not in semantic
    assert f"{known} best on validation: instance." in instance
    assert (rows["instance"]["seeds"][0]["step"], rows["published"]["seeds"][0]["step"]) == (80, 100)


def test_a_figure_that_one_seed_lacks_has_no_median(params: Params, tmp_path: Path) -> None:
    seeds = [figures("instance", 0.4), figures("instance", 0.4, ap_large=None), figures("instance", 0.4)]
    write_json(tmp_path / "evaluate" / "instance.json", evaluated("instance", [*seeds], task="instance"))
    facts = row_facts(params.rows["instance"], tmp_path)
    assert (facts["median"]["ap_large"], facts["range"]["ap_large"]) == (None, None)
    assert (facts["median"]["ap_medium"], facts["status"]) == (40.0, "finished")
    line = table_line("instance", facts)
    assert (line["ap_large"], line["ap_medium"], line["range"]) == ("-", "40.00", "40.00 to 40.00")


def test_a_row_whose_primary_figure_counts_nothing_is_shown_without_it(params: Params, tmp_path: Path) -> None:
    nothing = figures("instance", 0.4, ap=None)
    result = evaluated("instance", [0.4, 0.4, 0.4], task="instance")
    result["seeds"][1]["checkpoints"] = {"last": nothing, "best": nothing}
    write_json(tmp_path / "evaluate" / "instance.json", result)
    table = write_report(params, results=tmp_path, out=tmp_path / "reports")
    assert table.splitlines()[3].split()[:3] == ["instance", "3", "43.70"]  # AP and range are empty columns
    assert "has no AP, because" in (tmp_path / "reports" / "index.html").read_text()


def test_the_published_checkpoint_evaluated_here_stands_beside_the_published_figures(
    params: Params, tmp_path: Path
) -> None:
    checkpoint = figures("semantic", 0.80436, pixel_accuracy=0.95)
    result = published("published", "semantic", checkpoint, difference={"miou": -0.004}, pad_multiple=32)
    write_json(tmp_path / "published" / "published.json", result)
    facts = row_facts(params.rows["published"], tmp_path)
    assert facts["published_checkpoint"] == {
        "miou": 80.44,
        "mean_accuracy": 80.44,
        "pixel_accuracy": 95.0,
        "difference": {"miou": 0.0},
        "pad_multiple": 32,
        "other_padding": None,
        "agrees": None,
    }
    assert (
        "\npublished: the published checkpoint, evaluated here, has mIoU 80.44 (+0.00 from the published figure), "
        "pixel acc. 95.00.\n" in markdown({"published": facts})
    )
    assert row_facts(params.rows["ours"], tmp_path)["published_checkpoint"] is None


def test_the_padding_that_agrees_better_is_told_with_both_values(params: Params, tmp_path: Path) -> None:
    other = {"pad_multiple": 32, "figures": {"pq": 0.519}, "difference": {"pq": -0.1}}
    result = published(
        "panoptic",
        "panoptic",
        figures("panoptic", 0.5203, ap=0.419),
        difference={"pq": 0.03, "ap": 0.1},
        other_padding=other,
        agrees=1,
    )
    write_json(tmp_path / "published" / "panoptic.json", result)
    facts = row_facts(params.rows["panoptic"], tmp_path)
    assert facts["published_checkpoint"]["other_padding"] == {
        "pq": 51.9,
        "difference": {"pq": -0.1},
        "pad_multiple": 32,
    }
    text = markdown({"panoptic": facts})
    assert "has PQ 52.03 (+0.03 from the published figure), SQ 52.03, " in text
    assert "AP 41.90 (+0.10), mIoU 52.03. PQ is 52.03 (+0.03) without padding and 51.90 (-0.10) padded to multiples "
    assert text.count(": without padding agrees better.\n") == 1


def test_without_a_published_figure_no_padding_agrees_better(params: Params, tmp_path: Path) -> None:
    other = {"pad_multiple": 1, "figures": figures("instance", 0.42), "difference": {}}
    result = published("instance", "instance", figures("instance", 0.43), pad_multiple=32, other_padding=other)
    write_json(tmp_path / "published" / "instance.json", result)
    text = markdown({"instance": row_facts(params.rows["instance"], tmp_path)})
    assert "AP is 42.00 without padding and 43.00 padded to multiples of 32.\n" in text


def test_a_row_without_results_is_not_run(params: Params, tmp_path: Path) -> None:
    facts = row_facts(params.rows["ours"], tmp_path)
    assert (facts["status"], facts["seeds"], facts["median"]) == ("not run", [], {})


def test_a_row_that_was_only_trained_says_so(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "train" / "ours.json", trained("ours", 3))
    facts = row_facts(params.rows["ours"], tmp_path)
    assert (facts["status"], facts["median"], len(facts["seeds"])) == ("trained", {}, 3)


def test_a_diverged_seed_counts_as_failed_and_its_reason_is_told(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.7, None, 0.72]))
    facts = row_facts(params.rows["ours"], tmp_path)
    assert facts["status"] == "incomplete"
    assert facts["median"]["miou"] == 71.0
    text = markdown({"ours": facts})
    assert "| ours (incomplete) | 2 of 3 | 71.00 | 70.00 to 72.00 | - | - | - | - | - | 90.00 | 6.25 (road) |" in text
    assert "| 1 | diverged: the loss is not finite at step 7 | - | - | - | - | k1 |" in text


def test_a_missing_seed_makes_a_row_incomplete(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.7, 0.71]))
    assert row_facts(params.rows["ours"], tmp_path)["status"] == "incomplete"


def test_figures_of_an_earlier_training_are_out_of_date(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.7, 0.71, 0.72], key="old"))
    write_json(tmp_path / "train" / "ours.json", trained("ours", 3, key="new"))
    assert row_facts(params.rows["ours"], tmp_path)["status"] == "out of date"


def test_a_torn_result_is_named_with_the_command_that_makes_it(params: Params, tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "ours.json").write_text("{")
    with pytest.raises(ValueError, match=r"ours\.json is not JSON .*make it again with: dvc repro -f evaluate@ours"):
        row_facts(params.rows["ours"], tmp_path)


@pytest.mark.parametrize(
    ("stage", "content", "lacking"),
    [
        ("evaluate", {"decides": "last", "seeds": [], "baseline": {"class": "road", "miou": 0.1}}, "task"),
        ("evaluate", {**evaluated("ours", []), "seeds": [{"seed": 0, "run_key": "k"}]}, "status"),
        ("published", {"figures": {"miou": 0.8}, "difference": -0.004}, "task"),
        ("train", ["nothing"], "seeds"),
    ],
)
def test_a_result_of_another_layout_is_named_with_the_command_that_makes_it(
    params: Params, tmp_path: Path, stage: str, content: Any, lacking: str
) -> None:
    write_json(tmp_path / stage / "ours.json", content)
    with pytest.raises(ValueError, match=rf"ours\.json has no '{lacking}': .* with: dvc repro -f {stage}@ours$"):
        row_facts(params.rows["ours"], tmp_path)


def test_a_seed_without_a_figure_of_its_task_is_of_another_layout(params: Params, tmp_path: Path) -> None:
    result = evaluated("ours", [0.7])
    del result["seeds"][0]["checkpoints"]["best"]["mean_accuracy"]
    write_json(tmp_path / "evaluate" / "ours.json", result)
    with pytest.raises(ValueError, match=r"ours\.json has no 'mean_accuracy'"):
        row_facts(params.rows["ours"], tmp_path)


def test_a_result_of_another_task_than_its_row_is_named(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "panoptic.json", evaluated("panoptic", [0.7]))
    with pytest.raises(ValueError, match=r"is of the task semantic, but row panoptic is panoptic now; make it again"):
        row_facts(params.rows["panoptic"], tmp_path)


def test_the_terminals_tables_show_rows_and_columns_with_figures_and_name_the_others(
    params: Params, tmp_path: Path
) -> None:
    write_json(tmp_path / "evaluate" / "published.json", evaluated("published", [0.8]))
    write_json(tmp_path / "evaluate" / "panoptic.json", evaluated("panoptic", [0.52] * 3, task="panoptic"))
    rows = {name: row_facts(row, tmp_path) for name, row in params.rows.items()}
    lines = text_table(rows).splitlines()
    assert lines[0] == "Semantic segmentation"
    assert lines[1].split()[:3] == ["Row", "Seeds", "mIoU"]
    assert lines[1].count("ms+flip") == 1  # the authors' only: ours was not measured
    assert " ".join(lines[3].split()) == (
        "published 1 80.00 80.00 to 80.00 80.44 -0.44 79.40 82.20 90.00 6.25 (road) finished"
    )
    assert lines[4:6] == ["", "Panoptic segmentation"]
    assert lines[8].startswith("panoptic")
    assert lines[9:] == ["", "not run: ours, instance"]


class Outside(HTMLParser):
    """Addresses a page would load, and tags left open."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing_from_outside(params: Params, tmp_path: Path, storage: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "reports"
    facts = evaluated("ours", [0.7, 0.71, 0.72])
    facts["overlays"] = ["runs/k0/overlays/00000.png", "runs/gone.png"]
    write_json(results / "evaluate" / "ours.json", facts)
    write_json(results / "train" / "ours.json", trained("ours", 3))
    write_json(results / "shard" / "d.json", {"digest": "da7a"})
    write_json(results / "evaluate" / "renamed.json", facts)
    (storage / "runs" / "k0" / "overlays").mkdir(parents=True)
    (storage / "runs" / "k0" / "overlays" / "00000.png").write_bytes(PNG)
    curve = "".join(json.dumps({"step": s, "loss": 10 - s / 10, "lr": 0.1}) + "\n" for s in range(10, 60, 10))
    (storage / "runs" / "k0" / "curve.jsonl").write_text(curve + '{"step": 50, "val_miou": 0.5}\n')

    table = write_report(params, results=results, out=out)
    assert table.splitlines()[3].startswith("ours")
    page = (out / "index.html").read_text()
    parser = Outside()
    parser.feed(page)
    assert parser.open == []
    assert [load[:22] for load in parser.loads] == ["#ours", "data:image/png;base64,"]
    assert "url(" not in page
    assert "@import" not in page
    assert page.count("<polyline") == 2  # loss and mIoU of seed 0; the other seeds' folders are elsewhere
    assert "&lt;sky&gt;" in page
    assert "<sky>" not in page
    for fact in ("k0", "c0ffee", "da7a", "feed" * 16, "be57" * 16, "torch 2.0", "a CPU", "71.00", "6.25", "renamed"):
        assert fact in page, fact
    assert "no such row any more: renamed" in (out / "results.md").read_text()
    written = json.loads((out / "results.json").read_text())["rows"]
    assert written["ours"]["median"]["miou"] == 71.0
    assert written["published"]["status"] == "not run"


def test_the_page_shows_every_task_with_its_own_figure_and_classes(
    params: Params, tmp_path: Path, storage: Path
) -> None:
    for task in ("panoptic", "instance"):
        write_json(tmp_path / "evaluate" / f"{task}.json", evaluated(task, [0.5, 0.51, 0.52], task=task, key=task))
        write_json(tmp_path / "train" / f"{task}.json", trained(task, 3, key=task))
        (storage / "runs" / f"{task}0").mkdir(parents=True)
        points = ({"step": 50, f"val_{FIGURES[task][0]}": 0.4, "val_miou": 0.3}, {"step": 100, "val_ap_large": None})
        (storage / "runs" / f"{task}0" / "curve.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    write_json(tmp_path / "published" / "panoptic.json", published("panoptic", "panoptic", figures("panoptic", 0.52)))
    write_report(params, results=tmp_path, out=tmp_path / "reports")
    page = (tmp_path / "reports" / "index.html").read_text()
    titles = ["Semantic segmentation", "Panoptic segmentation", "Instance segmentation"]
    assert re.findall("<h2>(.*?)</h2>", page)[:3] == titles
    assert page.count("<polyline") == 2  # one validation curve each, of its own figure
    assert "Validation PQ during training" in page and "Validation AP during training" in page
    assert "published 52</text>" in page  # the dashed line in the chart of PQ
    assert "Validation mIoU" not in page
    assert re.findall("<summary>(.*?) of every class", page) == ["PQ", "AP", "IoU", "AP"]
    assert "PQ <b>51.00</b> of the last checkpoint, median of 3 seeds (50.00 to 52.00); published 52.00" in page
    assert "AP <b>51.00</b> of the last checkpoint, median of 3 seeds (50.00 to 52.00); the authors" in page
    assert "<li>panoptic: the published checkpoint, evaluated here, has PQ 52.00, " in page
    assert page.count("<table") == page.count('<div class="wide"><table')


def test_a_large_picture_is_shown_smaller(params: Params, tmp_path: Path, storage: Path) -> None:
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (400, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(storage / "big.png")
    write_json(tmp_path / "evaluate" / "ours.json", evaluated("ours", [0.7]) | {"overlays": ["big.png"]})
    write_report(params, results=tmp_path, out=tmp_path / "reports")
    page = (tmp_path / "reports" / "index.html").read_text()
    assert re.search(r'src="data:image/jpeg;base64,[A-Za-z0-9+/=]{1000,}"', page)


def test_ticks_are_round_and_enclose_the_values() -> None:
    assert _ticks(0.0, 600.0) == [0, 200, 400, 600]
    assert _ticks(68.9, 71.2) == [68.5, 69, 69.5, 70, 70.5, 71, 71.5]
    assert _ticks(5.0, 5.0) == [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]


def test_a_long_curve_keeps_its_last_point_and_the_means_of_pieces() -> None:
    # 7 points, 4 wanted: three pieces of two, and the last.
    points = [(float(x), 10.0 * x) for x in range(7)]
    assert thinned(points, 4) == [(0.5, 5.0), (2.5, 25.0), (4.5, 45.0), (6.0, 60.0)]
    assert thinned(points, 7) == points
